"""The page of the demo: its controls, how they lie, and which of [`Demo`]'s functions each of them calls."""

import html
import json
import os
import random
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .api import add_api
from .handlers import DEFAULT_CONTEXT, DETAILS, MAX_CANDIDATES, MAX_STEPS, MIN_CONTEXT_PIXELS, Demo, friendly
from .models import FULL, FULL_GIGABYTES, NANO
from .photos import MAX_FILE_MEGABYTES, MAX_MEGAPIXELS, VisitorError, open_photo, painted_mask, picture_url
from .session import Session, call_glibc, delete_upload

# What a visitor leaves behind is deleted when the page is closed, and after so many seconds in any case.
SESSION_SECONDS = 3600
MAX_WAITING = 64
M_ARENA_MAX = -8  # of malloc.h

STATIC = Path(__file__).with_name("static")


def _read(*names: str) -> str:
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


# Put before an event is sent: what the editor holds takes the place of its second input.
MARKED = "(...values) => [values[0], JSON.stringify(window.moebiusEditor?.marked ?? {}), ...values.slice(2)]"
SET_MARGINS = (
    f"(grow, percent) => {{ window.moebiusEditor?.setMargins(grow, percent, {MIN_CONTEXT_PIXELS}); return []; }}"
)
# Said before the server is told, whose answer may come after the run's last word.
STOPPING = """(...values) => {
  document.querySelector("#status [role=status]").textContent = "Stopping…";
  return values;
}"""
# Fonts by name alone: gradio's own themes would fetch theirs from another server.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME_FONTS = {"font": FONTS, "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"]}
INTRODUCTION = """# Remove things from photos
Choose a photo, paint over what should go, press **Remove**. Everything else stays as it is, pixel by pixel."""
MODEL_INFO = "One of these, or owner/name, or owner/name/folder, of a repository on the hub."
# Without the queue an event is answered by its own request, so that no answer is lost on the stream that others share.
DIRECT = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


def status_text(text: str, step: int = 0, total: int = 0) -> str:
    bar = f'<progress max="{total}" value="{step}" aria-label="Progress of the removal"></progress>' if total else ""
    return f'<div><span role="status" aria-live="polite">{html.escape(text)}</span>{bar}</div>'


