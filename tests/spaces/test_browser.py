"""The page in a real browser."""

import re
import shutil
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

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(
            **{"viewport": {"width": 1200, "height": 1000}, "accept_downloads": True, **options}
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#photo input[type=file]", state="attached")

    def upload(self, path):
        self.page.set_input_files("#photo input[type=file]", str(path))
        self.page.wait_for_selector("#editor canvas")
        self.page.wait_for_timeout(1500)  # the canvas draws itself without saying when it has

    def paint(self):
        """A stroke across the middle."""
        box = self.page.locator("#editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 30, y)
        self.page.mouse.down()
        self.page.mouse.move(x, y + 5, steps=4)
        self.page.mouse.move(x + 30, y, steps=4)
        self.page.mouse.up()
        self.page.wait_for_timeout(500)

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
    visitor.page.wait_for_timeout(2000)
    assert Image.open(visitor.download(tmp_path)).format == "JPEG"

    # The result becomes the new photo.
    visitor.page.click("#again")
    visitor.page.wait_for_selector("#download", state="detached")
    visitor.page.wait_for_timeout(1500)
    visitor.paint()
    visitor.run()
    assert visitor.download(tmp_path).name == "holiday-moebius.png"


def test_undo_takes_back_a_stroke(visit, photo):
    visitor = visit()
    visitor.upload(photo)
    visitor.paint()
    visitor.page.locator("#editor").get_by_role("button", name="Undo").click()
    visitor.page.wait_for_timeout(500)
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
    visitor.page.get_by_role("tab", name="Click to select").click()
    picture = visitor.page.locator("#clicked img").first
    sync_api.expect(picture).to_be_visible(timeout=TIMEOUT)
    picture.click(position={"x": 60, "y": 40})
    sync_api.expect(visitor.page.locator("#status")).to_contain_text(re.compile("arked"), timeout=TIMEOUT)
    visitor.page.get_by_role("tab", name="Paint").click()
    visitor.page.wait_for_timeout(1500)
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    assert changed(photo, visitor.download(tmp_path)).any()


def test_every_control_has_a_name(visit, photo):
    visitor = visit()
    unnamed = """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, [role=slider]')]
        .filter(e => e.offsetParent)
        .filter(e => !(e.getAttribute('aria-label') || e.title || e.innerText?.trim()
                       || e.labels?.[0]?.innerText.trim() || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 200))"""
    visitor.page.locator("#settings button").first.click()
    visitor.page.wait_for_timeout(500)
    assert visitor.page.evaluate(unnamed) == []
    visitor.upload(photo)
    visitor.paint()
    visitor.set_steps(3)
    visitor.run()
    assert visitor.page.evaluate(unnamed) == []


def test_an_example_brings_its_mask(visit):
    pytest.importorskip("skimage")
    visitor = visit()
    visitor.page.locator("#examples").get_by_text("The spoon").click()
    visitor.page.wait_for_selector("#clicked img")
    visitor.page.wait_for_timeout(1500)
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
