"""The remote reward against HTTP servers that are slow, down, die, lie and send garbage; ours is in test_serve.py.

Planted bugs that turned this file red: only a socket time-out instead of a deadline, 5xx or broken connections not
repeated, 4xx repeated, one repetition too few, pauses that do not grow, a short body taken for whole, no check of the
count, of numbers, of booleans, of float32's range, of the content type or of the length, metadata of the first batch
sent with every batch, metadata checked after sending, a run that keeps the prompt file's metadata to itself, no trial
request. Of a judge that is down: 503 or a refused connection counted as another failure, one count for both kinds,
`wait` ignored, without end or overslept, no word to the watch or too little time claimed, Retry-After ignored or
without limit. A server's words printed raw, uncut or by way of the exception's cause; the token masked after the cut,
not at all, not sent, taken from the environment before the file, or unchecked; a URL with spaces, empty labels or
port 0.
"""

import base64
import io
import json
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advgrpo.data.sources import Sources
from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.remote import TOKEN_VARIABLE, RemoteReward
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import build_metrics, build_rewards
from advgrpo.training.run import Run
from tests.judges import serving

QUICK = {"retries": 2, "backoff": 0.01, "wait": 0}
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["first", "second", "third"]


@contextmanager
def misbehaving(*behaviours, port=0, headers=None):
    """Serve one behaviour per request, the last one for ever; yields (url, list of received requests).

    The requests' headers go into the list `headers`.
    """
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(self.body))
            if headers is not None:
                headers.append(self.headers)
            behaviours[min(len(received), len(behaviours)) - 1](self)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", port), Handler)) as url:
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
        scores = reward.score(IMAGES, PROMPTS, None)
    assert scores.tolist() == [0.5, 1.0, -2.25]
    assert scores.dtype == torch.float32
    assert isinstance(reward, Reward)
    assert [request["prompts"] for request in received] == [["first", "second"], ["third"]]
    assert [request["metadata"] for request in received] == [
        [{"objects": ["first"]}, {"objects": ["second"]}],
        [{"objects": ["third"]}],
    ]
    sent = [Image.open(io.BytesIO(base64.b64decode(image))) for request in received for image in request["images"]]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in sent])).permute(0, 3, 1, 2)
    assert {image.format for image in sent} == {"PNG"}
    assert torch.equal(pixels, (IMAGES * 255).round().byte())


@pytest.mark.parametrize(
    "failure",
    [answer({"error": "busy"}, 500), answer(b"", 503), hang_up, not_http, silent, trickle, answer(b"{", length=99)],
    ids=["500", "503", "hang up", "not HTTP", "silent", "trickle", "breaks off"],
)
def test_passing_failures_are_tried_again(failure):
    with misbehaving(failure, GOOD) as (url, received):
        timeout = 1.5 if failure in (silent, trickle) else 30
        started = time.monotonic()
        assert RemoteReward(url=url, timeout=timeout, **QUICK).score(IMAGES, PROMPTS, None).tolist() == [
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
        (answer({}, 408), "status 408 Request Timeout"),
        (answer({}, 429), "status 429 Too Many Requests"),
        (hang_up, "RemoteDisconnected"),
        (trickle, r"no complete answer within 0.1 s"),
    ],
    ids=["500", "408", "429", "hang up", "trickle"],
)
def test_lasting_failures_end_after_the_retries(failure, complaint):
    with misbehaving(failure) as (url, received):
        reward = RemoteReward(url=url, name="judge", timeout=0.1 if failure is trickle else 30, **QUICK)
        with pytest.raises(RuntimeError, match=rf"reward judge at .*'first' \(and 2 more\).*{complaint}.*3 attempts"):
            reward.score(IMAGES, PROMPTS, None)
    assert len(received) == 3


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (answer({"error": "unknown prompt"}, 400), "status 400 Bad Request: unknown prompt"),
        (answer(b"<html>", 404, "text/html"), "status 404 Not Found: '<html>'"),
        (answer(b"", 302), "status 302 Found; redirects are not followed: correct the url"),
        (answer({"error": "want a token"}, 401), "want a token; set token_file to a file with the server's token"),
        (answer({"scores": [1, 2]}), "2 scores for 3 images"),
        (answer({"scores": [1, 2, 3, 4]}), "4 scores for 3 images"),
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
            reward.score(IMAGES, PROMPTS, None)
    assert len(received) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1e39", "1" + "0" * 400])
def test_a_score_that_is_not_finite_names_its_prompt(number):
    lie = answer(b'{"scores": [1, %s, 3]}' % number.encode())
    with misbehaving(lie) as (url, received), pytest.raises(FloatingPointError, match="second"):
        RemoteReward(url=url, **QUICK).score(IMAGES, PROMPTS, None)
    assert len(received) == 1


