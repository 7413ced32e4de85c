"""A vision-language model's yes or no (rewards/vlm_judge.py) against a stand-in of vLLM's chat endpoint.

The stand-in answers in the shape that vLLM and OpenAI document for POST /v1/chat/completions with logprobs: choices[0]
.logprobs.content[0].top_logprobs, a list of {token, logprob, bytes}.

Planted bugs that turned this file red: only "yes" without variants counted, p(yes) instead of its share, answers in the
order in which they came, no bound on what yes and no have together, 0.5 where neither is there, one request at a time,
threads that go on after the run was stopped, `progress` called from them, the token sent to another judge.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advgrpo import config
from advgrpo.data.sources import Sources
from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.judge_client import Refused
from advgrpo.rewards.vlm_judge import VlmJudge, yes_share
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import build_rewards
from advgrpo.training.run import Run
from tests.judges import serving

QUICK = {"retries": 1, "backoff": 0.01, "wait": 0}
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["first", "second", "third", "fourth"]
QUESTION = 'Is this "{prompt}"? Yes or no.'


def completion(tokens: dict[str, float]) -> dict:
    """vLLM's answer whose first token has these probabilities."""
    top = [{"token": t, "logprob": math.log(p) if p else -9999.0, "bytes": list(t.encode())} for t, p in tokens.items()]
    first = {**top[0], "top_logprobs": top}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": top[0]["token"], "reasoning_content": None},
                "logprobs": {"content": [first]},
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }


