"""Every arm of every experiment trains for two iterations, with its settings as they are but for sizes. CI has one of
each experiment, its first that no experiment above has, with those that start from it; the others are weekly, as all
of them take 80 seconds of a core. What comes after the training, from judge to page, CI has of `sft` alone
(test_experiments.py).

Bugs planted in a copy, each seen red: an arm whose micro-batch has no group's half; one whose start is another arm's
folder; a preset that names a reward which is not there; an experiment whose arms are all weekly.
"""

from pathlib import Path

import pytest
import yaml
from rich.console import Console

import advgrpo
from advgrpo.experiments.plan import EXPERIMENTS, chains, length, settings
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics

ITERATIONS = 2
CHAINS = {chain[0].arm: chain for chain in chains(list(EXPERIMENTS), [0]) if chain[0].made.trains}


def first_of_each() -> dict[str, str]:
    """experiment -> of its arms the first that none above has."""
    found: dict[str, str] = {}
    above: set[str] = set()
    for name, experiment in EXPERIMENTS.items():
        found[name] = next(arm for arm in experiment.arms if arm not in above)
        above |= set(experiment.arms)
    return found


def of_ci(root: str) -> bool:
    return not {job.arm for job in CHAINS[root]}.isdisjoint(first_of_each().values())


VARIANTS = [pytest.param(root, marks=() if of_ci(root) else pytest.mark.weekly) for root in CHAINS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Of all arms: they have the same prompts and references."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def sizes(root, unit_config, cache, tmp_path) -> Path:
    """--config for runs of a second: the unit model, and no more pictures than every arm's groups need."""
    prompts = 4 if root == "tempflow" else 2  # a group at least for each of its window's four steps
    plain = unit_config.model_dump(mode="json")
    content = {
        "model": {"path": plain["model"]["path"], "lora": {"rank": 4, "alpha": 8}},
        "data": {"held_out_prompts": plain["data"]["held_out_prompts"], "cache_dir": cache},
        "rollout": {
            **{"prompts_per_iteration": prompts, "group_size": 4, "micro_batch": 2, "num_steps": 8},
            "tail_agreement": 0.0,  # an untrained model's rewards do not agree
        },
        "adversary": {"updates_per_iteration": 1, "warmup_updates": 1, "batch_size": 4, "replay_capacity": 8},
        "evaluation": {"every": 0, "images_per_prompt": 1, "num_steps": 2, "grid_prompts": 1},
        "monitor": {"every": 0},
    }
    file = tmp_path / "sizes.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_ci_has_an_arm_of_every_experiment():
    """Of its own, and not the default that most stand beside; and not all, which would take too long."""
    in_ci = [variant.values[0] for variant in VARIANTS if not variant.marks]
    trained = {job.arm for root in in_ci for job in CHAINS[root]}
    shared = {name: set() if name == "dino" else {"dino"} for name in EXPERIMENTS}
    left = [name for name, each in EXPERIMENTS.items() if trained.isdisjoint(each.arms.keys() - shared[name])]
    assert not left
    assert len(VARIANTS) > 2 * len(in_ci)


@pytest.mark.parametrize("root", VARIANTS)
def test_an_arm_and_those_that_follow_it_train(root, sizes, tmp_path):
    for job in CHAINS[root]:
        result = advgrpo.train(settings(job, tmp_path, ITERATIONS, sizes), console=Console(quiet=True))
        assert not result.stopped
        assert len(load_metrics(job.folder(tmp_path) / METRICS_FILE)) == length(job.arm, ITERATIONS)
        assert (job.folder(tmp_path) / "lora" / "pytorch_lora_weights.safetensors").is_file()
