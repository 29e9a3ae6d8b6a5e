"""The static page in a real Chromium, without a network."""

import json
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from browser_noise import browser_noise
from page_server import PageServer
from page_settings import EXACT
from PIL import Image, ImageOps

from diffusers_moebius.export import load_onnx_pipeline
from diffusers_moebius.pictures import detail
from diffusers_moebius.pictures.region import find_regions

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
TIMEOUT = 120_000  # ms; the machine may be busy with other things
DONE = "Done in"


@pytest.fixture
def server(page_folder):
    server = PageServer(page_folder)
    yield server
    server.close()


class Visitor:
    """A visitor with a browser of their own."""

    def __init__(self, browser, url, **options):
        options = {"viewport": {"width": 900, "height": 900}, "locale": "en-US", "accept_downloads": True, **options}
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: print("console:", message.text))
        self.page.on("pageerror", lambda error: print("page:", error))
        self.page.goto(url)
        self.wait_until_ready()

    def wait_until_ready(self):
        self.page.wait_for_selector("body[data-ready]")

    def upload(self, path):
        self.page.set_input_files("#photo", str(path))
        self.expect_status("pixels")

    def stroke(self):
        """Across the middle."""
        box = self.page.locator("#canvas").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 30, y)
        self.page.mouse.down()
        self.page.mouse.move(x, y + 15, steps=4)
        self.page.mouse.move(x + 30, y, steps=4)
        self.page.mouse.up()

    def paint_example(self):
        self.press("Try an example")
        self.stroke()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def expect_status(self, text):
        sync_api.expect(self.page.locator("#status")).to_contain_text(text, timeout=TIMEOUT)

    def run(self):
        self.press("Remove")
        self.expect_status(DONE)

    def save(self, name, path):
        with self.page.expect_download() as download:
            self.press(name)
        download.value.save_as(path)
        return Image.open(path)


@pytest.fixture
def visit(browser):
    visitors = []

    def visit(url, **options):
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.context.close()


def make_photo(path, width=512, height=400, **options):
    """A photo-like picture."""
    coarse = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


