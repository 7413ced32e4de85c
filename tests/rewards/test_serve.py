"""The HTTP end of a reward: what it refuses and how, what a request may cost, and that clients get an answer in time.

Planted bugs that turned this file red: no limit for all images or for one, or only after decoding; three requests
decoded at once, a place not given back, or lost to a damaged image, images kept after they were scored; a backlog
of 5; no deadline for a trickle, which is 500 instead of 408; a judge waited for without end, no Retry-After; a client
that hung up is scored; bodies without a limit together, or one that is not given back or told; no check of the content
type, of Host, of a missing one, by its beginning, of Origin "null"; no token asked for, a longer one or another scheme
taken, GET without; a refusal that resets the connection; control characters in the log; --allow-hosts unchecked or not
handed on; the note about an open port always; limits below what our client sends; a bomb as 500; checks and decoding
that do not look at the time.
"""

import base64
import gc
import http.client
import io
import json
import logging
import random
import socket
import struct
import threading
import time
import tracemalloc
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from advgrpo.errors import UserError
from advgrpo.rewards import scoring_request, scoring_server
from advgrpo.rewards.remote import PROTOCOLS, TOKEN_VARIABLE, RemoteReward
from advgrpo.rewards.rule import RuleReward
from advgrpo.rewards.scoring_request import Limits, Refusal
from advgrpo.rewards.scoring_server import is_own_host, make_server
from advgrpo.rewards.serve import main
from advgrpo.tiny.scenes import BASE_ARTISTS, all_scenes, render
from tests.judges import serving

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["first", "second", "third"]


def test_both_ends_give_the_local_scores():
    """Rule reward over HTTP equals the rule reward on the same 8-bit images, to the last bit."""
    scenes = all_scenes()[::700]
    images = render(scenes, [BASE_ARTISTS[0]] * len(scenes), torch.Generator().manual_seed(1))
    images = (images.roll(6, 3) * 255).round() / 255  # off their places, so that the scores differ
    prompts = [scene.caption for scene in scenes]
    with serving(make_server(RuleReward())) as url:
        remote = RemoteReward(url=url, batch_size=2)
        remote.check_prompts(prompts)
        assert torch.equal(remote.score(images, prompts, None), RuleReward().score(images, prompts, None))
        with pytest.raises(RuntimeError, match=r"status 400 .*not a caption of the tiny world: 'a dragon'"):
            remote.score(images[:1], ["a dragon"], None)


class Broken:
    name = "broken"

    def score(self, images, prompts, references):
        return torch.tensor([float("nan")]) if prompts == ["nan"] else 1 / 0


