"""flow_grpo's reward servers (rewards/flow_grpo.py): a stand-in with their call pattern, and pickles that are not read.

The stand-in does what the handlers of yifan123/reward-server do: it unpickles the body, opens "images" as JPEG, reads
"meta_datas" and "only_strict" (GenEval) or images alone (DeQA), and answers a pickle as text/html; what goes wrong is a
traceback with status 500.

Planted bugs that turned this file red: a plain `pickle.loads` of the answer, the opcode check left out, memo numbers
unchecked, prompts left out of the metadata, PNG instead of JPEG, the content type of ours demanded, no count, "rewards"
taken before "scores", one token for all servers, the urls of a list not free to change. The class lookup alone left
open stays green: two locks are on that door.
"""

from __future__ import annotations

import io
import json
import pickle
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advgrpo import config
from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards.flow_grpo import read_plain
from advgrpo.rewards.judge_client import Refused
from advgrpo.rewards.remote import RemoteReward
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from tests.judges import serving

QUICK = {"retries": 1, "backoff": 0.01, "wait": 0}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red cube", "two dogs", "a sign"]
METADATA = {
    prompt: {"tag": tag, "include": [{"class": "cube", "count": count}]}
    for prompt, tag, count in zip(PROMPTS, ("colors", "counting", "single_object"), (1, 2, 3))
}


def geneval(data: dict) -> dict:
    """What app_geneval.py answers, with the object's count for a score."""
    images = [Image.open(io.BytesIO(content), formats=["jpeg"]).convert("RGB") for content in data["images"]]
    metadata = data["meta_datas"]
    assert data["only_strict"] is True
    assert len(images) == len(metadata)
    groups = {entry["tag"]: [1.0, -10.0] for entry in metadata}
    assert all(isinstance(entry["prompt"], str) for entry in metadata)  # it reads this key
    scores = [entry["include"][0]["count"] / 4 for entry in metadata]
    strict = [float(score == 0.5) for score in scores]
    rewards = [0.0] * len(images)
    return {
        "scores": scores,
        "rewards": rewards,
        "strict_rewards": strict,
        "group_rewards": groups,
        "group_strict_rewards": groups,
    }


def deqa(data: dict) -> dict:
    """What app_deqa.py answers, with the brightness for a score."""
    images = [Image.open(io.BytesIO(content), formats=["jpeg"]) for content in data["images"]]
    return {"outputs": [float(np.asarray(image).mean()) / 255 for image in images]}