def tell(do: str, **values) -> dict:
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
        with gr.Column(visible=False) as self.work_part:
            script = _read("editor.js", "component.js").replace("export function", "function")
            self.editor = gr.HTML(html_template="<div></div>", js_on_load=script, elem_id="editor")
            self.marked = gr.Textbox(visible=False)
        self.status = gr.HTML(status_text(""), elem_id="status")
        with gr.Row(visible=False, elem_id="actions") as self.actions:
            self.remove = gr.Button("Remove", variant="primary", elem_id="remove")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
            self.download = gr.Button("Download", visible=False, elem_id="download")
            self.restart = gr.Button("Another photo")
        self.file = gr.DownloadButton("File", visible="hidden", elem_id="file")
        with gr.Column(visible=False) as self.result_part:
            formats = [("PNG, exact", "PNG"), ("JPEG, smaller", "JPEG"), ("The mask", "mask")]
            self.file_format = gr.Radio(formats, value="PNG", label="Download as")
            with gr.Row(visible=False) as self.small_part:
                gr.Markdown("This is the small model that comes with the app: quick, and made for trying things out.")
                self.use_full = gr.Button(f"Use the full model ({FULL_GIGABYTES} GB download, once)", size="sm")
            self.used = gr.Textbox(
                label="For the same picture again", interactive=False, lines=2, buttons=["copy"], elem_id="used"
            )
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.options = self._build_settings()
        self._connect()

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
        self.gallery = gr.Gallery(
            [(example.thumbnail(), example.title) for example in self.demo.examples],
            label="Or try one of these",
            visible=bool(self.demo.examples),
            columns=4,
            height=200,
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="jpeg",
            elem_id="examples",
        )

    def _build_settings(self) -> dict[str, gr.components.Component]:
        """What a run takes, by its names in [`Demo.run`]. Texts for numbers: gradio sends one that is empty as 0."""
        shelf, text = self.demo.shelf, {"max_lines": 1, "placeholder": "The model's own"}
        options = {
            "model": gr.Dropdown(
                list(shelf.sources), value=shelf.default, allow_custom_value=True, label="Model", info=MODEL_INFO
            ),
        }
        with gr.Row():
            options |= {
                "steps": gr.Textbox(label=f"Steps (1 to {MAX_STEPS})", elem_id="steps", **text),
                "guidance": gr.Textbox(label="Guidance (0 to 20)", **text),
            }
        with gr.Row():
            options |= {
                "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
                "is_new": gr.Checkbox(True, label="A new seed each time"),
                "count": gr.Slider(1, MAX_CANDIDATES, value=1, step=1, label="Candidates to choose from"),
            }
        with gr.Row():
            text["placeholder"] = "over what is left of an object"
            options |= {
                "edge_margin": gr.Textbox(label="Edge margin (0 to 200 pixels)", **text),
                "context": gr.Slider(0, 400, DEFAULT_CONTEXT, step=5, label="Surroundings seen (% of the mask)"),
            }
        with gr.Row():
            options |= {
                "detail": gr.Radio(list(DETAILS.items()), value="auto", label="Texture"),
                "color_compensation": gr.Checkbox(False, label="Match the filling's colours to those around it"),
            }
        return options

    def _connect(self) -> None:
        """Says which event calls what."""
        margins = [self.options["edge_margin"], self.options["context"]]
        parts = [self.upload_part, self.work_part, self.actions, self.download, self.result_part]
        opened = [self.state, self.editor, self.upload, *parts, self.status]
        # Not `input`, which neither the camera nor the clipboard's button is.
        self.upload.change(self._open_upload, self.upload, opened, **DIRECT)
        self.gallery.select(self._open_example, None, opened, **DIRECT)
        self.editor.select(self._select, self.state, [self.editor, self.status], **DIRECT)
        for control in margins:
            control.input(None, margins, None, js=SET_MARGINS, **DIRECT)
        chosen = [self.options["model"], self.small_part]
        self.use_full.click(lambda: (FULL, gr.update(visible=False)), None, chosen, **DIRECT)

        idle = [self.remove, self.stop, self.editor, self.status]
        result = [self.download, self.result_part, self.small_part, self.used, self.options["seed"]]
        running = self.remove.click(self._wait, self.state, idle, **DIRECT).then(
            self._run,
            [self.state, self.marked, *self.options.values()],
            [*idle, *result],
            js=MARKED,
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="model",
            api_visibility="private",
        )
        # Not cancelled by gradio, whose cancelling may arrive so late that it ends the next run instead.
        self.stop.click(self._stop, self.state, None, js=STOPPING, **DIRECT)
        closed = list(dict.fromkeys([*opened, *idle]))
        self.restart.click(self._start_again, self.state, closed, cancels=[running], **DIRECT)
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
            self.editor: tell("idle"),
            self.status: status_text(text),
        }

    def _show(self, text: str, *photo_and_mask) -> dict:
        session, told = self.demo.open(*photo_and_mask)
        shown = {self.state: session, self.editor: tell("open", **told), self.status: status_text(text)}
        return self._arrange(True) | shown

    @friendly()
    def _open_upload(self, file):
        if file is None:  # as it is when the photo has been taken from the component
            # Not `gr.skip()` for all: an update makes a new component for the visitor, without our preprocessing.
            return {self.upload: None}
        try:
            photo = open_photo(*file)
        except VisitorError as error:
            gr.Warning(str(error), duration=None, title="Another photo, please")
            return {self.upload: None, self.status: status_text(str(error))}
        finally:
            delete_upload(file[0])
        return self._show(f"{photo.image.width}×{photo.image.height} pixels.", photo)

    @friendly()
    def _open_example(self, event: gr.SelectData):
        return self._show("What is tinted red is marked. Press Remove.", *self.demo.examples[event.index].load())

    @friendly()
    def _start_again(self, session):
        if session is not None:
            session.close()
        return {self.state: None, **self._idle(""), **self._arrange(False), self.editor: tell("close")}

    @friendly()
    def _select(self, session, event: gr.EventData):
        try:
            return tell("add", **self.demo.select(_opened(session), event._data)), status_text("")
        except VisitorError as error:
            return tell("add"), status_text(str(error))

    @friendly()
    def _wait(self, session):
        _opened(session).begin_run()
        return {
            self.remove: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.editor: tell("busy"),
            self.status: status_text("Waiting for a free place…"),
        }

    def _run(self, session, marked, *values):
        options = dict(zip(self.options, values))
        try:
            with friendly():
                if options.pop("is_new"):
                    options["seed"] = random.randrange(2**31)
                yield {self.status: status_text("Starting…"), self.options["seed"]: options["seed"]}
                marked = json.loads(marked)
                view = _opened(session).version(marked["photo"]).photo.view
                mask = painted_mask(marked["mask"], view.size)
                for kind, value in self.demo.run(session, marked["photo"], mask, **options):
                    if kind == "done":
                        yield self._idle("") | self._finished(session, value, options["model"])
                        return
                    yield self._progress(kind, value)
                yield self._idle("Stopped.")
        except gr.Error:
            yield self._idle("")
            raise

    def _progress(self, kind: str, value) -> dict:
        if kind == "note":
            return {self.status: status_text(value)}
        step, left = value
        text = f"Step {step.number} of {step.total}"
        if 2 <= step.number < step.total:
            text += f", about {max(1, round(left))} s left" if left < 90 else f", about {round(left / 60)} min left"
        update = {self.status: status_text(text, step.number, step.total)}
        if step.preview is not None:
            update[self.editor] = tell("preview", url=picture_url(step.preview))
        return update

    def _finished(self, session: Session, ids: list[int], model: str) -> dict:
        versions = [session.version(each) for each in ids]
        candidates = [{"id": each, "url": picture_url(v.photo.view)} for each, v in zip(ids, versions)]
        several = "Pick one, and mark the next thing" if len(ids) > 1 else "Mark the next thing"
        return {
            self.status: status_text(f"Done. {several}, or download the photo."),
            self.editor: tell("finish", candidates=candidates),
            self.download: gr.update(visible=True),
            self.result_part: gr.update(visible=True),
            self.small_part: gr.update(visible=model == NANO),
            self.used: "\n".join(version.settings.command(version.photo.name) for version in versions),
        }

    @friendly()
    def _stop(self, session):
        _opened(session).stop()

    @friendly()
    def _write(self, session, marked, file_format):
        return str(self.demo.write(_opened(session), json.loads(marked)["photo"], file_format))


