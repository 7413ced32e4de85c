"""Rewards of one's own (rewards/custom.py): what is understood, what is refused and when, and a run that trains on one.

Planted bugs that turned this file red: metadata of the first prompt given to all, a missing key left out instead of
None, PIL images for everybody, an array [B, 1] broadcast, NaN let through, the trial left out of the run, another
reward's name accepted, an edited file taken for the old one, its content left out of what a checkpoint is made from.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advgrpo import config
from advgrpo.config import judge_checks
from advgrpo.errors import RunFailure, UserError
from advgrpo.reporting import metric_names
from advgrpo.rewards.base import Reward
from advgrpo.rewards.custom import CustomReward, load_object
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import StopRequested
from advgrpo.train import parse
from advgrpo.training.resuming import Resume
from advgrpo.training.run import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward.py"
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["first", "second", "third"]


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def reward(source: str, **more) -> CustomReward:
    settings = {"name": "mine", "options": {}, "owner": "rewards.custom[0]", **more}
    return CustomReward(source, **settings)


FUNCTIONS = """
import numpy as np, torch
from PIL import Image

def as_list(images, prompts): return images.mean(dim=(1, 2, 3)).tolist()
def as_array(images, prompts): return images.mean(dim=(1, 2, 3)).numpy()
def as_tensor(images, prompts): return images.mean(dim=(1, 2, 3))
def as_scalars(images, prompts): return [image.mean() for image in images]
def as_booleans(images, prompts): return [prompt == "second" for prompt in prompts]
def as_numpy_scalars(images, prompts): return list(np.arange(len(prompts), dtype=np.float16))
def everything(images, prompts, **metadata):
    assert metadata == {"count": [1, None, 3][: len(prompts)], "tag": ["a", "b", "c"][: len(prompts)]}
    return list(range(len(prompts)))
def counted(images, prompts, *, tag, strength=1.0): return [ord(each) * strength for each in tag]
def images(images, prompts):
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in images)
    return [np.asarray(image).mean() / 255 for image in images]
images.images = "pil"

class Called:
    images = "pil"
    def __init__(self, bias, *, device, name, scale=1.0): self.told, self.bias = (str(device), name, scale), bias
    def __call__(self, images, prompts, count=None): return [self.bias + (c or 0) for c in count]
class Protocol:
    progress = None
    def score(self, images, prompts, references): return torch.full((len(prompts),), 2.0)
