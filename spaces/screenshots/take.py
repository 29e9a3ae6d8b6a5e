"""
The screenshots in this folder, taken anew: an example of the page, filled by the bundled model, on desktop and phone.

    python spaces/screenshots/take.py

Needs Chromium, no network, and about a minute.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from diffusers_moebius.demo import launch_demo

SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 1.5,
        "is_mobile": True,
        "has_touch": True,
        "color_scheme": "dark",
    },
}
MINUTE = 60_000  # ms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model than the bundled one: a repository or a folder")
    parser.add_argument("--example", default="The rocket", help="which of the page's examples (default: %(default)s)")
    parser.add_argument("--seed", default="0", help="seed of the filling (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("no Chromium is installed")
    url = launch_demo(arguments.model, host="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        for name, screen in SCREENS.items():
            page = browser.new_context(**screen).new_page()
            page.set_default_timeout(5 * MINUTE)
            page.goto(url)
            page.locator("#settings button").first.click()
            page.get_by_label("A new seed each time").uncheck()
            page.get_by_label("Seed", exact=True).fill(arguments.seed)
            page.locator("#settings button").first.click()
            page.locator("#examples button").filter(has_text=arguments.example).first.click()
            expect(page.locator("#status")).to_contain_text("Marked", timeout=5 * MINUTE)
            for step in ("marked", "done"):
                if step == "done":
                    page.click("#remove")
                    expect(page.locator("#status")).to_contain_text("Done", timeout=5 * MINUTE)
                page.mouse.move(0, 0)
                page.wait_for_timeout(2000)
                save(page, arguments.output / f"{name}-{step}.png")
        browser.close()


def save(page, path: Path) -> None:
    """What the window shows; 256 colours are enough to see what the page is like, and small."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = picture.quantize(256)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {picture.width}×{picture.height} px, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
