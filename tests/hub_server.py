"""The part of the Hugging Face hub that an upload talks to: repositories, preupload, git-lfs and commits."""

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

import yaml

TOKEN = "hf_good"


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    url: str = ""
    repositories: dict[str, dict] = field(default_factory=dict)  # name -> {"private": bool, "files": {path: bytes}}
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of git-lfs, by SHA-256
    refuse: tuple[str, int] | None = None  # a pattern of "METHOD path", and the status it gets


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
        if not asked.startswith("PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        return self._send(*self._route(asked, body))

    def _route(self, asked: str, body: bytes) -> tuple[int, dict]:
        hub = self.hub
        if asked == "POST /api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            hub.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{hub.url}/{name}", "name": name}
        if found := re.fullmatch(r"GET /api/models/([^/]+/[^/?]+)(\?.*)?", asked):
            repository = hub.repositories.get(found[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            return 200, {"id": found[1], "private": repository["private"], "siblings": []}
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

    def _send(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if content.get("error") == "Repository not found":
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


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
