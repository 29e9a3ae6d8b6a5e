"""The page in a real browser."""

import functools
import io
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
TIMEOUT = 90_000  # ms; the machine may be busy with other things


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visitor:
    """A visitor with a browser of their own."""

    def __init__(self, browser, url, script=None, **options):
        # A small window, since a browser without a GPU takes long to draw a large canvas.
        self.context = browser.new_context(
            **{"viewport": {"width": 700, "height": 560}, "accept_downloads": True, **options}
        )
        if script is not None:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.waited_for: set = set()
        self.last_active = 0.0
        for event in ("request", "requestfinished", "requestfailed"):
            self.page.on(event, functools.partial(self.note, event))
        # Shown with a test that fails.
        self.page.on("console", lambda message: message.type == "error" and print("console:", message.text))
        self.page.on("pageerror", lambda error: print("page:", error))
        self.page.goto(url)
        self.page.wait_for_selector("#photo input[type=file]", state="attached")

    def note(self, event, request):
        if "/heartbeat/" not in request.url:
            self.last_active = time.monotonic()
            (self.waited_for.add if event == "request" else self.waited_for.discard)(request)

    def rest(self):
        """Waits until nothing was sent or received for a second; the editor sends what it holds once it is drawn."""
        start = self.last_active = time.monotonic()
        while self.waited_for or time.monotonic() - self.last_active < 1:
            assert time.monotonic() - start < TIMEOUT / 1000, [request.url for request in self.waited_for]
            self.page.wait_for_timeout(100)

    def upload(self, path):
        self.page.set_input_files("#photo input[type=file]", str(path))
        self.wait_for_photo()

    def wait_for_photo(self):
        self.page.wait_for_selector("#editor canvas")
        sync_api.expect(self.status).to_contain_text("pixels")
        self.rest()

    @property
    def status(self):
        return self.page.locator("#status")

    def paint(self):
        """A stroke across the middle."""
        canvas = self.page.locator("#editor canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 30, y)
        self.page.mouse.down()
        self.page.mouse.move(x, y + 5, steps=4)
        self.page.mouse.move(x + 30, y, steps=4)
        self.page.mouse.up()
        self.rest()

    def mark(self, left, top, width, height, button="Mark the rectangle"):
        """Marks by numbers, in percent."""
        if not self.page.get_by_label("Left (%)").is_visible():
            self.page.locator("#by-keyboard button").first.click()
        for name, value in (("Left", left), ("Top", top), ("Width", width), ("Height", height)):
            self.page.get_by_label(f"{name} (%)").fill(str(value))
        self.press(button)

    def press(self, name):
        """Presses a button, and says what the status says of the mask then."""
        return self.told(lambda: self.page.get_by_role("button", name=name, exact=True).click())

    def told(self, act):
        """Does something that changes the status, and says what it says of the mask then."""
        self.rest()  # an event says its last status twice
        self.page.evaluate("document.querySelector('#status [role=status]').dataset.old = true")
        act()
        new = self.page.locator("#status [role=status]:not([data-old])", has_text="arked")
        sync_api.expect(new).to_be_visible(timeout=TIMEOUT)
        return new.inner_text()

    def go_to(self, tab):
        self.page.get_by_role("tab", name=tab).click()
        self.rest()

    def red_part(self):
        """How much of the editor is red."""
        picture = Image.open(io.BytesIO(self.page.locator("#editor").screenshot())).convert("RGB")
        red, green, blue = np.moveaxis(np.asarray(picture).astype(int), 2, 0)
        return ((red > green + 80) & (red > blue + 80)).mean()

    def select(self, x, y, **options):
        """Clicks to select, and says what the status says then."""
        picture = self.page.locator("#clicked img").first
        return self.told(lambda: picture.click(position={"x": x, "y": y}, **options))

    def set_steps(self, steps):
        if not self.page.locator("#steps").is_visible():
            self.page.locator("#settings button").first.click()
        number = self.page.get_by_label("Steps")
        number.fill(str(steps))
        number.press("Tab")

    def run(self):
        self.page.click("#remove")
        self.page.wait_for_selector("#download")
        sync_api.expect(self.page.locator("#status")).to_contain_text("Done", timeout=TIMEOUT)

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
    """Which pixels differ, and the size of the box around them as a share of the picture."""
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (before, after))
    assert before.shape == after.shape
    return (before != after).any(axis=2)


