"""The remote reward against HTTP servers on this machine: ours, and ones that are slow, die, lie and send garbage.

Planted bugs that turned this file red: only a socket time-out instead of a deadline, 5xx or broken connections not
repeated, 4xx repeated, one repetition too few, pauses that do not grow, a short body taken for whole, no check of the
count, of numbers, of booleans, of float32's range, of the content type or of the length, metadata of the first batch
sent with every batch, metadata checked after sending, a server that scores in silence what is no PNG or answers NaN, a
run that keeps the prompt file's metadata to itself, no trial request.
"""

import base64
import io
import json
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advgrpo.distributed import Distributed
from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.remote import RemoteReward
from advgrpo.rewards.rule import RuleReward
from advgrpo.rewards.serve import main, make_server
from advgrpo.run import Run
from advgrpo.tiny.shapes import render, sample_scenes

QUICK = {"retries": 2, "backoff": 0.01}
PICTURES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["first", "second", "third"]


@contextmanager
def serving(server: ThreadingHTTPServer):
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def misbehaving(*behaviours):
    """Serve one behaviour per request, the last one for ever; yields (url, list of received requests)."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(self.body))
            behaviours[min(len(received), len(behaviours)) - 1](self)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, received


def answer(body, status=200, content_type="application/json", length=None):
    """A behaviour that answers with `body`: bytes, or something for JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def behave(handler):
        handler.send_response(status)
        if content_type:
            handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return behave


