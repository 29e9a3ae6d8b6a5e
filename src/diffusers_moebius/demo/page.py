"""The page of the demo: its controls, how they lie, and which of [`Demo`]'s functions each of them calls."""

import html
import os
import random
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .api import add_api
from .handlers import DEFAULT_CONTEXT, DETAILS, MAX_CANDIDATES, MAX_STEPS, Demo, friendly, parse_number
from .models import FULL, FULL_GIGABYTES, NANO, OWN
from .photos import MAX_FILE_MEGABYTES, MAX_MEGAPIXELS, VisitorError, open_photo, picture_url
from .selection import SelectionUnavailable
from .session import Session, delete_upload

# What a visitor leaves behind is deleted when the page is closed, and after so many seconds in any case.
SESSION_SECONDS = 3600
MAX_WAITING = 64

STATIC = Path(__file__).with_name("static")


def _read(*names: str) -> str:
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


EDITOR_SCRIPT = _read("editor.js", "component.js").replace("export function", "function")
HEAD = f"<script>{_read('page.js')}</script>"
CSS = _read("page.css", "editor.css")
# Put before an event is sent: what the editor holds takes the place of its second input.
MARKED = """(...values) => {
  const editor = window.moebiusEditor;
  values[1] = JSON.stringify({ photo: editor?.photo ?? null, mask: !editor || editor.isEmpty ? null : editor.mask });
  return values;
}"""
SET_MARGINS = """(grow, percent) => {
  const editor = window.moebiusEditor;
  grow = grow.trim() === "" ? 4 * Math.min(...(editor?.photoSize ?? [0])) / 512 : Math.min(Number(grow) || 0, 200);
  editor?.setMargins({ grow, context: { percent, least: 32 } });
  return [];
}"""
# Fonts by name alone: gradio's own themes would fetch theirs from another server.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME_FONTS = {"font": FONTS, "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"]}
INTRODUCTION = """# Remove things from photos
Choose a photo, paint over what should go, press **Remove**. Everything else stays as it is, pixel by pixel."""
# Without the queue an event is answered by its own request, so that no answer is lost on the stream that others share.
DIRECT = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


def status_text(text: str, step: int | None = None, total: int | None = None) -> str:
    bar = ""
    if total:
        bar = f'<progress max="{total}" value="{step or 0}" aria-label="Progress of the removal"></progress>'
    return f'<div><span role="status" aria-live="polite">{html.escape(text)}</span>{bar}</div>'


def duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _tell(do: str, **values) -> dict:
    """A command for the editor; its number makes it another than the one before, which would be no news."""
    return {"do": do, "number": random.random(), **values}