def _opened(session: Session | None) -> Session:
    if session is None:
        raise VisitorError("Your photo is no longer kept here. Please open it again.")
    return session


def build_demo(model: str | None = None, selector: str | None = None) -> gr.Blocks:
    """
    Builds the page.

    Args:
        model (`str`, *optional*): The model that is chosen at first; see [`ModelShelf`].
        selector (`str`, *optional*): Repository or folder of the SAM 2 model of click to select; see
            [`ObjectSelector`].

    Returns:
        `gradio.Blocks`: The page; [`launch_demo`] serves it with the limits and looks that belong to it.
    """
    demo = Demo(model, selector)
    with gr.Blocks(
        title="Remove things from photos", analytics_enabled=False, delete_cache=(300, SESSION_SECONDS)
    ) as blocks:
        Page(demo)
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
    # One pool of memory for all threads, which come and go: what is free in the others is never given back.
    call_glibc("mallopt", M_ARENA_MAX, 1)
    page = build_demo(model, selector)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=gr.themes.Default(**THEME_FONTS),
            css=_read("page.css", "editor.css"),
            head=f"<script>{_read('page.js')}</script>",
            max_file_size=f"{MAX_FILE_MEGABYTES}mb",
            show_error=False,
            ssr_mode=False,
            footer_links=["api"],
            **kwargs,
        )
    except OSError as error:
        raise ValueError(f"`--port`: {port} cannot be listened on; another program may use it.") from error
