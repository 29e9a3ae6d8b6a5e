"""The page of the demo: its controls, what they do, and the API."""

import functools
import html
import inspect
import logging
import os
import random
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from PIL import Image

from ..image_processing import dilate_mask, load_masks, load_pictures, mask_values
from .examples import available_examples
from .inpainting import Settings, Step, generate, set_shelf
from .models import OWN, ModelShelf, on_zero_gpu
from .photos import (
    MAX_FILE_MEGABYTES,
    MAX_MEGAPIXELS,
    VIEW_SIDE,
    Photo,
    VisitorError,
    context_pixels,
    draw_outline,
    mask_layer,
    open_photo,
    painted_mask,
    save_photo,
    scale_mask,
    show_mask,
)
from .selection import ObjectSelector, SelectionUnavailable

logger = logging.getLogger(__name__)

# What a visitor leaves behind is deleted when the page is closed, and after so many seconds in any case.
SESSION_SECONDS = 3600
MAX_WAITING = 32
DEFAULT_CONTEXT = 50
MAX_STEPS = 100

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
# Fonts by name alone: gradio's own themes would fetch theirs from another server.
THEME_FONTS = {"font": FONTS, "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"]}
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
#status { min-height: 1.6rem; }
#status progress { width: 100%; height: 0.6rem; accent-color: var(--color-accent); }
#actions button { min-height: 2.75rem; }
@media (max-width: 480px) {
  .gradio-container { padding: 0.5rem !important; }
  #actions button { flex: 1 1 100%; }
}
"""
INTRODUCTION = """# Remove things from photos
Choose a photo, paint over what should go, press **Remove**. Everything else stays as it is, pixel by pixel."""


class Session:
    """One visitor's photo, mask and results. It is compared and hashed by identity, as gradio does with states."""

    def __init__(self):
        self.photo: Photo | None = None
        self.view: Image.Image | None = None
        self.mask: np.ndarray | None = None  # in the size of the view
        self.embeddings = None
        self.result: Photo | None = None
        self.result_view: Image.Image | None = None
        self.result_mask: np.ndarray | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="moebius-demo-"))
        self._remove_folder = weakref.finalize(self, _remove_folder, self.folder)
        self.stop_flag = self.folder / "stop"

    def open(self, photo: Photo, mask: np.ndarray | None = None) -> None:
        """Begins with a photo, and forgets the one before."""
        self.stop()
        self.photo, self.view = photo, photo.view()
        size = self.view.size
        self.mask = np.zeros((size[1], size[0]), bool) if mask is None else scale_mask(mask, size)
        self.embeddings = self.result = self.result_view = self.result_mask = None
        for path in self.folder.iterdir():
            if path != self.stop_flag:
                path.unlink(missing_ok=True)

    def begin_run(self) -> Path:
        """A flag for a new run; the one before, if it still goes on, is told to stop."""
        self.stop()
        handle, path = tempfile.mkstemp(prefix="stop-", dir=self.folder)
        os.close(handle)
        self.stop_flag = Path(path)
        self.stop_flag.unlink()
        return self.stop_flag

    def stop(self) -> None:
        """Stops the run that goes on, if any."""
        if self.folder.exists():
            self.stop_flag.touch()

    def close(self) -> None:
        """Stops, and deletes what is on the disk."""
        self.stop()
        self._remove_folder()


def _remove_folder(folder: Path) -> None:
    if folder.exists():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()


def _friendly(function):
    """Shows a visitor what concerns them; anything else goes to the log, since it may name what the server holds."""

    def translate(error: Exception) -> gr.Error:
        if isinstance(error, VisitorError):
            return gr.Error(str(error), duration=None, print_exception=False)
        logger.error("a request failed", exc_info=error)
        return gr.Error("Something went wrong on the server. Please try again.", print_exception=False)

    if _is_generator(function):

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise translate(error) from None
    else:

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise translate(error) from None

    return wrapper


def _is_generator(function) -> bool:
    return inspect.isgeneratorfunction(function)


def _status(text: str, step: int | None = None, total: int | None = None) -> str:
    bar = ""
    if total:
        bar = f'<progress max="{total}" value="{step or 0}" aria-label="Progress of the removal"></progress>'
    return f'<div role="status" aria-live="polite">{html.escape(text)}{bar}</div>'


def _seconds(value: float) -> str:
    return f"{max(1, round(value))} s" if value < 90 else f"{round(value / 60)} min"


