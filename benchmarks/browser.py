"""
A picture on the static page, in a real Chromium: what the page says and when, processor time and memory.

    make browser && python benchmarks/browser.py                                       # the page's own nano
    python benchmarks/browser.py --model graphs --steps 2 --guidance 1 --detail none   # another exported folder

Runs one after the other on one page, which paints a square of the photo each time. Seconds are of the clock and of all
of Chromium's processors; memory is the greatest that one of its processes has held, and which. Needs Linux, Chromium
and playwright; the network is not asked for anything.
"""

import argparse
import functools
import shutil
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from playwright.sync_api import sync_playwright

PAGE = Path(__file__).parents[1] / "spaces" / "browser" / "dist"
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
ISOLATED = {"Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Opener-Policy": "same-origin"}


def serve(page: Path, model: Path | None, headers: dict[str, str]) -> str:
    """Serves the page with a model under `models/measured`; returns its address."""

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path):
            below = path.partition("?")[0].removeprefix("/models/measured/")
            return str(model / below) if model and below != path.partition("?")[0] else super().translate_path(path)

        def end_headers(self):
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=page))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/" + ("?model=models/measured" if model else "")


class Processes:
    """Chromium's processes: their processor time so far, and the greatest memory of one of them."""

    def __init__(self):
        self.seconds: dict[int, float] = {}  # by process, so that those that have ended still count
        self.peaks: dict[int, tuple[float, str]] = {}  # GB

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if not process.name().startswith("chrom"):
                    continue
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
                kind = next((part[7:] for part in process.cmdline() if part.startswith("--type=")), "browser")
                times = process.cpu_times()
            except (psutil.Error, OSError, IndexError):
                continue
            self.peaks[process.pid] = (peak, kind)
            self.seconds[process.pid] = times.user + times.system


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="its path (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the built page")
    parser.add_argument("--model", type=Path, help="an exported folder, instead of the page's first model")
    parser.add_argument("--size", type=int, default=512, help="side of the photo in pixels (default: %(default)s)")
    parser.add_argument("--hole", type=float, default=0.06, help="share of the photo (default: %(default)s)")
    parser.add_argument("--photo", type=Path, help="a photo, of which the middle is taken; noise by default")
    parser.add_argument("--steps", help="the model's own by default")
    parser.add_argument("--guidance", help="the model's own by default")
    parser.add_argument("--detail", choices=["auto", "patches", "none"], default="auto")
    parser.add_argument("--device", choices=["wasm", "webgpu"], default="wasm", help="webgpu: through SwiftShader")
    parser.add_argument("--threads", action="store_true", help="several threads, as with the Space's headers")
    parser.add_argument("--wait", type=float, default=0, help="seconds between the mask and the first run")
    parser.add_argument("--runs", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a run (default: %(default)s)")
    arguments = parser.parse_args()

    size = arguments.size
    if arguments.photo:
        photo = Image.open(arguments.photo).convert("RGB")
        left, top = (photo.width - size) // 2, (photo.height - size) // 2
        photo = photo.crop((left, top, left + size, top + size))
    else:
        coarse = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    mask = np.zeros((size, size), bool)
    start = round(size * (1 - arguments.hole**0.5) / 2)
    mask[start : size - start, start : size - start] = True

    url = serve(arguments.page, arguments.model and arguments.model.resolve(), ISOLATED if arguments.threads else {})
    processes = Processes()
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking"]
    flags += WEBGPU if arguments.device == "webgpu" else ["--disable-gpu"]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        photo.save(f"{scratch}/photo.png")
        Image.fromarray(mask).save(f"{scratch}/mask.png")
        # With a profile on disk, as visitors have: an incognito window keeps the model in memory.
        context = playwright.chromium.launch_persistent_context(
            f"{scratch}/profile", executable_path=arguments.chromium, args=flags, locale="en-US"
        )
        page = context.new_page()
        page.on("console", lambda message: print("   console:", message.text))
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        page.evaluate(
            """() => {
                window.told = [];
                const status = document.querySelector('#status');
                const note = () => window.told.push([performance.now() / 1000, status.textContent]);
                new MutationObserver(note).observe(status, { childList: true });
            }"""
        )
        page.locator("summary").click()
        page.select_option("#device", arguments.device)
        page.select_option("#detail", arguments.detail)
        page.fill("#context", str(size))  # the whole photo goes through the model
        for name in ("steps", "guidance"):
            if getattr(arguments, name) is not None:
                page.fill(f"#{name}", getattr(arguments, name))
        page.set_input_files("#photo", f"{scratch}/photo.png")
        page.wait_for_function("told.length")
        page.set_input_files("#mask", f"{scratch}/mask.png")
        time.sleep(arguments.wait)
        for number in range(arguments.runs):
            processes.look()
            before = sum(processes.seconds.values())
            page.evaluate("told.length = 0")
            clock = page.evaluate("performance.now() / 1000")
            page.click("#run")
            until = time.monotonic() + arguments.limit
            while page.locator("#stop").is_visible() and time.monotonic() < until:
                time.sleep(0.2)
                processes.look()
            is_done = page.locator("#stop").is_hidden()
            told = page.evaluate("told")
            kinds = {}
            for when, text in told:
                kinds.setdefault(text.rstrip("…. 0123456789%")[:12], []).append((when - clock, text))
            for times in kinds.values():
                print(f"   {times[0][0]:6.1f}–{times[-1][0]:.1f} s  {times[-1][1]}")
            peak, kind = max(processes.peaks.values())
            seconds = sum(processes.seconds.values()) - before
            clock = f"{told[-1][0] - clock:.1f} s" if is_done else f"not done after {arguments.limit:.0f} s"
            print(f"run {number + 1}: {clock}, {seconds:.1f} s of processors, {peak:.2f} GB ({kind})")
            if not is_done:
                break
            if page.locator("#edit").is_visible():
                page.click("#edit")
        context.close()


if __name__ == "__main__":
    main()
