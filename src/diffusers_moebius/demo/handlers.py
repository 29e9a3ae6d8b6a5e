"""What the page's controls do, apart from how they look: each function takes plain values and gives plain values."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from ..pictures.mask import dilate_mask, fit_mask, grow_over_rims, mask_box
from .examples import EXAMPLES
from .inpainting import Settings, Step, generate, set_shelf
from .models import ModelShelf, on_zero_gpu
from .photos import Photo, VisitorError, painted_mask, picture_url, save_photo
from .selection import ObjectSelector, snap_to_edges
from .session import Session, Version, raise_flag

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 50
MIN_CONTEXT_PIXELS = 32
MAX_STEPS = 100
MAX_CANDIDATES = 4
DETAILS = {"The model's own choice": "auto", "From the photo": "patches", "None": "none"}


@contextlib.contextmanager
def friendly():
    """Shows a visitor what concerns them; anything else goes to the log, since it may name what the server holds."""
    try:
        yield
    except gr.Error:
        raise
    except VisitorError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    except Exception as error:
        logger.error("a request failed", exc_info=error)
        raise gr.Error("Something went wrong on the server. Please try again.", print_exception=False) from None


def number(name: str, value: float | str | None, least: float, most: float, whole: bool = True) -> float | None:
    """A setting within its limits, which bind the API's callers as well, or `None` where nothing is given."""
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    try:
        parsed = float(text.replace(",", "."))
    except ValueError:
        parsed = math.nan
    if not least <= parsed <= most or (whole and parsed != int(parsed)):
        kind = "a whole number" if whole else "a number"
        raise VisitorError(f"{name} must be {kind} from {least} to {most}, but is {text!r}.")
    return int(parsed) if whole else parsed


def context_pixels(mask: np.ndarray, percent: float) -> int:
    """How many pixels around the mask the model sees: a share of its longer side."""
    left, top, right, bottom = mask_box(mask)
    return max(MIN_CONTEXT_PIXELS, math.ceil(max(right - left, bottom - top) * percent / 100))