def trickle(handler):
    """A byte every 50 ms, for ever: no single read is late."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def silent(handler):
    time.sleep(6.0)


def hang_up(handler):
    handler.close_connection = True


def not_http(handler):
    handler.wfile.write(b"\x00\xff garbage\r\n\r\n")


GOOD = answer({"scores": [0.5, 1, -2.0], "took": 3})


def test_scores_and_what_is_sent():
    metadata = {prompt: {"objects": [prompt]} for prompt in PROMPTS}
    with misbehaving(answer({"scores": [0.5, 1]}), answer({"scores": [-2.25]})) as (url, received):
        reward = RemoteReward(url=url + "/score?model=a", name="judge", batch_size=2, metadata=metadata)
        scores = reward.score(PICTURES, PROMPTS, None)
    assert scores.tolist() == [0.5, 1.0, -2.25]
    assert scores.dtype == torch.float32
    assert isinstance(reward, Reward)
    assert [request["prompts"] for request in received] == [["first", "second"], ["third"]]
    assert [request["metadata"] for request in received] == [
        [{"objects": ["first"]}, {"objects": ["second"]}],
        [{"objects": ["third"]}],
    ]
    sent = [Image.open(io.BytesIO(base64.b64decode(image))) for request in received for image in request["images"]]
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in sent])).permute(0, 3, 1, 2)
    assert {picture.format for picture in sent} == {"PNG"}
    assert torch.equal(pixels, (PICTURES * 255).round().byte())


@pytest.mark.parametrize(
    "failure",
    [answer({"error": "busy"}, 500), answer(b"", 503), hang_up, not_http, silent, trickle, answer(b"{", length=99)],
    ids=["500", "503", "hang up", "not HTTP", "silent", "trickle", "breaks off"],
)
def test_passing_failures_are_tried_again(failure):
    with misbehaving(failure, GOOD) as (url, received):
        timeout = 1.5 if failure in (silent, trickle) else 30
        started = time.monotonic()
        assert RemoteReward(url=url, timeout=timeout, **QUICK).score(PICTURES, PROMPTS, None).tolist() == [
            0.5,
            1.0,
            -2.0,
        ]
        assert time.monotonic() - started < 5  # the silent and trickling servers take longer
    assert len(received) == 2
    assert received[0] == received[1]


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (answer({"error": "out of memory"}, 500), "status 500 Internal Server Error: out of memory"),
        (hang_up, "RemoteDisconnected"),
        (trickle, r"no complete answer within 0.1 s"),
    ],
    ids=["500", "hang up", "trickle"],
)
def test_lasting_failures_end_after_the_retries(failure, complaint):
    with misbehaving(failure) as (url, received):
        reward = RemoteReward(url=url, name="judge", timeout=0.1 if failure is trickle else 30, **QUICK)
        with pytest.raises(RuntimeError, match=rf"reward judge at .*'first' \(and 2 more\).*{complaint}.*3 attempts"):
            reward.score(PICTURES, PROMPTS, None)
    assert len(received) == 3


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (answer({"error": "unknown prompt"}, 400), "status 400 Bad Request: unknown prompt"),
        (answer(b"<html>", 404, "text/html"), "status 404 Not Found: '<html>'"),
        (answer(b"", 302), "status 302"),
        (answer({"scores": [1, 2]}), "2 scores for 3 pictures"),
        (answer({"scores": [1, 2, 3, 4]}), "4 scores for 3 pictures"),
        (answer({"scores": [1, "0.5", 2]}), 'not a number: "0.5"'),
        (answer({"scores": [1, None, 2]}), "not a number: null"),
        (answer({"scores": [1, True, 2]}), "not a number: true"),
        (answer({"scores": [[1], 2, 3]}), "not a number"),
        (answer({"scores": 3}), 'no list "scores"'),
        (answer([1, 2, 3]), 'no list "scores"'),
        (answer(b'{"scores": [1, 2'), "not JSON"),
        (answer(b"\xff\xfe\x00"), "not JSON"),
        (answer(b"[" * 100_000), "not JSON"),
        (answer({"scores": [1, 2, 3]}, content_type="text/plain"), "content type text/plain"),
        (answer({"scores": [1, 2, 3]}, content_type=None), "content type none"),
        (answer(b" " * 300_000), "longer than max_answer_bytes = 200000"),
    ],
)
def test_lies_and_garbage_are_errors_at_once(lie, complaint):
    with misbehaving(lie) as (url, received):
        reward = RemoteReward(url=url, max_answer_bytes=200_000, **QUICK)
        with pytest.raises(RuntimeError, match=complaint):
            reward.score(PICTURES, PROMPTS, None)
    assert len(received) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1e39", "1" + "0" * 400])
def test_a_score_that_is_not_finite_names_its_prompt(number):
    lie = answer(b'{"scores": [1, %s, 3]}' % number.encode())
    with misbehaving(lie) as (url, received), pytest.raises(FloatingPointError, match="second"):
        RemoteReward(url=url, **QUICK).score(PICTURES, PROMPTS, None)
    assert len(received) == 1


def test_nobody_listens():
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as url:
        pass
    reward = RemoteReward(url=url, **QUICK)
    with pytest.raises(RuntimeError, match=r"ConnectionRefusedError.*3 attempts"):
        reward.score(PICTURES, PROMPTS, None)
    with pytest.raises(UserError, match="start the server"):
        reward.check_prompts(PROMPTS)


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr("advgrpo.rewards.remote.time.sleep", pauses.append)
    with misbehaving(answer({}, 500)) as (url, _), pytest.raises(RuntimeError):
        RemoteReward(url=url, retries=4, backoff=5).score(PICTURES, PROMPTS, None)
    assert pauses == [5, 10, 20, 30]


def test_metadata_is_checked_before_anything_is_sent():
    with misbehaving(GOOD) as (url, received):
        reward = RemoteReward(url=url, metadata={"first": {}})
        for attempt in (reward.check_prompts, lambda prompts: reward.score(PICTURES, prompts, None)):
            with pytest.raises(UserError, match="'second' has no metadata"):
                attempt(PROMPTS)
    assert received == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"url": "ftp://host/x"}, "url = 'ftp://host/x'"),
        ({"url": "localhost:8000"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://host:many/"}, "url"),
        ({"url": "http://user:secret@host/"}, "url"),
        ({"batch_size": 0}, "batch_size"),
        ({"retries": -1}, "retries"),
        ({"backoff": -1}, "backoff"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"max_answer_bytes": 0}, "max_answer_bytes"),
    ],
)
def test_bad_arguments(arguments, field):
    with pytest.raises(UserError, match=f"reward judge: {field}"):
        RemoteReward(**{"url": "http://host", "name": "judge", **arguments})


def test_both_ends_give_the_local_scores():
    """Rule reward over HTTP equals the rule reward on the same 8-bit pictures, to the last bit."""
    scenes = sample_scenes(5, torch.Generator().manual_seed(0))
    pictures = render(scenes, torch.Generator().manual_seed(1), roughness=0.4)
    pictures = (pictures * 255).round() / 255
    prompts = [scene.caption for scene in scenes]
    with serving(make_server(RuleReward())) as url:
        remote = RemoteReward(url=url, batch_size=2)
        remote.check_prompts(prompts)
        assert torch.equal(remote.score(pictures, prompts, None), RuleReward().score(pictures, prompts, None))
        with pytest.raises(RuntimeError, match=r"status 400 .*not a caption of the tiny world: 'a dragon'"):
            remote.score(pictures[:1], ["a dragon"], None)


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
        ({"version": 1, "images": [_bomb()], "prompts": ["a"]}, 400, "image 0 has more than 16,777,216 pixels"),
        ({"version": 1, "images": [_png(), _png(size=(8, 4))], "prompts": ["a", "b"]}, 400, "differ in size"),
        ({"version": 1, "images": [_png()], "prompts": ["a"]}, 500, "ZeroDivisionError"),
        ({"version": 1, "images": [_png()], "prompts": ["nan"]}, 500, "FloatingPointError"),
        ("x" * 3000, 413, "longer than 2000 bytes"),
    ],
)
def test_our_server_refuses_bad_requests(request_, status, complaint, monkeypatch):
    with serving(make_server(Broken(), max_request_bytes=2000)) as url:
        reward = RemoteReward(url=url, retries=0)
        monkeypatch.setattr("advgrpo.rewards.remote._request_body", lambda *_: json.dumps(request_).encode())
        with pytest.raises(RuntimeError, match=f"status {status} .*{complaint}"):
            reward.score(PICTURES, PROMPTS, None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--reward", "nonsense"], "unknown reward 'nonsense'"),
        (["--reward", "rule", "--options", '{"strictly": true}'], "has no option 'strictly'"),
        (["--reward", "rule", "--options", "{"], "is not JSON"),
        (["--reward", "rule", "--options", "[]"], "is not a JSON object"),
        (["--reward", "rule", "--references", "somewhere"], "belong together"),
        (["--reward", "rule", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (["--reward", "rule", "--port", "70000"], "--port 70000: want a whole number from 0 to 65535"),
    ],
)
def test_bad_command_lines(arguments, complaint, capsys):
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def scoring_by_count(handler):
    """Half a point per object that the request's metadata asks for."""
    request = json.loads(handler.body)
    answer({"scores": [entry["count"] / 2 for entry in request["metadata"]]})(handler)


