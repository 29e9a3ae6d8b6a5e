// What gradio has no words for: pictures from the clipboard, names, and where the focus goes.
// Each part alone, so that one that fails takes no other with it; the page works without any.
(() => {
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

  // Gradio (6.31) loses a run that is asked for while the end of the last run's stream of answers is on its way: see
  // docs/gradio-lost-events.md. So it is asked for once that stream has ended.
  const fetchNow = window.fetch.bind(window);
  let ended = Promise.resolve();
  window.fetch = async (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    if (/\/queue\/join(\?|$)/.test(url)) await Promise.race([ended, new Promise((later) => setTimeout(later, 5000))]);
    const response = await fetchNow(...request);
    if (!/\/queue\/data(\?|$)/.test(url) || !response.body) return response;
    ended = new Promise((end) => {
      new Request(...request).signal.addEventListener("abort", end);
      response.stream = response.body.pipeThrough(new TransformStream({ flush: end }));
    });
    return new Response(response.stream, { status: response.status, headers: response.headers });
  };

  const names = [["#used textarea", "Command for the same picture again"]];
  // Where the focus goes when what had it is gone: whoever uses the keyboard must not be sent back to the top.
  const next = ["#stop", "#download", "#remove", ".moebius-editor .view", "#photo button"];
  const isThere = (element) => element?.isConnected && element.checkVisibility() && !element.disabled;
  let last = null;
  document.addEventListener("focusin", (event) => (last = event.target));
  document.addEventListener("pointerdown", () => (last = null));
  new MutationObserver(() => {
    for (const [selector, label] of names) document.querySelector(selector)?.setAttribute("aria-label", label);
    if (last === null || isThere(last)) return;
    const target = next.map((selector) => document.querySelector(selector)).find(isThere);
    target?.focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["class", "disabled"] });
})();
