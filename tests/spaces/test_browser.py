"""The page in a real browser."""

import base64
import io
import re
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from diffusers_moebius.pictures.mask import grow_over_rims

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
TIMEOUT = 90_000  # ms; the machine may be busy with other things


class Visitor:
    """A visitor with a browser of their own."""

    def __init__(self, browser, url, script=None, **options):
        self.context = browser.new_context(
            **{"viewport": {"width": 900, "height": 700}, "accept_downloads": True, **options}
        )
        if script is not None:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        # Shown with a test that fails.
        self.page.on("console", lambda message: message.type == "error" and print("console:", message.text))
        self.page.on("pageerror", lambda error: print("page:", error))
        self.page.goto(url)
        self.page.wait_for_selector("#photo input[type=file]", state="attached")

    @property
    def status(self):
        return self.page.locator("#status")

    @property
    def view(self):
        return self.page.locator(".moebius-editor .view")

    def told(self, text):
        sync_api.expect(self.status).to_contain_text(text, timeout=TIMEOUT)

    def tool(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def upload(self, path):
        self.page.set_input_files("#photo input[type=file]", str(path))
        self.wait_for_photo()

    def wait_for_photo(self):
        self.told("pixels")
        self.page.wait_for_function("window.moebiusEditor?.marked.photo")
        self.view.wait_for(state="visible")

    def at(self, x, y):
        """Where in the window a point of the photo is, as shares of its width and height."""
        box = self.page.locator(".moebius-editor .stage").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, *points, button="left"):
        """Presses at the first point of the photo, and lets go at the last."""
        self.view.scroll_into_view_if_needed()
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down(button=button)
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=5)
        self.page.mouse.up(button=button)

    def paint(self, **options):
        """A stroke across the middle."""
        self.drag((0.4, 0.5), (0.5, 0.52), (0.6, 0.5), **options)

    def marked(self):
        """The mask as the editor would send it."""
        url = self.page.evaluate("document.querySelector('.moebius-editor canvas.mask').toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            return np.asarray(image.convert("RGBA"))[..., 3] >= 128

    def set_steps(self, steps):
        if not self.page.locator("#steps").is_visible():
            self.page.locator("#settings button").first.click()
        number = self.page.get_by_label("Steps")
        number.fill(str(steps))
        number.press("Tab")

    def run(self):
        self.page.click("#remove")
        self.told("Done")

    def download(self, folder) -> Path:
        with self.page.expect_download() as download:
            self.page.click("#download")
        path = Path(folder) / download.value.suggested_filename
        download.value.save_as(path)
        return path


@pytest.fixture
def visit(browser, demo_url):
    visitors = []

    def visit(**options):
        visitors.append(Visitor(browser, demo_url, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.context.close()


def changed(before, after):
    """Which pixels differ."""
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (before, after))
    assert before.shape == after.shape
    return (before != after).any(axis=2)


def test_strokes_are_filled_in_place_and_the_rest_is_exact(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.told("Marked")
    mask = grow_over_rims(visitor.marked(), Image.open(photo))
    visitor.set_steps(6)
    visitor.run()
    path = visitor.download(tmp_path)
    assert path.name == "holiday-moebius.png"
    difference = changed(photo, path)
    assert difference[mask].mean() > 0.5 and not difference[~mask].any()
    used = visitor.page.locator("#used textarea").input_value()
    assert re.search(r"--steps 6 .*--seed \d+", used)

    # What was filled is in sight, in the place where it was marked, and nothing is marked any more.
    assert visitor.page.evaluate("moebiusEditor.marked.mask === null")
    sync_api.expect(visitor.view).to_be_in_viewport()
    visitor.page.get_by_label("JPEG, smaller").check()
    assert Image.open(visitor.download(tmp_path)).format == "JPEG"
    visitor.page.get_by_role("radio", name="The mask").check()
    marked = np.asarray(Image.open(visitor.download(tmp_path))) > 0
    assert (grow_over_rims(marked, Image.open(photo)) == mask).all()
    visitor.page.get_by_label("PNG, exact").check()

    # The next thing is painted right there.
    visitor.drag((0.1, 0.1), (0.2, 0.1))
    second_mask = grow_over_rims(visitor.marked(), Image.open(path))
    visitor.run()
    second = visitor.download(tmp_path / "second")
    difference = changed(photo, second)
    assert difference[second_mask].mean() > 0.5 and not difference[~(mask | second_mask)].any()

    # Removals are undone and done again; another goes on from what is shown.
    history = visitor.page.get_by_role("group", name="History").get_by_role("button")
    sync_api.expect(history).to_have_count(3)
    visitor.page.keyboard.press("Control+Z")
    visitor.page.keyboard.press("Control+Z")
    assert not changed(photo, visitor.download(tmp_path / "undone")).any()
    visitor.page.keyboard.press("Control+Shift+Z")
    assert not changed(path, visitor.download(tmp_path / "again")).any()
    history.nth(0).click()
    visitor.drag((0.8, 0.8), (0.9, 0.8))
    visitor.run()
    sync_api.expect(history).to_have_count(2)
    outside = {urlparse(url).hostname for url in visitor.requests if url.startswith(("http", "ws"))}
    assert outside == {"127.0.0.1"}


def test_tools_of_the_editor(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    stroke = visitor.marked()
    assert 0.005 < stroke.mean() < 0.2 and stroke[100, 150]
    visitor.paint(button="right")  # erases
    assert not visitor.marked().any()
    visitor.told("Nothing is marked")
    visitor.page.keyboard.press("Control+Z")
    assert (visitor.marked() == stroke).all()
    visitor.tool("Redo")
    assert not visitor.marked().any()
    visitor.tool("Box")
    visitor.drag((0.2, 0.2), (0.5, 0.6))
    box = visitor.marked()
    columns = np.flatnonzero(box.any(0))
    assert abs(columns.min() - 60) <= 1 and abs(columns.max() - 150) <= 2
    assert box.sum() == pytest.approx(7200, rel=0.05)
    visitor.tool("Eraser")
    visitor.drag((0.35, 0.4), (0.35, 0.42))
    assert 0 < visitor.marked().sum() < box.sum()

    def from_menu(name):
        visitor.page.locator(".moebius-editor summary").click()
        visitor.page.get_by_role("button", name=name).click()

    from_menu("Fill its holes")
    assert (visitor.marked() == box).all()
    from_menu("Invert")
    assert (visitor.marked() == ~box).all()
    visitor.page.locator(".moebius-editor summary").click()
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("button", name="Save the mask").click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    assert ((np.asarray(Image.open(saved).convert("L")) > 127) == ~box).all()
    from_menu("Unmark everything")
    assert not visitor.marked().any()

    # A mask comes in by its brightness or its alpha, in any size of the photo's shape.
    large = Image.fromarray(box).resize((600, 400))
    transparent = Image.new("RGBA", large.size)
    transparent.putalpha(large.convert("L"))
    for index, image in enumerate((large.convert("RGB"), transparent)):
        path = tmp_path / f"mask{index}.png"
        image.save(path)
        visitor.page.set_input_files("[data-file]", str(path))
        visitor.told("Marked: 12 %")
        assert (visitor.marked() != box).mean() < 0.01
        from_menu("Unmark everything")
    large.resize((300, 300)).save(path)
    visitor.page.set_input_files("[data-file]", str(path))
    visitor.told("another shape")

    # Zoomed in, the same movement covers less.
    visitor.tool("Brush")
    for _ in range(4):
        visitor.tool("Zoom in")
    middle = visitor.view.bounding_box()
    x, y = middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2
    visitor.page.mouse.move(x - 30, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x + 30, y, steps=4)
    visitor.page.mouse.up()
    assert 0 < visitor.marked().sum() < stroke.sum()


def test_stop_and_reload(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(100)
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.locator("#status progress")).to_be_visible(timeout=TIMEOUT)
    visitor.page.click("#stop", force=True)  # on a busy machine the run would end while it waits for the page to rest
    visitor.told("Stopped")
    sync_api.expect(visitor.page.locator("#remove")).to_be_enabled()
    sync_api.expect(visitor.page.locator("#stop")).to_be_hidden()
    assert not visitor.page.locator("#download").is_visible()
    assert not visitor.page.evaluate("moebiusEditor.marked.mask === null")  # what was marked still is
    visitor.set_steps(4)
    visitor.run()  # the place is free again
    visitor.page.reload()
    visitor.page.wait_for_selector("#photo input[type=file]", state="attached")
    assert not visitor.page.locator("#download").is_visible()


def test_two_visitors_at_once(visit, photo, tmp_path):
    second_photo = tmp_path / "other.png"
    Image.fromarray(255 - np.asarray(Image.open(photo))).save(second_photo)
    visitors = {photo: visit(), second_photo: visit()}
    for path, visitor in visitors.items():
        visitor.upload(path)
        visitor.paint()
        visitor.set_steps(12)
    for visitor in visitors.values():
        visitor.page.click("#remove")
    for path, visitor in visitors.items():
        visitor.told("Done")
        difference = changed(path, visitor.download(tmp_path))
        assert difference.any() and difference.mean() < 0.2


def test_a_phone_photo(visit, phone_photo, tmp_path):
    visitor = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    visitor.upload(phone_photo)
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    result = np.asarray(Image.open(visitor.download(tmp_path)))
    from PIL import ImageOps

    upright = np.asarray(ImageOps.exif_transpose(Image.open(phone_photo)))
    assert result.shape == upright.shape == (4000, 3000, 3)
    difference = (result != upright).any(axis=2)
    assert difference.any() and difference.mean() < 0.1
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(value) for value in re.findall(r"\d+", background)[:3]) < 90


def test_a_bad_file_gets_a_message_and_a_good_one_works(visit, photo, tmp_path):
    visitor = visit()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is no picture")
    visitor.page.set_input_files("#photo input[type=file]", str(bad))
    visitor.told("not a picture")
    assert str(tmp_path) not in visitor.page.content()
    visitor.upload(photo)
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.get_by_text("Nothing is marked yet")).to_be_visible(timeout=TIMEOUT)
    sync_api.expect(visitor.page.locator("#remove")).to_be_enabled()
    # Another photo may be the same one.
    visitor.page.get_by_role("button", name="Another photo").click()
    visitor.upload(photo)


def test_select_by_click_and_by_scribble(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.tool("Select")
    visitor.drag((0.2, 0.2))
    visitor.told("Marked")
    once = visitor.marked()
    assert once.any()
    visitor.page.keyboard.down("Shift")
    visitor.drag((0.2, 0.2))
    visitor.page.keyboard.up("Shift")
    visitor.told("Nothing is marked")
    # Two clicks at once count both, whichever is answered first.
    visitor.drag((0.2, 0.2))
    visitor.drag((0.7, 0.7))
    visitor.told("Marked")
    visitor.page.wait_for_timeout(3000)
    assert visitor.marked()[once].all()
    square = tmp_path / "square.png"
    pixels = np.full((200, 300, 3), 90, np.uint8)
    pixels[60:140, 100:200] = (200, 40, 40)
    Image.fromarray(pixels).save(square)
    visitor.page.get_by_role("button", name="Another photo").click()
    visitor.upload(square)
    visitor.tool("Select")
    visitor.drag((0.38, 0.4), (0.62, 0.5), (0.4, 0.6))
    visitor.told("Marked: 13 %")
    truth = pixels[..., 0] == 200
    found = visitor.marked()
    assert (found & truth).sum() / (found | truth).sum() > 0.95


def test_candidates(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(3)
    visitor.page.get_by_label("number input for Candidates").fill("3")
    visitor.page.get_by_label("number input for Candidates").press("Tab")
    visitor.run()
    candidates = visitor.page.get_by_role("group", name="Pick one").get_by_role("button")
    sync_api.expect(candidates).to_have_count(3)
    assert len(visitor.page.locator("#used textarea").input_value().splitlines()) == 3
    first = visitor.download(tmp_path)
    candidates.nth(2).click()
    third = visitor.download(tmp_path / "third")
    assert changed(first, third).any() and changed(photo, third).mean() < 0.2


def test_by_keyboard_alone(visit, photo, tmp_path):
    visitor = visit()
    keyboard, page = visitor.page.keyboard, visitor.page

    def go_to(name):
        """Tabs on to what is called so, and sees that the focus is visible."""
        for _ in range(60):
            keyboard.press("Tab")
            found = page.evaluate(
                """name => {
                    const e = document.activeElement;
                    const text = e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.innerText || '';
                    return text.trim().startsWith(name) && getComputedStyle(e).outlineStyle !== 'none';
                }""",
                name,
            )
            if found:
                return
        raise AssertionError(f"{name} is not reached")

    page.on("filechooser", lambda chooser: None)  # the browser is told now, not while the key is on its way
    go_to("Drop an image")
    with page.expect_file_chooser() as chooser:
        keyboard.press("Enter")
    chooser.value.set_files(str(photo))
    visitor.wait_for_photo()
    go_to("Box")
    keyboard.press("Enter")
    go_to("Your photo")
    keyboard.press("Enter")  # a corner in the middle
    for _ in range(5):
        keyboard.press("ArrowRight")
        keyboard.press("ArrowDown")
    keyboard.press("Enter")
    visitor.told("Marked")
    mask = visitor.marked()
    assert mask[101, 151] and not mask[99, 149]
    mask = grow_over_rims(mask, Image.open(photo))
    go_to("Remove")
    keyboard.press("Enter")
    visitor.told("Done")
    go_to("Download")
    with page.expect_download() as download:
        keyboard.press("Enter")
    path = tmp_path / "result.png"
    download.value.save_as(path)
    assert not changed(photo, path)[~mask].any() and changed(photo, path).any()


def test_every_control_has_a_name(visit, photo):
    visitor = visit()
    unnamed = re.compile(r"- (button|checkbox|radio|slider|spinbutton|textbox|combobox|tab|link|img)\b(?! \")(.*)")

    def check():
        snapshot = visitor.page.locator("main").aria_snapshot()
        # Icons have no name; their buttons do.
        found = [match.group(0) for match in unnamed.finditer(snapshot) if match.group(0) != "- img"]
        assert found == []

    visitor.page.locator("#settings button").first.click()
    check()
    page = visitor.page
    for name in ("Upload file", "Capture from camera", "Paste from clipboard"):
        sync_api.expect(page.get_by_role("button", name=name)).to_be_visible()
    assert page.evaluate("document.activeElement.matches(':not(#photo *)')")  # nothing is chosen for the visitor
    visitor.upload(photo)
    visitor.paint()
    visitor.page.locator(".moebius-editor summary").click()
    for name in ("Brush", "Eraser", "Box", "Select", "Undo", "Redo", "Zoom in", "Zoom out", "Fit", "Invert"):
        sync_api.expect(page.get_by_role("button", name=name, exact=True)).to_be_visible()
    visitor.page.locator(".moebius-editor summary").click()
    sync_api.expect(page.get_by_role("slider", name="Size", exact=True)).to_be_visible()
    check()
    visitor.set_steps(3)
    visitor.run()
    check()
    before, after = page.locator(".moebius-editor .old"), page.locator(".moebius-editor .after")
    assert before.get_attribute("src") != after.get_attribute("src") and not before.is_visible()
    page.get_by_role("button", name="Before").hover()
    page.mouse.down()
    sync_api.expect(before).to_be_visible()
    page.mouse.up()
    sync_api.expect(before).to_be_hidden()
    page.get_by_role("slider", name="Compare").fill("50")
    sync_api.expect(before).to_be_visible()


@pytest.mark.parametrize("how", ["keys", "button"])
def test_a_picture_from_the_clipboard(visit, photo, how):
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    visitor.page.evaluate(
        """async (bytes) => {
            const blob = new Blob([new Uint8Array(bytes)], {type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        list(photo.read_bytes()),
    )
    if how == "keys":
        visitor.page.keyboard.press("Control+V")
    else:
        visitor.page.get_by_role("button", name="Paste from clipboard").click()
    visitor.wait_for_photo()
    visitor.told("300×200")


def test_a_picture_from_the_camera(visit):
    visitor = visit()
    visitor.page.get_by_role("button", name="Capture from camera").click()
    visitor.page.get_by_role("button", name="Click to Access Webcam").click()
    visitor.page.wait_for_function("document.querySelector('#photo video')?.readyState === 4")
    visitor.page.get_by_role("button", name="capture photo").click()
    visitor.wait_for_photo()
    assert int(re.search(r"(\d+)×", visitor.status.inner_text())[1]) >= 640


def test_empty_settings_are_the_models_own(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps("")
    visitor.page.get_by_label("Guidance").fill("no number")
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.get_by_text("guidance must be a number").first).to_be_visible(timeout=TIMEOUT)
    visitor.page.get_by_label("Guidance").fill("")
    visitor.run()
    used = visitor.page.locator("#used textarea").input_value()
    assert "--steps 20" in used and "--guidance" not in used


# The end of each stream of answers takes two seconds to arrive, as it may through a proxy or on a busy machine.
LATE_END = r"""
const plain = window.fetch.bind(window);
window.fetch = async (...request) => {
  const response = await plain(...request);
  if (!String(request[0]?.url ?? request[0]).includes("/queue/data")) return response;
  const late = new TransformStream({
    async transform(text, controller) {
      const end = text.search(/data: [^\n]*close_stream/);
      controller.enqueue(end < 0 ? text : text.slice(0, end));
      if (end < 0) return;
      await new Promise((resolve) => setTimeout(resolve, 2000));
      controller.enqueue(text.slice(end));
    },
  });
  const text = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(late);
  return new Response(text.pipeThrough(new TextEncoderStream()), { headers: response.headers });
};
"""


def test_a_run_that_crosses_the_end_of_the_stream_is_answered(visit, photo):
    visitor = visit(script=LATE_END)
    visitor.upload(photo)
    visitor.set_steps(3)
    for _ in range(3):
        visitor.paint()
        visitor.run()
        visitor.page.evaluate("document.querySelector('#status [role=status]').textContent = ''")


def test_reload_during_a_run(visit, photo, monkeypatch):
    from diffusers_moebius.demo import inpainting

    show = inpainting.Preview.__call__

    def show_slowly(*args, **kwargs):
        time.sleep(0.3)
        return show(*args, **kwargs)

    def running():
        return [thread for thread in threading.enumerate() if "(work)" in thread.name]

    monkeypatch.setattr(inpainting.Preview, "__call__", show_slowly)
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(100)
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.locator("#status progress")).to_be_visible(timeout=TIMEOUT)
    assert running()
    start = time.monotonic()
    visitor.page.reload()
    visitor.page.wait_for_selector("#photo input[type=file]", state="attached")
    while running() and time.monotonic() - start < 20:
        time.sleep(0.1)
    assert not running()  # long before its 30 seconds were over


def test_an_example_with_the_bundled_model(browser, tmp_path):
    pytest.importorskip("skimage")
    from diffusers_moebius.demo import launch_demo

    page_url = launch_demo(host="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    visitor = Visitor(browser, page_url)
    try:
        visitor.page.locator("#examples button img").first.click()
        visitor.told("Marked")
        visitor.run()
        sync_api.expect(visitor.page.get_by_text("the small model")).to_be_visible()
        visitor.page.get_by_role("button", name="Use the full model").click()
        sync_api.expect(visitor.page.get_by_text("the small model")).to_be_hidden()
        visitor.page.locator("#settings button").first.click()
        sync_api.expect(visitor.page.get_by_label("Model", exact=True)).to_have_value(re.compile("Places2"))
    finally:
        visitor.context.close()