"""
METADATA = {"first": {"count": 1, "tag": "a"}, "second": {"tag": "b"}, "third": {"count": 3, "tag": "c"}}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("as_list", {}, IMAGES.mean(dim=(1, 2, 3)).tolist()),
        ("as_array", {}, IMAGES.mean(dim=(1, 2, 3)).tolist()),
        ("as_tensor", {}, IMAGES.mean(dim=(1, 2, 3)).tolist()),
        ("as_scalars", {}, IMAGES.mean(dim=(1, 2, 3)).tolist()),
        ("as_booleans", {}, [0.0, 1.0, 0.0]),
        ("as_numpy_scalars", {}, [0.0, 1.0, 2.0]),
        ("everything", {}, [0.0, 1.0, 2.0]),
        ("counted", {"strength": 2.0}, [194.0, 196.0, 198.0]),
        ("images", {}, [(image * 255).round().mean().item() / 255 for image in IMAGES]),
        ("Called", {"bias": 10}, [11.0, 10.0, 13.0]),
        ("Protocol", {}, [2.0, 2.0, 2.0]),
    ],
)
def test_what_is_understood(name, options, expected, tmp_path):
    mine = reward(f"{write(tmp_path, FUNCTIONS)}:{name}", options=options, metadata=METADATA)
    scores = mine.score(IMAGES, PROMPTS, None)
    assert isinstance(mine, Reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected)
    mine.try_out(PROMPTS, None, 8)


def test_a_class_is_told_what_it_asks_for_and_progress_reaches_it(tmp_path):
    source = write(tmp_path, FUNCTIONS)
    called = reward(f"{source}:Called", options={"bias": 1, "scale": 3.0})
    assert called._judge.told == ("cpu", "mine", 3.0)
    assert called.scores_references
    called.progress = print  # it has none, and gets none
    assert not hasattr(called._judge, "progress")
    protocol = reward(f"{source}:Protocol")
    protocol.progress = print
    assert protocol._judge.progress is print
    assert not protocol.scores_references  # it may compare with them


def test_the_wish_to_stop_passes_through_a_reward_that_reports_progress(tmp_path):
    code = "class f:\n progress = None\n def __call__(self, images, prompts): self.progress('wait', within_seconds=1)"
    mine = reward(f"{write(tmp_path, code)}:f")

    def stop(doing, *, within_seconds):
        raise StopRequested("SIGTERM")

    mine.progress = stop
    with pytest.raises(StopRequested):
        mine.score(IMAGES, PROMPTS)


def test_no_graph_is_built(tmp_path):
    code = "import torch\nw = torch.nn.Parameter(torch.ones(()))\ndef f(images, prompts):\n"
    code += " found = images.mean((1, 2, 3)) * w\n assert not found.requires_grad\n return found"
    assert reward(f"{write(tmp_path, code)}:f").score(IMAGES, PROMPTS).shape == (3,)


def test_a_module_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_judges").mkdir()
    write(tmp_path / "my_judges", FUNCTIONS, "simple.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reward("my_judges.simple:as_booleans").score(IMAGES, PROMPTS).tolist() == [0, 1, 0]
    sys.modules.pop("my_judges.simple")


def test_an_edited_file_is_read_anew(tmp_path):
    source = write(tmp_path, "def f(images, prompts): return [1.0] * len(prompts)") + ":f"
    first = reward(source)
    assert load_object(source, "rewards.custom[0]") is first._judge  # not run twice
    write(tmp_path, "def f(images, prompts): return [2.0] * len(prompts)")
    assert reward(source).score(IMAGES, PROMPTS).tolist() == [2, 2, 2]
    assert first.score(IMAGES, PROMPTS).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "name", "options", "expected"),
    [
        ("", "f", {}, r"import = '.*mine.py:f': .*mine.py has no 'f'; there are none"),
        ("def redness(a, b): 0", "rednes", {}, "did you mean 'redness'"),
        ("f = 3", "f", {}, "is a int; want a class or a function"),
        ("f = (", "f", {}, r"cannot be imported: SyntaxError: .*\(mine.py, line 1\)"),
        ("import nothing_like_this", "f", {}, "No module named 'nothing_like_this'; install it"),
        ("\n1 / 0", "f", {}, r"cannot be imported: ZeroDivisionError: division by zero \(mine.py, line 2\)"),
        ("raise SystemExit(3)", "f", {}, "cannot be imported: SystemExit: 3"),
        ("def f(images): 0", "f", {}, r"takes \(images\); want \(images, prompts, \*\*metadata\)"),
        ("def f(images, prompts): 0", "f", {"k": 1}, r"custom\[0\].options.k is no parameter of .*; it has none"),
        ("def f(images, prompts, strength=1): 0", "f", {"strenght": 1}, "did you mean 'strength'"),
        ("class f:\n def __init__(self, path): 0", "f", {}, r"rewards.custom\[0\].options lacks path, which f needs"),
        ("class f:\n def __init__(self): 1/0", "f", {}, r"building it: ZeroDivisionError: .* \(mine.py, line 2\)"),
        ("class f:\n def score(self, images): 0", "f", {}, r"takes \(images\); want score\(images, prompts, ref"),
        ("class f:\n def score(self, a, b, c, d): 0", "f", {}, r"want score\(images, prompts, references\)"),
        ("class f: pass", "f", {}, "does not say what it takes|takes|callable"),
        ("def f(images, prompts): 0\nf.images = 'numpy'", "f", {}, "images is 'numpy'; want \"tensor\" or \"pil\""),
        ("def f(images, prompts, tag): 0", "f", {"tag": 1}, r"options.tag: the prompt file gives 'tag' too"),
        ("def f(count, tag, **more): 0", "f", {}, "its parameter 'count' is also a key of the prompt file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named_before_anything_is_scored(text, name, options, expected, tmp_path):
    with pytest.raises(UserError, match=expected) as error:
        reward(f"{write(tmp_path, text)}:{name}", options=options, metadata=METADATA)
    assert str(error.value).startswith("rewards.custom[0].")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["mine.py", "mine.py:", ":f", "mine.py:f g", "nowhere.py:f", "no_such_module.x:f", "f"]
)
def test_an_import_that_leads_nowhere(source):
    with pytest.raises(UserError, match=r"rewards.custom\[0\].import = .*want \"file.py:NAME\""):
        reward(source)


@pytest.mark.parametrize(
    ("returned", "expected", "kind"),
    [
        ("[1.0]", r"scores of shape \[1\] for 2 images; want a list, array \[2\] or tensor \[2\]", RunFailure),
        ("[1.0, 2.0, 3.0]", r"shape \[3\] for 2 images", RunFailure),
        ("np.ones((2, 1))", r"shape \[2, 1\] for 2 images", RunFailure),
        ("torch.ones(2, 2)", r"shape \[2, 2\]", RunFailure),
        ("None", r"returned nothing \(None\)", RunFailure),
        ("3.0", "returned a float", RunFailure),
        ("np.array(['a', 'b'])", "returned an array of <U1", RunFailure),
        ("[1.0, None]", "score 1 is None, of type NoneType", RunFailure),
        ("['1', 2]", "score 0 is '1', of type str", RunFailure),
        ("([1.0, 2.0], {})", r"score 0 is \[1.0, 2.0\], of type list", RunFailure),
        ("[1.0, float('nan')]", "the score for prompt 'second' is nan", FloatingPointError),
        ("[1.0, 1e39]", "the score for prompt 'second' is inf", FloatingPointError),
        ("[1.0, 10 ** 400]", "the score for prompt 'second' is inf", FloatingPointError),
        ("images.mul_(0.5).mean((1, 2, 3))", r"has changed the images in place", RunFailure),
        ("1 / 0", r"ZeroDivisionError: division by zero \(mine.py, line 2\), prompt 'first'", RunFailure),
    ],
)
def test_what_is_no_score_is_an_error_and_the_trial_finds_it(returned, expected, kind, tmp_path):
    mine = reward(write(tmp_path, f"import numpy as np, torch\ndef f(images, prompts): return {returned}") + ":f")
    with pytest.raises(kind, match=expected):
        mine.score(IMAGES[:2].clone(), PROMPTS[:2])
    with pytest.raises(
        UserError, match=rf"^rewards.custom\[0\].import = .*two|tried on 2 images of noise: .*{expected}"
    ):
        mine.try_out(PROMPTS, None, 8)


def test_a_prompt_without_what_the_function_needs_is_named(tmp_path):
    source = write(tmp_path, "def f(images, prompts, count): return count") + ":f"
    with pytest.raises(UserError, match=r"needs 'count' of every prompt, but the prompt file .* none for 'second'"):
        reward(source, metadata=METADATA).try_out(PROMPTS, None, 8)
    with pytest.raises(UserError, match="'first'"):
        reward(source).check_prompts(PROMPTS)


# In a run.


def custom(unit_config, source, *, metrics=("red",), **more):
    entry = {"name": "red", "import": source, "weight": 1.0, **more}
    change = {
        "adversary": {"kind": "none"},
        "rewards": {"custom": [entry]},
        "evaluation": {"metrics": list(metrics)},
        "output": {"checkpoint_every": 1},
    }
    return config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")


def run(settings, resume=False):
    return Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))


def rows(settings):
    return [json.loads(line) for line in (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_the_example_trains_the_tiny_world_and_is_resumed_exactly(unit_config, tmp_path):
    """Two iterations in one go, and one after the other; the edited file is refused, or accepted by consent."""
    lines = Path(unit_config.data.prompts).read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "target": 0.1}) + "\n" for p in lines))
    unit_config.data.prompts = str(tmp_path / "prompts.jsonl")
    source = shutil.copy(EXAMPLE, tmp_path / "mine.py")
    settings = custom(unit_config, f"{source}:redness", options={"strength": 2.0})
    run(settings).train()
    whole = rows(settings)
    assert all(math.isfinite(row["reward_red"]) and row["reward_red"] <= 0 for row in whole)
    assert all(row["reward_generated"] == pytest.approx(row["reward_red"], rel=1e-6) for row in whole)
    assert "reward_red_of_references" in whole[0]  # the monitor sees beside them whether it is hacked
    summary = json.loads((Path(settings.output_dir) / "summary.json").read_text())
    assert "red" in json.dumps(summary["final"]), summary

    halves = settings.model_copy(update={"output_dir": str(tmp_path / "halves"), "iterations": 1})
    run(halves).train()
    halves = halves.model_copy(update={"iterations": 2})
    Path(source).write_text(EXAMPLE.read_text() + "\n# another comment\n")
    changed = r"content of rewards \(rewards.custom = '.*mine.py:redness'\) has changed.*--accept-changed rewards"
    with pytest.raises(UserError, match=changed):
        run(halves, resume=True)
    run(halves, resume=Resume("folder", accepted=("rewards",))).train()
    timed = [name for name in whole[0] if "second" in name or "time" in name]
    for row in [*whole, *(again := rows(halves))]:
        for name in timed:
            row.pop(name, None)
    assert again == whole


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "Red"}, r"rewards.custom\[0\].name = 'Red': want a name for metrics"),
        ({"name": "red_of_references"}, "not ending in _of_references"),
        ({"name": "ocr"}, r"rewards.custom\[0\].name = 'ocr' is the name of another reward or metric"),
        ({"name": "saturation"}, "another reward or metric"),
        ({"name": "generated"}, "another reward or metric"),
        ({"weight": 0.0, "name": "blue"}, r"rewards.custom\[0\].weight = 0.*the reward would do nothing"),
    ],
)
def test_names_and_weights_that_cannot_work(unit_config, change, expected):
    settings = custom(unit_config, f"{EXAMPLE}:redness", metrics=["rule"], **change)
    with pytest.raises(UserError, match=expected):
        config.check(settings)


def test_two_rewards_of_one_name(unit_config):
    settings = custom(unit_config, f"{EXAMPLE}:redness")
    settings.rewards.remotes = (config.rewards.NamedRemote(name="red", url="http://127.0.0.1:1", weight=1.0),)
    with pytest.raises(
        UserError, match=r"rewards.custom\[0\].name = 'red' is the name of another .* of rewards.remotes\[0\]"
    ):
        config.check(settings)


def test_a_reward_that_fails_its_trial_ends_the_run_before_a_model_is_loaded(unit_config, monkeypatch, tmp_path):
    monkeypatch.setattr("advgrpo.training.run.build_policy", lambda *_: pytest.fail("a model was loaded"))
    source = write(tmp_path, "def f(images, prompts): return [1.0]")
    settings = custom(unit_config, f"{source}:f")
    with pytest.raises(UserError, match=r"rewards.custom\[0\].import = .* tried on 2 images of noise: .*shape \[1\]"):
        run(settings)


def test_as_a_flag_and_in_a_file(tmp_path):
    flags = ["--rewards.custom", '[{"name": "red", "import": "a.py:f", "weight": 2, "options": {"k": [1, 2]}}]']
    settings, _ = parse(flags)
    (entry,) = settings.rewards.custom
    assert (entry.name, getattr(entry, "import"), entry.weight, entry.options) == ("red", "a.py:f", 2.0, {"k": [1, 2]})
    (tmp_path / "all.yaml").write_text(config.dump(settings))
    assert config.load(file=tmp_path / "all.yaml") == settings
    with pytest.raises(UserError, match=r"rewards.custom\[0\].weight = 'much': want a number"):
        parse(["--rewards.custom", '[{"name": "red", "import": "a.py:f", "weight": "much"}]'])


def test_pil_images_are_what_the_tensor_says():
    """Rounded to the nearest level, RGB, one per prompt."""
    seen = []

    def look(images, prompts):
        seen.extend(images)
        return np.zeros(len(prompts))

    look.images = "pil"
    sys.modules["looking"] = type(sys)("looking")
    sys.modules["looking"].look = look
    reward("looking:look").score(IMAGES, PROMPTS)
    del sys.modules["looking"]
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in seen)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in seen])).permute(0, 3, 1, 2)
    assert torch.equal(pixels, (IMAGES * 255).round().byte())


def test_names_that_are_taken_are_those_of_other_metrics():
    """`config` stands below `reporting`, so it has them written out."""
    assert {f"reward_{name}" for name in (*judge_checks._TAKEN_NAMES, "adversary")} >= set(metric_names.OTHER_REWARDS)
    endings = (metric_names.OF_REFERENCES, metric_names.CI95, metric_names.FIRST)
    assert set(judge_checks._TAKEN_ENDINGS) == set(endings)