def fill_in_python(folder, photo, mask, seed=0, margin=64):
    """What the pipeline makes of the same graphs and the same noise."""
    pipeline = load_onnx_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    region = find_regions(photo, Image.fromarray(mask), pipeline.sizes, padding_mask_crop=margin)[0]
    height, width = (length // pipeline.vae_scale_factor for length in region.size)
    channels = pipeline.unet.config.out_channels
    count = channels * height * width
    latents = browser_noise(seed, count).reshape(1, channels, height, width)
    latents = latents + np.float32(0.0357) * browser_noise(seed, channels, count).reshape(1, channels, 1, 1)
    options = {"padding_mask_crop": margin, "latents": torch.from_numpy(latents)}
    options["generator"] = torch.Generator().manual_seed(seed)  # of the texture
    fill = partial(detail.fill_with_patches, settings=detail.Settings(exact=EXACT))
    with patch.object(detail, "fill_with_patches", fill):
        return pipeline(photo, Image.fromarray(mask), **options).images[0]


def assert_alike(given, expected, mask):
    """Within two grey levels, but where two patches fit so equally that rounding decides between them."""
    assert np.mean(np.abs(given - expected).max(-1)[mask] <= 2) >= 0.97


def test_fills_a_stroke_as_the_pipeline_does(server, visit, page_folder, tmp_path):
    visitor = visit(server.url)
    photo = Image.open(make_photo(tmp_path / "holiday.png"))
    visitor.upload(tmp_path / "holiday.png")
    visitor.stroke()
    mask = np.asarray(visitor.save("Save mask", tmp_path / "mask.png").convert("L")) > 127
    assert 500 < mask.sum() < 20_000
    visitor.run()
    result = visitor.save("Download PNG (exact)", tmp_path / "result.png")

    assert result.size == photo.size
    given, original = (np.asarray(image.convert("RGB")).astype(int) for image in (result, photo))
    assert (given[~mask] == original[~mask]).all()
    expected = np.asarray(fill_in_python(page_folder / "models" / "nano", photo, mask)).astype(int)
    assert_alike(given, expected, mask)
    assert np.abs(given - original)[mask].mean() > 2  # something has been filled in

    jpeg = visitor.save("Download JPEG", tmp_path / "result.jpg")
    assert jpeg.format == "JPEG" and jpeg.size == photo.size
    # Nothing was asked of anybody else.
    assert {url.split("/")[2] for url in visitor.requests if not url.startswith(("blob:", "data:"))} == {
        server.url.split("/")[2]
    }


def test_photo_of_twelve_megapixels_with_orientation(server, visit, page_folder, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter clockwise
    path = make_photo(tmp_path / "IMG_0001.JPG", 4000, 3000, format="JPEG", quality=92, subsampling=0, exif=exif)
    mask = np.zeros((4000, 3000), bool)
    mask[1500:2300, 1000:1900] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    visitor = visit(server.url)
    visitor.upload(path)
    visitor.expect_status("3000 × 4000")
    visitor.page.set_input_files("#mask", str(tmp_path / "mask.png"))
    visitor.run()
    result = visitor.save("Download PNG (exact)", tmp_path / "result.png")
    photo = ImageOps.exif_transpose(Image.open(path))
    assert result.size == (3000, 4000)
    given, original = (np.asarray(image.convert("RGB")).astype(int) for image in (result, photo))
    assert (given[~mask] == original[~mask]).all()
    expected = np.asarray(fill_in_python(page_folder / "models" / "nano", photo, mask)).astype(int)
    assert_alike(given, expected, mask)


def test_several_results_to_choose_from(server, visit, tmp_path):
    visitor = visit(server.url)
    visitor.paint_example()
    visitor.page.locator("summary").click()
    visitor.page.get_by_label("Results to choose from").fill("3")
    visitor.run()
    pictures = []
    for number in (1, 2, 3):
        visitor.page.get_by_label(f"Result {number}").check()
        pictures.append(np.asarray(visitor.save("Download PNG (exact)", tmp_path / f"{number}.png")))
    assert all((pictures[i] != pictures[j]).any() for i, j in [(0, 1), (1, 2), (0, 2)])
    visitor.page.get_by_label("Before").fill("50")
    visitor.press("Go on with this picture")
    visitor.expect_status("768 × 512")
    assert visitor.page.get_by_role("button", name="Undo").is_disabled()


def test_stop_and_run_again(server, visit):
    visitor = visit(server.url)
    server.is_open.clear()
    visitor.paint_example()
    visitor.press("Remove")
    visitor.press("Stop")
    visitor.expect_status("Stopped.")
    server.is_open.set()
    visitor.run()


def test_model_is_opened_while_the_user_paints(server, visit):
    visitor = visit(server.url)
    assert not any(path.endswith(".onnx_data") for path, _ in server.requests)
    with (
        visitor.page.expect_response("**/vae_decoder/model.onnx_data"),
        visitor.page.expect_response("**/unet/*_data"),
    ):
        visitor.paint_example()
    server.requests.clear()
    visitor.run()
    assert not any(".onnx" in path for path, _ in server.requests)


def test_weights_of_a_large_model_stay_float16(server, visit, page_folder, tmp_path):
    """Above 100 MB the page saves memory; the picture is the same."""
    files = json.loads((page_folder / "models/nano/files.json").read_text())
    memory, pictures = [], []
    for size in (0, 100 * 2**20):
        files["more"] = {"size": size, "sha256": ""}  # which is counted, and never asked for
        server.replaced["nano/files.json"] = json.dumps(files).encode()
        visitor = visit(server.url)
        server.is_open.clear()
        with visitor.page.expect_worker() as worker:
            visitor.press("Try an example")
        worker.value.evaluate(
            """() => {
                const { Memory } = WebAssembly, { postMessage } = self;
                WebAssembly.Memory = function (limits) { return self.memory = new Memory(limits); };
                WebAssembly.Memory.prototype = Memory.prototype;
                self.postMessage = (message, options) => {
                    if (message.kind === 'starting') console.log('memory', memory.buffer.byteLength);
                    postMessage(message, options);
                };
            }"""
        )
        server.is_open.set()
        visitor.stroke()
        mask = np.asarray(visitor.save("Save mask", tmp_path / "mask.png").convert("L")) > 127
        with visitor.page.expect_console_message(lambda message: message.text.startswith("memory")) as message:
            visitor.run()
        memory.append(int(message.value.text.split()[1]))
        picture = visitor.save("Download PNG (exact)", tmp_path / "result.png").convert("RGB")
        pictures.append(np.asarray(picture).astype(int))
    assert memory[1] < 0.6 * memory[0]
    assert_alike(*pictures, mask)


def test_works_offline_on_the_second_visit(page_folder, visit):
    server = PageServer(page_folder)
    visitor = visit(server.url)
    visitor.page.evaluate("navigator.serviceWorker.ready.then(() => undefined)")
    visitor.paint_example()
    visitor.run()
    server.close()
    visitor.page.reload()
    visitor.wait_until_ready()
    visitor.paint_example()
    visitor.run()


def test_broken_model_file(server, visit, page_folder):
    content = (page_folder / "models/nano/unet/model.onnx_data").read_bytes()
    server.replaced["unet/model.onnx_data"] = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    visitor = visit(server.url)
    visitor.paint_example()
    visitor.press("Remove")
    visitor.expect_status("broken or incomplete")
    server.replaced["unet/model.onnx_data"] = content[:-100]
    visitor.press("Remove")
    visitor.expect_status("broken or incomplete")
    server.replaced.clear()
    visitor.run()


def test_missing_model(server, visit):
    visitor = visit(f"{server.url}?model=models/other/")
    visitor.paint_example()
    visitor.press("Remove")
    visitor.expect_status("The model cannot be loaded")


def test_download_goes_on_where_it_broke_off(page_folder, visit):
    server = PageServer(page_folder, ranges=True)
    size = (page_folder / "models/nano/unet/model.onnx_data").stat().st_size
    part = 8 * 2**20
    assert size > part
    second = f"bytes={part}-{size - 1}"
    server.lost.add(("unet/model.onnx_data", second))
    visitor = visit(server.url)
    visitor.paint_example()
    visitor.press("Remove")
    sync_api.expect(visitor.page.get_by_role("button", name="Remove")).to_be_visible(timeout=TIMEOUT)
    server.lost.clear()
    visitor.run()
    asked = [wanted for path, wanted in server.requests if path.endswith("unet/model.onnx_data")]
    assert asked.count(f"bytes=0-{part - 1}") == 1
    assert asked.count(second) >= 2
    server.close()


def test_threads_where_the_page_is_isolated(page_folder, visit):
    headers = {"Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Opener-Policy": "same-origin"}
    server = PageServer(page_folder, headers=headers)
    visitor = visit(server.url)
    assert visitor.page.evaluate("crossOriginIsolated")
    visitor.paint_example()
    visitor.run()
    server.close()


def test_keyboard_alone(server, visit):
    visitor = visit(server.url)
    page = visitor.page
    page.get_by_role("button", name="Try an example").focus()
    page.keyboard.press("Enter")
    undo = page.get_by_role("button", name="Undo")
    sync_api.expect(undo).to_be_disabled()
    page.locator("#canvas").focus()
    page.keyboard.press("Space")
    sync_api.expect(undo).to_be_enabled()
    page.keyboard.press("Control+z")
    sync_api.expect(undo).to_be_disabled()
    page.keyboard.press("e")
    sync_api.expect(page.get_by_role("button", name="Eraser")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("b")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowRight")
    page.get_by_role("button", name="Remove").focus()
    page.keyboard.press("Enter")
    visitor.expect_status(DONE)
    sync_api.expect(page.get_by_role("button", name="Download PNG (exact)")).to_be_focused()


def test_every_control_has_a_name(server, visit):
    visitor = visit(server.url)
    visitor.press("Try an example")
    visitor.page.locator("summary").click()
    names = visitor.page.evaluate(
        """[...document.querySelectorAll('button, input, select, canvas, progress, [role]')].map((element) => [
            element.id,
            element.getAttribute('aria-label') || element.textContent.trim() ||
                [...(element.labels ?? [])].map((label) => label.textContent.trim()).join(''),
        ])"""
    )
    assert len(names) > 25
    assert [element for element, name in names if not name and element != "status"] == []


def test_phone(server, visit):
    visitor = visit(
        server.url, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True, color_scheme="dark"
    )
    visitor.press("Try an example")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 375
    heights = visitor.page.evaluate(
        "[...document.querySelectorAll('button, .button')].map((b) => b.offsetHeight).filter(Boolean)"
    )
    assert min(heights) >= 44  # px, for fingers
    background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background[4:-1].split(","))) < 64


def test_languages(server, visit, browser_folder):
    for code in ("de", "es", "fr", "ja", "zh"):
        texts = json.loads((browser_folder / "languages" / f"{code}.json").read_text())
        visitor = visit(server.url, locale=code)
        sync_api.expect(visitor.page.locator("h1")).to_have_text(texts["title"])
        sync_api.expect(visitor.page.locator("html")).to_have_attribute("lang", code)
    visitor.page.get_by_label(texts["language"]).select_option("en")
    sync_api.expect(visitor.page.locator("#run")).to_have_text("Remove")


def test_files_that_are_no_photos(server, visit, tmp_path):
    visitor = visit(server.url)
    (tmp_path / "text.png").write_text("not a picture")
    visitor.page.set_input_files("#photo", str(tmp_path / "text.png"))
    visitor.expect_status("cannot be opened")
    visitor.page.set_input_files("#photo", str(make_photo(tmp_path / "small.png", 15, 40)))
    visitor.expect_status("too small")
    visitor.upload(make_photo(tmp_path / "photo.png"))
    visitor.press("Remove")
    visitor.expect_status("Nothing is marked yet.")
    visitor.page.set_input_files("#mask", str(make_photo(tmp_path / "mask.png", 400, 400)))
    visitor.expect_status("another shape")


def test_folder_is_small_enough(page_folder):
    """What a first visit with `nano` loads."""
    files = [path for path in page_folder.rglob("*") if path.is_file() and "asyncify" not in path.name]
    assert sum(path.stat().st_size for path in files) < 25e6


def test_falls_back_to_the_processor(server, visit):
    visitor = visit(server.url)
    assert not visitor.page.evaluate("!!navigator.gpu && navigator.gpu.requestAdapter()")
    statuses = visitor.page.evaluate_handle(
        """() => {
            const texts = [], status = document.querySelector('#status');
            new MutationObserver(() => texts.push(status.textContent)).observe(status, { childList: true });
            return texts;
        }"""
    )
    visitor.paint_example()
    visitor.page.locator("summary").click()
    visitor.page.get_by_label("Compute on").select_option("webgpu")
    visitor.run()
    assert any("graphics card cannot" in text for text in statuses.json_value())
