"""What the page's controls do, apart from how they look: each function takes plain values and gives plain values."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from ..pictures.mask import dilate_mask, removal_dilation
from .examples import available_examples
from .inpainting import Settings, Step, generate, set_shelf
from .models import OWN, ModelShelf, on_zero_gpu
from .photos import Photo, VisitorError, context_pixels, mask_url, painted_mask, picture_url, save_photo, scale_mask
from .selection import ObjectSelector, snap_to_edges
from .session import Session, Version

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 50
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


def parse_number(name: str, text: str | None) -> float | None:
    """A number that a visitor has typed; `None` for none."""
    if not (text or "").strip():
        return None
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise VisitorError(f"{name} must be a number, but is {text.strip()!r}.") from None


def checked(name: str, value: float | None, least: float, most: float, whole: bool = True) -> float:
    """A setting within its limits, which bind the API's callers as well, whom no slider does."""
    if value is None or not least <= value <= most or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise VisitorError(f"{name} must be {kind} from {least} to {most}, but is {value}.")
    return int(value) if whole else value


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
        self.examples = available_examples()
        set_shelf(self.shelf)
        if on_zero_gpu():
            self.shelf.preload()

    def open(self, session: Session, photo: Photo, mask: np.ndarray | None = None) -> dict:
        """Begins with a photo, and says what the editor shows."""
        version_id = session.open(photo)
        view = photo.view()
        return {
            "do": "open",
            "photo": {"id": version_id, "url": picture_url(view), "width": photo.image.width},
            "size": view.size,
            "hint": self.selector.hint,
            "mask": None if mask is None else mask_url(scale_mask(mask, view.size)),
        }

    def settings(self, source, mask, steps, guidance, seed, context, color_compensation, detail="auto") -> Settings:
        """Settings of a run, checked. Loads the model if need be."""
        if detail not in DETAILS.values():
            raise VisitorError(f"detail must be one of {', '.join(DETAILS.values())}, but is {detail!r}.")
        if guidance is not None:
            guidance = checked("guidance", guidance, 0, 20, whole=False)
        if steps is None:
            steps = self.shelf.get(source).config.default_num_inference_steps
        return Settings(
            checked("steps", steps, 1, MAX_STEPS),
            guidance,
            checked("seed", seed, 0, 2**32 - 1),
            context_pixels(mask, checked("surroundings", context, 0, 400)),
            bool(color_compensation),
            detail,
        )

    def grow(self, mask: np.ndarray, pixels: float) -> np.ndarray:
        """The mask grown by an edge margin."""
        pixels = checked("edge margin", pixels, 0, 200)
        if not mask.any():
            raise VisitorError("Nothing is marked yet. Paint over what should go, or click on it.")
        return dilate_mask(mask, pixels)

    def select(self, session: Session, request: str | dict) -> dict | None:
        """
        The object that a visitor clicks on, scribbles over or draws around, for the editor to add.

        Args:
            session (`Session`): The visitor's.
            request (`str` or `dict`): What the editor sends: `photo` (id), `point` (x, y), `scribble` (data URL or
                none, for a click) and `erase`.
        """
        request = json.loads(request) if isinstance(request, str) else request
        view = session.version(request["photo"]).photo.view().convert("RGB")
        if request.get("scribble"):
            region = snap_to_edges(view, painted_mask(request["scribble"], view.size))
        else:
            if session.embeddings is None or session.embeddings[0] != request["photo"]:
                session.embeddings = request["photo"], self.selector.embed(view)
            region = self.selector.select(session.embeddings[1], view.size, tuple(request["point"]))
        return {"do": "add", "mask": mask_url(region), "erase": bool(request.get("erase"))}

    def run(
        self,
        session: Session,
        marked: str | dict,
        model: str,
        own: str,
        edge_margin: float | None,
        count: float = 1,
        seed: float = 0,
        **options,
    ) -> Iterator[tuple[str, object]]:
        """
        A visitor's run.

        Args:
            session (`Session`): The visitor's.
            marked (`str` or `dict`): What the editor sends: `photo` (id) and `mask` (data URL or none).
            model (`str`): Name on the page's list.
            own (`str`): Repository, where the name says that it is another.
            edge_margin (`float`, *optional*): Pixels of the photo by which the mask grows; by default by its size.
            count (`float`, defaults to 1): Candidates, with seeds that follow each other.
            seed (`float`, defaults to 0): Seed of the first.
            options: The other arguments of [`settings`].

        Yields:
            `("note", text)`, `("step", (Step, total steps, seconds left))`, and in the end
            `("done", (ids, source))`, or nothing when stopped.
        """
        marked = json.loads(marked) if isinstance(marked, str) else marked
        before = session.version(marked["photo"])
        photo, view = before.photo, before.photo.view()
        stop_flag = session.begin_run()
        # The edge margin is in pixels of the photo, the mask is that of the view.
        mask = scale_mask(painted_mask(marked.get("mask"), view.size), photo.image.size)
        edge_margin = removal_dilation(*photo.image.size) if edge_margin is None else edge_margin
        grown = self.grow(mask, edge_margin)
        count = checked("candidates", count, 1, MAX_CANDIDATES)
        source = self.shelf.resolve(model, own)
        if not self.shelf.is_loaded(source):
            yield "note", "Loading the model; the first time takes a moment…"
        seeds = [(checked("seed", seed, 0, 2**32 - 1) + k) % 2**32 for k in range(count)]
        settings = [self.settings(source, grown, seed=each, **options) for each in seeds]
        self.shelf.get(source)
        yield "note", "Starting…"
        start, results = time.monotonic(), []
        for number, each in enumerate(settings):
            for output in generate(source, photo.image, grown, view, each, str(stop_flag)):
                if isinstance(output, Step):
                    done, total = number * output.total + output.number, count * output.total
                    left = (time.monotonic() - start) / done * (total - done)
                    yield "step", (Step(done, total, output.preview), left)
                else:
                    results.append(output)
            if len(results) <= number:
                return
        if before is not session.versions.get(marked["photo"]):
            return
        name = own if model == OWN else model
        yield (
            "done",
            [
                session.keep(
                    Version(
                        Photo(result, photo.metadata, photo.name),
                        mask,
                        self.command(name, source, self.describe(name, each, edge_margin)),
                    )
                )
                for result, each in zip(results, settings)
            ],
        )

    def write(self, session: Session, marked: str | dict, file_format: str) -> Path:
        """The file of the version that is shown, `"PNG"` or `"JPEG"`, or of the `"mask"` that it was made by."""
        marked = json.loads(marked) if isinstance(marked, str) else marked
        version = session.version(marked["photo"])
        if file_format != "mask":
            return save_photo(version.photo, session.folder, file_format)
        if version.mask is None:
            raise VisitorError("Nothing has been removed yet, so there is no mask.")
        path = session.folder / f"{version.photo.name}-mask.png"
        Image.fromarray(version.mask).save(path)
        return path

    def describe(self, model: str, settings: Settings, edge_margin: float) -> dict:
        """The settings as they are shown."""
        return {
            "model": model,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
            "edge_margin": int(edge_margin),
            "surroundings_px": settings.context,
            "color_compensation": settings.color_compensation,
            "detail": settings.detail,
        }

    def command(self, model: str, source: tuple[str, str | None], description: dict) -> str:
        """The command line that makes the same picture from the photo and its mask."""
        place = source[0] if source[0] == "nano" or model != self.shelf.default or "/" in model else "FOLDER"
        parts = ["moebius inpaint PHOTO MASK -o RESULT", f"--model {place}"]
        if source[1]:
            parts.append(f"--checkpoint {source[1]}")
        parts.append(f"--steps {description['steps']}")
        if description["guidance"] is not None:
            parts.append(f"--guidance {description['guidance']:g}")
        parts.append(f"--seed {description['seed']} --crop-margin {description['surroundings_px']}")
        parts.append(f"--mask-dilation {description['edge_margin']}")
        if description["color_compensation"]:
            parts.append("--color-compensation")
        if description["detail"] != "auto":
            parts.append(f"--detail {description['detail']}")
        return " ".join(parts)