@contextmanager
def reward_server(answer, received=None):
    """`answer(data)` pickled, or bytes as they are."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            data, status = self.rfile.read(int(self.headers["Content-Length"])), 200
            try:
                data = pickle.loads(data)  # what theirs does, and ours never
                if received is not None:
                    received.append(data)
                found = answer(data)
                content = found if isinstance(found, bytes) else pickle.dumps(found)
            except Exception:
                content, status = traceback.format_exc().encode(), 500
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def remote(url, **more) -> RemoteReward:
    return RemoteReward(url=url, name="judge", protocol="flow_grpo", **{**QUICK, **more})


def test_geneval_gets_what_it_reads_and_its_scores_are_taken():
    received = []
    with reward_server(geneval, received) as url:
        found = remote(url, batch_size=2, metadata=METADATA).score(IMAGES, PROMPTS)
        strict = remote(url, scores_key="strict_rewards", metadata=METADATA).score(IMAGES, PROMPTS)
    assert found.tolist() == [0.25, 0.5, 0.75]
    assert strict.tolist() == [0.0, 1.0, 0.0]
    assert [data["prompts"] for data in received] == [PROMPTS[:2], PROMPTS[2:], PROMPTS]
    assert received[0]["meta_datas"][1] == {**METADATA["two dogs"], "prompt": "two dogs"}
    sent = np.asarray(Image.open(io.BytesIO(received[0]["images"][0])).convert("RGB")).astype(float)
    assert abs(sent.mean() - IMAGES[0].mean().item() * 255) < 3  # JPEG keeps the image, roughly


def test_deqa_gets_no_metadata_and_answers_outputs():
    with reward_server(deqa) as url:
        found = remote(url).score(IMAGES, PROMPTS)
    assert found.tolist() == pytest.approx(IMAGES.mean((1, 2, 3)).tolist(), abs=0.02)


def test_a_traceback_of_theirs_is_its_last_line():
    with (
        reward_server(geneval) as url,
        pytest.raises(RunFailure, match=r"status 500 .*: KeyError: 'tag'; gave up after 2"),
    ):
        remote(url).score(IMAGES, PROMPTS)  # no metadata


class Evil:
    """Whose pickle runs a command."""

    def __init__(self, command, *arguments):
        self.call = command, arguments

    def __reduce__(self):
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    """Pickles that are not plain data; some would leave `marker` behind."""
    touch = {protocol: pickle.dumps({"scores": [Evil(open, str(marker), "w")]}, protocol) for protocol in (0, 2, 4)}
    return {
        **{f"reduce, protocol {protocol}": content for protocol, content in touch.items()},
        "inst": b"(S'%s'\nS'w'\nibuiltins\nopen\n." % str(marker).encode(),
        "obj": b"(cbuiltins\nopen\nS'%s'\nS'w'\no." % str(marker).encode(),
        "numpy scalars": pickle.dumps({"scores": list(np.ones(3))}),
        "numpy array": pickle.dumps({"scores": np.ones(3)}),
        "tensor": pickle.dumps({"scores": torch.ones(3)}),
        "a set": pickle.dumps({"scores": {1.0, 2.0, 3.0}}),
        "global alone": b"cos\nsystem\n.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "persistent id": b"P0\n.",
        "extension": b"\x80\x02\x82\x01.",
        "huge memo number": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        "truncated": pickle.dumps({"scores": [1.0, 2.0, 3.0]})[:-4],
        "html": b"<html>welcome</html>",
        "empty": b"",
        "long text number": b"L" + b"9" * 5000 + b"L\n.",
    }


@pytest.mark.parametrize("name", list(hostile(Path("/nowhere"))))
def test_nothing_but_plain_data_is_read_and_nothing_runs(name, tmp_path):
    marker = tmp_path / "marker"
    content = hostile(marker)[name]
    with pytest.raises(Refused) as refusal:
        read_plain(content)
    assert not marker.exists()
    assert "pickle" in str(refusal.value)
    if name == "huge memo number":  # before memory is asked for
        assert "memo number 2147483647" in str(refusal.value)
    if name.startswith("numpy"):
        assert "plain numbers" in str(refusal.value)
    with (
        reward_server(lambda _: content) as url,
        pytest.raises(RunFailure, match=r"reward judge at .*'a red cube' \(and 2"),
    ):
        remote(url).score(IMAGES, PROMPTS)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_from_every_protocol(protocol):
    value = {
        "scores": [1, 2.5, -3, 10**30, 0.1],
        "text": ["ü", "", b"bytes" if protocol > 2 else "text"],  # before protocol 3 bytes are a call
        "more": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "few": [None, True, False],
    }
    assert read_plain(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"scores": [1.0, 2.0]}, "the answer has 2 scores for 3 images"),
        ({"scores": [1.0, "2", 3.0]}, "a score that is a str, not a number"),
        ({"scores": [1.0, None, 3.0]}, "a score that is a NoneType"),
        ({"scores": [1.0, True, 3.0]}, "a score that is a bool"),
        ({"scores": 3.0}, "no list 'scores', but scores; scores_key names the list to take"),
        ({"values": [1.0, 2.0, 3.0]}, "no list 'outputs', but values"),
        ([1.0, 2.0, 3.0], "a pickled list; want a dict of lists"),
        (b"(" * 5000 + b"l" * 5000 + b".", "a pickled list; want a dict of lists"),
    ],
)
def test_an_answer_that_is_wrong_in_content_is_an_error_at_once(answer, expected):
    received = []
    with reward_server(lambda _: answer, received) as url, pytest.raises(RunFailure, match=expected):
        remote(url).score(IMAGES, PROMPTS)
    assert len(received) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e39, 10**400])
def test_a_score_that_is_not_finite_names_its_prompt(number):
    with (
        reward_server(lambda _: {"scores": [1.0, number, 2.0]}) as url,
        pytest.raises(FloatingPointError, match="two dogs"),
    ):
        remote(url).score(IMAGES, PROMPTS)


def test_settings_that_do_not_go_together():
    with pytest.raises(UserError, match="protocol = 'grpo': want advgrpo or flow_grpo"):
        RemoteReward(url="http://host", protocol="grpo")
    with pytest.raises(UserError, match="scores_key = 'scores' is protocol flow_grpo's"):
        RemoteReward(url="http://host", scores_key="scores")


def test_two_servers_by_name_in_a_run(unit_config, tmp_path, monkeypatch):
    """GenEval and DeQA at once: metrics, evaluation, and what may change when the run goes on."""
    for name in ("prompts", "held_out_prompts"):
        lines = Path(getattr(unit_config.data, name)).read_text().splitlines()
        rows = [{"prompt": p, "tag": "counting", "include": [{"class": "cube", "count": 2}]} for p in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(unit_config.data, name, str(tmp_path / f"{name}.jsonl"))
    with reward_server(geneval) as first, reward_server(deqa) as second, reward_server(deqa) as moved:
        servers = [
            {"name": "geneval", "url": first, "weight": 1.0, "protocol": "flow_grpo"},
            {"name": "deqa", "url": second, "weight": 0.5, "protocol": "flow_grpo"},
        ]
        change = {
            "iterations": 1,
            "adversary": {"kind": "none"},
            "rewards": {"remotes": servers},
            "evaluation": {"metrics": ["deqa", "rule"]},
        }
        settings = config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).train()
        again = settings.model_dump(mode="json") | {"iterations": 2}
        again["rewards"]["remotes"][1] |= {"url": moved, "retries": 7}
        resumed = config.build(again, "test")
        Run(resumed, Distributed.start("cpu"), resume=True, console=Console(quiet=True)).train()
        again["rewards"]["remotes"][1]["weight"] = 0.7
        other = config.build({**again, "iterations": 3}, "test")
        with pytest.raises(UserError, match=r"rewards.remotes\[1\].weight: 0.5 -> 0.7"):
            Run(other, Distributed.start("cpu"), resume=True, console=Console(quiet=True))
    rows = [json.loads(line) for line in (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_geneval"] for row in rows] == [0.5, 0.5]
    assert all(0 < row["reward_deqa"] < 1 for row in rows)
    assert all(row["reward_generated"] == pytest.approx(0.5 + 0.5 * row["reward_deqa"]) for row in rows)
    summary = json.loads((Path(settings.output_dir) / "summary.json").read_text())
    assert "deqa" in json.dumps(summary["final"])


def test_every_server_has_a_token_of_its_own(monkeypatch):
    """One server's secret is never sent to another."""
    monkeypatch.setenv("ADVGRPO_REWARD_TOKEN", "of-remote")
    monkeypatch.setenv("ADVGRPO_REWARD_TOKEN_GENEVAL", "of-geneval")
    made = {name: RemoteReward(url="http://host", name=name) for name in ("remote", "geneval", "deqa")}
    assert {name: reward._client._token for name, reward in made.items()} == {
        "remote": "of-remote",
        "geneval": "of-geneval",
        "deqa": "",
    }


def test_a_dead_server_of_the_list_is_named_before_a_model_is_loaded(unit_config, monkeypatch):
    monkeypatch.setattr("advgrpo.training.run.build_policy", lambda *_: pytest.fail("a model was loaded"))
    servers = [{"name": "geneval", "url": "http://127.0.0.1:9/", "weight": 1.0, "retries": 0, "wait": 0}]
    change = {"rewards": {"remotes": servers}}
    settings = config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")
    with pytest.raises(UserError, match=r"^rewards.remotes\[0\] at http://127.0.0.1:9/.*start the server"):
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