class Page:
    """The controls, which events take as inputs and give as outputs."""

    def __init__(self, demo: Demo):
        self.demo = demo
        self.state = gr.State(
            None, time_to_live=SESSION_SECONDS, delete_callback=lambda session: session and session.close()
        )
        gr.Markdown(INTRODUCTION)
        with gr.Column() as self.upload_part:
            self._build_upload()
        with gr.Column(visible=False, elem_id="work") as self.work_part:
            self.editor = gr.HTML(html_template="<div></div>", js_on_load=EDITOR_SCRIPT, elem_id="editor")
            self.marked = gr.Textbox(visible=False)
        self.status = gr.HTML(status_text(""), elem_id="status")
        with gr.Row(visible=False, elem_id="actions") as self.actions:
            self.remove = gr.Button("Remove", variant="primary", elem_id="remove")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
            self.download = gr.Button("Download", visible=False, elem_id="download")
            self.restart = gr.Button("Another photo", elem_id="restart")
        self.file = gr.DownloadButton("File", visible="hidden", elem_id="file")
        with gr.Column(visible=False, elem_id="result") as self.result_part:
            self._build_result()
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self._build_settings()

    def _build_upload(self) -> None:
        self.upload = gr.Image(
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
        self.upload.preprocess = lambda payload: payload and (payload.path, payload.orig_name)
        self.gallery = None
        if self.demo.examples:
            self.gallery = gr.Gallery(
                [(example.thumbnail(), example.title) for example in self.demo.examples],
                label="Or try one of these",
                columns=4,
                height=200,
                allow_preview=False,
                interactive=False,
                buttons=[],
                format="jpeg",
                elem_id="examples",
            )

    def _build_result(self) -> None:
        self.file_format = gr.Radio(
            [("PNG, exact", "PNG"), ("JPEG, smaller", "JPEG"), ("The mask", "mask")],
            value="PNG",
            label="Download as",
            elem_id="format",
        )
        with gr.Row(visible=False, elem_id="small") as self.small_part:
            gr.Markdown("This is the small model that comes with the app: quick, and made for trying things out.")
            self.use_full = gr.Button(f"Use the full model ({FULL_GIGABYTES} GB download, once)", size="sm")
        self.used = gr.Textbox(
            label="For the same picture again", interactive=False, lines=2, buttons=["copy"], elem_id="used"
        )

    def _build_settings(self) -> None:
        shelf = self.demo.shelf
        self.model = gr.Dropdown(shelf.names, value=shelf.default, label="Model", elem_id="model")
        self.own = gr.Textbox(
            label="Repository", placeholder="owner/name, or owner/name/folder", visible=False, elem_id="own"
        )
        with gr.Row():
            # No numbers: gradio shows and sends one that is empty as 0.
            self.steps = gr.Textbox(
                label=f"Steps (1 to {MAX_STEPS})", placeholder="The model's own", max_lines=1, elem_id="steps"
            )
            self.guidance = gr.Textbox(
                label="Guidance (0 to 20)", placeholder="The model's own", max_lines=1, elem_id="guidance"
            )
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
            self.new_seed = gr.Checkbox(True, label="A new seed each time", elem_id="new-seed")
            self.count = gr.Slider(
                1, MAX_CANDIDATES, value=1, step=1, label="Candidates to choose from", elem_id="count"
            )
        with gr.Row():
            self.margin = gr.Textbox(
                label="Edge margin (0 to 200 pixels)", placeholder="4 for each 512 pixels of the photo", max_lines=1
            )
            self.context = gr.Slider(0, 400, value=DEFAULT_CONTEXT, step=5, label="Surroundings seen (% of the mask)")
        with gr.Row():
            self.detail = gr.Radio(list(DETAILS.items()), value="auto", label="Texture", elem_id="detail")
            self.compensate = gr.Checkbox(False, label="Match the filling's colours to those around it")

    # --- what happens

    def connect(self) -> None:
        """Says which event calls what."""
        parts = [self.upload_part, self.work_part, self.actions, self.download, self.result_part]
        opened = [self.state, self.editor, self.upload, *parts, self.status]
        # Not `input`, which neither the camera nor the clipboard's button is.
        self.upload.change(self._open_upload, [self.state, self.upload], opened, **DIRECT)
        if self.gallery is not None:
            self.gallery.select(self._open_example, [self.state], opened, **DIRECT)

        self.editor.select(lambda: status_text("Looking for what is there…"), None, self.status, **DIRECT)
        self.editor.select(self._select, [self.state], [self.editor, self.status], **DIRECT)
        for slider in (self.margin, self.context):
            slider.input(None, [self.margin, self.context], None, js=SET_MARGINS, **DIRECT)
        self.model.input(lambda name: gr.update(visible=name == OWN), self.model, self.own, **DIRECT)
        self.use_full.click(lambda: (FULL, gr.update(visible=False)), None, [self.model, self.small_part], **DIRECT)

        buttons = [self.remove, self.stop]
        options = [self.model, self.own, self.steps, self.guidance, self.seed, self.new_seed, self.count]
        options += [self.margin, self.context, self.compensate, self.detail]
        shown = [self.status, self.editor, self.result_part, self.small_part, self.used, self.seed, self.download]
        running = self.remove.click(self._wait, None, [*buttons, self.editor, self.status], **DIRECT).then(
            self._run,
            [self.state, self.marked, *options],
            [*shown, *buttons],
            js=MARKED,
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="model",
            api_visibility="private",
        )
        stopped = [*buttons, self.status, self.editor]
        self.stop.click(self._stop, [self.state], stopped, cancels=[running], **DIRECT)
        self.restart.click(self._start_again, [self.state], [*opened, *buttons], cancels=[running], **DIRECT)
        # The file is written when it is asked for: a PNG of a large photo takes seconds.
        self.download.click(
            self._write, [self.state, self.marked, self.file_format], self.file, js=MARKED, **DIRECT
        ).success(None, js="() => document.querySelector('#file')?.click()", **DIRECT)

    def _arrange(self, is_open: bool) -> dict:
        """Which parts are seen while a photo is open, or is not."""
        shown = {self.upload_part: not is_open, self.work_part: is_open, self.actions: is_open}
        shown |= {self.download: False, self.result_part: False}
        return {self.upload: None, **{part: gr.update(visible=value) for part, value in shown.items()}}

    def _idle(self, text: str) -> dict:
        return {
            self.remove: gr.update(interactive=True),
            self.stop: gr.update(visible=False),
            self.editor: _tell("idle"),
            self.status: status_text(text),
        }

    def _show(self, session: Session, told: dict, text: str) -> dict:
        return {
            self.state: session,
            self.editor: _tell(**told),
            **self._arrange(True),
            self.status: status_text(text),
        }

    @friendly()
    def _open_upload(self, session, file):
        if file is None:  # as it is when the photo has been taken from the component
            # Not `gr.skip()` for all: an update makes a new component for the visitor, without our preprocessing.
            return {self.upload: None}
        path, name = file
        session = session or Session()
        try:
            photo = open_photo(path, name)
            return self._show(
                session, self.demo.open(session, photo), f"{photo.image.width}×{photo.image.height} pixels."
            )
        except VisitorError as error:
            gr.Warning(str(error), duration=None, title="Another photo, please")
            return {self.upload: None, self.status: status_text(str(error))}
        finally:
            delete_upload(path)

    @friendly()
    def _open_example(self, session, event: gr.SelectData):
        session = session or Session()
        told = self.demo.open(session, *self.demo.examples[event.index].load())
        return self._show(session, told, "What is tinted red is marked. Press Remove.")

    @friendly()
    def _start_again(self, session):
        if session is not None:
            session.close()
        return {self.state: None, **self._idle(""), **self._arrange(False), self.editor: _tell("close")}

    @friendly()
    def _select(self, session, event: gr.EventData):
        try:
            return _tell(**self.demo.select(session or Session(), event._data)), status_text("")
        except SelectionUnavailable as error:
            return _tell("add", mask=None), status_text(str(error))

    @friendly()
    def _wait(self):
        return {
            self.remove: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.editor: _tell("busy"),
            self.status: status_text("Waiting for a free place…"),
        }

    def _run(
        self, session, marked, model, own, steps, guidance, seed, is_new, count, margin, context, compensate, detail
    ):
        stop_flag = None
        try:
            with friendly():
                seed = random.randrange(2**31) if is_new else seed
                yield {self.status: status_text("Starting…"), self.seed: seed}
                for kind, value in self.demo.run(
                    session or Session(),
                    marked,
                    model,
                    own,
                    parse_number("edge margin", margin),
                    count,
                    seed,
                    steps=parse_number("steps", steps),
                    guidance=parse_number("guidance", guidance),
                    context=context,
                    color_compensation=compensate,
                    detail=detail,
                ):
                    stop_flag = session.stop_flag
                    if kind == "done":
                        yield self._idle("") | self._finished(session, value, model)
                        return
                    yield self._progress(kind, value)
            yield self._idle("Stopped.")
        except BaseException as error:
            # Also when the page is closed, or the event is cancelled: nobody waits for the result any more.
            if stop_flag is not None and stop_flag.parent.exists():
                stop_flag.touch()
            if isinstance(error, Exception):
                yield self._idle("")
            raise

    def _progress(self, kind: str, value) -> dict:
        if kind == "note":
            return {self.status: status_text(value)}
        step, left = value
        text = f"Step {step.number} of {step.total}"
        if 2 <= step.number < step.total:
            text += f", about {duration(left)} left"
        update = {self.status: status_text(text, step.number, step.total)}
        if step.preview is not None:
            update[self.editor] = _tell("preview", url=picture_url(step.preview))
        return update

    def _finished(self, session: Session, ids: list[int], model: str) -> dict:
        versions = [session.version(each) for each in ids]
        candidates = [{"id": each, "url": picture_url(v.photo.view())} for each, v in zip(ids, versions)]
        several = "Pick one, and mark the next thing" if len(ids) > 1 else "Mark the next thing"
        return {
            self.status: status_text(f"Done. {several}, or download the photo."),
            self.editor: _tell("finish", candidates=candidates),
            self.download: gr.update(visible=True),
            self.result_part: gr.update(visible=True),
            self.small_part: gr.update(visible=model == NANO),
            self.used: "\n".join(version.command for version in versions),
        }

    @friendly()
    def _stop(self, session):
        if session is not None:
            session.stop()
        return self._idle("Stopped.")

    @friendly()
    def _write(self, session, marked, file_format):
        return str(self.demo.write(session or Session(), marked, file_format))


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
        title="Remove things from photos", analytics_enabled=False, delete_cache=(300, SESSION_SECONDS)
    ) as blocks:
        Page(demo).connect()
        add_api(demo)
    return blocks


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

    Raises:
        ValueError: If the port is in use.
    """
    page = build_demo(model, selector)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=gr.themes.Default(**THEME_FONTS),
            css=CSS,
            head=HEAD,
            max_file_size=f"{MAX_FILE_MEGABYTES}mb",
            show_error=False,
            ssr_mode=False,
            footer_links=["api"],
            **kwargs,
        )
    except OSError as error:
        raise ValueError(f"`--port`: {port} cannot be listened on; another program may use it.") from error