class Demo:
    """
    What the page does, apart from how it looks.

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

    def settings(self, source, mask, steps, guidance, seed, context, color_compensation) -> Settings:
        """Settings of a run, checked, since the API's callers are bound by no slider. Loads the model if need be."""
        for name, value, least, most in (
            ("steps", steps, 1, MAX_STEPS),
            ("seed", seed, 0, 2**32 - 1),
            ("surroundings", context, 0, 400),
        ):
            if name == "steps" and value is None:
                continue
            if value is None or not least <= value <= most:
                raise VisitorError(f"{name} must be between {least} and {most}, but is {value}.")
        if guidance is not None and not 0 <= guidance <= 20:
            raise VisitorError(f"guidance must be between 0 and 20, but is {guidance}.")
        if steps is None:
            steps = self.shelf.get(source).config.default_num_inference_steps
        return Settings(int(steps), guidance, int(seed), context_pixels(mask, context), bool(color_compensation))

    def grow(self, mask: np.ndarray, pixels: float) -> np.ndarray:
        """The mask grown by an edge margin."""
        if pixels is None or not 0 <= pixels <= 200:
            raise VisitorError(f"edge margin must be between 0 and 200, but is {pixels}.")
        if not mask.any():
            raise VisitorError("Nothing is marked yet. Paint over what should go, or click on it.")
        return dilate_mask(mask, int(pixels))

    def current_mask(self, session: Session, editor: dict | None) -> np.ndarray:
        """What the visitor has marked, by brush and clicks."""
        if editor is not None and editor.get("background") is not None:
            session.mask = painted_mask(editor["layers"], session.view.size)
        return session.mask

    def click(self, session: Session, point: tuple[float, float], remove: bool, grow: float) -> np.ndarray:
        """Adds the object under a point to the mask, or takes it away."""
        if session.embeddings is None:
            session.embeddings = self.selector.embed(session.view)
        selected = self.selector.select(session.embeddings, session.view.size, point)
        selected = dilate_mask(selected, int(grow or 0))
        session.mask = session.mask & ~selected if remove else session.mask | selected
        return session.mask

    def predict(
        self,
        photo: str | None,
        mask: str | None,
        model: str = "",
        steps: float | None = None,
        guidance: float | None = None,
        seed: float = 0,
        edge_margin: float = 0,
        surroundings: float = DEFAULT_CONTEXT,
        color_compensation: bool = False,
        file_format: str = "PNG",
    ) -> tuple[str, dict]:
        """
        Removes what a mask marks from a photo. `mask` is a picture of the photo's size, white where it is filled.
        `model` is a name of the page's list, owner/name or owner/name/folder; empty is the default. Returns the file
        (of the photo's size; in PNG every pixel outside the mask is the photo's) and the settings used.
        """
        if not photo or not mask:
            raise VisitorError("photo and mask are both needed.")
        if file_format not in ("PNG", "JPEG"):
            raise VisitorError(f"file_format must be PNG or JPEG, but is {file_format!r}.")
        folder = Path(tempfile.mkdtemp(prefix="moebius-demo-"))
        try:
            opened, given = open_photo(photo), open_photo(mask).image
            if given.size != opened.image.size:
                raise VisitorError(
                    f"mask must have the photo's size, {opened.image.width}×{opened.image.height} pixels, but is "
                    f"{given.width}×{given.height}."
                )
            values = load_masks(mask_values(given) >= 0.5, load_pictures(opened.image))[0]
            values = self.grow(values, edge_margin)
            name = model or self.shelf.default
            source = self.shelf.resolve(name) if name in self.shelf.sources else self.shelf.resolve(OWN, name)
            settings = self.settings(source, values, steps, guidance, seed, surroundings, color_compensation)
            self.shelf.get(source)
            outputs = generate(source, opened.image, values, opened.view(), settings, str(folder / "stop"))
            result = next(output for output in outputs if isinstance(output, Image.Image))
            path = save_photo(Photo(result, opened.metadata, opened.name), folder, file_format)
            gradio_copy = gr.processing_utils.save_file_to_cache(path, cache_dir=gr.utils.get_upload_folder())
            return gradio_copy, self.describe(name, settings, edge_margin)
        finally:
            _remove_folder(folder)
            for path in (photo, mask):
                Path(path).unlink(missing_ok=True)

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
        }

    def command(self, model: str, source: tuple[str, str | None], description: dict) -> str:
        """Settings and the command line that makes the same picture from the photo and its mask."""
        place = source[0] if source[0] == "nano" or model != self.shelf.default or "/" in model else "FOLDER"
        parts = ["moebius inpaint PHOTO MASK -o RESULT", f"--model {place}"]
        if source[1]:
            parts.append(f"--checkpoint {source[1]}")
        parts.append(f"--steps {description['steps']}")
        if description["guidance"] is not None:
            parts.append(f"--guidance {description['guidance']:g}")
        parts.append(f"--seed {description['seed']} --crop-margin {description['surroundings_px']}")
        if description["edge_margin"]:
            parts.append(f"--mask-dilation {description['edge_margin']}")
        if description["color_compensation"]:
            parts.append("--color-compensation")
        return " ".join(parts)

    def run(
        self, session: Session, mask: np.ndarray, model: str, own: str, edge_margin: float, **options
    ) -> Iterator[tuple[str, object]]:
        """
        A visitor's run.

        Yields:
            `("note", text)`, `("step", (Step, seconds left))`, and in the end `("done", (description, command))`, or
            nothing when stopped.
        """
        photo, view = session.photo, session.view
        stop_flag = session.begin_run()
        # The edge margin is in pixels of the photo, the mask is that of the view.
        full_mask = self.grow(scale_mask(mask, photo.image.size), edge_margin)
        source = self.shelf.resolve(model, own)
        if not self.shelf.is_loaded(source):
            yield "note", "Loading the model; the first time takes a moment…"
        settings = self.settings(source, full_mask, **options)
        self.shelf.get(source)
        yield "note", "Starting…"
        start, result = time.monotonic(), None
        for output in generate(source, photo.image, full_mask, view, settings, str(stop_flag)):
            if isinstance(output, Step):
                elapsed = time.monotonic() - start
                yield "step", (output, elapsed / output.number * (output.total - output.number))
            else:
                result = output
        if result is None or session.photo is not photo:
            return
        yield "note", "Writing the file…"
        session.result = Photo(result, photo.metadata, photo.name)
        session.result_view = session.result.view()
        session.result_mask = scale_mask(full_mask, view.size)
        description = self.describe(own if model == OWN else model, settings, edge_margin)
        yield "done", (description, self.command(model, source, description))