def test_a_run_tells_the_judge_what_the_prompt_file_says(unit_config, tmp_path):
    """JSONL metadata reaches the server with every picture of its prompt, from the trial request on."""
    for name in ("prompts", "held_out_prompts"):
        lines = Path(getattr(unit_config.data, name)).read_text().splitlines()
        rows = [{"prompt": prompt, "count": number} for number, prompt in enumerate(lines)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(unit_config.data, name, str(tmp_path / f"{name}.jsonl"))
    unit_config.adversary.kind, unit_config.rewards.remote.weight = "none", 1.0
    unit_config.evaluation.metrics = ("remote",)
    with misbehaving(scoring_by_count) as (url, received):
        unit_config.rewards.remote.url = url
        Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).train()
    counts = {row["prompt"]: row["count"] for row in map(json.loads, (tmp_path / "prompts.jsonl").open())}
    counts |= {row["prompt"]: row["count"] for row in map(json.loads, (tmp_path / "held_out_prompts.jsonl").open())}
    assert len(received[0]["images"]) == 1  # the trial
    for request in received:
        assert [entry["count"] for entry in request["metadata"]] == [counts[prompt] for prompt in request["prompts"]]
    rows = [json.loads(line) for line in (Path(unit_config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    trained = [prompt for request in received for prompt in request["prompts"]]
    assert all(row["reward_remote"] in {n / 4 for n in range(20)} for row in rows)  # means of two groups
    assert set(trained) <= set(counts)


def test_a_dead_judge_is_an_error_before_a_model_is_loaded(unit_config, monkeypatch):
    monkeypatch.setattr("advgrpo.run.build_policy", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("advgrpo.rewards.remote.time.sleep", lambda _: None)
    unit_config.rewards.remote.weight, unit_config.rewards.remote.url = 1.0, "http://127.0.0.1:9/score"
    with pytest.raises(UserError, match=r"rewards\.remote at http://127\.0\.0\.1:9/score.*start the server"):
        Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