def test_a_stroke_is_filled_and_the_rest_is_exact(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(6)
    visitor.run()
    path = visitor.download(tmp_path)
    assert path.name == "holiday-moebius.png"
    difference = changed(photo, path)
    rows, columns = np.nonzero(difference)
    assert len(rows) > 100
    # The stroke crosses the middle; the brush is no wider than a sixth of the photo.
    assert 60 < rows.min() <= 100 <= rows.max() < 140
    assert columns.min() < 150 < columns.max()
    assert difference.mean() < 0.2
    used = visitor.page.locator("#used textarea").input_value()
    assert re.search(r"--steps 6 .*--seed \d+", used)
    outside = {urlparse(url).hostname for url in visitor.requests if url.startswith(("http", "ws"))}
    assert outside == {"127.0.0.1"}

    # The outline changes the slider's picture, not the download.
    images = visitor.page.locator("#slider img")
    shown = [images.nth(k).get_attribute("src") for k in range(images.count())]
    visitor.page.get_by_label("Show the outline").check()
    visitor.page.wait_for_function(
        "shown => [...document.querySelectorAll('#slider img')].some(i => !shown.includes(i.getAttribute('src')))",
        arg=shown,
    )
    # JPEG on request.
    visitor.page.get_by_label("JPEG, smaller").check()
    visitor.page.wait_for_function("document.querySelector('a#download, #download a, #download')")
    visitor.rest()
    assert Image.open(visitor.download(tmp_path)).format == "JPEG"

    # The result becomes the new photo.
    visitor.page.click("#again")
    visitor.page.wait_for_selector("#download", state="detached")
    visitor.rest()
    visitor.paint()
    visitor.run()
    assert visitor.download(tmp_path).name == "holiday-moebius.png"


def test_undo_takes_back_a_stroke(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.page.locator("#editor").get_by_role("button", name="Undo").click()
    visitor.rest()
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.get_by_text("Nothing is marked yet")).to_be_visible(timeout=TIMEOUT)


def test_stop_and_reload(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(100)
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.locator("#status progress")).to_be_visible(timeout=TIMEOUT)
    visitor.page.click("#stop", force=True)  # on a busy machine the run would end while it waits for the page to rest
    sync_api.expect(visitor.page.locator("#status")).to_contain_text("Stopped", timeout=TIMEOUT)
    sync_api.expect(visitor.page.locator("#remove")).to_be_enabled()
    sync_api.expect(visitor.page.locator("#stop")).to_be_hidden()
    assert not visitor.page.locator("#download").is_visible()
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
        sync_api.expect(visitor.page.locator("#status")).to_contain_text("Done", timeout=TIMEOUT)
        difference = changed(path, visitor.download(tmp_path))
        assert difference.any() and difference.mean() < 0.2
    first, second = visitors.values()
    pictures = [
        {url for url in visitor.requests if "/file=" in url and "moebius" in url} for visitor in (first, second)
    ]
    assert not pictures[0] & pictures[1]


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
    sync_api.expect(visitor.page.get_by_text("not a picture").first).to_be_visible(timeout=TIMEOUT)
    assert str(tmp_path) not in visitor.page.content()
    visitor.upload(photo)


def test_click_to_select_then_mend_and_fill(visit, photo, tmp_path):
    visitor = visit()
    visitor.upload(photo)
    visitor.go_to("Click to select")
    visitor.select(60, 40)
    visitor.press("Unmark everything")
    visitor.mark(10, 10, 20, 20)
    visitor.go_to("Paint")
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    rows, columns = np.nonzero(changed(photo, visitor.download(tmp_path)))
    # Both the rectangle from 30 to 90 and 20 to 60 px, and the stroke in the middle.
    assert 30 <= columns.min() <= 34 and 20 <= rows.min() <= 24
    assert 150 < columns.max() < 220 and 95 < rows.max() < 140


def test_shift_click_and_toggle_take_away(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.go_to("Click to select")
    assert "Marked" in visitor.select(60, 40)
    assert "Nothing" in visitor.select(60, 40, modifiers=["Shift"])
    assert "Marked" in visitor.select(60, 40)
    visitor.page.get_by_label("Unmark it").check()
    assert "Nothing" in visitor.select(60, 40)
    # Without the page's script clicks still add.
    visitor.page.get_by_label("Mark the object", exact=True).check()
    visitor.page.evaluate("delete window.moebiusShift")
    visitor.page.evaluate(
        "document.addEventListener('click', () => delete window.moebiusShift, {capture: true})",
    )
    assert "Marked" in visitor.select(60, 40, modifiers=["Shift"])


def test_a_click_while_another_is_worked_on_counts(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.go_to("Click to select")
    picture = visitor.page.locator("#clicked img").first
    picture.click(position={"x": 60, "y": 40})
    picture.click(position={"x": 60, "y": 40}, modifiers=["Shift"])
    sync_api.expect(visitor.status).to_contain_text("Nothing is marked", timeout=15_000)


def test_a_click_while_the_picture_loads_counts(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.go_to("Click to select")
    picture = visitor.page.locator("#clicked img").first
    loading = []
    visitor.page.route("**/file=**", lambda route: loading.append(route))
    visitor.select(60, 40)
    visitor.page.wait_for_function("!document.querySelector('#clicked img').complete")
    picture.click(position={"x": 60, "y": 40}, modifiers=["Shift"])
    for route in loading:
        route.continue_()
    visitor.page.unroute("**/file=**")
    sync_api.expect(visitor.status).to_contain_text("Nothing is marked", timeout=TIMEOUT)


# The end of each stream of answers takes two seconds to arrive, as it may through a proxy or on a busy machine.
LATE_END = r"""
const plain = window.fetch.bind(window);
window.streams = [];
window.fetch = async (...request) => {
  const response = await plain(...request);
  if (!String(request[0]?.url ?? request[0]).includes("/queue/data")) return response;
  const stream = { ended: false };
  window.streams.push(stream);
  const late = new TransformStream({
    async transform(text, controller) {
      const end = text.search(/data: [^\n]*close_stream/);
      controller.enqueue(end < 0 ? text : text.slice(0, end));
      if (end < 0) return;
      await new Promise((resolve) => setTimeout(resolve, 2000));
      stream.ended = true;
      controller.enqueue(text.slice(end));
    },
  });
  const text = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(late);
  return new Response(text.pipeThrough(new TextEncoderStream()), { headers: response.headers });
};
"""


def test_an_event_that_crosses_the_end_of_the_stream_is_answered(visit, photo):
    visitor = visit(script=LATE_END)
    visitor.upload(photo)
    visitor.mark(0, 0, 20, 20)
    for k in range(1, 4):
        visitor.page.get_by_label("Left (%)").fill(str(20 * k))
        visitor.page.get_by_role("button", name="Mark the rectangle", exact=True).click()
        sync_api.expect(visitor.status).to_contain_text(f"Marked: {4 * k + 4} %", timeout=TIMEOUT)
    # No stream is left open: nothing would notice that it broke.
    visitor.page.wait_for_function("window.streams.every((stream) => stream.ended)")
    assert visitor.page.evaluate("window.streams.length") >= 3
    visitor.mark(0, 50, 20, 20)


# The page is told late that its events were taken: their answers come first.
LATE_TAKING = r"""
const plain = window.fetch.bind(window);
window.fetch = async (...request) => {
  const response = await plain(...request);
  if (String(request[0]?.url ?? request[0]).includes("/queue/join"))
    await new Promise((resolve) => setTimeout(resolve, 1500));
  return response;
};
"""


def test_events_that_are_answered_before_they_are_taken(visit, photo):
    visitor = visit(script=LATE_TAKING)
    visitor.upload(photo)
    visitor.go_to("Click to select")  # without the editor, which takes its time
    visitor.mark(0, 0, 20, 20)
    for k in (1, 2, 3):
        visitor.page.get_by_label("Left (%)").fill(str(20 * k))
        visitor.page.get_by_role("button", name="Mark the rectangle", exact=True).click()
        visitor.page.wait_for_timeout(900)
    sync_api.expect(visitor.status).to_contain_text("Marked: 16 %", timeout=TIMEOUT)
    visitor.rest()  # also no stream is left open
    visitor.mark(80, 0, 20, 20)
    assert "20 %" in visitor.status.inner_text()


def test_what_is_marked_by_numbers_is_seen_in_the_editor(visit, photo, tmp_path):
    visitor = visit()
    grey = tmp_path / "grey.png"
    Image.new("RGB", (300, 200), (90, 90, 90)).save(grey)
    visitor.upload(grey)
    nothing = visitor.red_part()
    visitor.mark(0, 0, 40, 50)
    visitor.rest()
    once = visitor.red_part()
    visitor.mark(60, 50, 40, 50)
    visitor.rest()
    twice = visitor.red_part()
    assert once - nothing > 0.02
    assert twice - nothing == pytest.approx(2 * (once - nothing), rel=0.1)
    assert "40 %" in visitor.status.inner_text()
    visitor.mark(60, 50, 40, 50, "Unmark the rectangle")
    assert "20 %" in visitor.status.inner_text()
    visitor.mark(10, 10, 20, 20, "Mark the object in its middle")
    assert "Nothing is marked" in visitor.press("Unmark everything")
    visitor.rest()
    assert visitor.red_part() == pytest.approx(nothing, abs=0.002)


def test_zoom_and_eraser(visit, photo, tmp_path):
    visitor = visit()
    editor = visitor.page.locator("#editor")
    visitor.upload(photo)
    visitor.paint()
    editor.get_by_role("button", name="Erase").click()
    for _ in range(3):
        visitor.paint()
    visitor.page.click("#remove")
    sync_api.expect(visitor.page.get_by_text("Nothing is marked yet").first).to_be_visible(timeout=TIMEOUT)
    editor.get_by_role("button", name="Brush", exact=True).click()
    before = editor.locator(".zoom-number").inner_text()
    for _ in range(5):
        editor.get_by_role("button", name="Zoom in").click()
        visitor.page.wait_for_timeout(300)
    assert int(editor.locator(".zoom-number").inner_text().strip("%\n ")) > 1.3 * int(before.strip("%\n "))
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    rows, columns = np.nonzero(changed(photo, visitor.download(tmp_path)))
    assert 60 < rows.min() <= 100 <= rows.max() < 140
    assert columns.min() < 150 < columns.max()


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
    go_to("Mark by keyboard")
    keyboard.press("Enter")
    sync_api.expect(page.get_by_label("Left (%)")).to_be_visible()
    for name, value in (("Left", "10"), ("Top", "20"), ("Width", "30"), ("Height", "40")):
        go_to(name)
        keyboard.press("Control+A")
        keyboard.type(value)
    go_to("Mark the rectangle")
    keyboard.press("Space")
    sync_api.expect(visitor.status).to_contain_text("Marked: 12 %", timeout=TIMEOUT)
    go_to("Remove")
    keyboard.press("Enter")
    sync_api.expect(visitor.status).to_contain_text("Done", timeout=TIMEOUT)
    # The button that had the focus went away; what is wanted next has it.
    page.wait_for_function("document.activeElement.closest('#download')")
    with page.expect_download() as download:
        keyboard.press("Enter")
    path = tmp_path / "result.png"
    download.value.save_as(path)
    rows, columns = np.nonzero(changed(photo, path))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (30, 119, 40, 119)


def test_every_control_has_a_name(visit, photo):
    visitor = visit()
    unnamed = re.compile(r"- (button|checkbox|radio|slider|spinbutton|textbox|combobox|tab|link|img)\b(?! \")(.*)")

    def check():
        snapshot = visitor.page.locator("main").aria_snapshot()
        # Icons have no name; their buttons do.
        found = [match.group(0) for match in unnamed.finditer(snapshot) if match.group(0) != "- img"]
        assert found == []

    visitor.page.locator("#settings button").first.click()
    visitor.rest()
    check()
    page = visitor.page
    for name in ("Upload file", "Capture from camera", "Paste from clipboard"):
        sync_api.expect(page.get_by_role("button", name=name)).to_be_visible()
    visitor.upload(photo)
    visitor.paint()
    editor = page.get_by_role("group", name="Paint over what should go")
    for name in ("Brush", "Erase", "Undo", "Redo", "Zoom in", "Zoom out", "Pan", "Brush Size"):
        sync_api.expect(editor.get_by_role("button", name=name, exact=True)).to_be_visible()
    sync_api.expect(editor.get_by_role("img", name="Your photo")).to_be_visible()
    for name in ("Clear canvas", "Color"):  # which would lose the photo, and choose among one
        sync_api.expect(editor.get_by_role("button", name=name)).to_have_count(0)
    editor.get_by_role("button", name="Brush Size").click()
    sync_api.expect(editor.get_by_role("slider", name="Brush size")).to_be_visible()
    check()
    editor.get_by_role("button", name="Brush Size").click()
    visitor.go_to("Click to select")
    check()
    visitor.mark(10, 10, 20, 20)
    visitor.set_steps(3)
    visitor.run()
    check()
    for name in ("Before", "After"):
        sync_api.expect(page.get_by_role("img", name=name, exact=True)).to_be_visible()
    page.get_by_role("radio", name="After").check()
    page.wait_for_function("!document.querySelector('#slider img.fixed').style.clipPath.includes('50%')")


@pytest.mark.parametrize("how", ["keys", "button"])
def test_a_picture_from_the_clipboard(visit, photo, tmp_path, how):
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
    assert "300×200" in visitor.status.inner_text()
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    difference = changed(photo, visitor.download(tmp_path))
    assert difference.any() and difference.mean() < 0.2


def test_a_picture_from_the_camera(visit, tmp_path):
    visitor = visit()
    visitor.page.get_by_role("button", name="Capture from camera").click()
    visitor.page.get_by_role("button", name="Click to Access Webcam").click()
    visitor.page.wait_for_function("document.querySelector('#photo video')?.readyState === 4")
    visitor.page.get_by_role("button", name="capture photo").click()
    visitor.wait_for_photo()
    told = visitor.status.inner_text()
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    width, height = Image.open(visitor.download(tmp_path)).size
    assert f"{width}×{height} pixels" in told and width >= 640


def test_another_photo_may_be_the_same_one(visit, photo):
    visitor = visit()
    for _ in range(3):
        visitor.upload(photo)
        picture = np.asarray(Image.open(io.BytesIO(visitor.page.locator("#editor").screenshot())).convert("RGB"))
        assert picture[100:-100, 100:-100].std() > 20
        visitor.page.get_by_role("button", name="Another photo").click()
        visitor.page.wait_for_selector("#photo input[type=file]", state="attached")


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
    monkeypatch.undo()
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()


def test_an_example_brings_its_mask(visit):
    pytest.importorskip("skimage")
    visitor = visit()
    visitor.page.locator("#examples").get_by_text("The spoon").click()
    visitor.page.wait_for_selector("#clicked img")
    visitor.rest()
    visitor.set_steps(3)
    visitor.run()


def test_the_bundled_model(browser, photo, tmp_path):
    from diffusers_moebius import bundled_checkpoint
    from diffusers_moebius.demo import launch_demo

    try:
        bundled_checkpoint()
    except ValueError:
        pytest.skip("the bundled model is not in this checkout")
    page_url = launch_demo(host="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    visitor = Visitor(browser, page_url)
    try:
        visitor.upload(photo)
        visitor.paint()
        start = time.monotonic()
        visitor.run()
        print(f"{time.monotonic() - start:.1f} s")
        difference = changed(photo, visitor.download(tmp_path))
        assert difference.any() and difference.mean() < 0.2
    finally:
        visitor.context.close()
