"""`python -m advgrpo.compare serve`: what it serves, stores, and refuses; and what is left when it is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path

import pytest

from advgrpo.compare import server as module
from advgrpo.compare.__main__ import main
from advgrpo.compare.server import make_server
from advgrpo.compare.votes import VOTES, read_votes
from tests.comparisons import make, vote
from tests.judges import serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


@contextmanager
def served(folder, **how):
    server = make_server(folder, **how)
    try:
        with serving(server) as url:
            yield url
    finally:
        server.votes.close()


def ask(url: str, body: object = None, headers: dict | None = None, path: str = "") -> tuple[int, dict | bytes]:
    """(status, content); JSON is read."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, given), timeout=30) as answer:
            status, kind, content = answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        status, kind, content = error.code, error.headers.get_content_type(), error.read()
    return status, json.loads(content) if kind == "application/json" else content


def post(url: str, body: object, headers: dict | None = None) -> tuple[int, dict]:
    return ask(url, body, headers, "/votes")


def test_the_page_is_served_and_nothing_else_of_the_folder(made):
    folder, comparison = made
    with served(folder) as url:
        assert ask(url, path="/") == (200, (folder / "index.html").read_bytes())
        assert ask(url, path="/index.html?x=1")[0] == 200
        port = int(url.rpartition(":")[2])
        for path in ("/comparison.json", "/votes.jsonl", "/report.html", "/pictures", "/../comparison.json",
                     "/%2e%2e/comparison.json", "//etc/passwd", "/index.html/", "index.html", "/votes"):  # fmt: skip
            connection = HTTPConnection("127.0.0.1", port, timeout=30)  # which does not tidy the path up
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status in (400, 404), path
            assert comparison.id.encode() not in answer.read(), path
            connection.close()


def test_a_vote_is_stored_once_however_often_it_comes(made):
    folder, comparison = made
    first, changed = vote(comparison), vote(comparison, id="f" * 32, milliseconds=9)
    with served(folder) as url:
        assert post(url, asdict(first)) == (200, {"stored": True})
        assert post(url, asdict(first)) == (200, {"stored": False})
        assert post(url, {**asdict(first), "milliseconds": 1})[0] == 409
        assert post(url, asdict(changed), {"Origin": url}) == (200, {"stored": True})
    assert read_votes(folder / VOTES, comparison) == ([first, changed], 0)


def test_many_raters_at_once(made):
    folder, comparison = made
    given = [vote(comparison, pair, f"rater {n}") for n in range(16) for pair in comparison.pairs]
    answers = []
    with served(folder) as url:

        def work(own):
            for each in own:
                answers.append(post(url, asdict(each)))
                answers.append(post(url, asdict(each)))

        threads = [threading.Thread(target=work, args=(given[start::8],)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(str, answers)) == sorted(
        [str((200, {"stored": stored})) for stored in (True, False)] * len(given)
    )
    found, torn = read_votes(folder / VOTES, comparison)
    assert {each.id: each for each in found} == {each.id: each for each in given}
    assert (len(found), torn) == (len(given), 0)


@pytest.mark.parametrize(
    ("body", "headers", "status", "expected"),
    [
        (b"no json", {}, 400, "no JSON"),
        (b"\xff\xfe", {}, 400, "no JSON"),
        (b"[" * 5000, {}, 400, "no JSON"),
        (b'{"id": "a", "id": "b"}', {}, 400, "no JSON"),
        ([], {}, 400, "a vote is a JSON object"),
        ({"rater": "Ann"}, {}, 400, "'id' is missing"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"x" * (2**14 + 1), {}, 413, "no longer than"),
        (b"x" * 2**19, {}, 413, "no longer than"),
        ({}, {"Origin": "http://elsewhere.example"}, 403, "own page alone"),
        ({}, {"Origin": "null"}, 403, "own page alone"),
        ({}, {"Host": "elsewhere.example"}, 403, "--allow-hosts"),
    ],
)
def test_bad_votes(made, body, headers, status, expected):
    folder, comparison = made
    with served(folder) as url:
        found, said = post(url, body, headers)
        assert found == status
        assert expected in said["error"]
        assert post(url, asdict(vote(comparison)))[0] == 200  # it goes on
        assert ask(url, {}, path="/elsewhere")[0] == 404
    assert len(read_votes(folder / VOTES, comparison)[0]) == 1


def test_a_name_that_the_server_was_told(made):
    folder, comparison = made
    with served(folder, hosts=("votes.example",)) as url:
        assert post(url, asdict(vote(comparison)), {"Host": "votes.example"})[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /votes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n", 411),
        (
            b"POST /votes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n",
            411,
        ),
        (b"POST /votes HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n", 403),
        (b"POST /votes HTTP/1.1\r\nHost: localhost\r\nHost: b\r\nContent-Length: 0\r\n\r\n", 403),
        (
            b"POST /votes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
            400,
        ),
        (b"PUT /votes HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    ],
)
def test_requests_that_no_browser_makes(made, head, status):
    with served(made[0]) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as client:
        client.sendall(head)
        client.shutdown(socket.SHUT_WR)
        assert client.makefile("rb").readline().split()[1] == str(status).encode()


def test_a_client_that_says_nothing_is_left(made, monkeypatch):
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    with served(made[0]) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as client:
        client.sendall(b"POST /votes HTTP/1.1\r\nHost: lo")
        assert client.recv(100) == b""


def test_a_disk_that_fails_is_told_and_the_vote_may_come_again(made, monkeypatch):
    folder, comparison = made
    with served(folder) as url:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            status, said = post(url, asdict(vote(comparison)))
            assert (status, "Input/output error" in said["error"]) == (500, True)
        assert post(url, asdict(vote(comparison))) == (200, {"stored": True})


def test_what_a_killed_server_has_acknowledged_is_there(made):
    """The command itself, killed while eight clients vote."""
    folder, comparison = made
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "advgrpo.compare", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    acknowledged = []

    def work(own: int) -> None:
        for number in range(10_000):
            each = vote(comparison, rater=f"{own} {number}")
            try:
                if post(url, asdict(each)) == (200, {"stored": True}):
                    acknowledged.append(each)
            except OSError:
                return

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 40:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    for thread in threads:
        thread.join()
    process.stdout.close()
    found, torn = read_votes(folder / VOTES, comparison)
    assert torn <= 1
    assert {each.id for each in acknowledged} <= {each.id for each in found}
    with served(folder) as again:  # the lock has gone with the process
        assert post(again, asdict(acknowledged[0])) == (200, {"stored": False})


def test_bad_folders_and_addresses(made, tmp_path, capsys):
    folder, _ = made
    assert main(["serve", str(tmp_path)]) == 2
    assert "comparison.json does not exist; make the comparison again" in capsys.readouterr().err
    with served(folder) as url:
        assert main(["serve", str(folder), "--port", "0"]) == 2
        assert "is in use by process" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    for name in ("comparison.json", "index.html"):
        (tmp_path / "taken" / name).write_bytes((folder / name).read_bytes())
    with served(folder) as url:
        assert main(["serve", str(tmp_path / "taken"), "--port", url.rpartition(":")[2]]) == 2
        assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    changed = (folder / "comparison.json").read_text().replace('"side": 1', '"side": 0')
    (folder / "comparison.json").write_text(changed)
    assert main(["serve", str(folder)]) == 2
    assert "its id is not that of its content" in capsys.readouterr().err
