"""The page on which people answer a study; needs the extra `demo`."""

import base64
import os
import secrets
import time

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .study import Study

# The pictures in a row, each with its number; the number keys choose, too.
SCRIPT = """
const show = () => {
  const { photo, options = [], text = "" } = props.value ?? {};
  const figure = (url, label, index) => {
    const element = document.createElement(index ? "button" : "figure");
    const picture = document.createElement("img");
    const caption = document.createElement("span");
    Object.assign(picture, { src: url, alt: label });
    caption.textContent = label;
    element.append(picture, caption);
    if (index) element.addEventListener("click", () => trigger("select", { index }));
    return element;
  };
  const row = document.createElement("div");
  row.className = "choices";
  row.append(...options.map((url, k) => figure(url, String(k + 1), k + 1)));
  const heading = document.createElement("p");
  heading.textContent = text;
  heading.setAttribute("role", "status");
  element.replaceChildren(heading, ...(photo ? [row, figure(photo, "The photo, with its hole", 0)] : []));
};
watch("value", show);
show();
document.addEventListener("keydown", (event) => {
  const index = Number(event.key);
  if (index >= 1 && index <= (props.value?.options ?? []).length && !event.ctrlKey && !event.metaKey)
    trigger("select", { index });
});
"""
CSS = """
.choices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px; }
.choices button { cursor: pointer; border: 2px solid transparent; border-radius: 8px; padding: 6px; }
.choices button:hover, .choices button:focus-visible { border-color: var(--color-accent); }
.choices img { width: 100%; display: block; }
.choices span { font-size: 1.3rem; }
figure img { max-width: 300px; }
"""


def build_study_page(study: Study) -> gr.Blocks:
    """
    Builds the page: the consent first, then one case after another, by click or by the keys 1 to 9.

    Args:
        study ([`Study`]): The study.

    Returns:
        `gradio.Blocks`: The page; [`serve_study`] serves it.
    """

    def picture_url(name: str) -> str:
        """Without loss, and without the place or the name of a file."""
        data = (study.folder / "pictures" / name).read_bytes()
        return "data:image/png;base64," + base64.b64encode(data).decode()

    def next_case(person: str) -> tuple[dict, float]:
        done = study.answered(person)
        left = [case for case in study.order(person) if case not in done]
        if not left:
            return {"text": "That was the last one. Thank you!"}, 0.0
        case = left[0]
        value = {
            "case": case,
            "photo": picture_url(study.cases[case]["photo"]),
            "options": [picture_url(option) for option in study.options(person, case)],
            "text": f"{len(done) + 1} of {len(study.cases)}: which one looks best? Click on it, or press its number.",
        }
        return value, time.time()

    def begin(person: str):
        person = person or secrets.token_hex(8)
        return (person, gr.update(visible=False), *next_case(person))

    def choose(person: str, value: dict, since: float, event: gr.EventData):
        options = study.options(person, value["case"])
        study.answer(person, value["case"], options[event.index - 1], time.time() - since)
        return next_case(person)

    with gr.Blocks(title="Which one looks best?", analytics_enabled=False) as page:
        person = gr.BrowserState("", storage_key="moebius-study", secret="moebius-study")
        since = gr.State(0.0)
        with gr.Column() as welcome:
            gr.Markdown(f"# Which one looks best?\n\n{study.consent}")
            start = gr.Button("I have read this and take part", variant="primary", elem_id="start")
        case = gr.HTML(html_template="<div></div>", js_on_load=SCRIPT, elem_id="case")
        direct = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        start.click(begin, person, [person, welcome, case, since], **direct)
        case.select(choose, [person, case, since], [case, since], **direct)
    return page


def serve_study(study: Study, host: str = "127.0.0.1", port: int = 7861, **kwargs):
    """
    Serves a study.

    Args:
        study ([`Study`]): The study.
        host (`str`, defaults to `"127.0.0.1"`): Address to listen on; `"0.0.0.0"` is open to the network.
        port (`int`, defaults to 7861): Port.
        kwargs: Other arguments of `gradio.Blocks.launch`.
    """
    return build_study_page(study).launch(
        server_name=host, server_port=port, css=CSS, ssr_mode=False, footer_links=[], **kwargs
    )
