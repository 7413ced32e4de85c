"""The part of the Hugging Face hub that an upload and a download talk to: repositories, preupload, git-lfs, commits,
listings and files.

A repository that is gated says what it holds to everybody, and its files to the tokens that its owner has let in.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

TOKEN = "hf_good"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    url: str = ""
    # name -> {"private": bool, "files": {path: bytes}, "gated": whom it lets in, where it has a gate}
    repositories: dict[str, dict] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of git-lfs, by SHA-256
    refuse: tuple[str, int] | None = None  # a pattern of "METHOD path", and the status it gets

    def hold(self, name: str, folder: Path, gated: set[str] | None = None) -> None:
        """A public repository with a folder's files."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repositories[name] = {"private": False, "files": files} | ({} if gated is None else {"gated": gated})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path}"
        self.hub.requests.append(asked)
        if self.hub.refuse and re.search(self.hub.refuse[0], asked):
            return self._send(self.hub.refuse[1], {"error": "no"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        reads = re.match(r"(?:HEAD|GET) (?:/api/models)?/([^/]+/[^/?]+)", asked)
        known = self.hub.repositories.get(reads[1]) if reads else None
        public = known is not None and not known["private"] and not token
        if not (asked.startswith("PUT") or token == TOKEN or public):
            return self._send(401, {"error": "Invalid username or password."})
        if found := re.fullmatch(r"(?:HEAD|GET) /[^/]+/[^/]+/resolve/(?:main|[0-9a-f]{40})/(.+)", asked):
            return self._send_file(known, unquote(found[1]), token)
        return self._send(*self._route(asked, body))

    def _send_file(self, repository: dict | None, path: str, token: str) -> None:
        if repository is None or path not in repository["files"]:
            code = "RepoNotFound" if repository is None else "EntryNotFound"
            return self._send(404, {"error": "not found"}, {"X-Error-Code": code})
        if token not in repository.get("gated", {token}):
            return self._send(403 if token else 401, {"error": "restricted"}, {"X-Error-Code": "GatedRepo"})
        content = repository["files"][path]
        named = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self._send(200, content, named)

    def _route(self, asked: str, body: bytes) -> tuple[int, dict | list]:
        hub = self.hub
        if asked == "POST /api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            hub.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{hub.url}/{name}", "name": name}
        if found := re.fullmatch(r"GET /api/models/([^/]+/[^/?]+)(/revision/[^/?]+)?(\?.*)?", asked):
            repository = hub.repositories.get(found[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            siblings = [{"rfilename": path} for path in repository["files"]]
            return 200, {"id": found[1], "sha": COMMIT, "private": repository["private"], "siblings": siblings}
        if found := re.fullmatch(r"GET /api/models/([^/]+/[^/?]+)/tree/[^/?]+(\?.*)?", asked):
            files = hub.repositories[found[1]]["files"]
            sums = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
            return 200, [{"type": "file", "path": p, "size": len(files[p]), "oid": oid} for p, oid in sums.items()]
        if asked == "POST /api/validate-yaml":  # of the card, before anything is sent
            header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if {"license", "tags"} <= header.keys() else [{"message": "no license or tags"}]
            return (400 if wrong else 200), {"errors": wrong, "warnings": []}
        if re.match(r"POST /api/models/.+/preupload/main", asked):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if re.match(r"POST /.+\.git/info/lfs/objects/batch", asked):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if asked.startswith("PUT /lfs/"):
            oid = asked.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "another content"}
            hub.objects[oid] = body
            return 200, {}
        if found := re.match(r"POST /api/models/([^/]+/[^/]+)/commit/main", asked):
            files = hub.repositories[found[1]]["files"]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
            return 200, {"commitUrl": f"{hub.url}/{found[1]}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        return 404, {"error": f"no such path: {asked}"}

    def _send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404 and content == {"error": "Repository not found"}:
            self.send_header("X-Error-Code", "RepoNotFound")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_for_this_process(monkeypatch: pytest.MonkeyPatch, token: str = "") -> Iterator[Hub]:
    """As with HF_ENDPOINT and HF_TOKEN in the environment when it began."""
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")  # what `hf auth login` has left on this machine
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its store is a protocol of its own
    close_session()
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # made when the package was imported
        yield hub
    close_session()
