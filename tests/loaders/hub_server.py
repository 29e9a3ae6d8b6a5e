"""A small stand-in for the hub: what the `huggingface_hub` client asks when it downloads and uploads, over HTTP."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by revision; a revision's commit hash follows from its files."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    token: str | None = None  # who may read it, if it is private
    variables: dict[str, str] = field(default_factory=dict)  # settings of a Space

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or tag, or of a commit hash itself."""
        for name, files in self.revisions.items():
            digest = hashlib.sha1(name.encode())
            for path in sorted(files):
                digest.update(path.encode() + b"\0" + files[path])
            if revision in (name, digest.hexdigest()):
                return digest.hexdigest()
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)

    def add_folder(self, folder: Path, prefix: str = "", revision: str = "main") -> None:
        files = self.revisions.setdefault(revision, {})
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()


class HubServer:
    """Serves `repositories` on a loopback port and keeps a list of the requests it got, as `"GET /path"`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.cut_downloads = False  # close the connection in the middle of every file
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def add(self, repo_id: str, token: str | None = None) -> Repository:
        self.repositories[repo_id] = Repository(token=token)
        return self.repositories[repo_id]

    def start(self) -> None:
        """Listens, at the same port as before if it was stopped."""
        hub = self

        class Handler(_Handler):
            server_version = "hub"

            def setup(self):
                self.hub = hub
                super().setup()

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def downloads(self) -> list[str]:
        """The files that were sent since the requests were last cleared."""
        return [
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.requests
            if line.startswith("GET ") and "/resolve/" in line
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # one connection a request: a stopped server is unreachable at once

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        is_api = path.startswith(("/api/models/", "/api/spaces/"))
        parts = (path.split("/", 3)[3] if is_api else path).strip("/").split("/")
        repo_id, action = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(repo_id)
        allowed = repository is not None and repository.token in (None, self._token())
        if not allowed:
            return self._error(401, "RepoNotFound", "Repository not found")
        revision = action[1] if len(action) > 1 else "main"
        commit = repository.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.files(revision)
        if action[:1] == ["resolve"]:
            return self._file(commit, files, "/".join(action[2:]))
        if is_api and action[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name} for name in sorted(files)]
            private = repository.token is not None
            return self._json({"id": repo_id, "sha": commit, "private": private, "siblings": siblings, "tags": []})
        if is_api and action[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(files.items())
            ]
            return self._json(entries)
        if is_api and action[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if is_api and action[:1] == ["variables"]:
            variable = json.loads(body)
            repository.variables[variable["key"]] = variable["value"]
            return self._json({variable["key"]: {"value": variable["value"]}})
        if is_api and action[:1] == ["commit"]:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "deletedFile":
                    del files[item["value"]["path"]]
                if item["key"] == "file":
                    files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self._json({"commitUrl": f"{self.hub.url}/{repo_id}", "commitOid": repository.commit(revision)})
        return self._error(404, "NotFound", f"No such page: {path}")

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _create(self, request: dict):
        repo_id = f"{request.get('organization') or 'somebody'}/{request['name']}"
        if repo_id in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{repo_id}", "error": "exists"}, 409)
        self.hub.add(repo_id, token=self._token() if request.get("visibility") == "private" else None)
        return self._json({"url": f"{self.hub.url}/{repo_id}"})

    def _file(self, commit: str, files: dict[str, bytes], name: str):
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data = files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start : len(data) // 2] if self.hub.cut_downloads else data[start:])

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        return self._json(
            {"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        )