def build_demo(model: str | None = None, selector: str | None = None) -> gr.Blocks:
    """
    Builds the page.

    Args:
        model (`str`, *optional*): The model that is chosen at first: `"nano"`, a repository on the hub, a pipeline
            folder; the environment variable `MOEBIUS_DEMO_MODEL`, or the bundled model, if not given.
        selector (`str`, *optional*): Repository or folder of the SAM 2 model of click to select;
            `facebook/sam2.1-hiera-tiny` if not given.

    Returns:
        `gradio.Blocks`: The page; [`launch_demo`] serves it with the limits and looks that belong to it.
    """
    demo = Demo(model, selector)
    with gr.Blocks(
        title="Remove things from photos",
        analytics_enabled=False,
        delete_cache=(300, SESSION_SECONDS),
    ) as page:
        state = gr.State(
            None, time_to_live=SESSION_SECONDS, delete_callback=lambda session: session and session.close()
        )
        gr.Markdown(INTRODUCTION)

        with gr.Column() as upload_part:
            upload = gr.Image(
                label=f"Your photo (up to {MAX_FILE_MEGABYTES} MB, {MAX_MEGAPIXELS} megapixels; deleted after use)",
                sources=["upload", "clipboard", "webcam"],
                image_mode=None,
                height=280,
                buttons=[],
                elem_id="photo",
            )
            # The file as it came: the component's own preprocessing opens it, and fails on what is no picture. Where
            # the file lies has been checked before. Not a subclass, for which gradio writes a stub beside this file.
            upload.preprocess = lambda payload: payload and (payload.path, payload.orig_name)
            gallery = None
            if demo.examples:
                gallery = gr.Dataset(
                    label="Or try one of these",
                    components=[gr.Textbox(visible=False, label="Example")],
                    samples=[[example.title] for example in demo.examples],
                    type="index",
                    elem_id="examples",
                )

        with gr.Column(visible=False, elem_id="work") as work_part:
            with gr.Tabs(selected="paint") as tabs:
                with gr.Tab("Paint", id="paint"):
                    editor = gr.ImageEditor(
                        label="Paint over what should go",
                        type="numpy",
                        image_mode="RGBA",
                        format="png",
                        sources=[],
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(colors=[("#ff4040", 0.7)], color_mode="fixed", default_size="auto"),
                        eraser=gr.Eraser(),
                        buttons=["fullscreen"],
                        canvas_size=(VIEW_SIDE, VIEW_SIDE),
                        elem_id="editor",
                    )
                with gr.Tab("Click to select", id="click") as click_tab:
                    clicked = gr.Image(
                        label="Click on what should go",
                        interactive=False,
                        format="png",
                        buttons=[],
                        elem_id="clicked",
                        alt_text="The photo; what is marked is tinted red",
                    )
                    with gr.Row():
                        click_mode = gr.Radio(
                            [("Add the object", "add"), ("Take the object away", "remove")],
                            value="add",
                            label="A click will",
                        )
                        click_grow = gr.Slider(0, 40, value=6, step=1, label="Grow each selection by (pixels)")
                    click_note = gr.Markdown(visible=False, elem_id="click-note")
                    click_clear = gr.Button("Clear the selection", size="sm")
            with gr.Row(elem_id="actions"):
                remove = gr.Button("Remove", variant="primary", elem_id="remove")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                restart = gr.Button("Another photo", elem_id="restart")

        status = gr.HTML(_status(""), elem_id="status")
        preview = gr.Image(
            label="On the way",
            visible=False,
            interactive=False,
            format="jpeg",
            buttons=[],
            elem_id="preview",
            alt_text="The photo while its marked part is being filled",
        )

        with gr.Column(visible=False, elem_id="result") as result_part:
            slider = gr.ImageSlider(
                label="Before and after", interactive=False, format="png", buttons=["fullscreen"], elem_id="slider"
            )
            outline = gr.Checkbox(False, label="Show the outline of the mask", elem_id="outline")
            with gr.Row():
                file_format = gr.Radio(
                    [("PNG, exact", "PNG"), ("JPEG, smaller", "JPEG")], value="PNG", label="File", elem_id="format"
                )
                with gr.Column():
                    download = gr.DownloadButton("Download", variant="primary", elem_id="download")
                    again = gr.Button("Use the result as the new photo", elem_id="again")
            used = gr.Textbox(label="For the same picture again", interactive=False, lines=2, elem_id="used")

        with gr.Accordion("Settings", open=False, elem_id="settings"):
            model_name = gr.Dropdown(demo.shelf.names, value=demo.shelf.default, label="Model", elem_id="model")
            own = gr.Textbox(
                label="Repository", placeholder="owner/name, or owner/name/folder", visible=False, elem_id="own"
            )
            with gr.Row():
                steps = gr.Number(
                    None,
                    label="Steps (empty: the model's own)",
                    precision=0,
                    minimum=1,
                    maximum=MAX_STEPS,
                    elem_id="steps",
                )
                guidance = gr.Number(
                    None, label="Guidance (empty: the model's own)", minimum=0, maximum=20, elem_id="guidance"
                )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
                new_seed = gr.Checkbox(True, label="A new seed each time", elem_id="new-seed")
            with gr.Row():
                edge_margin = gr.Slider(0, 100, value=0, step=1, label="Edge margin: grow the mask by (pixels)")
                context = gr.Slider(
                    0, 400, value=DEFAULT_CONTEXT, step=5, label="Surroundings that the model sees (% of the mask)"
                )
            color_compensation = gr.Checkbox(False, label="Match the filling's colours to those around it")

        private = {"api_visibility": "private"}
        opened = [state, editor, clicked, upload, upload_part, work_part, result_part, status, preview, tabs]

        def show(session: Session) -> dict:
            """The page with a newly opened photo."""
            layers = [mask_layer(session.mask)] if session.mask.any() else []
            return {
                state: session,
                editor: {"background": session.view, "layers": layers, "composite": None},
                clicked: show_mask(session.view, session.mask),
                upload: None,
                upload_part: gr.update(visible=False),
                work_part: gr.update(visible=True),
                result_part: gr.update(visible=False),
                preview: gr.update(value=None, visible=False),
                tabs: gr.update(selected="paint"),
                status: _status(f"{session.photo.image.width}×{session.photo.image.height} pixels."),
            }

        @_friendly
        def open_upload(session, file):
            if file is None:
                yield {status: _status("")}
                return
            path, name = file
            session = session or Session()
            try:
                session.open(open_photo(path, name))
            except Exception:
                yield {upload: None, status: _status("")}  # ready for another file
                raise
            finally:
                Path(path).unlink(missing_ok=True)
            yield show(session)

        upload.input(open_upload, [state, upload], opened, show_progress="minimal", show_progress_on=status, **private)

        @_friendly
        def open_example(session, index):
            session = session or Session()
            session.open(*demo.examples[index].load())
            # Where the mask shows at once; an editor that has not been drawn yet does not draw a layer.
            return show(session) | {
                tabs: gr.update(selected="click"),
                status: _status("What is tinted red is marked. Press Remove."),
            }

        if gallery is not None:
            gallery.click(open_example, [state, gallery], opened, show_progress="hidden", **private)

        @_friendly
        def open_result(session):
            if session is None or session.result is None:
                raise VisitorError("There is no result yet.")
            session.open(session.result)
            return show(session)

        again.click(open_result, [state], opened, show_progress="hidden", **private)

        def start_again(session):
            if session is not None:
                session.close()
            return {
                state: None,
                editor: None,
                clicked: None,
                upload: None,
                upload_part: gr.update(visible=True),
                work_part: gr.update(visible=False),
                result_part: gr.update(visible=False),
                preview: gr.update(value=None, visible=False),
                status: _status(""),
            }

        @_friendly
        def to_click(session, editor):
            if session is None or session.photo is None:
                return None
            return show_mask(session.view, demo.current_mask(session, editor))

        click_tab.select(to_click, [state, editor], clicked, show_progress="hidden", **private)

        def to_editor(session):
            layers = [mask_layer(session.mask)] if session.mask.any() else []
            return {"background": session.view, "layers": layers, "composite": None}

        @_friendly
        def on_click(session, mode, grow, event: gr.SelectData):
            if session is None or session.photo is None:
                raise VisitorError("Choose a photo first.")
            yield {status: _status("Looking for what is there…")}
            try:
                mask = demo.click(session, tuple(event.index), mode == "remove", grow)
            except SelectionUnavailable as error:
                yield {status: _status(""), click_note: gr.update(value=f"**{error}**", visible=True)}
                return
            except Exception:
                yield {status: _status("")}
                raise
            yield {
                clicked: show_mask(session.view, mask),
                editor: to_editor(session),
                click_note: gr.update(visible=False),
                status: _status("Marked. Click on more, or press Remove." if mask.any() else "Nothing is marked."),
            }

        clicked.select(
            on_click,
            [state, click_mode, click_grow],
            [clicked, editor, status, click_note],
            show_progress="minimal",
            show_progress_on=status,
            concurrency_limit=1,
            concurrency_id="selector",
            **private,
        )

        @_friendly
        def clear(session):
            if session is None or session.photo is None:
                raise VisitorError("Choose a photo first.")
            session.mask = np.zeros_like(session.mask)
            return {clicked: session.view, editor: to_editor(session)}

        click_clear.click(clear, [state], [clicked, editor], show_progress="hidden", **private)

        run_outputs = [status, preview, result_part, slider, outline, download, used, seed, remove, stop, file_format]
        idle = {remove: gr.update(interactive=True), stop: gr.update(visible=False)}

        def wait():
            return {
                remove: gr.update(interactive=False),
                stop: gr.update(visible=True),
                status: _status("Waiting for a free place…"),
            }

        @_friendly
        def run(session, editor, model, own, steps, guidance, seed_value, is_new, margin, context, compensate):
            stop_flag = None
            try:
                if session is None or session.photo is None:
                    raise VisitorError("Choose a photo first.")
                mask = demo.current_mask(session, editor)
                seed_value = random.randrange(2**31) if is_new else seed_value
                messages = demo.run(
                    session,
                    mask,
                    model,
                    own,
                    margin,
                    steps=steps,
                    guidance=guidance,
                    seed=seed_value,
                    context=context,
                    color_compensation=compensate,
                )
                yield {status: _status("Starting…"), seed: seed_value}
                stop_flag = session.stop_flag
                for kind, value in messages:
                    stop_flag = session.stop_flag
                    if kind == "note":
                        yield {status: _status(value)}
                    elif kind == "step":
                        step, left = value
                        text = f"Step {step.number} of {step.total}"
                        text += f", about {_seconds(left)} left " if step.number < step.total else " "
                        update = {status: _status(text, step.number, step.total)}
                        if step.preview is not None:
                            update[preview] = gr.update(value=step.preview, visible=True)
                        yield update
                    else:
                        _, command = value
                        path = save_photo(session.result, session.folder, "PNG")
                        yield {
                            **idle,
                            status: _status("Done."),
                            preview: gr.update(value=None, visible=False),
                            result_part: gr.update(visible=True),
                            slider: (session.view, session.result_view),
                            outline: False,
                            file_format: "PNG",
                            download: str(path),
                            used: command,
                        }
                        return
                yield {**idle, status: _status("Stopped."), preview: gr.update(value=None, visible=False)}
            except BaseException as error:
                # Also when the page is closed, or the event is cancelled: nobody waits for the result any more.
                if stop_flag is not None and stop_flag.parent.exists():
                    stop_flag.touch()
                if isinstance(error, Exception):
                    yield {**idle, status: _status(""), preview: gr.update(value=None, visible=False)}
                raise

        running = remove.click(
            wait, None, [remove, stop, status], queue=False, show_progress="hidden", **private
        ).then(
            run,
            [
                state,
                editor,
                model_name,
                own,
                steps,
                guidance,
                seed,
                new_seed,
                edge_margin,
                context,
                color_compensation,
            ],
            run_outputs,
            show_progress="minimal",
            show_progress_on=status,
            concurrency_limit=1,
            concurrency_id="model",
            **private,
        )

        def stop_run(session):
            if session is not None:
                session.stop()
            return {**idle, status: _status("Stopped."), preview: gr.update(value=None, visible=False)}

        stop.click(
            stop_run,
            [state],
            [remove, stop, status, preview],
            cancels=[running],
            queue=False,
            show_progress="hidden",
            **private,
        )
        restart.click(
            start_again,
            [state],
            opened,
            cancels=[running],
            queue=False,
            show_progress="hidden",
            **private,
        ).then(lambda: (gr.update(interactive=True), gr.update(visible=False)), None, [remove, stop], **private)

        @_friendly
        def show_outline(session, wanted):
            if session is None or session.result is None:
                raise VisitorError("There is no result yet.")
            after = session.result_view
            return session.view, draw_outline(after, session.result_mask) if wanted else after

        outline.input(show_outline, [state, outline], slider, show_progress="hidden", **private)

        @_friendly
        def write_file(session, file_format):
            if session is None or session.result is None:
                raise VisitorError("There is no result yet.")
            return str(save_photo(session.result, session.folder, file_format))

        file_format.input(write_file, [state, file_format], download, **private)
        model_name.input(
            lambda name: gr.update(visible=name == OWN),
            model_name,
            own,
            queue=False,
            show_progress="hidden",
            **private,
        )

        _add_api(demo)
    return page


