"""A web server that can be slow, lose its connections, or serve a file that is not what it should be."""

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class PageServer:
    """
    Serves a folder.

    Args:
        folder (`Path`): The folder.
        ranges (`bool`, defaults to `False`): Whether parts of files can be asked for.
        headers (`dict`, *optional*): More headers for every answer.
    """

    def __init__(self, folder: Path, ranges: bool = False, headers: dict | None = None):
        self.requests: list[tuple[str, str | None]] = []  # path and range
        self.replaced: dict[str, bytes] = {}  # by the end of the path
        self.lost: set[tuple[str, str]] = set()  # ends of paths, and the range that breaks off
        self.is_open = threading.Event()  # models wait for it
        self.is_open.set()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args):
                pass

            def end_headers(self):
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                super().end_headers()

            def do_GET(self):
                path, wanted = self.path.partition("?")[0], self.headers.get("Range")
                server.requests.append((path, wanted))
                if "/models/" in path:
                    server.is_open.wait(60)
                content = next((value for end, value in server.replaced.items() if path.endswith(end)), None)
                if content is None and not path.endswith((".onnx", ".onnx_data")):
                    super().do_GET()
                    return
                content = Path(self.translate_path(self.path)).read_bytes() if content is None else content
                is_part = ranges and wanted is not None
                if is_part:
                    first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                    total, content = len(content), content[first : last + 1]
                self.send_response(206 if is_part else 200)
                if is_part:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if any(path.endswith(end) and part == wanted for end, part in server.lost):
                    content = content[: len(content) // 2]
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.is_open.set()
        self.server.shutdown()
        self.server.server_close()
