"""advgrpo from Python: train, evaluate and generate do as the commands, callbacks are told, all of it twice.

Bugs planted in a copy, each seen red: callbacks left out of `Run`; told before the checkpoint is whole; the reason of a
callback lost; `resume` not passed on; a second training in the process with the first one's lock; signals handled in a
thread; settings laid under the file; the module `advgrpo.train` not callable once it is imported.
"""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

import advgrpo
from advgrpo import Callback, Config
from advgrpo.config.reading import nested
from advgrpo.errors import RunFailure, UserError
from advgrpo.runtime.checkpoint import load_state
from advgrpo.tiny import held_out_prompts_file

QUIET = Console(quiet=True)


class Recorder(Callback):
    def __init__(self, end_after: int = 0):
        self.told, self.end_after = [], end_after

    def on_iteration(self, metrics, flags):
        self.told.append(("iteration", metrics["iteration"]))
        return "enough" if metrics["iteration"] + 1 == self.end_after else None

    def on_evaluation(self, stage, scores, iteration):
        assert all(name.startswith("eval_") for name in scores)
        self.told.append((stage, iteration))

    def on_checkpoint(self, folder, iteration):
        assert load_state(folder)["trainer"]["iteration"] == iteration  # whole, where it says
        self.told.append(("checkpoint", iteration))


@pytest.fixture
def config(unit_config):
    unit_config.iterations, unit_config.output.checkpoint_every, unit_config.evaluation.every = 2, 1, 1
    return unit_config


def test_a_training_tells_its_callbacks_and_leaves_a_result(config, tmp_path):
    told = Recorder()
    result = advgrpo.train(config, callbacks=[told, Callback()], console=QUIET)
    iterations = [("during", 1), ("iteration", 0), ("checkpoint", 1), ("iteration", 1), ("checkpoint", 2)]
    assert told.told == [("base", 0), *iterations, ("final", 2)]
    assert [row["iteration"] for row in result.metrics] == [0, 1]
    assert result.summary == json.loads((result.folder / "summary.json").read_text())
    assert result.summary["iterations"] == 2
    assert (result.lora / "pytorch_lora_weights.safetensors").is_file()
    assert result.stopped == ""


def test_a_callback_ends_a_run_which_goes_on_as_if_it_had_not(config, tmp_path):
    whole = advgrpo.train(config, console=QUIET)
    config.output_dir = str(tmp_path / "parts")
    first = Recorder(end_after=1)
    stopped = advgrpo.train(config, callbacks=[Recorder(), first], console=QUIET)
    assert (stopped.stopped, stopped.summary, len(stopped.metrics)) == ("enough", {}, 1)
    rest = Recorder()
    resumed = advgrpo.train(config, callbacks=[rest], resume="auto", console=QUIET)
    assert ("iteration", 0) not in rest.told
    assert ("base", 0) not in rest.told
    timed = ("seconds", "cpu_seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in r.metrics] for r in (whole, resumed)]
    assert rows[0] == rows[1]
    again = advgrpo.train(config, resume="auto", console=QUIET)
    assert again.summary == resumed.summary  # it is done: nothing is trained


def test_an_error_of_a_callback_is_the_runs_and_nothing_is_lost(config):
    class Fails(Callback):
        def on_iteration(self, metrics, flags):
            raise ZeroDivisionError("mine")

    config.output.checkpoint_every = 0
    with pytest.raises(ZeroDivisionError, match="mine"):
        advgrpo.train(config, callbacks=[Fails()], console=QUIET)
    resumed = advgrpo.train(config, resume=True, console=QUIET)
    assert [row["iteration"] for row in resumed.metrics] == [0, 1]


def test_it_trains_in_a_thread_where_no_signal_can_be_handled(config):
    found = []
    config.iterations, config.data.held_out_prompts = 1, ""
    thread = threading.Thread(target=lambda: found.append(advgrpo.train(config, console=QUIET)))
    thread.start()
    thread.join()
    assert len(found[0].metrics) == 1


def test_what_is_trained_is_evaluated_and_drawn(config, tmp_path):
    config.iterations = 1
    result = advgrpo.train(config, console=QUIET)
    model = config.model.path
    prompt = "a small fox on blue, left"
    (tmp_path / "prompts.txt").write_text(prompt + "\n")
    scores = advgrpo.evaluate(
        result.lora, model=model, against="base", metrics=["rule", "saturation"], prompts=str(tmp_path / "prompts.txt"),
        output=tmp_path / "scores", images_per_prompt=2, num_steps=2, guidance_scale=1, resolution=32,
        max_sequence_length=16, cache_dir=config.data.cache_dir, console=QUIET,
    )  # fmt: skip
    assert set(scores) == {"rule", "saturation"}
    assert scores["saturation"].comparison is not None
    how = {"model": model, "num_steps": 2, "guidance_scale": 1, "resolution": 32, "max_sequence_length": 16}
    drawn = advgrpo.generate(prompt, lora=result.lora, base=True, images_per_prompt=2, **how)
    assert list(drawn.images) == ["base", "lora"]
    assert {tuple(of.shape) for of in drawn.images.values()} == {(1, 2, 3, 32, 32)}
    assert not torch.equal(drawn.images["base"], drawn.images["lora"])
    assert drawn.grid().size[0] > 64


def test_bad_input_is_named(config, tmp_path):
    with pytest.raises(UserError, match=r"settings: unknown key 'rollout\.groups'; did you mean 'rollout\.group_size'"):
        Config.load("tiny", {"rollout.groups": 8})
    with pytest.raises(UserError, match=r"'rollout\.noise_level' is called 'rollout\.eta' now"):
        Config.load("tiny", {"rollout": {"noise_level": 0.5}})
    with pytest.raises(UserError, match='resume = "yes"'.replace('"', "'")):
        advgrpo.train(config, resume="yes", console=QUIET)
    with pytest.raises(UserError, match="unknown key 'sead'; did you mean 'seed'"):
        advgrpo.generate("a red star", sead=1)
    with pytest.raises(UserError, match="unknown metric 'rules'; did you mean 'rule'"):
        advgrpo.evaluate(metrics=["rules"], output=tmp_path, console=QUIET)
    assert issubclass(RunFailure, Exception)


def test_settings_lie_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny-sft\nseed: 1\nrollout: {group_size: 8}\n")
    config = Config.load(file=file, settings={"rollout.group_size": 4, "iterations": 3})
    assert (config.update.objective, config.seed, config.rollout.group_size, config.iterations) == ("sft", 1, 4, 3)
    assert nested({"a.b": 1, "a": {"c": 2}, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_the_names_are_callable_whoever_imports_what_first():
    import advgrpo.evaluate
    import advgrpo.generate
    import advgrpo.train

    for name in ("train", "evaluate", "generate"):
        assert callable(getattr(advgrpo, name))
    assert set(advgrpo.__all__) <= set(dir(advgrpo))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        advgrpo.trian  # noqa: B018


@pytest.mark.weekly
@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    few = held_out_prompts_file().read_text().splitlines()[:2]
    (tmp_path / "few.txt").write_text("\n".join(few))
    small = {
        **{"iterations": 1, "evaluation.images_per_prompt": 1, "data.held_out_prompts": "few.txt"},
        **{"rollout.prompts_per_iteration": 2, "rollout.micro_batch": 8, "adversary.updates_per_iteration": 2},
    }
    short = {
        '"iterations": 20': json.dumps(small)[1:-1],
        "metrics=[": "images_per_prompt=2, prompts='few.txt', metrics=[",
    }
    for old, new in short.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/python.md", "exec"), {})
    assert (tmp_path / "grid.png").is_file()
