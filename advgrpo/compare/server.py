"""`python -m advgrpo.compare serve DIR`: the page, and a place for its votes.

    GET  /          index.html
    POST /votes     one vote of votes.py as JSON -> {"stored": true}, or false for one that was sent again

Nothing else of the folder is served: no path of a request ever becomes a path of the disk. 400: no vote; 403: not this
server's name, or another site's page; 409: the id is another vote's; 411, 413, 415: the request's form; 500: the disk
did not take it, and the page sends it again later.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import shutil
import socket
import sys
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from advgrpo.compare.page import PAGE
from advgrpo.compare.plan import Comparison
from advgrpo.compare.settings import Serve
from advgrpo.compare.votes import BadVoteError, RepeatedVoteError, Vote, VoteFile
from advgrpo.errors import UserError, printable
from advgrpo.rewards.scoring_request import Refusal
from advgrpo.rewards.scoring_server import is_own_host, listening
from advgrpo.runtime.reading import RepeatedKeyError, parse_json, unique_keys

_MOST_BYTES = 2**14  # of a request: a vote has a few hundred
_MOST_UNREAD = 2**20  # bytes of a refused request that are taken before its answer
_SECONDS, _LINGER_SECONDS = 20.0, 2.0  # without a byte of a client; of one that is refused
_log = logging.getLogger(__name__)


class VoteServer(ThreadingHTTPServer):
    """Shows a comparison and appends its votes; call `serve_forever()`, then `server_close()`.

    Args:
        hosts: names that browsers may call it by, beside addresses and localhost.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], page: Path, votes: VoteFile, hosts: tuple[str, ...]) -> None:
        self.page, self.votes = page, votes
        self.hosts = frozenset(name.lower().rstrip(".") for name in ("localhost", socket.gethostname(), *hosts))
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _log.info("%s: the connection broke", client_address[0])
        else:
            _log.exception("a request of %s", client_address[0])


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    timeout = _SECONDS
    _is_read = False  # the request's body; a connection has one request

    def do_GET(self) -> None:
        try:
            self._check_who()
            if self.path.partition("?")[0] not in ("/", f"/{PAGE}"):
                raise Refusal("there is no such page; / shows the comparison", 404)
            with self.server.page.open("rb") as page:
                self._answer(200, "text/html; charset=utf-8", page, self.server.page.stat().st_size)
        except Refusal as refusal:
            self._say(refusal.status, {"error": str(refusal)})

    def do_POST(self) -> None:
        try:
            self._check_who()
            if self.path != "/votes":
                raise Refusal("votes are posted to /votes", 404)
            stored = self.server.votes.append(self._vote())
            self._say(200, {"stored": stored})
        except Refusal as refusal:
            self._say(refusal.status, {"error": str(refusal)})
        except RepeatedVoteError as error:
            self._say(409, {"error": str(error)})
        except BadVoteError as error:
            self._say(400, {"error": str(error)})
        except OSError as error:
            _log.error("a vote could not be stored: %s", error)
            self._say(500, {"error": f"the vote could not be stored ({error.strerror or error})"})

    def _check_who(self) -> None:
        """Refusal for another site's page: a browser says where a request comes from, and by which name it calls."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own_host(hosts[0], self.server.hosts):
            called = ", ".join(map(repr, hosts)) or "missing"
            raise Refusal(
                f"the Host of the request is {called}; if that is this server, start it with --allow-hosts", 403
            )
        origins = self.headers.get_all("Origin", [])
        if origins and [each.lower() for each in origins] != [f"http://{hosts[0].lower()}"]:
            raise Refusal("votes are taken from this server's own page alone", 403)

    def _vote(self) -> Vote:
        if self.headers.get_content_type() != "application/json":
            raise Refusal("want Content-Type: application/json", 415)
        length = _length(self.headers)
        if length is None:
            raise Refusal("the request has no Content-Length", 411)
        if length > _MOST_BYTES:
            raise Refusal(f"a vote is no longer than {_MOST_BYTES} bytes", 413)
        self._is_read = True
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refusal("the request broke off")
        try:
            content = parse_json(body.decode(), "the vote", "send one vote as a JSON object", pairs=unique_keys)
        except (UserError, RepeatedKeyError, UnicodeDecodeError) as error:
            raise Refusal(f"no JSON ({error})") from None
        return Vote.read(content, self.server.votes.comparison)

    def _say(self, status: int, content: dict[str, Any]) -> None:
        self._answer(status, "application/json", json.dumps(content).encode())

    def _answer(self, status: int, kind: str, content: bytes | BinaryIO, size: int = 0) -> None:
        self.close_connection = True
        if not self._is_read:  # closing a connection with unread bytes resets it, and the answer is lost
            with suppress(OSError):
                self.connection.settimeout(_LINGER_SECONDS)
                self.rfile.read(min(_length(self.headers) or 0, _MOST_UNREAD))
        self.send_response(HTTPStatus(status))
        is_bytes = isinstance(content, bytes)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content) if is_bytes else size),
            "Cache-Control": "no-store",  # a comparison made anew is another page
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Connection": "close",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if is_bytes:
            self.wfile.write(content)
        else:
            shutil.copyfileobj(content, self.wfile)

    def log_message(self, format: str, *args: Any) -> None:
        _log.info("%s %s", self.address_string(), printable(format % args))


def _length(headers: Message) -> int | None:
    """Bytes of the request's body, as it says."""
    found = re.fullmatch("[0-9]{1,18}", headers.get("Content-Length", ""))
    return None if found is None else int(found[0])


def make_server(folder: Path, *, host: str = "127.0.0.1", port: int = 0, hosts: tuple[str, ...] = ()) -> VoteServer:
    """A server of the comparison in a folder.

    Args:
        port: 0 takes a free one, see `server_address`.
        hosts: further names that browsers may call it by.

    Raises:
        UserError: no comparison there, another process serves it, its votes are damaged, or the address is taken.
    """
    comparison = Comparison.read(folder)
    if not (folder / PAGE).is_file():
        raise UserError(f"{folder / PAGE} does not exist; make the comparison again with python -m advgrpo.compare")
    votes = VoteFile(folder, comparison)
    try:
        return listening(lambda: VoteServer((host, port), folder / PAGE, votes, (host, *hosts)), host, port, hosts)
    except BaseException:
        votes.close()
        raise


def serve_folder(options: Serve) -> None:
    """Until interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    server = make_server(options.folder, host=options.host, port=options.port, hosts=options.allow_hosts)
    host, port = server.server_address[:2]
    with server:
        if server.votes.torn:
            print(f"note: {server.votes.torn} votes broke off when a server was killed; their pages send them again")
        print(f"{len(server.votes)} votes so far; vote at http://{host}:{port}/", flush=True)
        if not ipaddress.ip_address(host).is_loopback:
            print("note: whoever reaches this port may vote, under any name", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"stopped with {len(server.votes)} votes", flush=True)
        finally:
            server.votes.close()
