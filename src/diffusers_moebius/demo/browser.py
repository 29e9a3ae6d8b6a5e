"""What the page adds to gradio's own in the browser: its looks, and a script for what gradio has no words for."""

import json

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
/* Thrice, to outdo the components' own rules, some of which take the outline away. */
.gradio-container.gradio-container.gradio-container :focus-visible {
  outline: 3px solid var(--color-accent) !important;
  outline-offset: -2px;
}
#status { min-height: 1.6rem; }
#status progress { display: block; width: 100%; height: 0.6rem; margin-top: 4px; accent-color: var(--color-accent); }
#actions button { min-height: 2.75rem; }
#actions { scroll-margin-top: 0.5rem; }
/* There is one colour to paint with, and a canvas that is cleared has lost its photo. */
#editor button[aria-label="Color"], #editor button[aria-label="Clear canvas"] { display: none; }
@media (max-width: 480px) {
  .gradio-container { padding: 0.5rem !important; }
  #actions button { flex: 1 1 100%; }
  #editor { height: 400px !important; }
  /* The toolbar needs the place, and the tab above says it as well. */
  #editor > [data-testid=block-label] { display: none; }
  /* Above the photo, beside the other toolbar, not upon it. */
  #editor .toolbar-wrap { top: 4px !important; left: 4px !important; }
  #editor .toolbar-wrap, #editor .toolbar-wrap .half-container {
    flex-direction: row !important; width: max-content !important;
  }
  /* One below the other, so that labels have the width. */
  .form { flex-direction: column !important; }
  #by-keyboard .form { flex-direction: row !important; }
}
"""
# Fits a laptop's screen together with the buttons below.
EDITOR_HEIGHT = "clamp(350px, 62vh, 700px)"

# Names for what gradio leaves without one: selector, attributes.
NAMES = [
    ["#editor [data-testid=image]", {"role": "group", "aria-label": "Paint over what should go"}],
    [
        "#editor .pixi-target canvas",
        {
            "role": "img",
            "aria-label": "Your photo, with what is marked in red. Painting takes a mouse, a pen or a finger; "
            "“Mark by keyboard” below does without.",
        },
    ],
    ["#editor .pixi-target-crop", {"aria-hidden": "true"}],
    ["#editor .zoom-number [role=button]", {"aria-description": "Zoom; press for a list"}],
    ["#editor input[type=range]", {"aria-label": "Brush size"}],
    ["#used textarea", {"aria-label": "Command for the same picture again"}],
    ["#slider img:not(.fixed)", {"alt": "Before"}],
    ["#slider img.fixed", {"alt": "After"}],
]

# Where the focus goes when what had it is gone, and one of these appears.
FOCUS = ["#work [role=tab]", "#stop", "#download", "#photo button"]

# Each part alone, so that one that fails takes no other with it; the page works without any.
SCRIPT = """
(() => {
  // Whether Shift was held at the last click, which gradio's events do not say.
  document.addEventListener("click", (event) => { window.moebiusShift = event.shiftKey; }, true);

  // Gradio drops a click on a picture that is still on its way, as the tinted one is after each click.
  document.addEventListener("click", (event) => {
    const picture = event.target;
    if (!picture.matches?.("#clicked img") || picture.complete) return;
    event.stopImmediatePropagation();
    picture.addEventListener("load", () => picture.dispatchEvent(new MouseEvent("click", event)), { once: true });
  }, true);

  // A picture that is pasted anywhere on the page becomes the photo, if one is waited for.
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    const input = document.querySelector("#photo input[type=file]");
    if (!files.length || !input) return;
    const transfer = new DataTransfer();
    transfer.items.add(files[0]);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    event.preventDefault();
  });

  const setNames = () => {
    for (const [selector, attributes] of NAMES)
      for (const element of document.querySelectorAll(selector))
        for (const [key, value] of Object.entries(attributes))
          if (element.getAttribute(key) !== value) element.setAttribute(key, value);
  };

  // Buttons come and go with what is possible; whoever uses the keyboard must not be sent back to the top each time.
  let before = null;
  let target = null;
  let since = 0;
  let given = null;
  const follow = () => {
    const now = Object.fromEntries(
      [...FOCUS, "#status progress"].map((selector) => [selector, document.querySelector(selector) !== null]),
    );
    const last = before;
    before = now;
    if (last === null) return;
    const old = target;
    for (const selector of FOCUS)
      if (now[selector] && !last[selector]) target = selector;
    if (last["#stop"] && !now["#stop"]) target = now["#download"] ? "#download" : "#remove";
    if (target !== old) since = performance.now();
    const active = document.activeElement;
    // One update of the page comes in parts: what was given the focus a part ago passes it on. Nobody is moved late.
    if (target !== null && (!active || active === document.body || active.disabled || active === given)) {
      given = document.querySelector(target);
      given?.focus({ preventScroll: true });
      target = null;
    } else if (performance.now() - since > 2000) {
      target = null;
    }
    // What is going on is seen without scrolling.
    if (now["#status progress"] && !last["#status progress"]) document.querySelector("#actions")?.scrollIntoView();
  };

  const watch = (update) => {
    const watching = new MutationObserver(update);
    watching.observe(document.documentElement, { childList: true, subtree: true });
  };
  watch(setNames);
  watch(follow);
})();
"""
# Gradio (6.31) ends the stream on which answers come when none is due. An event that is sent while that end is on its
# way is taken for one on the old stream: no other is opened, and its answer never comes. So an end that crosses an
# event is kept from gradio's client, which goes on reading from the next stream as if it were the same.
STREAM = r"""
(() => {
  const plain = window.fetch.bind(window);
  const sending = new Set(); // events on their way to the server
  const due = new Set(); // ids of those it has taken and not answered
  const early = new Set(); // ids of those that were answered before the client was told that they are taken
  const encoder = new TextEncoder();
  let ended = Promise.resolve(); // that the client has seen the last stream's end

  const send = async (request) => {
    const response = plain(...request);
    const noted = response
      .then((taken) => taken.clone().json())
      .then(({ event_id }) => event_id && !early.delete(event_id) && due.add(event_id))
      .catch(() => {}); // refused, or not sent: the client sees to that
    sending.add(noted);
    await noted;
    sending.delete(noted);
    await ended;
    return response;
  };

  // Hands on all messages but the one that ends the stream, which is returned; null if there is none.
  const handOn = async (body, controller) => {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return null;
      const messages = (text + value).split("\n\n");
      text = messages.pop();
      for (const message of messages) {
        const { msg, event_id } = JSON.parse(message.replace(/^data: /, ""));
        if (msg === "close_stream") {
          reader.cancel().catch(() => {}); // else the connection is kept
          return encoder.encode(message + "\n\n");
        }
        if (msg === "process_completed" && !due.delete(event_id)) early.add(event_id);
        controller.enqueue(encoder.encode(message + "\n\n"));
      }
    }
  };

  const listen = async (request) => {
    // The client was told late that an event is taken, and has its answer already.
    if (!due.size && !sending.size) return new Response('data: {"msg": "close_stream"}\n\n');
    const first = await plain(request.clone());
    if (!first.ok) return first;
    const start = async (controller) => {
      try {
        let end = await handOn(first.body, controller);
        for (;;) {
          while (sending.size) await Promise.all(sending);
          if (end === null || !due.size) break;
          const next = await plain(request.clone());
          if (!next.ok) break;
          end = await handOn(next.body, controller);
        }
        due.clear();
        if (end !== null) {
          ended = new Promise((resolve) => {
            request.signal.addEventListener("abort", resolve);
            setTimeout(resolve, 1000);
          });
          controller.enqueue(end);
        }
        controller.close();
      } catch (error) {
        due.clear();
        controller.error(error);
      }
    };
    return new Response(new ReadableStream({ start }), { status: first.status, headers: first.headers });
  };

  window.fetch = (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    if (/\/queue\/join(\?|$)/.test(url)) return send(request);
    if (/\/queue\/data(\?|$)/.test(url)) return listen(new Request(...request));
    return plain(...request);
  };
})();
"""
# Gradio's rules for `css` do not reach its footer, of which a phone shows a dot.
FOOTER = "<style>@media (max-width: 480px) { footer { display: none !important; } }</style>"
SCRIPT = SCRIPT.replace("NAMES", json.dumps(NAMES)).replace("FOCUS", json.dumps(FOCUS))
HEAD = f"{FOOTER}<script>{STREAM}</script><script>{SCRIPT}</script>"

# Put before a click on the picture is sent: replaces the last input by whether Shift was held.
ADD_SHIFT = "(...values) => [...values.slice(0, -1), window.moebiusShift === true]"
