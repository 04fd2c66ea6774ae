"""A small stand-in of the hub's API on 127.0.0.1: repositories, one-commit uploads (plain and LFS), downloads.

It answers what `huggingface_hub` asks of the hub without the Xet protocol, keeps everything in memory, and records
every request. Only the token `TOKEN` may write, and only below `OWNER`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"
OWNER = "me"


@dataclass
class Repository:
    """One on the stand-in."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Their messages."""

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    """What the stand-in holds."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, uploaded before the commit that names them."""
    requests: list[str] = field(default_factory=list)
    refuse: tuple[str, int] | None = None
    """A part of a path, and the status with which requests for it are refused from now on."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_POST(self) -> None:
        body = self._begin()
        if body is None:
            return
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, action in (
            (r"/api/models/(.+)/preupload/main", self._preupload),
            (r"/api/models/(.+)/commit/main", self._commit),
            (r"/(.+)\.git/info/lfs/objects/batch", self._batch),
        ):
            if found := re.fullmatch(pattern, path):
                if found[1] not in self.hub.repositories:
                    return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return action(found[1], body)
        return self._json({"error": f"no such path: {path}"}, 404)

    def do_PUT(self) -> None:
        body = self._begin()
        if body is None:
            return
        name = self.path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != name:
            return self._json({"error": "another content than was announced"}, 400)
        self.hub.objects[name] = body
        self._json({})

    def _begin(self) -> bytes | None:
        """The body; None if the request was refused."""
        self.hub.requests.append(f"{self.command} {self.path}")
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.refuse and self.hub.refuse[0] in self.path:
            self._json({"error": "refused on purpose"}, self.hub.refuse[1])
            return None
        return body

    def _create(self, asked: dict[str, Any]) -> None:
        owner, name = asked.get("organization") or OWNER, asked["name"]
        if owner != OWNER:
            return self._json({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        repo, private = f"{owner}/{name}", asked.get("visibility") == "private" or bool(asked.get("private"))
        if repo in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repositories[repo] = Repository(private=private)
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def _preupload(self, repo: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, repo: str, body: bytes) -> None:
        objects: list[dict[str, Any]] = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repo: str, body: bytes) -> None:
        held = self.hub.repositories[repo]
        header, *changes = [json.loads(line) for line in body.splitlines()]
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                held.files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                held.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                return self._json({"error": f"cannot do {change['key']}"}, 400)
        held.commits.append(header["value"]["summary"])
        url = f"{self.hub.url}/{repo}/commit/{held.sha}"
        self._json({"success": True, "commitOid": held.sha, "commitUrl": url, "hookOutput": ""})

    def _get(self, *, body: bool) -> None:
        if self._begin() is None:
            return
        path = self.path.partition("?")[0]
        if path == "/":
            return self._send(b"a stand-in", body=body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(found[1], found[2], body)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)((?:/revision|/tree)/.+)?", path)
        held = self.hub.repositories.get(found[1]) if found else None
        if found is None or held is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if (found[2] or "").startswith("/tree/"):  # of folders; there are none
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        siblings = [{"rfilename": name} for name in held.files]
        self._json({"id": found[1], "private": held.private, "sha": held.sha, "siblings": siblings, "tags": []})

    def _file(self, repo: str, name: str, body: bool) -> None:
        held = self.hub.repositories.get(repo)
        if held is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = {"X-Repo-Commit": held.sha}
        if name not in held.files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"} | commit, body=body)
        content = held.files[name]
        self._send(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'} | commit, body=body)

    def _json(
        self,
        value: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        kind: str = "application/json",
        body: bool = True,
    ) -> None:
        message = {"X-Error-Message": value["error"]} if status >= 400 and "error" in value else {}
        told = {"Content-Type": kind} | message | (headers or {})
        self._send(json.dumps(value).encode(), status, told, body=body)

    def _send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub of its own, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
