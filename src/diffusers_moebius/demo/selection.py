"""
What a visitor points at: the object under a click, by a SAM 2 model of transformers that is loaded on first use, or
what a scribble covers, snapped to the edges in the photo.
"""

import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from PIL import Image

from ..pictures.mask import mask_box
from .models import on_zero_gpu
from .photos import VisitorError

logger = logging.getLogger(__name__)

DEFAULT_SELECTOR = "facebook/sam2.1-hiera-tiny"
# Mean and deviation of ImageNet's colours, on which SAM 2 was trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# GrabCut takes 0.4 s at this size, and its edges are those of the photo once they are enlarged.
SNAP_SIDE = 512
HUB_SECONDS = 3  # to find out whether there is a hub to download from
UNAVAILABLE = (
    "A click finds nothing here, since the model for it cannot be loaded. Scribble over the object, or draw a line "
    "around it: that snaps to its edges."
)


class ObjectSelector:
    """
    Marks the object under a point. The processor of transformers needs torchvision; the two lines that it does for
    points are here instead.

    Args:
        model (`str`, *optional*): Repository or folder of a SAM 2 model; `MOEBIUS_DEMO_SELECTOR` or
            `facebook/sam2.1-hiera-tiny` if not given.
    """

    def __init__(self, model: str | None = None):
        self.source = model or os.environ.get("MOEBIUS_DEMO_SELECTOR") or DEFAULT_SELECTOR
        self._model = None
        self._lock = threading.Lock()
        # Looking for a hub takes long where there is none: it is done while the visitor still looks at the page.
        self._size = ThreadPoolExecutor(1).submit(self._look)

    def _look(self) -> float:
        try:
            if os.path.isdir(self.source) or isinstance(try_to_load_from_cache(self.source, "model.safetensors"), str):
                return 0
            info = HfApi().model_info(self.source, files_metadata=True, timeout=HUB_SECONDS)
            return next(file.size for file in info.siblings if file.rfilename == "model.safetensors") / 1e6
        except Exception:  # no network, no such repository, no weights in it
            logger.warning("the selection model %s cannot be had", self.source)
            return math.inf

    @property
    def megabytes(self) -> float:
        """What a first click would download; infinite where it cannot."""
        try:
            return 0 if self._model else self._size.result(4 * HUB_SECONDS)
        except TimeoutError:
            return math.inf

    @property
    def hint(self) -> str:
        """What a visitor should know before the first click."""
        scribble = "scribble over it, or draw a line around it"
        if self.megabytes == math.inf:
            return f"To mark an object, {scribble}."
        download = f" The first click downloads a model ({self.megabytes:.0f} MB)." if self.megabytes else ""
        return f"Click on an object, {scribble}.{download}"

    def _load(self):
        with self._lock:
            if self._model is None:
                if self.megabytes == math.inf:
                    raise VisitorError(UNAVAILABLE)
                try:
                    from transformers import Sam2Model

                    # On ZeroGPU clicks are answered where there is no GPU: waiting for one takes longer.
                    device = "cuda" if torch.cuda.is_available() and not on_zero_gpu() else "cpu"
                    self._model = Sam2Model.from_pretrained(self.source).eval().to(device)
                except Exception as error:  # A network that breaks, a transformers without SAM 2.
                    logger.warning("the selection model cannot be loaded", exc_info=True)
                    raise VisitorError(UNAVAILABLE) from error
            return self._model

    @torch.no_grad()
    def embed(self, view: Image.Image) -> list[torch.Tensor]:
        """What the model needs to know of an RGB picture, once for all clicks."""
        model = self._load()
        side = _side(model)
        pixels = np.asarray(view.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
        pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        return model.get_image_embeddings(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device))

    @torch.no_grad()
    def select(self, embeddings: list[torch.Tensor], size: tuple[int, int], point: tuple[float, float]) -> np.ndarray:
        """
        The object under a point: of the model's three guesses the one that it trusts most.

        Args:
            embeddings (`list[torch.Tensor]`): From [`embed`].
            size (`tuple[int, int]`): Width and height of the picture.
            point (`tuple[float, float]`): x and y in its pixels.

        Returns:
            `np.ndarray` of shape `[height, width]`, boolean.
        """
        model = self._load()
        side = _side(model)
        scaled = [(value + 0.5) * side / length for value, length in zip(point, size)]
        output = model(
            image_embeddings=embeddings,
            input_points=torch.tensor([[[scaled]]], dtype=torch.float32, device=model.device),
            input_labels=torch.ones(1, 1, 1, dtype=torch.int32, device=model.device),
            multimask_output=True,
        )
        best = output.iou_scores[0, 0].argmax()
        logits = output.pred_masks[0, 0, best].float().cpu()[None, None]
        width, height = size
        logits = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return (logits[0, 0] > 0).numpy()


def _side(model) -> int:
    return int(np.max(model.config.prompt_encoder_config.image_size))


def snap_to_edges(view: Image.Image, scribble: np.ndarray) -> np.ndarray:
    """
    The object that a scribble covers, or that a closed line goes around, by GrabCut (Rother et al., 2004).

    Args:
        view (`PIL.Image.Image`): RGB.
        scribble (`np.ndarray` of shape `[height, width]`): Boolean.

    Returns:
        `np.ndarray` of shape `[height, width]`, boolean; the scribble itself where no edge is found.
    """
    import cv2

    if not scribble.any():
        return scribble
    height, width = scribble.shape
    scale = min(1.0, SNAP_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = cv2.resize(np.asarray(view), size, interpolation=cv2.INTER_AREA)[..., ::-1]
    drawn = cv2.resize(scribble.astype(np.uint8), size, interpolation=cv2.INTER_AREA)
    contours, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    filled = cv2.drawContours(np.zeros_like(drawn), contours, -1, 1, cv2.FILLED)
    labels = np.full_like(drawn, cv2.GC_BGD)
    if filled.sum() > 2 * drawn.sum():  # a line around the object, which lies within
        labels[filled > 0] = cv2.GC_PR_FGD
        labels[drawn > 0] = cv2.GC_PR_BGD
    else:
        left, top, right, bottom = mask_box(drawn > 0)
        left, top, right, bottom = mask_box(drawn > 0, max(8, round(0.25 * max(right - left, bottom - top))))
        labels[top:bottom, left:right] = cv2.GC_PR_BGD
        labels[drawn > 0] = cv2.GC_PR_FGD
        labels[cv2.erode(drawn, np.ones((3, 3), np.uint8), iterations=3) > 0] = cv2.GC_FGD
    try:
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(np.ascontiguousarray(pixels), labels, None, *models, 4, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # all is object, or nothing
        return scribble
    region = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    found = cv2.resize(region, (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5
    return found if found.any() else scribble
