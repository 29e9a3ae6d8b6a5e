"""Click to select: the object under a point, by a SAM 2 model of transformers that is loaded on first use."""

import logging
import math
import os
import threading
import time

import numpy as np
import torch
from PIL import Image

from .models import on_zero_gpu
from .photos import VisitorError

logger = logging.getLogger(__name__)

DEFAULT_SELECTOR = "facebook/sam2.1-hiera-tiny"
# Mean and deviation of ImageNet's colours, on which SAM 2 was trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# After a failure the model is tried again, but not at every click: finding out that there is no network takes long.
RETRY_SECONDS = 300


class SelectionUnavailable(VisitorError):
    """The model of click to select cannot be loaded."""

    def __init__(self):
        super().__init__("Click to select is not available: its model could not be loaded. The brush works as always.")


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
        self._failure_time = -math.inf
        self._lock = threading.Lock()

    def _load(self):
        with self._lock:
            if self._model is None:
                if time.monotonic() - self._failure_time < RETRY_SECONDS:
                    raise SelectionUnavailable
                try:
                    from transformers import Sam2Model

                    # On ZeroGPU clicks are answered where there is no GPU: waiting for one takes longer.
                    device = "cuda" if torch.cuda.is_available() and not on_zero_gpu() else "cpu"
                    self._model = Sam2Model.from_pretrained(self.source).eval().to(device)
                except Exception as error:  # No network, no such file, a transformers without SAM 2.
                    logger.warning("the selection model cannot be loaded", exc_info=True)
                    self._failure_time = time.monotonic()
                    raise SelectionUnavailable from error
            return self._model

    @torch.no_grad()
    def embed(self, view: Image.Image) -> list[torch.Tensor]:
        """
        What the model needs to know of a picture, once for all clicks.

        Args:
            view (`PIL.Image.Image`): RGB.
        """
        model = self._load()
        side = _side(model)
        pixels = np.asarray(view.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
        pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        return model.get_image_embeddings(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device))

    @torch.no_grad()
    def select(self, embeddings: list[torch.Tensor], size: tuple[int, int], point: tuple[float, float]) -> np.ndarray:
        """
        The object under a point.

        Args:
            embeddings (`list[torch.Tensor]`): From [`embed`].
            size (`tuple[int, int]`): Width and height of the picture.
            point (`tuple[float, float]`): x and y in its pixels.

        Returns:
            `np.ndarray` of shape `[height, width]`, boolean: of the model's three guesses the one that it trusts most.
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
    side = model.config.prompt_encoder_config.image_size
    return side if isinstance(side, int) else side[0]
