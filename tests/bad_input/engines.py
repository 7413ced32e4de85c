"""Rollout engines: settings that none can serve, and servers that are none."""

from __future__ import annotations

from tests.bad_input.case import Bench, Case, changed

_GROUP = "rollout engine"
_QUICK = {"timeout": 1, "retries": 0, "wait": 0}


def _asked(kind: str = "sglang", urls: tuple[str, ...] = ("http://127.0.0.1:9",), **more) -> dict:
    """Settings of a run with an engine."""
    rollout = {
        "noise": "torch_float32",
        "engine": {"kind": kind, "urls": list(urls), **_QUICK, **more.pop("engine", {})},
    }
    return {**more, "rollout": {**rollout, **more.get("rollout", {})}}


def _served(behaviour: str, *expect: str, **engine) -> Case:
    """A server of the suite in the place of an engine."""

    def make(bench: Bench) -> list[str]:
        return bench.train(change=_asked(urls=(bench.world.servers[behaviour],), engine=engine))

    return Case(_GROUP, behaviour, ("rollout engine sglang at http://127.0.0.1", *expect), make)


CASES = [
    changed(
        _GROUP,
        {"rollout": {"engine": {"kind": "sgl"}}},
        "rollout.engine.kind = 'sgl': want one of none, sglang, vllm_omni",
    ),
    changed(
        _GROUP,
        _asked("vllm_omni"),
        "rollout.engine.kind = 'vllm_omni': its released HTTP interface",
        "Set rollout.engine.kind = sglang",
    ),
    changed(_GROUP, _asked(urls=()), "rollout.engine.urls is empty", "pass --rollout.engine.urls http://host:30000"),
    changed(_GROUP, _asked("none"), "would not be looked at: rollout.engine.kind = none"),
    changed(_GROUP, _asked(urls=("http://a:1", "http://a:1")), "want different addresses"),
    changed(
        _GROUP,
        _asked(urls=("10.0.0.7:30000",)),
        "rollout.engine.urls = '10.0.0.7:30000'; want http://host:port/path",
    ),
    changed(
        _GROUP,
        _asked(rollout={"noise": "philox"}),
        "rollout.noise = philox is drawn here alone",
        "set rollout.noise = torch_bfloat16",
    ),
    changed(_GROUP, _asked(rollout={"scouts": 2}), "rollout.scouts = 2: a scout has the noise of the window's steps"),
    changed(
        _GROUP, _asked(rollout={"window": {"steps": [0, 1]}}), "rollout.window.steps = [0, 1] begins with the first"
    ),
    changed(
        _GROUP,
        _asked(urls=("http://127.0.0.1:9", "http://127.0.0.1:10")),
        "rollout.engine.urls names 2 engines for 1 process,",
        "name at most 1",
    ),
    changed(
        _GROUP,
        _asked(fast=True, update={"objective": "nft"}, rollout={"precision": "fp8", "initial_noise": "per_image"}),
        "rollout.precision = fp8 would not be looked at",
        "set rollout.precision = model",
    ),
    changed(_GROUP, _asked(update={"objective": "sft"}), "update.objective = sft draws nothing"),
    changed(_GROUP, _asked(model={"train": "full", "dtype": "float32"}), "model.train = full; set model.train = lora"),
    changed(
        _GROUP,
        _asked(model={"shard_base": "blocks"}),
        "model.shard_base = 'blocks' has all processes run each together",
    ),
    changed(
        _GROUP,
        _asked(fast=True, model={"sequence_parallel": 2}),
        "model.sequence_parallel = 2 has several compute each together",
    ),
    changed(
        _GROUP, _asked(engine={"probe_tolerance": 2}), "rollout.engine.probe_tolerance = 2: want a number from 0 to 1"
    ),
    changed(_GROUP, _asked(engine={"requests_at_once": 0}), "rollout.engine.requests_at_once = 0"),
    changed(_GROUP, _asked(engine={"token_file": "nowhere.token"}), "rollout.engine.token_file = nowhere.token"),
    changed(_GROUP, {"rollout": {"noise": "torch"}}, "rollout.noise = 'torch': want one of philox, torch_float32"),
    changed(
        _GROUP,
        _asked(),
        "rollout engine sglang at http://127.0.0.1:9/v1/models",
        "refused",
        "start it, or correct rollout.engine.urls",
    ),
    _served("not-found", "status 404", "start it, or correct rollout.engine.urls"),
    _served("wants-a-token", "status 401", "set token_file to a file with the server's token"),
    _served("down", "status 503", "gave up after 1 attempts"),
    _served("hangs", "no complete answer within 1.0 s"),
    _served("html", "the answer has content type text/html; want application/json"),
    _served("not-json", "the answer is not JSON"),
    _served("good", "the answer lists no model", "is it SGLang-Diffusion's server?"),
    _served("engine-in-bf16", "runs its transformer in 'bf16', but model.dtype = 'float32'", "--dit-precision fp32"),
]