def test_nobody_listens():
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as url:
        pass
    reward = RemoteReward(url=url, **QUICK)
    with pytest.raises(RuntimeError, match=r"ConnectionRefusedError.*3 attempts"):
        reward.score(IMAGES, PROMPTS, None)
    with pytest.raises(UserError, match="start the server"):
        reward.check_prompts(PROMPTS)


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr("advgrpo.rewards.judge_client.time.sleep", pauses.append)
    with misbehaving(answer({}, 500)) as (url, _), pytest.raises(RuntimeError):
        RemoteReward(url=url, retries=4, backoff=5).score(IMAGES, PROMPTS, None)
    assert pauses == [5, 10, 20, 30]


def port_of_nobody() -> int:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as url:
        return int(url.rpartition(":")[2])


def test_a_judge_that_is_down_for_a_while_is_waited_for():
    """Longer than the retries take; it then fails once more in another way, and answers."""
    port = port_of_nobody()
    told = []

    def come_up():
        time.sleep(1.0)
        with misbehaving(answer({}, 500), GOOD, port=port):
            done.wait(20)

    done = threading.Event()
    threading.Thread(target=come_up, daemon=True).start()
    reward = RemoteReward(url=f"http://127.0.0.1:{port}", name="judge", timeout=5, retries=1, backoff=0.05, wait=20)
    reward.progress = lambda doing, *, within_seconds: told.append((doing, within_seconds))
    started = time.monotonic()
    try:
        assert reward.score(IMAGES, PROMPTS, None).tolist() == [0.5, 1.0, -2.0]
    finally:
        done.set()
    assert 0.9 < time.monotonic() - started < 15
    assert [doing for doing, _ in told] == [
        f"reward judge at http://127.0.0.1:{port}, attempt {number + 1}" for number in range(len(told))
    ]
    assert len(told) > 4
    assert all(within >= 5 + 30 for _, within in told)  # an attempt, and the longest pause after it


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now, self.pauses = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)


@pytest.mark.parametrize("how", ["nobody listens", "503"])
def test_a_judge_that_stays_down_is_one_error_with_its_name_attempts_and_seconds(how, monkeypatch):
    monkeypatch.setattr("advgrpo.rewards.judge_client.time", clock := Clock())
    with misbehaving(answer({"error": "starting"}, 503)) as (url, received):
        url = url if how == "503" else f"http://127.0.0.1:{port_of_nobody()}"
        reward = RemoteReward(url=url, name="judge", retries=0, backoff=0.25, wait=5)
        with pytest.raises(RunFailure) as failure:
            reward.score(IMAGES, PROMPTS, None)
    refused = "ConnectionRefusedError: [Errno 111] Connection refused"
    why = "status 503 Service Unavailable: starting" if how == "503" else refused
    assert str(failure.value) == (
        f"reward judge at {url}, prompt 'first' (and 2 more): {why}; "
        "gave up after 6 attempts in 5 s (retries = 0, wait = 5 s)"
    )
    assert clock.pauses == [0.25, 0.5, 1.0, 2.0, 1.25]
    assert len(received) == (6 if how == "503" else 0)


def test_a_server_may_ask_to_be_left_alone(monkeypatch):
    pauses = []
    monkeypatch.setattr("advgrpo.rewards.judge_client.time.sleep", pauses.append)

    def busy(seconds):
        def behave(handler):
            handler.send_response(503)
            handler.send_header("Retry-After", seconds)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return behave

    asked = ("7", "999999", "Wed, 21 Oct 2015 07:28:00 GMT", "-3", "1e9")
    with misbehaving(*map(busy, asked), GOOD) as (url, _):
        RemoteReward(url=url, retries=5, backoff=0.01).score(IMAGES, PROMPTS, None)
    assert pauses == [7.0, 30.0, 0.04, 0.08, 0.16]


ESCAPES = "\x1b]0;owned\x07\x1b[31mred\r\u202e"


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("place", ["error", "reason", "body", "not HTTP"])
def test_what_a_server_says_cannot_move_the_cursor(place, status, caplog):
    def behave(handler):
        if place == "not HTTP":
            return handler.wfile.write(f"{ESCAPES}\r\n\r\n".encode())
        reason = ESCAPES.replace("\r", "") if place == "reason" else "Bad"
        body = json.dumps({"error": ESCAPES * 1000}) if place == "error" else ESCAPES
        handler.wfile.write(f"HTTP/1.0 {status} {reason}\r\nContent-Type: text/plain\r\n\r\n{body}".encode())

    with misbehaving(behave) as (url, _), pytest.raises(RunFailure) as failure:
        RemoteReward(url=url, retries=1, backoff=0.01).score(IMAGES, PROMPTS, None)
    shown = "".join(traceback.format_exception(failure.value))  # --traceback
    for text in (*(record.getMessage() for record in caplog.records), str(failure.value), shown):
        assert all(each.isprintable() or each in "\n" for each in text)
    assert "owned" in str(failure.value)
    assert len(str(failure.value)) < 4000
    assert len(caplog.records) == (1 if status == 500 or place == "not HTTP" else 0)


