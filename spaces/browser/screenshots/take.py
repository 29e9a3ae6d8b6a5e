"""
The screenshots in this folder, taken anew: the rocket of scikit-image, removed by `nano`, on desktop and phone.

    make browser && python spaces/browser/screenshots/take.py

Needs Chromium, no network, and about a minute.
"""

import argparse
import functools
import io
import shutil
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from diffusers_moebius.demo.examples import EXAMPLES

SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 960}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 1.5,
        "is_mobile": True,
        "has_touch": True,
        "color_scheme": "dark",
    },
}
MINUTE = 60_000  # ms


class QuietHandler(SimpleHTTPRequestHandler):
    """A web server that says nothing."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *args):
        pass


def main():
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=folder.parent / "dist", help="the built page")
    parser.add_argument("--output", type=Path, default=folder, help="folder for the pictures")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("no Chromium is installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=arguments.page))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    photo, mask = EXAMPLES[0].load()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        photo.image.save(f"{scratch}/rocket.png")
        Image.fromarray(mask).save(f"{scratch}/mask.png")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        for name, screen in SCREENS.items():
            page = browser.new_context(locale="en-US", **screen).new_page()
            page.set_default_timeout(5 * MINUTE)
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.wait_for_selector("body[data-ready]")
            page.set_input_files("#photo", f"{scratch}/rocket.png")
            expect(page.locator("#status")).to_contain_text("pixels")
            page.set_input_files("#mask", f"{scratch}/mask.png")
            page.wait_for_timeout(2000)
            save(page, arguments.output / f"{name}-marked.png")
            page.click("#run")
            expect(page.locator("#status")).to_contain_text("Done", timeout=5 * MINUTE)
            page.wait_for_timeout(2000)
            save(page, arguments.output / f"{name}.png")
        browser.close()


def save(page, path: Path) -> None:
    """What the window shows; 256 colours are enough to see what the page is like, and small."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = picture.quantize(256)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {picture.width}×{picture.height} px, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
