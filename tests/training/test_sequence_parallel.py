"""Images computed by several processes each: runs of 1, 2 and 4 in sequence groups of 2 are the same up to rounding,
with the base whole on each process, and with its blocks in parts on all.

Bugs planted in a copy, seen red (tests/mutants): processes of a sequence group that draw images of their own.

CI has one group of two, and two groups of two. Going on with a checkpoint of another number of processes, each of which
has the whole network, is weekly: CI sees it in test_sharding.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from advgrpo import config
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.reporting.evaluations import EVALUATIONS_FILE
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import build_trainer
from tests import flux_models, qwen_models, sharding_worker
from tests.conftest import make_unit_config
from tests.families import metrics
from tests.parts import some_weekly
from tests.training.test_run import environment
from tests.training.test_sharding import FIRST, RUN_TESTS, asked, changed, rounded_alike
from tests.zygote import run as run_forked

pytestmark = pytest.mark.slow
PER_IMAGE = {"rollout": {"initial_noise": "per_image"}, "data": {"held_out_prompts": ""}, "iterations": 1}
TWO = {  # runs by a sequence group of two
    "qwen": {},
    "sd3": {"iterations": 2},
    "flux": {"model": {"gradient_checkpointing": True}},
    "nft": {"update": {"objective": "nft"}, **PER_IMAGE},
    "awm": {"update": {"objective": "awm"}, **PER_IMAGE},
    "sft": {"update": {"objective": "sft"}, **PER_IMAGE},
    "scouts": {"rollout": {"scouts": 2}, "data": {"held_out_prompts": ""}},
}
EVALUATED = ("qwen", "sd3", "flux")
FOUR = ("sd3",)  # by two sequence groups of two
IN_PARTS = ("qwen", "flux")  # by two processes that have a part of the blocks each, beside those that have all
PARTS_TEST = "test_a_run_of_two_processes_with_blocks_in_parts_has_the_losses_of_one"
WEEKLY = {"sd3", "flux", "nft", "awm", "sft", "scouts"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sequence_parallel")


@pytest.fixture(scope="module")
def base(unit_pipeline, unit_backbone, folder, request) -> dict[str, Config]:
    """The unit run of each kind that is asked for: two minibatches of two micro-batches, and three held-out prompts."""
    settings = make_unit_config(unit_pipeline, unit_backbone, folder).model_dump()
    pipelines = {"flux": flux_models.save_pipeline, "qwen": qwen_models.save_pipeline}
    changes = {
        "iterations": 1,
        "model": {"max_sequence_length": 16},
        "rollout": {"micro_batch": 2, "num_steps": 3},
        "update": {"minibatches": 2},
        "evaluation": {"images_per_prompt": 2, "grid_prompts": 1},
        "output": {"checkpoint_every": 1, "keep_checkpoints": 9},
    }
    found = {}
    for name, own in (asked(request, RUN_TESTS, TWO) | asked(request, {PARTS_TEST}, TWO)).items():
        made = config.merge(config.merge(settings, changes), own)
        if name in pipelines:
            made = config.merge(made, {"model": {"path": str(pipelines[name](folder / name, shard="300KB"))}})
        found[name] = config.build(made, name)
    return found


@pytest.fixture(scope="module")
def runs(base, folder) -> dict[str, Path]:
    """Folders of runs of one process, and settings of those of several."""
    for name, settings in base.items():
        alone = changed(settings, folder, f"{name}-1")
        sharding_worker.train(alone, Distributed.start("cpu"))
        for other in (f"{name}-2", f"{name}-4", f"{name}-1-to-2"):
            changed(alone, folder, other, model={**alone.model.model_dump(), "sequence_parallel": 2})
        for other in (f"{name}-2-parts", f"{name}-4-parts", f"{name}-2-to-4-parts"):
            in_parts = {"sequence_parallel": 2, "shard_base": "blocks"}
            changed(alone, folder, other, model={**alone.model.model_dump(), **in_parts})
        changed(alone, folder, f"{name}-2-to-1")
    return {name: folder / f"{name}-1" for name in base}


def rounded_and_evaluated_alike(found: Path, expected: Path, *, merged: bool = True) -> None:
    rounded_alike(found, expected, merged=merged)
    ours, theirs = (
        [json.loads(line)["scores"] for line in (each / EVALUATIONS_FILE).read_text().splitlines()]
        for each in (found, expected)
    )
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        assert all(values == pytest.approx(other[metric], abs=1e-5) for metric, values in own.items())


def start(folder: Path, processes: int, runs: dict[str, Path | None]) -> None:
    job = {"group": False, "models": {}, "runs": {name: path and str(path) for name, path in runs.items()}}
    (folder / "job.json").write_text(json.dumps(job))
    done = run_forked("tests.sequence_worker:main", [folder], processes=processes, environment=environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def by_two(runs, folder) -> None:
    """Of all but sd3."""
    names = [name for name in runs if name != "sd3"]
    start(folder, 2, dict.fromkeys([*(f"{n}-2" for n in names), *(f"{n}-2-parts" for n in names if n in IN_PARTS)]))


@pytest.fixture(scope="module")
def sd3_by_two(runs, folder) -> None:
    """From its start and from what one process began."""
    start(folder, 2, {"sd3-2": None, "sd3-1-to-2": runs["sd3"] / FIRST, "sd3-2-parts": None})


@pytest.mark.parametrize("name", some_weekly(TWO, WEEKLY))
def test_a_run_of_two_processes_has_the_losses_of_one(name, runs, folder, request):
    """Metrics, what held-out prompts score, the weights, and no drift before the first optimizer step."""
    request.getfixturevalue("sd3_by_two" if name == "sd3" else "by_two")
    same = rounded_and_evaluated_alike if name in EVALUATED else rounded_alike
    same(folder / f"{name}-2", runs[name])


@pytest.mark.parametrize("name", some_weekly(IN_PARTS, WEEKLY))
def test_a_run_of_two_processes_with_blocks_in_parts_has_the_losses_of_one(name, runs, by_two, folder):
    """One samples by merged weights, which these have not."""
    rounded_and_evaluated_alike(folder / f"{name}-2-parts", runs[name], merged=False)


@pytest.mark.weekly
def test_a_run_of_two_sequence_groups_of_two_has_the_losses_of_one(runs, folder):
    start(folder, 4, dict.fromkeys(f"{name}-4" for name in FOUR))
    for name in FOUR:
        rounded_and_evaluated_alike(folder / f"{name}-4", runs[name])


def test_a_policy_that_does_not_share_out_tokens_is_refused(unit_config):
    unit_config.model.sequence_parallel, job = 2, SimpleNamespace(rank=0, world_size=2)
    with pytest.raises(UserError, match=r"sequence_parallel = 2: a SimpleNamespace does not share out tokens, and its"):
        build_trainer(unit_config, SimpleNamespace(), [], None, None, job, None)


@pytest.mark.weekly
def test_blocks_in_parts_on_two_sequence_groups_of_two_from_the_start_and_from_what_two_began(runs, sd3_by_two, folder):
    """Held-out prompts are three, which are no equal shares of two groups."""
    start(folder, 4, {"sd3-4-parts": None, "sd3-2-to-4-parts": folder / "sd3-2-parts" / FIRST})
    rounded_and_evaluated_alike(folder / "sd3-2-parts", runs["sd3"], merged=False)
    rounded_and_evaluated_alike(folder / "sd3-4-parts", runs["sd3"], merged=False)
    rounded_alike(folder / "sd3-2-to-4-parts", runs["sd3"], from_iteration=1, merged=False)


@pytest.mark.weekly
def test_two_processes_go_on_with_what_one_began(runs, sd3_by_two, folder):
    rounded_alike(folder / "sd3-1-to-2", runs["sd3"], from_iteration=1)


@pytest.mark.weekly
def test_one_process_goes_on_with_what_two_began(runs, sd3_by_two, folder):
    settings = config.load(file=folder / "sd3-2-to-1.yaml")
    sharding_worker.train(settings, Distributed.start("cpu"), str(folder / "sd3-2" / FIRST))
    rounded_alike(folder / "sd3-2-to-1", runs["sd3"], from_iteration=1)
    assert metrics(folder / "sd3-2-to-1")[0]["log_prob_mismatch_max"] == 0