def test_the_token_is_sent_and_never_shown(tmp_path, monkeypatch, caplog):
    """Also where a server sends it back, across the place where long answers are cut."""

    def parrot(handler):
        answer({"error": "x" * 455 + handler.headers["Authorization"] + "\x1b[31m"}, 500)(handler)

    monkeypatch.setenv(TOKEN_VARIABLE, "Zq9-environment")
    (tmp_path / "token").write_text("Zq8-file\n")
    for options, token in (({}, "Zq9-environment"), ({"token_file": str(tmp_path / "token")}, "Zq8-file")):
        with misbehaving(GOOD, parrot, headers=(sent := [])) as (url, _):
            reward = RemoteReward(url=url, **options, **QUICK)
            reward.score(IMAGES, PROMPTS, None)
            with pytest.raises(RunFailure) as failure:
                reward.score(IMAGES, PROMPTS, None)
        assert {headers["Authorization"] for headers in sent} == {f"Bearer {token}"}
        shown = "".join(traceback.format_exception(failure.value)) + caplog.text + repr(reward)
        assert token[:3] not in shown
        assert "Bearer ***" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"two words", b"two\nlines", b"\xff", "ü".encode(), b"x" * 5000, b"\x1b"]
)
def test_a_token_that_is_none_is_refused_without_showing_it(content, tmp_path, monkeypatch):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match="token_file") as error:
        RemoteReward(url="http://host", token_file=str(tmp_path / "token"))
    if len(content) < 5000 and b"\xff" not in content:
        monkeypatch.setenv(TOKEN_VARIABLE, content.decode())
        with pytest.raises(UserError, match=f"environment variable {TOKEN_VARIABLE}: want the token alone"):
            RemoteReward(url="http://host")
    assert "two" not in str(error.value)


def test_a_run_s_judges_tell_its_watch_what_they_wait_for(unit_config):
    """Also as a metric: evaluation has no other reward to look at."""
    unit_config.adversary.kind, unit_config.rewards.remote.weight = "none", 1.0
    unit_config.rewards.remote.url, unit_config.evaluation.metrics = "http://127.0.0.1:1", ("remote",)
    distributed = Distributed.start("cpu")
    sources = Sources(["a"], ["b"], None)
    rewards = build_rewards(unit_config, sources, distributed)
    metrics = build_metrics(unit_config, sources, None, distributed)
    assert rewards["remote"].progress == metrics["remote"].progress == distributed.step


def test_metadata_is_checked_before_anything_is_sent():
    with misbehaving(GOOD) as (url, received):
        reward = RemoteReward(url=url, metadata={"first": {}})
        for attempt in (reward.check_prompts, lambda prompts: reward.score(IMAGES, prompts, None)):
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
        ({"url": "http://ho st:1/"}, r"url = 'http://ho st:1/' is not an address \(it holds a space"),
        ({"url": "http://host/images of ü"}, "url"),
        ({"url": "http://host/\x1b[31m"}, r"url = 'http://host/\\x1b\[31m'"),
        ({"url": "http://ho\tst/"}, "url"),  # urlsplit leaves tabs out in silence
        ({"url": "http://a..b/"}, "url"),
        ({"url": f"http://{'a' * 64}/"}, "url"),
        ({"url": "http://host:0/"}, "url"),
        ({"batch_size": 0}, "batch_size"),
        ({"retries": -1}, "retries"),
        ({"backoff": 0}, "backoff"),
        ({"backoff": 31}, "backoff = 31 must be at least 0.001 and at most 30"),
        ({"wait": -1}, "wait"),
        ({"wait": float("inf")}, "wait"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"token_file": "nowhere/token"}, "token_file = nowhere/token does not exist; write the token into it"),
        ({"max_answer_bytes": 0}, "max_answer_bytes"),
    ],
)
def test_bad_arguments(arguments, field):
    with pytest.raises(UserError, match=f"reward judge: {field}"):
        RemoteReward(**{"url": "http://host", "name": "judge", **arguments})


def scoring_by_count(handler):
    """Half a point per object that the request's metadata asks for."""
    request = json.loads(handler.body)
    answer({"scores": [entry["count"] / 2 for entry in request["metadata"]]})(handler)


def test_a_run_tells_the_judge_what_the_prompt_file_says(unit_config, tmp_path):
    """JSONL metadata reaches the server with every image of its prompt, from the trial request on."""
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
    monkeypatch.setattr("advgrpo.training.run.build_policy", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("advgrpo.rewards.judge_client.time.sleep", lambda _: None)
    unit_config.rewards.remote.weight, unit_config.rewards.remote.url = 1.0, "http://127.0.0.1:9/score"
    unit_config.rewards.remote.wait = 0.0
    with pytest.raises(UserError, match=r"rewards\.remote at http://127\.0\.0\.1:9/score.*start the server"):
        Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