def _add_api(demo: Demo) -> None:
    """The API: components that are not shown, whose labels are its documentation."""
    with gr.Column(visible=False):
        inputs = [
            gr.File(label="photo", type="filepath"),
            gr.File(label="mask (white is filled, the photo's size)", type="filepath"),
            gr.Textbox("", label="model (empty: the default)"),
            gr.Number(None, label="steps (none: the model's own)"),
            gr.Number(None, label="guidance (none: the model's own)"),
            gr.Number(0, label="seed"),
            gr.Number(0, label="edge margin (pixels)"),
            gr.Number(DEFAULT_CONTEXT, label="surroundings (percent of the mask)"),
            gr.Checkbox(False, label="match colours"),
            gr.Textbox("PNG", label="file format (PNG or JPEG)"),
        ]
        outputs = [gr.File(label="result"), gr.JSON(label="settings")]
        gr.Button("API").click(
            _friendly(demo.predict),
            inputs,
            outputs,
            api_name="predict",
            concurrency_limit=1,
            concurrency_id="model",
        )


def launch_demo(
    model: str | None = None,
    selector: str | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    **kwargs,
):
    """
    Builds the page and serves it.

    Args:
        model (`str`, *optional*): See [`build_demo`].
        selector (`str`, *optional*): See [`build_demo`].
        host (`str`, *optional*): Address to listen on; gradio's choice (`GRADIO_SERVER_NAME`) if not given.
        port (`int`, *optional*): Port; gradio's choice if not given.
        share (`bool`, defaults to `False`): Also make a public link through gradio's server.
        kwargs: Other arguments of `gradio.Blocks.launch`.

    Returns:
        What `gradio.Blocks.launch` returns.
    """
    page = build_demo(model, selector)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    theme = gr.themes.Default(**THEME_FONTS)
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=CSS,
        max_file_size=f"{MAX_FILE_MEGABYTES}mb",
        show_error=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **kwargs,
    )
