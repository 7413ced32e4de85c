"""Whole runs of two processes under torchrun that are stopped or lose a process, beside one that is not disturbed.

Bugs planted in a copy, each seen red: keys of the job's store without torchrun's attempt; processes that wait for each
other's scores in the gather; a signal that is heard at the end of an iteration.
"""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advgrpo import config
from tests.conftest import make_unit_config
from tests.training.test_run import environment, metrics, wait_for_rows
from tests.zygote import Forked

RESUME = ("--resume", "auto")  # starts the run, or continues it after a restart
LIMIT_SECONDS = 180

pytestmark = pytest.mark.slow


def torchrun(settings, *flags: str, fault: str = "none", restarts: int = 0, **variables: str) -> Forked:
    file = Path(settings.output_dir).with_suffix(".yaml")
    file.write_text(config.dump(settings))
    arguments, variables = [fault, "--config", str(file), *flags], environment() | variables
    how = {"processes": 2, "restarts": restarts, "merged": True, "environment": variables}
    return Forked("tests.train_worker:run", arguments, **how)


@pytest.fixture(scope="module")
def settings(unit_pipeline, unit_backbone, tmp_path_factory):
    base = make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("restart"))
    changes = {
        "iterations": 3,
        "collective_timeout": 7.0,
        "data": {"held_out_prompts": ""},
        "rollout": {"micro_batch": 1},  # four micro-batches for each process
        "output": {"checkpoint_every": 1, "keep_checkpoints": 10},
    }
    return config.build(config.merge(base.model_dump(), changes), "test")


@pytest.fixture(scope="module")
def undisturbed(settings):
    process = torchrun(settings)
    shown, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, shown
    return Path(settings.output_dir)


@pytest.fixture
def own(settings, tmp_path):
    return config.build(config.merge(settings.model_dump(), {"output_dir": str(tmp_path / "run")}), "test")


def assert_same_tensors(folder, other, iteration: int) -> None:
    name = f"checkpoints/iteration-{iteration:06d}/tensors.safetensors"
    ours, theirs = load_file(Path(folder) / name), load_file(Path(other) / name)
    assert ours.keys() == theirs.keys()
    assert [k for k in theirs if k != "rng.torch" and not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.weekly
def test_a_stop_is_in_time_and_a_slow_process_no_failure(own, undisturbed):
    """Rank 1 is eight seconds behind, longer than the collective timeout, in an iteration that takes longer than
    torchrun leaves between SIGTERM and SIGKILL; a torchrun that does not know the variable leaves half a minute."""
    own.output.checkpoint_every = 0
    process = torchrun(own, fault="slow", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    wait_for_rows(Path(own.output_dir), 1, process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert "stopped by SIGTERM after 1 iterations" in shown.replace("\n", " ")
    assert metrics(own.output_dir) == metrics(undisturbed)[:1]
    assert_same_tensors(own.output_dir, undisturbed, 1)


@pytest.mark.weekly
def test_torchrun_restarts_a_run_that_lost_a_process_and_the_bits_are_the_same(own, undisturbed):
    process = torchrun(own, *RESUME, fault="killed", restarts=1)
    shown, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, shown
    assert f"resumed {own.output_dir} at iteration 2\n" in shown, "the one under way is all that is lost"
    assert metrics(own.output_dir) == metrics(undisturbed)
    assert_same_tensors(own.output_dir, undisturbed, 3)
    files = [Path(each) / "lora" / "pytorch_lora_weights.safetensors" for each in (own.output_dir, undisturbed)]
    ours, theirs = (load_file(file) for file in files)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
