"""The page of the demo: its controls, what they do, and the API."""

import functools
import html
import inspect
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from PIL import Image

from ..pictures.mask import dilate_mask, load_masks, mask_values
from ..pictures.picture import load_pictures
from .browser import ADD_SHIFT, CSS, EDITOR_HEIGHT, HEAD
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
from .session import Session, delete_upload, remove_folder

logger = logging.getLogger(__name__)

# What a visitor leaves behind is deleted when the page is closed, and after so many seconds in any case.
SESSION_SECONDS = 3600
MAX_WAITING = 32
DEFAULT_CONTEXT = 50
MAX_STEPS = 100

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
# Fonts by name alone: gradio's own themes would fetch theirs from another server.
THEME_FONTS = {"font": FONTS, "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"]}
INTRODUCTION = """# Remove things from photos
Choose a photo, paint over what should go, press **Remove**. Everything else stays as it is, pixel by pixel."""


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


def parse_number(name: str, text: str | None) -> float | None:
    """A number that a visitor has typed; `None` for none."""
    if not (text or "").strip():
        return None
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise VisitorError(f"{name} must be a number, but is {text.strip()!r}.") from None


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
            if value is None or not least <= value <= most or value != int(value):
                raise VisitorError(f"{name} must be a whole number from {least} to {most}, but is {value}.")
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
        if session.in_editor and editor is not None and editor.get("background") is not None:
            session.from_editor(painted_mask(editor["layers"], session.view.size))
        return session.mask

    def box(self, session: Session, rectangle: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, in pixels of the view, of a rectangle whose place and size are in percent."""
        for name, value in zip(("left", "top", "width", "height"), rectangle):
            if value is None or not 0 <= value <= 100:
                raise VisitorError(f"{name} must be between 0 and 100, but is {value}.")
        left, top, width, height = rectangle
        corners = (left, top, min(100, left + width), min(100, top + height))
        box = tuple(round(value * side / 100) for value, side in zip(corners, session.view.size * 2))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise VisitorError("There is nothing in this rectangle. Width and height must be more than 0 %.")
        return box

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
            remove_folder(folder)
            for path in (photo, mask):
                delete_upload(path)

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
                placeholder="# Choose a photo\nor drop or paste one here",
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
                with gr.Tab("Paint", id="paint") as paint_tab:
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
                        height=EDITOR_HEIGHT,
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
                            [("Mark the object", "add"), ("Unmark it (or Shift-click)", "remove")],
                            value="add",
                            label="A click will",
                            elem_id="click-mode",
                        )
                        click_grow = gr.Slider(0, 40, value=6, step=1, label="Grow selections by (pixels)")
                    with_shift = gr.Checkbox(False, visible=False)
                    click_note = gr.Markdown(visible=False, elem_id="click-note")
            unmark_all = gr.Button("Unmark everything", size="sm")
            with gr.Accordion("Mark by keyboard", open=False, elem_id="by-keyboard"):
                with gr.Row():
                    rectangle = [
                        gr.Number(value, label=f"{name} (%)", minimum=0, maximum=100, min_width=110)
                        for name, value in (("Left", 40), ("Top", 40), ("Width", 20), ("Height", 20))
                    ]
                with gr.Row():
                    mark_rectangle = gr.Button("Mark the rectangle", size="sm")
                    unmark_rectangle = gr.Button("Unmark the rectangle", size="sm")
                    mark_object = gr.Button("Mark the object in its middle", size="sm")
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
            with gr.Row():
                shown = gr.Radio(
                    [("Before", 100), ("Half and half", 50), ("After", 0)], value=50, label="Show", elem_id="shown"
                )
                outline = gr.Checkbox(False, label="Show the outline of the mask", elem_id="outline")
            with gr.Row():
                file_format = gr.Radio(
                    [("PNG, exact", "PNG"), ("JPEG, smaller", "JPEG")], value="PNG", label="File", elem_id="format"
                )
                with gr.Column():
                    download = gr.DownloadButton("Download", variant="primary", elem_id="download")
                    again = gr.Button("Use the result as the new photo", elem_id="again")
            used = gr.Textbox(
                label="For the same picture again", interactive=False, lines=2, buttons=["copy"], elem_id="used"
            )

        with gr.Accordion("Settings", open=False, elem_id="settings"):
            model_name = gr.Dropdown(demo.shelf.names, value=demo.shelf.default, label="Model", elem_id="model")
            own = gr.Textbox(
                label="Repository", placeholder="owner/name, or owner/name/folder", visible=False, elem_id="own"
            )
            with gr.Row():
                # No numbers: gradio shows and sends one that is empty as 0.
                steps = gr.Textbox(
                    label=f"Steps (1 to {MAX_STEPS})", placeholder="The model's own", max_lines=1, elem_id="steps"
                )
                guidance = gr.Textbox(
                    label="Guidance (0 to 20)", placeholder="The model's own", max_lines=1, elem_id="guidance"
                )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
                new_seed = gr.Checkbox(True, label="A new seed each time", elem_id="new-seed")
            with gr.Row():
                edge_margin = gr.Slider(0, 100, value=0, step=1, label="Edge margin (pixels)")
                context = gr.Slider(0, 400, value=DEFAULT_CONTEXT, step=5, label="Surroundings seen (% of the mask)")
            color_compensation = gr.Checkbox(False, label="Match the filling's colours to those around it")

        private = {"api_visibility": "private"}
        opened = [state, editor, clicked, upload, upload_part, work_part, result_part, status, preview, tabs]

        def edited(session: Session) -> dict:
            """What the editor is given."""
            mask = session.to_editor()
            layers = [mask_layer(mask)] if mask.any() else []
            value = {"background": session.view, "layers": layers, "composite": None}
            # The canvas has the size of the photo: the editor puts a layer in the middle of its canvas.
            return gr.update(value=value, canvas_size=session.view.size)

        def show(session: Session) -> dict:
            """The page with a newly opened photo."""
            return {
                state: session,
                editor: edited(session),
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
            if file is None:  # as it is when the photo has been taken from the component
                # Not `gr.skip()` for all: an update makes a new component for the visitor, without our preprocessing.
                return {upload: None}
            path, name = file
            session = session or Session()
            try:
                session.open(open_photo(path, name))
            except VisitorError as error:
                gr.Warning(str(error), duration=None, title="Another photo, please")
                return {upload: None, status: _status(str(error))}
            finally:
                delete_upload(path)
            return show(session)

        # Not `input`, which neither the camera nor the clipboard's button is.
        upload.change(
            open_upload, [state, upload], opened, show_progress="minimal", show_progress_on=status, **private
        )

        @_friendly
        def open_example(session, index):
            session = session or Session()
            session.open(*demo.examples[index].load())
            page = show(session)
            # Where the mask shows at once; an editor that has not been drawn yet does not draw a layer.
            session.in_editor = False
            return page | {
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

        def opened_session(session) -> Session:
            if session is None or session.photo is None:
                raise VisitorError("Choose a photo first.")
            return session

        @_friendly
        def to_click(session, editor):
            if session is None or session.photo is None:
                return None
            picture = show_mask(session.view, demo.current_mask(session, editor))
            session.in_editor = False
            return picture

        @_friendly
        def to_paint(session):
            return gr.skip() if session is None or session.photo is None or session.in_editor else edited(session)

        click_tab.select(to_click, [state, editor], clicked, show_progress="hidden", **private)
        paint_tab.select(to_paint, [state], editor, show_progress="hidden", **private)

        def show_marked(session) -> dict:
            """The page after a change of the mask; its size in words is for those who cannot see it."""
            share = session.mask.mean()
            percent = f"{100 * share:.0f}" if share >= 0.01 else "less than 1"
            return {
                **({editor: edited(session)} if session.in_editor else {}),
                clicked: show_mask(session.view, session.mask),
                click_note: gr.update(visible=False),
                status: _status(
                    f"Marked: {percent} % of the photo. Mark more, or press Remove." if share else "Nothing is marked."
                ),
            }

        @_friendly
        def select(session, point, unmark, grow):
            yield {status: _status("Looking for what is there…")}
            try:
                demo.click(session, point, unmark, grow)
            except SelectionUnavailable as error:
                yield {status: _status(str(error)), click_note: gr.update(value=f"**{error}**", visible=True)}
                return
            except Exception:
                yield {status: _status("")}
                raise
            yield show_marked(session)

        @_friendly
        def on_click(session, mode, grow, shift, event: gr.SelectData):
            yield from select(opened_session(session), tuple(event.index), shift or mode == "remove", grow)

        @_friendly
        def on_mark_object(session, editor, grow, *rectangle):
            box = demo.box(opened_session(session), rectangle)
            demo.current_mask(session, editor)
            yield from select(session, ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2), False, grow)

        marked = {
            "outputs": [clicked, editor, status, click_note],
            "trigger_mode": "multiple",  # else what is marked while the last mark is worked on is lost
            "show_progress": "minimal",
            "show_progress_on": status,
            **private,
        }
        selecting = {"concurrency_limit": 1, "concurrency_id": "selector", **marked}
        clicked.select(on_click, [state, click_mode, click_grow, with_shift], js=ADD_SHIFT, **selecting)
        mark_object.click(on_mark_object, [state, editor, click_grow, *rectangle], **selecting)

        def fill_rectangle(value: bool):
            @_friendly
            def fill(session, editor, *rectangle):
                left, top, right, bottom = demo.box(opened_session(session), rectangle)
                mask = demo.current_mask(session, editor).copy()
                mask[top:bottom, left:right] = value
                session.mask = mask
                return show_marked(session)

            return fill

        mark_rectangle.click(fill_rectangle(True), [state, editor, *rectangle], **marked)
        unmark_rectangle.click(fill_rectangle(False), [state, editor, *rectangle], **marked)

        @_friendly
        def on_unmark_all(session):
            session.mask = np.zeros_like(opened_session(session).mask)
            return show_marked(session)

        unmark_all.click(on_unmark_all, [state], **marked)

        run_outputs = [status, preview, result_part, slider, shown, outline]
        run_outputs += [file_format, download, used, seed, remove, stop]
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
                mask = demo.current_mask(opened_session(session), editor)
                seed_value = random.randrange(2**31) if is_new else seed_value
                messages = demo.run(
                    session,
                    mask,
                    model,
                    own,
                    margin,
                    steps=parse_number("steps", steps),
                    guidance=parse_number("guidance", guidance),
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
                            slider: gr.update(value=(session.view, session.result_view), slider_position=50),
                            shown: 50,
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

        shown.input(
            lambda position: gr.update(slider_position=position),
            shown,
            slider,
            queue=False,
            show_progress="hidden",
            **private,
        )
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
        head=HEAD,
        max_file_size=f"{MAX_FILE_MEGABYTES}mb",
        show_error=False,
        ssr_mode=False,
        footer_links=["api"],
        **kwargs,
    )
