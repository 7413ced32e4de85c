"""Rewards of one's own, several remote judges, and a vision-language model as judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.bad_input.case import Bench, Case, changed, flagged

_CUSTOM, _REMOTES, _VLM, _POOLS = "custom rewards", "several remote rewards", "vlm judge", "reward workers"
_GOOD = "def f(images, prompts): return [0.0] * len(prompts)"
_QUICK = {"timeout": 1, "retries": 0, "wait": 0}


def _custom(name: str, code: str, *expect: str, **entry: Any) -> Case:
    """A run with one reward of the file mine.py."""

    def make(bench: Bench) -> list[str]:
        source = bench.write("mine.py", code)
        own = {"name": "mine", "import": f"{source}:f", "weight": 1.0, **entry}
        return bench.train("--rewards.custom", json.dumps([own]))

    return Case(_CUSTOM, name, ("rewards.custom[0].", *expect), make)


def _list(field: str, group: str, text: str, *expect: str) -> Case:
    return flagged(group, [f"--rewards.{field}", text], *expect)


CUSTOM = [
    _list("custom", _CUSTOM, "mine.py:f", "rewards.custom = 'mine.py:f': want a list of mappings (", "as JSON"),
    _list("custom", _CUSTOM, '[{"name": "a"', "rewards.custom[0] = ", "want a list of mappings ("),
    _list("custom", _CUSTOM, '{"name": "a", "import": "b:c"}', "want a list of mappings ("),
    _list("custom", _CUSTOM, '[{"name": "a", "weight": 1}]', "rewards.custom[0].import is missing: want text"),
    _list("custom", _CUSTOM, '[{"import": "a:b", "weight": 1}]', "rewards.custom[0].name is missing: want text"),
    _list("custom", _CUSTOM, '[{"name": "a", "import": "a:b", "wieght": 1}]', "did you mean 'rewards.custom[0].weight'?"),
    _list("custom", _CUSTOM, '[{"name": "a", "import": "a:b", "weight": -1}]', "rewards.custom[0].weight = -1: want a number"),
    _list("custom", _CUSTOM, '[{"name": "a", "import": "a:b", "options": 3}]', "rewards.custom[0].options = 3: want a mapping"),
    changed(_CUSTOM, {"rewards": {"custom": [{"name": "a b", "import": "a:b", "weight": 1}]}}, "rewards.custom[0].name = 'a b': want a name"),
    changed(_CUSTOM, {"rewards": {"custom": [{"name": "pickscore", "import": "a:b", "weight": 1}]}}, "rewards.custom[0].name = 'pickscore' is the name of another reward"),
    changed(_CUSTOM, {"rewards": {"custom": [{"name": "a", "import": "a:b"}]}}, "rewards.custom[0].weight = 0", "the reward would do nothing"),
    changed(_CUSTOM, {"rewards": {"custom": [{"name": "a", "import": "a:b", "weight": 1}] * 2}}, "rewards.custom[1].name = 'a' is the name of another reward or metric, of rewards.custom[0]"),
    flagged(_CUSTOM, "--evaluation.metrics mine", "evaluation.metrics: unknown metric 'mine'"),
    _custom("no colon", _GOOD, "import = 'mine.py': want \"file.py:NAME\"", **{"import": "mine.py"}),
    _custom("no file", _GOOD, "nowhere.py does not exist", **{"import": "nowhere.py:f"}),
    _custom("no module", _GOOD, "No module named 'no_such_package'", **{"import": "no_such_package.x:f"}),
    _custom("no such name", "def redness(images, prompts): 0", "has no 'f'; there are redness"),
    _custom("no function", "f = 3", "is a int; want a class or a function"),
    _custom("syntax", "def f(:", "cannot be imported: SyntaxError", "mine.py, line 1"),
    _custom("raises on import", "raise RuntimeError('no GPU')", "cannot be imported: RuntimeError: no GPU"),
    _custom("exits on import", "import sys; sys.exit(3)", "cannot be imported: SystemExit"),
    _custom("one parameter", "def f(images): 0", "takes (images); want (images, prompts, **metadata)"),
    _custom("unknown option", _GOOD, "options.scale is no parameter of", options={"scale": 2}),
    _custom("option missing", "class f:\n def __init__(self, path): 0\n def __call__(self, a, b): 0", "options lacks path, which f needs"),
    _custom("raises when built", "class f:\n def __init__(self): raise ValueError('no weights')", "building it: ValueError: no weights"),
    _custom("no metadata", "def f(images, prompts, target): 0", "needs 'target' of every prompt"),
    _custom("raises", "def f(images, prompts): raise ValueError('too small')", "tried on 2 images of noise", "ValueError: too small (mine.py, line 1)"),
    _custom("nothing", "def f(images, prompts): pass", "returned nothing (None); want a list, array [2] or tensor [2]"),
    _custom("one score", "def f(images, prompts): return [1.0]", "scores of shape [1] for 2 images"),
    _custom("a column", "def f(images, prompts): return images.mean((1, 2, 3))[:, None]", "scores of shape [2, 1] for 2 images"),
    _custom("text", "def f(images, prompts): return ['good', 'bad']", "score 0 is 'good', of type str"),
    _custom("nan", "def f(images, prompts): return [0.0, float('nan')]", "tried on 2 images of noise", "is nan"),
    _custom("wrong kind of images", f"{_GOOD}\nf.images = 'numpy'", 'images is \'numpy\'; want "tensor" or "pil"'),
]  # fmt: skip


def _remotes(name: str, entries: list[Mapping[str, Any]], *expect: str, behaviours: tuple[str, ...] = ()) -> Case:
    """A run with these servers; those of `behaviours` get the urls, in their order."""

    def make(bench: Bench) -> list[str]:
        urls = [{"url": bench.world.servers[behaviour]} for behaviour in behaviours]
        full = [{**_QUICK, "weight": 1, **entry, **url} for entry, url in zip(entries, urls or [{}] * len(entries))]
        return bench.train("--rewards.remotes", json.dumps(full))

    return Case(_REMOTES, name, expect, make)


_GENEVAL = {"name": "geneval", "protocol": "flow_grpo"}
REMOTES = [
    _remotes("no url", [{"name": "a"}], "rewards.remotes[0].url is empty, but rewards.remotes[0] needs it"),
    _remotes("no name", [{"url": "http://127.0.0.1:1"}], "rewards.remotes[0].name is missing"),
    _remotes("of a reward", [{"name": "remote", "url": "http://127.0.0.1:1"}], "rewards.remotes[0].name = 'remote' is the name of another reward"),
    _remotes("protocol", [{"name": "a", "url": "http://h", "protocol": "flow"}], "rewards.remotes[0].protocol = 'flow': want advgrpo or flow_grpo; did you mean 'flow_grpo'?"),
    _remotes("url", [{"name": "a", "url": "ftp://h"}], "rewards.remotes[0].url = 'ftp://h'"),
    _remotes("scores_key", [{"name": "a", "url": "http://h", "scores_key": "x"}], "rewards.remotes[0].scores_key = 'x' is protocol flow_grpo's"),
    _remotes("token", [{"name": "a", "url": "http://h", "token_file": "nowhere"}], "rewards.remotes[0].token_file = nowhere does not exist"),
    _remotes("dead", [{"name": "a", "url": "http://127.0.0.1:1/"}], "rewards.remotes[0] at http://127.0.0.1:1/"),
    _remotes("the second fails", [{"name": "a"}, {"name": "b"}], "rewards.remotes[1] at", "500", behaviours=("good", "fails")),
    _remotes("a pickle of code", [_GENEVAL], "rewards.remotes[0] at", "holds more than plain data", behaviours=("pickled-code",)),
    _remotes("a pickle of numpy", [_GENEVAL], "rewards.remotes[0] at", "let the server answer plain numbers", behaviours=("pickled-numpy",)),
    _remotes("JSON for a pickle", [_GENEVAL], "rewards.remotes[0] at", "the answer is no pickle", behaviours=("good",)),
    _remotes("other lists", [_GENEVAL], "no list 'outputs', but values; scores_key names the list", behaviours=("pickled-values",)),
]  # fmt: skip


def _judge(name: str, behaviour: str, *expect: str, **settings: Any) -> Case:
    def make(bench: Bench) -> list[str]:
        own = {**_QUICK, "weight": 1, "base_url": bench.world.servers[behaviour], "model": "judge", **settings}
        return bench.train(change={"rewards": {"vlm_judge": own}})

    return Case(_VLM, name, ("rewards.vlm_judge", *expect), make)


VLM = [
    flagged(_VLM, "--rewards.vlm_judge.weight 1", "rewards.vlm_judge.base_url is empty, but rewards.vlm_judge needs it"),
    flagged(_VLM, "--rewards.vlm_judge.weight 1 --rewards.vlm_judge.base_url http://h/v1", "rewards.vlm_judge.model is empty"),
    flagged(_VLM, "--evaluation.metrics vlm_judge", "rewards.vlm_judge.base_url is empty, but evaluation.metrics: vlm_judge"),
    flagged(_VLM, "--rewards.vlm_judge.min_probability 2", "rewards.vlm_judge.min_probability = 2: want a number from 0 to 1"),
    flagged(_VLM, "--rewards.vlm_judge.concurrency 0", "rewards.vlm_judge.concurrency = 0"),
    flagged(_VLM, "--rewards.vlm_judge.extra_body 3", "rewards.vlm_judge.extra_body = 3: want a mapping"),
    _judge("url", "good", "base_url = 'localhost:8000/v1/chat/completions'; want http://", base_url="localhost:8000/v1"),
    _judge("question", "good", "question = 'Good?': want {prompt}", question="Good?"),
    _judge("body", "good", "extra_body sets 'stream'", extra_body={"stream": True}),
    _judge("a token file", "good", "token_file = nowhere does not exist", token_file="nowhere"),
    _judge("another protocol", "good", 'no "choices"', "want base_url of a chat endpoint"),
    _judge("not found", "not-found", "404"),
    _judge("a key", "wants-a-token", "set token_file"),
    _judge("no log-probabilities", "chat-silent", "gives no log-probabilities; take one that does"),
    _judge("thinks", "chat-thinks", "less than min_probability = 0.1; likelier are '<think>'"),
]  # fmt: skip

_RULE = {"rule": {"weight": 1.0}}


def _pools(pools: Any, *expect: str, rewards: Mapping[str, Any] = _RULE) -> Case:
    return changed(_POOLS, {"rewards": {**rewards, "pools": pools}}, *expect)


def _broken_in_a_worker(bench: Bench) -> list[str]:
    source = bench.write("mine.py", "class f:\n def __init__(self): raise ValueError('no weights')")
    own = {"name": "mine", "import": f"{source}:f", "weight": 1.0}
    return bench.train("--rewards.custom", json.dumps([own]), "--rewards.pools", '[{"reward": "mine"}]')


POOLS = [
    _list("pools", _POOLS, "ocr", "rewards.pools = 'ocr': want a list of mappings (", "as JSON"),
    _pools([{"workers": 2}], "rewards.pools[0].reward is missing: want text"),
    _pools([{"reward": "rule", "worker": 2}], "did you mean 'rewards.pools[0].workers'?"),
    _pools([{"reward": "rule", "workers": 0}], "rewards.pools[0].workers = 0: want a whole number from 1 to 1024"),
    _pools([{"reward": "rule", "kind": "rey"}], "rewards.pools[0].kind = 'rey': want processes or ray; did you mean 'ray'?"),
    _pools([{"reward": "ocr"}], "rewards.pools[0].reward = 'ocr' is no fixed reward in use; those that can have workers: rule"),
    _pools([{"reward": "adversary"}], "rewards.pools[0].reward = 'adversary' is no fixed reward in use"),
    _pools([{"reward": "rule"}, {"reward": "rule"}], "rewards.pools[1].reward = 'rule' has workers in rewards.pools[0] already"),
    _pools([{"reward": "dino_similarity"}], "rewards.pools[0].reward = 'dino_similarity' compares with the references", rewards={"dino_similarity": {"weight": 1.0}}),
    _pools([{"reward": "rule", "gpus": 1}], "rewards.pools[0].gpus = 1 is what Ray reserves"),
    _pools([{"reward": "rule", "device": "cuda"}], "rewards.pools[0].device = 'cuda' with kind = processes: want cpu or cuda:N"),
    _pools([{"reward": "rule", "kind": "ray", "device": "cuda"}], "rewards.pools[0].device = 'cuda' with gpus = 0: Ray gives a worker the GPUs that it asks for"),
    Case(_POOLS, "cannot be built", ("rewards.custom[0].import", "building it: ValueError: no weights"), _broken_in_a_worker),
]  # fmt: skip

CASES = [*CUSTOM, *REMOTES, *VLM, *POOLS]
