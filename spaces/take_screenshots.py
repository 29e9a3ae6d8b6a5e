"""
The screenshots of a page, taken anew: an example, filled by the bundled model, on desktop and phone.

    python spaces/take_screenshots.py demo
    make browser && python spaces/take_screenshots.py browser

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

from diffusers_moebius.demo import launch_demo
from diffusers_moebius.demo.examples import EXAMPLES

SPACES = Path(__file__).parent
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 1.5,
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}
MINUTE = 60_000  # ms


def take_demo(visit, arguments) -> None:
    """The Gradio page."""
    url = launch_demo(arguments.model, host="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    for name, page in visit(url, height=900):
        page.locator("#settings button").first.click()
        page.get_by_label("A new seed each time").uncheck()
        page.get_by_label("Seed", exact=True).fill(arguments.seed)
        page.locator("#settings button").first.click()
        page.locator("#examples button").filter(has_text=arguments.example).first.click()
        expect(page.locator("#status")).to_contain_text("Marked", timeout=5 * MINUTE)
        save(page, arguments.output / f"{name}-marked.png")
        page.click("#remove")
        expect(page.locator("#status")).to_contain_text("Done", timeout=5 * MINUTE)
        save(page, arguments.output / f"{name}-done.png")


def take_browser(visit, arguments) -> None:
    """The static page."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=SPACES / "browser" / "dist")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    photo, mask = next(example for example in EXAMPLES if arguments.example in example.title).load()
    with tempfile.TemporaryDirectory() as scratch:
        photo.image.save(f"{scratch}/photo.png")
        Image.fromarray(mask).save(f"{scratch}/mask.png")
        for name, page in visit(f"http://127.0.0.1:{server.server_port}/", height=960):
            page.wait_for_selector("body[data-ready]")
            page.set_input_files("#photo", f"{scratch}/photo.png")
            expect(page.locator("#status")).to_contain_text("pixels")
            page.set_input_files("#mask", f"{scratch}/mask.png")
            save(page, arguments.output / f"{name}-marked.png")
            page.click("#run")
            expect(page.locator("#status")).to_contain_text("Done", timeout=5 * MINUTE)
            save(page, arguments.output / f"{name}.png")


def save(page, path: Path) -> None:
    """What the window shows; 256 colours are enough to see what the page is like, and small."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(2000)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = picture.quantize(256)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {picture.width}×{picture.height} px, {path.stat().st_size / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=["demo", "browser"])
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="its path (default: %(default)s)")
    parser.add_argument("--model", help="of the demo: another than the bundled one, a repository or a folder")
    parser.add_argument("--example", default="The rocket", help="which example (default: %(default)s)")
    parser.add_argument("--seed", default="0", help="seed of the demo's filling (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the pictures; the page's own by default")
    arguments = parser.parse_args()
    take, folder = {"demo": (take_demo, SPACES), "browser": (take_browser, SPACES / "browser")}[arguments.page]
    arguments.output = arguments.output or folder / "screenshots"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--headless", "--no-sandbox"])

        def visit(url: str, height: int):
            for name, screen in {"desktop": {"viewport": {"width": 1280, "height": height}}, "phone": PHONE}.items():
                page = browser.new_context(locale="en-US", **screen).new_page()
                page.set_default_timeout(5 * MINUTE)
                page.goto(url)
                yield name, page

        take(visit, arguments)
        browser.close()


if __name__ == "__main__":
    main()
