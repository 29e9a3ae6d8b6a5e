"""
Many visitors of the web demo at once: is anything lost or mixed up, how long do they wait, and does memory come back?

    python benchmarks/demo_load.py --visitors 50

Starts the demo with the bundled model on loopback, and lets each visitor send a photo of a colour of their own, mark a
square, remove it and download the result, by the requests that the page sends. Needs the extra `demo`.
"""

import argparse
import base64
import concurrent.futures
import io
import json
import socket
import statistics
import subprocess
import sys
import time
import uuid

import httpx
import numpy as np
from PIL import Image

SIDE = 192
TIMEOUT = 600  # s, for one visitor


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Visitor:
    """One visitor: the requests of a page, and what came of them."""

    def __init__(self, url: str, functions: dict[str, int], number: int):
        self.client = httpx.Client(base_url=f"{url}/gradio_api", timeout=TIMEOUT)
        self.functions = functions
        self.session = uuid.uuid4().hex
        generator = np.random.default_rng(number)
        self.pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)  # nobody else's
        self.hole = np.zeros((SIDE, SIDE), bool)
        self.hole[80:120, 70:130] = True

    def call(self, name: str, *data, event=None):
        """An event that is answered by its own request."""
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session, "event_data": event}
        answer = self.client.post("/run/predict", json=body).raise_for_status()
        return answer.json()["data"]

    def queued(self, name: str, *data) -> None:
        """An event with a place in the queue, to its end."""
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        self.client.post("/queue/join", json=body).raise_for_status()
        with self.client.stream("GET", "/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"])
                    self.told = message["output"]["data"]
                    return
        raise RuntimeError("the stream ended without an answer")

    def visit(self) -> float:
        """All of a visit; returns the seconds from pressing Remove to the answer."""
        (path,) = self.client.post("/upload", files={"files": ("photo.png", png(self.pixels))}).json()
        photo = {"path": path, "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}}
        opened = self.call("_open_upload", photo)
        photo_id = next(value["photo"]["id"] for value in opened if isinstance(value, dict) and "photo" in value)
        layer = np.zeros((SIDE, SIDE, 4), np.uint8)
        layer[self.hole] = 255
        mask = "data:image/png;base64," + base64.b64encode(png(layer)).decode()
        marked = json.dumps({"photo": photo_id, "mask": mask})
        start = time.monotonic()
        # As the page sends them; the edge margin is 0, so that the mask is the hole.
        self.queued("_run", None, marked, self.model, "", "", 0, True, 1, "0", 50, "auto", False)
        seconds = time.monotonic() - start
        result_id = photo_id + 1
        (file,) = self.call("_write", None, json.dumps({"photo": result_id, "mask": None}), "PNG")
        result = np.asarray(Image.open(io.BytesIO(self.client.get(f"/file={file['path']}").content)))
        changed = (result != self.pixels).any(axis=2)
        if changed[~self.hole].any() or not changed[self.hole].any():
            raise RuntimeError("this is not the visitor's photo")
        self.call("_start_again", None)
        return seconds


def resident_megabytes(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50, help="how many at once, at most 200 (default: 50)")
    parser.add_argument("--rounds", type=int, default=2, help="how often, at most 5 (default: 2)")
    arguments = parser.parse_args()
    visitors, rounds = min(arguments.visitors, 200), min(arguments.rounds, 5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "diffusers_moebius", "demo", "--port", str(port)])
    try:
        for _ in range(240):
            try:
                config = httpx.get(f"{url}/config").json()
                break
            except httpx.TransportError:
                time.sleep(0.5)
        functions = {dependency["api_name"]: dependency["id"] for dependency in config["dependencies"]}
        Visitor.model = next(c["props"]["value"] for c in config["components"] if c["props"].get("label") == "Model")
        Visitor(url, functions, 0).visit()  # the model is loaded
        print(f"memory with one visitor gone: {resident_megabytes(server.pid):.0f} MB")
        for each in range(rounds):
            with concurrent.futures.ThreadPoolExecutor(visitors) as pool:
                futures = [
                    pool.submit(Visitor(url, functions, 1 + each * visitors + k).visit) for k in range(visitors)
                ]
                peak = 0.0
                while not all(future.done() for future in futures):
                    peak = max(peak, resident_megabytes(server.pid))
                    time.sleep(0.2)
            failures = [future.exception() for future in futures if future.exception()]
            waits = [future.result() for future in futures if not future.exception()]
            print(
                f"round {each + 1}: {len(waits)} of {visitors} served, median wait {statistics.median(waits):.1f} s, "
                f"longest {max(waits):.1f} s; memory {peak:.0f} MB at most, "
                f"{resident_megabytes(server.pid):.0f} MB after"
            )
            for failure in failures[:3]:
                print(f"  failed: {failure!r}")
        sys.exit(bool(failures))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