def _png(mode="RGB", size=(4, 4), kind="PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def _bomb() -> str:
    """A PNG whose header promises 10^10 pixels: 500 made clients send it again."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(content)).decode()


@pytest.mark.parametrize(
    ("request_", "status", "complaint"),
    [
        ({}, 400, '"version": 1'),
        ({"version": 1, "images": [], "prompts": []}, 400, '"images" must be'),
        ({"version": 1, "images": [_png()], "prompts": [3]}, 400, '"prompts" must be'),
        ({"version": 1, "images": [_png()], "prompts": ["a", "b"]}, 400, "1 images but 2 prompts"),
        ({"version": 1, "images": ["no base64!"], "prompts": ["a"]}, 400, "image 0 is not in base64"),
        (
            {"version": 1, "images": [_png(kind="JPEG")], "prompts": ["a"]},
            400,
            r"image 0 .*\(no PNG\)",
        ),
        ({"version": 1, "images": [_png()[:60]], "prompts": ["a"]}, 400, "image 0 is unreadable or truncated"),
        ({"version": 1, "images": [_png("RGBA")], "prompts": ["a"]}, 400, "image 0 has mode RGBA"),
        ({"version": 1, "images": [_bomb()], "prompts": ["a"]}, 400, "image 0 has more than 4,194,304 pixels"),
        ({"version": 1, "images": [_png(), _png(size=(8, 4))], "prompts": ["a", "b"]}, 400, "differ in size"),
        ({"version": 1, "images": [_png()], "prompts": ["a"]}, 500, "ZeroDivisionError"),
        ({"version": 1, "images": [_png()], "prompts": ["nan"]}, 500, "FloatingPointError"),
        ("x" * 3000, 413, "longer than 2000 bytes"),
    ],
)
def test_our_server_refuses_bad_requests(request_, status, complaint, monkeypatch):
    with serving(make_server(Broken(), limits=Limits(max_bytes=2000))) as url:
        reward = RemoteReward(url=url, retries=0)
        monkeypatch.setattr(PROTOCOLS["advgrpo"], "request", lambda *_: json.dumps(request_).encode())
        with pytest.raises(RuntimeError, match=f"status {status} .*{complaint}"):
            reward.score(IMAGES, PROMPTS, None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--reward", "nonsense"], "unknown reward 'nonsense'"),
        (["--reward", "rule", "--options", '{"strictly": true}'], "has no option 'strictly'"),
        (["--reward", "rule", "--options", "{"], "is not JSON"),
        (["--reward", "rule", "--options", "[]"], "is not a JSON object"),
        (["--reward", "rule", "--references", "somewhere"], "belong together"),
        (["--reward", "rule", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (
            ["--reward", "rule", "--token-file", "nowhere"],
            "--token-file nowhere does not exist; write the token into it",
        ),
        (
            ["--reward", "rule", "--allow-hosts", "http://judge:80"],
            "--allow-hosts http://judge:80: want names",
        ),
        (["--reward", "rule", "--max-pixels", "0"], "--max-pixels 0: want a whole number"),
        (["--reward", "rule", "--request-seconds", "inf"], "--request-seconds inf: not finite"),
        (["--reward", "rule", "--port", "70000"], "--port 70000: want a whole number from 0 to 65535"),
    ],
)
def test_bad_command_lines(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr(scoring_server.ScoringServer, "serve_forever", lambda _: pytest.fail("it serves"))
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


class Mean:
    """Scores by brightness; `gate` lets it, `begun` says that it has, and what it saw is kept by weak references."""

    name = "mean"

    def __init__(self, is_open=True):
        self.gate, self.begun, self.seen, self.images = threading.Event(), threading.Event(), [], []
        if is_open:
            self.gate.set()

    def score(self, images, prompts, references):
        self.begun.set()
        assert self.gate.wait(20)
        self.seen += prompts
        self.images.append(weakref.ref(images))
        return images.mean(dim=(1, 2, 3))


def request_of(prompts, image="") -> bytes:
    return json.dumps({"version": 1, "images": [image or _png()] * len(prompts), "prompts": list(prompts)}).encode()


JSON = {"Content-Type": "application/json"}


def post(url, body, headers=JSON):
    """(status, answer, headers) of a request with exactly these headers, and Host unless it is None."""
    address = url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.putrequest("POST", "/", skip_host=True)
        for name, value in {"Host": address, "Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def open_request(url, body, length=None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    return client


def until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_too_many_pixels_are_refused_before_one_is_decoded(monkeypatch):
    """40 images of 4 megapixels in 650 kB, and one of 16: neither costs memory."""
    monkeypatch.setattr(scoring_request, "open_image", lambda *_, **__: pytest.fail("an image was decoded"))
    many, large = request_of(["a"] * 40, _png(size=(2000, 2000))), request_of(["a"], _png(size=(4000, 4000)))
    assert len(many) < 2_000_000
    with serving(make_server(Mean())) as url:
        tracemalloc.start()
        try:
            status, said, _ = post(url, many)
            assert (status, said["error"]) == (
                413,
                "the images have more than 33,554,432 pixels together; send fewer at once",
            )
            status, said, _ = post(url, large)
            assert (status, said["error"]) == (
                400,
                "image 0 is 4000x4000: more than 4,194,304 pixels; want an RGB PNG of at most 4,194,304 pixels",
            )
            assert tracemalloc.get_traced_memory()[1] < 20_000_000  # decoded, they are 480 and 48 MB
        finally:
            tracemalloc.stop()


def test_what_the_client_sends_by_default_is_within_the_limits():
    image = _png(size=(1024, 1024))
    images, prompts = scoring_request.parse_request(request_of(["a"] * 16, image), Limits(), time.monotonic() + 60)
    assert (len(images), len(prompts)) == (16, 16)


def test_few_requests_are_decoded_at_a_time_and_none_stays_in_memory():
    """The others wait as the files they came as."""
    reward, decoded = Mean(is_open=False), []

    def counting(*arguments):
        decoded.append(1)
        return scoring_request.decode(*arguments)

    with pytest.MonkeyPatch.context() as patch, serving(make_server(reward)) as url, ThreadPoolExecutor(8) as clients:
        patch.setattr(scoring_server, "decode", counting)
        answers = [clients.submit(post, url, request_of([f"{number}"])) for number in range(8)]
        until(lambda: len(decoded) == 2)
        time.sleep(0.3)
        assert len(decoded) == 2
        reward.gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 8
        until(lambda: gc.collect() + 1 and all(image() is None for image in reward.images))


def test_damaged_images_take_no_place_for_ever():
    """Their headers are good, so they are found while they are decoded."""
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    damaged = base64.b64encode(buffer.getvalue()[:200]).decode()
    with serving(make_server(Mean(), limits=Limits(score_seconds=5))) as url:
        for _ in range(3):
            status, said, _ = post(url, request_of(["a"], damaged))
            assert status == 400
            assert "image 0 is unreadable or truncated" in said["error"]
        assert post(url, request_of(["a"]))[0] == 200


def test_checking_and_decoding_end_with_the_request_s_time():
    over = time.monotonic() - 1
    for work in (
        lambda: scoring_request.parse_request(request_of(["a"]), Limits(), over),
        lambda: scoring_request.decode([base64.b64decode(_png())], Limits(), over),
    ):
        with pytest.raises(Refusal, match="the judge is busy") as refusal:
            work()
        assert refusal.value.status == 503


def test_fifty_clients_at_once_are_all_answered():
    """They connect before the first is taken, as when all ranks of a job finish their rollout."""
    with make_server(Mean()) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        clients = [open_request(url, request_of([f"{number}"])) for number in range(50)]
        with serving(server):
            for client in clients:
                client.settimeout(20)
                assert client.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"
                client.close()


@pytest.mark.parametrize("place", ["body", "head"])
def test_a_client_that_sends_a_byte_now_and_then_is_let_go(place):
    with serving(make_server(Mean(), limits=Limits(request_seconds=0.5))) as url:
        client = (
            open_request(url, b"{", length=1000)
            if place == "body"
            else socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
        )
        started, said = time.monotonic(), b""
        client.settimeout(0.05)
        while time.monotonic() - started < 10:
            try:
                client.send(b"a")
                if not (part := client.recv(1000)):
                    break
                said += part
            except TimeoutError:
                pass
            except OSError:
                break
        assert 0.4 < time.monotonic() - started < 5
        client.close()
        assert place == "head" or said.startswith(b"HTTP/1.0 408 Request Timeout\r\n")
        assert place == "head" or b"did not come to its end within 0.5 s" in said
        assert post(url, request_of(["next"]))[0] == 200


def test_a_judge_that_is_too_slow_says_so_and_recovers():
    """Of the requests that wait, none is begun after its time; the answer says when to come again."""
    reward = Mean(is_open=False)
    limits = Limits(score_seconds=0.5)
    with serving(make_server(reward, limits=limits)) as url, ThreadPoolExecutor(4) as clients:
        started = time.monotonic()
        answers = [clients.submit(post, url, request_of([f"{number}"])) for number in range(4)]
        for answer in answers:
            status, said, headers = answer.result()
            assert (status, headers["Retry-After"]) == (503, "5")
            assert "the judge is busy" in said["error"]
        assert time.monotonic() - started < 5
        reward.gate.set()
        assert post(url, request_of(["next"]))[0] == 200
        assert len(reward.seen) == 2  # the one that had begun, and "next"


def test_a_client_that_hung_up_costs_the_judge_nothing():
    reward = Mean(is_open=False)
    with serving(make_server(reward)) as url, ThreadPoolExecutor(2) as clients:
        first = clients.submit(post, url, request_of(["first"]))
        assert reward.begun.wait(10)
        open_request(url, request_of(["gone"])).close()
        last = clients.submit(post, url, request_of(["last"]))
        time.sleep(0.2)
        reward.gate.set()
        assert first.result()[0] == last.result()[0] == 200
    assert reward.seen == ["first", "last"]


def test_bodies_wait_for_room():
    room = scoring_server._Room(4)
    with room.taken(3, 1.0):
        with pytest.raises(Refusal, match="busy") as refusal, room.taken(2, 0.05):
            pass
        assert refusal.value.status == 503
    with room.taken(4, 0.05):
        pass
    waiting = threading.Event()

    def later():
        with room.taken(2, 10.0):
            waiting.set()

    with room.taken(3, 1.0):
        thread = threading.Thread(target=later)
        thread.start()
        assert not waiting.wait(0.1)
    assert waiting.wait(5)
    thread.join()


@pytest.mark.parametrize(
    ("headers", "status", "complaint"),
    [
        ({"Content-Type": "text/plain"}, 415, "want Content-Type: application/json, not text/plain"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "want Content-Type"),
        ({"Content-Type": None}, 415, "want Content-Type"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
        ({"Host": "rebound.example"}, 403, "the Host of the request is 'rebound.example'; if that is this server"),
        ({"Host": "rebound.example:8000"}, 403, "Host"),
        ({"Host": None}, 403, "the Host of the request is missing"),
        ({"Host": "localhost"}, 200, ""),
        ({"Host": "judge.local:8000"}, 200, ""),
        ({"Origin": "http://rebound.example"}, 403, "requests of web pages are not served"),
        ({"Origin": "null"}, 403, "requests of web pages"),
        ({"Content-Length": None}, 411, "no Content-Length"),
        ({"Content-Length": "-1"}, 411, "no Content-Length"),
        ({"Content-Length": "9" * 30}, 411, "no Content-Length"),
        ({"Content-Length": "9" * 18}, 413, "longer than 200000000 bytes"),
    ],
)
def test_requests_that_no_client_of_ours_makes(headers, status, complaint):
    reward = Mean()
    with serving(make_server(reward, hosts=("judge.local",))) as url:
        answer = post(url, request_of(["a"]), {**JSON, **headers})
        assert answer[0] == status
        assert complaint in answer[1].get("error", "")
    assert reward.seen == (["a"] if status == 200 else [])


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3:8000", True),
        ("[::1]:8000", True),
        ("LOCALHOST.:80", True),
        ("judge", True),
        ("judge.evil.example", False),
        ("evil@judge", False),
        ("judge/", False),
        ("judge:80:80", False),
        ("127.0.0.1.evil.example", False),
        ("[judge]", False),
        ("", False),
    ],
)
def test_names_of_a_server(host, is_own):
    assert is_own_host(host, frozenset({"localhost", "judge"})) is is_own


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer open", 401),
        ("Bearer open-sesame2", 401),
        ("Basic open-sesame", 401),
        ("Bearer \xfcber", 401),
        ("Bearer open-sesame", 200),
        ("bearer  open-sesame", 200),
    ],
)
def test_a_token_is_asked_for(given, status, method):
    with serving(make_server(Mean(), token="open-sesame")) as url:
        if method == "POST":
            got, _, headers = post(url, request_of(["a"]), {**JSON, "Authorization": given})
        else:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
            connection.request("GET", "/", headers={} if given is None else {"Authorization": given})
            response = connection.getresponse()
            got, headers = response.status, response.headers
            connection.close()
    assert got == status
    assert headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize("why", ["no token", "too long"])
def test_who_is_refused_while_still_sending_gets_the_answer(why):
    """Not a reset connection, which a client would take for a failure that passes."""
    settings = {"token": "open-sesame"} if why == "no token" else {"limits": Limits(max_bytes=1000)}
    with serving(make_server(Mean(), **settings)) as url:
        for _ in range(5):
            assert post(url, b" " * 20_000_000)[0] == (401 if why == "no token" else 413)


def test_both_ends_share_a_token(tmp_path, monkeypatch):
    """The wrong one is one attempt, not four."""
    (tmp_path / "token").write_text("open-sesame")
    with serving(make_server(Mean(), token="open-sesame")) as url:
        RemoteReward(url=url, token_file=str(tmp_path / "token")).check_prompts(PROMPTS)
        with pytest.raises(UserError, match=r"status 401 .*; set token_file to a file with the server's token;"):
            RemoteReward(url=url).check_prompts(PROMPTS)


def test_the_log_takes_no_orders(caplog):
    caplog.set_level(logging.INFO)
    with serving(make_server(Mean())) as url:
        client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
        client.sendall(b"GET /\x1b[31m\x9b2J HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert client.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"
        client.close()
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("advgrpo")]
    assert any("GET /" in line for line in logged)
    assert all(line.isprintable() for line in logged)


@pytest.mark.parametrize(
    ("flags", "token", "note"),
    [
        (("--host", "0.0.0.0"), "", True),
        (("--host", "0.0.0.0"), "open-sesame", False),
        ((), "", False),
    ],
)
def test_the_command_hands_everything_on(flags, token, note, monkeypatch, capsys):
    served = []

    def serve_forever(server):
        served.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring_server.ScoringServer, "serve_forever", serve_forever)
    if token:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    limits = ("--max-bytes", "5", "--max-pixels", "6", "--max-image-pixels", "7", "--request-seconds", "8")
    arguments = ["--reward", "rule", "--port", "0", *flags, "--allow-hosts", "judge", "a.b", *limits]
    assert main([*arguments, "--score-seconds", "9"]) == 0
    (server,) = served
    assert server.limits == Limits(5, 6, 7, 8.0, 9.0)
    assert server.token == token
    assert {"judge", "a.b", "localhost"} < server.hosts
    out = capsys.readouterr().out
    assert ("whoever reaches this port may use it" in out) is note
    assert "open-sesame" not in out