@contextmanager
def chat_server(answer, received=None, headers=None):
    """`answer(request)` as JSON; bytes as they are; (status, anything) with that status. Yields the base url."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if received is not None:
                received.append((self.path, request))
            if headers is not None:
                headers.append(self.headers)
            found = answer(request)
            status, found = found if isinstance(found, tuple) else (200, found)
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield f"{url}/v1"


def judge(url, **more) -> VlmJudge:
    return VlmJudge(**{"base_url": url, "model": "qwen", "question": QUESTION, **QUICK, **more})


def text_of(request) -> str:
    return request["messages"][0]["content"][1]["text"]


def pixels_of(request) -> np.ndarray:
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]))


YES = {"first": 0.8, "second": 0.1, "third": 0.4, "fourth": 0.25}


def by_prompt(request):
    name = next(name for name in YES if f'"{name}"' in text_of(request))
    return completion({"Yes": YES[name] / 2, " yes": YES[name] / 2, "No": 1 - YES[name] - 0.05, "Maybe": 0.05})


@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_the_share_of_yes_and_what_is_asked(concurrency):
    received = []

    def slow_at_first(request):
        time.sleep(0.2 if '"first"' in text_of(request) else 0)  # answers come in another order
        return by_prompt(request)

    with chat_server(slow_at_first, received) as url:
        mine = judge(
            f"{url}/", concurrency=concurrency, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        )
        scores = mine.score(IMAGES, PROMPTS, None)
    assert isinstance(mine, Reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([YES[name] / 0.95 for name in PROMPTS])
    assert {path for path, _ in received} == {"/v1/chat/completions"}
    assert sorted(text_of(request) for _, request in received) == sorted(f'Is this "{p}"? Yes or no.' for p in PROMPTS)
    for _, request in received:
        assert (request["model"], request["max_tokens"], request["temperature"]) == ("qwen", 1, 0)
        assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
        number = next(number for number, prompt in enumerate(PROMPTS) if f'"{prompt}"' in text_of(request))
        assert np.array_equal(pixels_of(request), (IMAGES[number] * 255).round().byte().permute(1, 2, 0).numpy())


def choice(tokens):
    return completion(tokens)["choices"][0]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75),
        ({" yes": 0.3, "YES": 0.3, "▁Yes": 0.1, "Ġyes": 0.05, "no": 0.25}, 0.75),
        ({'"Yes': 0.5, "**No": 0.5}, 0.5),
        ({"No": 0.9, "Maybe": 0.1}, 0.0),
        ({"Yes": 1.0}, 1.0),
        ({"Yes": 0.3, "No": 0.0, "Yesterday": 0.3, "Nothing": 0.2, "Not": 0.1, "": 0.1}, 1.0),
    ],
)
def test_what_counts_as_yes_and_no(tokens, share):
    assert yes_share(choice(tokens), 0.1) == pytest.approx(share)


def with_top(*entries):
    return {"logprobs": {"content": [{"token": "Yes", "top_logprobs": list(entries)}]}}


NO_TOKEN = "an entry of top_logprobs is no token with its log-probability"
THINKING = (
    "yes and no have 3.00% of the first token's probability, less than min_probability = 0.1; likelier are "
    "'<think>' 97.0%.*switch thinking off by extra_body"
)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (choice({"<think>": 0.97, "Yes": 0.02, "No": 0.01}), THINKING),
        (choice({"The": 1.0}), "have 0.00%"),
        (choice({"Yes": 0.0, "No": 0.0}), "have 0.00%"),
        (choice({"Yes": 0.9, "yes": 0.9}), "add up to 1.8"),
        ({"message": {}}, "no logprobs.content"),
        ({"logprobs": None}, "no logprobs.content"),
        ({"logprobs": {"content": None}}, "gives no log-probabilities; take one that does"),
        ({"logprobs": {"content": []}}, "no logprobs.content"),
        (with_top(), "no logprobs.content"),
        (with_top({"token": "Yes", "logprob": "-1"}), NO_TOKEN),
        (with_top({"token": "Yes", "logprob": float("nan")}), NO_TOKEN),
        (with_top({"token": "Yes", "logprob": True}), NO_TOKEN),
        (with_top({"token": "Yes", "logprob": 3.0}), NO_TOKEN),
        (with_top({"token": None, "logprob": -1.0}), NO_TOKEN),
        (with_top("Yes"), NO_TOKEN),
    ],
)
def test_what_gives_no_share_is_refused(wrong, expected):
    with pytest.raises(Refused, match=expected):
        yes_share(wrong, 0.1)


@pytest.mark.parametrize(
    ("answer", "expected", "requests"),
    [
        ((404, {"object": "error", "message": "The model `x` does not exist."}), "status 404 .*`x` does not exist", 1),
        ((400, {"error": {"message": "top_logprobs must be at most 5"}}), "top_logprobs must be at most 5", 1),
        ((401, {"error": {"message": "Incorrect API key"}}), "Incorrect API key; set token_file", 1),
        ((500, {"error": {"message": "out of memory"}}), "out of memory; gave up after 2 attempts", 2),
        (b"<html>", "not JSON", 1),
        ({"scores": [1.0]}, 'no "choices".*want base_url of a chat endpoint', 1),
        ({"choices": []}, 'no "choices"', 1),
        (completion({"Maybe": 1.0}), "less than min_probability", 1),
    ],
)
def test_a_server_that_is_no_judge_is_an_error_that_says_what_to_change(answer, expected, requests):
    received = []
    with chat_server(lambda _: answer, received) as url:
        with pytest.raises(
            RunFailure, match=rf"reward vlm_judge at {url}/chat/completions, prompt 'first': .*{expected}"
        ):
            judge(url).score(IMAGES[:1], PROMPTS[:1])
        assert len(received) == requests
        with pytest.raises(UserError, match="start the server, or correct its base_url and settings"):
            judge(url).check_prompts(PROMPTS)


def test_a_failure_of_one_is_the_failure_of_all_and_names_its_prompt():
    def third_fails(request):
        return (400, {"error": "no"}) if '"third"' in text_of(request) else by_prompt(request)

    with chat_server(third_fails) as url, pytest.raises(RunFailure, match="prompt 'third'"):
        judge(url, concurrency=2).score(IMAGES, PROMPTS)


def test_requests_are_under_way_together():
    """As many as `concurrency`, and never more."""
    there, most, lock = [0], [0], threading.Lock()

    def count(request):
        with lock:
            there[0] += 1
            most[0] = max(most[0], there[0])
        time.sleep(0.1)
        with lock:
            there[0] -= 1
        return by_prompt(request)

    with chat_server(count) as url:
        judge(url, concurrency=3).score(IMAGES.repeat(3, 1, 1, 1), PROMPTS * 3)
    assert most[0] == 3


class Stop(Exception):
    """As StopRequested."""


def test_progress_comes_from_the_caller_s_thread_and_can_stop_everything():
    received, told, main = [], [], threading.current_thread()

    def tell(doing, *, within_seconds):
        assert threading.current_thread() is main
        told.append((doing, within_seconds))
        if len(told) == 3:
            raise Stop

    with chat_server(lambda _: (503, {"error": "starting"}), received) as url:
        mine = judge(url, concurrency=2, wait=100, backoff=0.05, retries=50)
        mine.progress = tell
        started = time.monotonic()
        with pytest.raises(Stop):
            mine.score(IMAGES, PROMPTS)
        assert time.monotonic() - started < 5
        time.sleep(0.5)  # whoever was about to ask asks no more
        asked = len(received)
        time.sleep(0.5)
        assert len(received) == asked
    assert all("reward vlm_judge at" in doing and within >= 60 for doing, within in told)


def test_the_key_comes_from_a_file_or_its_own_variable_and_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVGRPO_REWARD_TOKEN", "of-another-judge")
    (tmp_path / "key").write_text("sk-file\n")
    sent = []

    def parrot(request):
        return (400, {"error": {"message": f"bad key {sent[-1]['Authorization']}"}})

    for variable, file, expected in (("", "", None), ("sk-variable", "", "sk-variable"), ("x", "key", "sk-file")):
        if variable:
            monkeypatch.setenv("ADVGRPO_REWARD_TOKEN_VLM_JUDGE", variable)
        with chat_server(parrot, headers=sent) as url, pytest.raises(RunFailure) as failure:
            judge(url, token_file=str(tmp_path / file) if file else "").score(IMAGES[:1], PROMPTS[:1])
        assert sent[-1]["Authorization"] == (None if expected is None else f"Bearer {expected}")
        assert "sk-" not in str(failure.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"base_url": "localhost:8000"}, "reward vlm_judge: base_url = "),
        ({"model": ""}, "model is empty"),
        ({"question": "Is it good?"}, r"question = 'Is it good\?': want {prompt}"),
        ({"min_probability": 1.5}, "min_probability"),
        ({"concurrency": 0}, "concurrency"),
        ({"extra_body": {"messages": []}}, "extra_body sets 'messages'"),
        ({"extra_body": {"x": float("nan")}}, "extra_body cannot be sent as JSON"),
        ({"extra_body": {"x": {1}}}, "extra_body cannot be sent as JSON"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(UserError, match=expected):
        judge("http://host/v1", **arguments)


def with_judge(unit_config, url, **more):
    change = {
        "adversary": {"kind": "none"},
        "rewards": {"vlm_judge": {"weight": 1.0, "base_url": url, "model": "qwen", **more}},
        "evaluation": {"metrics": ["vlm_judge"]},
    }
    return config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")


def test_a_run_trains_on_it(unit_config):
    def brightness(request):
        bright = float(pixels_of(request).mean()) / 255
        return completion({"Yes": 0.9 * bright, "No": 0.9 * (1 - bright), "It": 0.1})

    received = []
    with chat_server(brightness, received) as url:
        settings = with_judge(unit_config, url)
        run = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
        run.train()
        reward = build_rewards(settings, Sources.read(settings), run.distributed)["vlm_judge"]
    assert reward.progress == run.distributed.step
    rows = [json.loads(line) for line in (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["reward_vlm_judge"] < 1 for row in rows)
    assert len(received) >= 2 * 8


@pytest.mark.parametrize("field", ["base_url", "model"])
def test_what_it_needs_is_asked_for(unit_config, field):
    settings = with_judge(unit_config, "http://host/v1")
    setattr(settings.rewards.vlm_judge, field, "")
    with pytest.raises(
        UserError, match=rf"rewards.vlm_judge.{field} is empty, but rewards.vlm_judge needs it: pass --"
    ):
        config.check(settings)


def test_a_judge_that_is_not_there_is_named_before_a_model_is_loaded(unit_config, monkeypatch):
    monkeypatch.setattr("advgrpo.training.run.build_policy", lambda *_: pytest.fail("a model was loaded"))
    settings = with_judge(unit_config, "http://127.0.0.1:9/v1", retries=0, wait=0)
    with pytest.raises(
        UserError, match=r"^rewards.vlm_judge at http://127.0.0.1:9/v1/chat/completions.*start the server"
    ):
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