class Demo:
    """
    The demo behind its page.

    Args:
        model (`str`, *optional*): The model that is chosen at first; see [`ModelShelf`].
        selector (`str`, *optional*): The model of click to select; see [`ObjectSelector`].
    """

    def __init__(self, model: str | None = None, selector: str | None = None):
        self.shelf = ModelShelf(model)
        self.selector = ObjectSelector(selector)
        self.examples = EXAMPLES if find_spec("skimage") else ()
        set_shelf(self.shelf)
        # ZeroGPU moves to its GPU only what was put on `cuda` before the page is served. What cannot be loaded now is
        # in the log, and is tried again when a visitor asks for it.
        with contextlib.suppress(VisitorError):
            if on_zero_gpu():
                self.shelf.get(self.shelf.resolve(self.shelf.default))

    def open(self, photo: Photo, mask: np.ndarray | None = None) -> tuple[Session, dict]:
        """Begins with a photo, and says what the editor shows."""
        width, height = size = photo.view.size
        told = {
            "photo": {"id": 1, "url": picture_url(photo.view), "width": photo.image.width},
            "size": size,
            "hint": self.selector.hint,
        }
        if mask is not None:
            mask = fit_mask(mask, height, width, stretch=True)
            told["mask"] = picture_url(Image.fromarray(mask), lossless=True)
        return Session(photo), told

    def select(self, session: Session, request: dict) -> dict:
        """
        The object that a visitor clicks on, scribbles over or draws around, for the editor to add.

        Args:
            session (`Session`): The visitor's.
            request (`dict`): What the editor sends: `photo` (id), `point` (x, y), `scribble` (data URL or none, for a
                click) and `erase`.
        """
        view = session.version(request["photo"]).photo.view.convert("RGB")
        if request.get("scribble"):
            region = snap_to_edges(view, painted_mask(request["scribble"], view.size))
        else:
            if session.embeddings is None or session.embeddings[0] != request["photo"]:
                session.embeddings = request["photo"], self.selector.embed(view)
            region = self.selector.select(session.embeddings[1], view.size, tuple(request["point"]))
        return {"mask": picture_url(Image.fromarray(region), lossless=True), "erase": bool(request.get("erase"))}

    def run(
        self,
        session: Session,
        photo_id: int,
        mask: np.ndarray,
        model: str,
        steps: float | str | None = None,
        guidance: float | str | None = None,
        seed: float | None = 0,
        count: float = 1,
        edge_margin: float | str | None = None,
        context: float = DEFAULT_CONTEXT,
        color_compensation: bool = False,
        detail: str = "auto",
    ) -> Iterator[tuple[str, object]]:
        """
        A visitor's run.

        Args:
            session (`Session`): The visitor's.
            photo_id (`int`): Id of the version to go on from.
            mask (`np.ndarray` of shape `[h, w]`): Boolean, in any size of the photo's shape.
            model (`str`): Name on the page's list, or a repository.
            steps, guidance (`float` or `str`, *optional*): Denoising steps and guidance scale; by default the model's.
            seed (`float`, defaults to 0): Seed of the first candidate; those of the others follow it.
            count (`float`, defaults to 1): Candidates.
            edge_margin (`float` or `str`, *optional*): Pixels by which the mask grows; by default over what is
                left of an object beside it.
            context (`float`, defaults to 50): Surroundings that the model sees, in percent of the mask's longer side.
            color_compensation (`bool`, defaults to `False`): Match the filling's colours to those around it.
            detail (`str`, defaults to `"auto"`): One of the values of `DETAILS`.

        Yields:
            `("note", text)`, `("step", (Step, seconds left))`; in the end `("done", ids)`, or nothing when stopped.
        """
        photo = session.version(photo_id).photo
        source = self.shelf.resolve(model)
        if detail not in DETAILS.values():
            raise VisitorError(f"detail must be one of {', '.join(DETAILS.values())}, but is {detail!r}.")
        steps, guidance = number("steps", steps, 1, MAX_STEPS), number("guidance", guidance, 0, 20, whole=False)
        count, seed = number("candidates", count, 1, MAX_CANDIDATES) or 1, number("seed", seed, 0, 2**32 - 1) or 0
        edge_margin = number("edge margin", edge_margin, 0, 200)
        percent = number("surroundings", context, 0, 400)
        if not mask.any():
            raise VisitorError("Nothing is marked yet. Paint over what should go, or click on it.")
        mask = fit_mask(mask, photo.image.height, photo.image.width, stretch=True)
        grown = grow_over_rims(mask, photo.image) if edge_margin is None else dilate_mask(mask, edge_margin)
        stop_flag = session.stop_flag
        if stop_flag.exists():  # while it waited
            return
        yield "note", "Preparing the model; its first time takes a moment…"
        steps = steps or self.shelf.get(source).config.default_num_inference_steps
        context = context_pixels(grown, DEFAULT_CONTEXT if percent is None else percent)
        first = Settings(source, steps, guidance, seed, edge_margin, context, bool(color_compensation), detail)
        start, versions = time.monotonic(), []
        try:
            for k in range(count):
                settings = replace(first, seed=(seed + k) % 2**32)
                for output in generate(photo, grown, settings, str(stop_flag)):
                    if isinstance(output, Step):
                        done, total = k * output.total + output.number, count * output.total
                        left = (time.monotonic() - start) / done * (total - done)
                        yield "step", (Step(done, total, output.preview), left)
                    else:
                        versions.append(Version(replace(photo, image=output), mask, settings))
                if len(versions) <= k:
                    return
        finally:
            raise_flag(stop_flag)  # also of a run that nobody waits for any more
        if photo_id in session.versions:
            yield "done", [session.keep(version) for version in versions]

    def write(self, session: Session, photo_id: int, file_format: str) -> Path:
        """The file of the version that is shown, `"PNG"` or `"JPEG"`, or of the `"mask"` that it was made by."""
        version = session.version(photo_id)
        if file_format != "mask":
            return save_photo(version.photo, session.folder, file_format)
        if version.mask is None:
            raise VisitorError("Nothing has been removed yet, so there is no mask.")
        path = session.folder / f"{version.photo.name}-mask.png"
        Image.fromarray(version.mask).save(path)
        return path
