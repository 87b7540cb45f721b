"""A small server that speaks as much of the hub's protocol as a push needs, and remembers what it received."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
USER = {"type": "user", "name": "me", "orgs": [{"name": "lab"}]}


@dataclass
class FakeHub:
    """The state of the server.

    repositories: by name, whether they are private and their files.
    requests: the method and path of each request, in order.
    role: what the token may do.
    refuses: a part of a path. Requests to such paths get status 403.
    """

    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    role: str = "write"
    refuses: str = ""
    endpoint: str = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """The status, the content and the headers for a request."""
        path = path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}, {}
        if self.refuses and self.refuses in path:
            return 403, {"error": "You have no storage left"}, {"X-Error-Message": "You have no storage left"}
        if path == "/api/whoami-v2":
            return 200, USER | {"auth": {"accessToken": {"role": self.role}}}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._in_repository(f"{owner}/{name}", repository, rest[:1], body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked.get('organization') or USER['name']}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo"} | url, {}
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = {"private": private, "files": {".gitattributes": b""}}
        return 200, url, {}

    def _in_repository(
        self, name: str, repository: dict[str, Any], what: list[str], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        files = repository["files"]
        if what == ["preupload"]:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}, {}
        if what == ["tree"]:
            return 200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in files], {}
        if what == ["commit"]:
            for entry in map(json.loads, body.decode().splitlines()):
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del files[entry["value"]["path"]]
            url = f"{self.endpoint}/{name}/commit/0"
            return 200, {"success": True, "commitOid": "0", "commitUrl": url, "hookOutput": ""}, {}
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "private": repository["private"], "siblings": siblings, "sha": "0", "tags": []}, {}


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Runs the server on a free port of this machine while a with block runs."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "")
            status, content, headers = hub.answer(self.command, self.path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
