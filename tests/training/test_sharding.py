"""A base in parts on 2 and 4 processes: the bits of the whole one, its runs, and going on with other numbers of them.

Bugs planted in a copy, each seen red: adapters shared out as well; blocks kept after their forward; a run whose texts
were encoded in other batches than those of the one with its bits; an export that gathers a block. In tests/mutants: a
block that is gathered when it runs; blocks kept after they were merged.
"""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.config import Config
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from tests import flux_models, qwen_models, sharding_worker
from tests.conftest import make_large_pipeline, make_unit_config
from tests.families import PROMPTS, metrics
from tests.parts import some_weekly
from tests.training.test_run import environment
from tests.zygote import run as run_forked

pytestmark = pytest.mark.slow

FIRST = "checkpoints/iteration-000001"
NETWORKS = {
    "sd3": {"lora": {"export_format": "kohya"}},
    "sd3-bfloat16": {"dtype": "bfloat16"},
    "flux": {"gradient_checkpointing": True},
    "flux-fp8": {"base_precision": "fp8", "gradient_checkpointing": True},
    "qwen": {},
    "large": {"gradient_checkpointing": True},  # SD3.5-large's kind: no block attends twice
    "large-fp8": {"base_precision": "fp8"},
}
COPIED = {"flux", "flux-fp8", "large", "large-fp8"}  # of which every process has merged weights in FP8 as well, whole
RUNS = {
    "sd3": {"iterations": 2},
    "flux": {"data": {"held_out_prompts": ""}},
    "flux-copied": {"data": {"held_out_prompts": ""}, "fast": True, "rollout": {"precision": "fp8"}},
    "flux-fp8": {"data": {"held_out_prompts": ""}, "iterations": 2, "model": {"base_precision": "fp8"}},
    "large-fp8": {"data": {"held_out_prompts": ""}, "iterations": 2, "model": {"base_precision": "fp8"}},
}
WEEKLY = {"sd3-bfloat16", "qwen", "large", "large-fp8"}
GOING_ON = ("sd3", "flux-fp8", "large-fp8")
BY_FOUR = ("sd3", "flux", "qwen", "large")


def asked(request, tests: Collection[str], every: dict[str, dict]) -> dict[str, dict]:
    """Those that this session's tests of these names in this file are about, and sd3, which is in others as well."""
    own = (item for item in request.session.items if item.path == request.path)
    items = [item for item in own if getattr(item, "originalname", "") in tests]
    names = {"sd3", *(item.callspec.params["name"] for item in items)}
    return {name: changes for name, changes in every.items() if name in names}


NETWORK_TESTS = (
    "test_every_process_has_the_bits_of_the_whole_network",
    "test_four_processes_have_the_bits_of_the_whole_network",
    "test_the_next_block_is_gathered_while_one_runs",
    "test_a_whole_copy_is_merged_block_by_block_and_gathers_nothing_to_sample",
    "test_an_export_of_adapters_gathers_nothing",
)
RUN_TESTS = ("test_a_run_of_two_processes_has_the_losses_of_one",)
WHOLE_TEST = "test_a_run_in_parts_has_the_bits_of_one_whose_processes_have_all_of_the_base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def base(unit_pipeline, unit_backbone, folder, request) -> dict[str, Config]:
    """The unit run on each family by one process. The KL has no weight, so that one process alone measures it, and
    held-out prompts are three, which are no equal shares of several."""
    names = (*asked(request, NETWORK_TESTS, NETWORKS), *asked(request, RUN_TESTS, RUNS))
    families = {name.split("-")[0] for name in names}
    made = {"flux": flux_models.save_pipeline, "qwen": qwen_models.save_pipeline}
    pipelines = {name: made[name](folder / name, shard="300KB") for name in made.keys() & families}
    pipelines["sd3"] = unit_pipeline
    if "large" in families:
        pipelines["large"] = make_large_pipeline(folder / "large")
    settings = make_unit_config(unit_pipeline, unit_backbone, folder).model_dump()
    changes = {
        "fast": False,
        "iterations": 1,
        "rollout": {"micro_batch": 2, "num_steps": 3},
        "update": {"minibatches": 1},
        "evaluation": {"images_per_prompt": 2, "grid_prompts": 1},
        "output": {"checkpoint_every": 1, "keep_checkpoints": 9},
    }
    return {
        family: config.build(
            config.merge(settings, {**changes, "model": {"path": str(path), "max_sequence_length": 16}}), family
        )
        for family, path in pipelines.items()
    }


def changed(settings: Config, folder: Path, name: str, **changes) -> Config:
    """The settings with these changes, in FOLDER/NAME.yaml, of a run that leaves FOLDER/NAME."""
    made = config.build(config.merge(settings.model_dump(), {"output_dir": str(folder / name), **changes}), name)
    (folder / f"{name}.yaml").write_text(config.dump(made))
    return made


@pytest.fixture(scope="module")
def networks(base, folder, request) -> dict[str, dict[str, torch.Tensor]]:
    """What is seen of each whole network, by one process."""
    found = {}
    for name, changes in asked(request, NETWORK_TESTS, NETWORKS).items():
        rollout = {"precision": "fp8" if name in COPIED else "model"}
        settings = changed(base[name.split("-")[0]], folder, name, model=changes, rollout=rollout)
        policy = sharding_worker.loaded(settings)
        policy.text_cache.fill([policy.negative_prompt, *PROMPTS])
        found[name] = sharding_worker.seen(policy)
    return found


@pytest.fixture(scope="module")
def runs(base, folder, request) -> dict[str, Path]:
    """Folders of runs of one process that has all of the base."""
    chosen = asked(request, RUN_TESTS, RUNS)
    for name, changes in chosen.items():
        model = {"shard_base": "blocks", **changes.get("model", {})}
        whole = changed(base[name.split("-")[0]], folder, f"{name}-1", **{**changes, "model": model})
        sharding_worker.train(whole, Distributed.start("cpu"))
        for other in (f"{name}-2", f"{name}-1-to-2", f"{name}-2-to-1"):
            changed(whole, folder, other)
        own = changed(whole, folder, f"{name}-2", data={**whole.data.model_dump(), "cache_dir": str(folder / "empty")})
        if name == "sd3":  # with the texts that the other has encoded
            changed(own, folder, "sd3-2-whole", model={**own.model.model_dump(), "shard_base": "none"})
    return {name: folder / f"{name}-1" for name in chosen}


def start(folder: Path, processes: int, networks: list[str], runs: dict[str, Path | None]) -> None:
    job = {"networks": networks, "runs": {name: path and str(path) for name, path in runs.items()}}
    (folder / "job.json").write_text(json.dumps(job))
    done = run_forked("tests.sharding_worker:main", [folder], processes=processes, environment=environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def by_two(networks, runs, folder, request) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What each of two processes has seen, by network."""
    fresh = {f"{name}-2": None for name in runs}
    going_on = {f"{name}-1-to-2": runs[name] / FIRST for name in GOING_ON if name in runs}
    if any(getattr(item, "originalname", "") == WHOLE_TEST for item in request.session.items):
        fresh["sd3-2-whole"] = None
    start(folder, 2, list(networks), {**fresh, **going_on})
    return {name: [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(2)] for name in networks}


@pytest.fixture(scope="module")
def by_four(networks, folder) -> dict[str, list[dict[str, torch.Tensor]]]:
    own, names = folder / "four", [name for name in BY_FOUR if name in networks]
    own.mkdir()
    for name in names:
        shutil.copy(folder / f"{name}.yaml", own)
    start(own, 4, names, {})
    return {name: [load_file(own / f"{name}.{rank}.safetensors") for rank in range(4)] for name in names}


def assert_the_bits_of_the_whole(expected: dict[str, torch.Tensor], by_process: list[dict[str, torch.Tensor]]) -> None:
    for found in by_process:
        assert found.keys() == expected.keys()
        assert not torch.equal(found["adapted"], found.get("merged", found["base"]))
        assert [name for name in expected if "held" not in name and not torch.equal(found[name], expected[name])] == []
    assert not torch.equal(expected["adapted"], expected["base"])


@pytest.mark.parametrize("name", some_weekly(NETWORKS, WEEKLY))
def test_every_process_has_the_bits_of_the_whole_network(name, networks, by_two):
    assert_the_bits_of_the_whole(networks[name], by_two[name])


@pytest.mark.weekly
@pytest.mark.parametrize("name", BY_FOUR)
def test_four_processes_have_the_bits_of_the_whole_network(name, networks, by_four):
    assert_the_bits_of_the_whole(networks[name], by_four[name])


@pytest.mark.parametrize("processes", ["by_two", pytest.param("by_four", marks=pytest.mark.weekly)])
@pytest.mark.parametrize("when", ["held", "held after the backward"])
def test_every_process_holds_its_share_alone(when, processes, networks, request):
    """Shares are of rows: a parameter of one row is on one process whole."""
    for name, by_process in request.getfixturevalue(processes).items():
        total, shares = int(networks[name][when]), [int(found[when]) for found in by_process]
        assert sum(shares) == total
        assert max(shares) < 1.1 * total / len(shares)


def counts(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each of two processes has `counted`."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", some_weekly(NETWORKS, WEEKLY))
def test_the_next_block_is_gathered_while_one_runs(name, networks, by_two, folder):
    """The network's own weights are the first gather; a block starts with its own done and the next one's begun."""
    for found in counts(folder, name):
        blocks = len(found["before"])
        assert found["before"] == [1 + min(number + 2, blocks) for number in range(blocks)]


@pytest.mark.parametrize("name", some_weekly(sorted(COPIED), WEEKLY))
def test_a_whole_copy_is_merged_block_by_block_and_gathers_nothing_to_sample(name, networks, by_two, folder):
    for rank, found in enumerate(counts(folder, name)):
        assert found["merged"] == 0
        share, total = int(by_two[name][rank]["held"]), int(networks[name]["held"])
        assert share < found["held"] < share + (total - share) / 2  # four blocks, of which one is here


@pytest.mark.parametrize("name", some_weekly(NETWORKS, WEEKLY))
def test_an_export_of_adapters_gathers_nothing(name, networks, by_two, folder):
    """They lie whole on every process: process 0 writes them alone, in each format."""
    kinds = {"pytorch_lora_weights", *({"kohya"} if name == "sd3" else ())}
    for rank, found in enumerate(counts(folder, name)):
        assert found["export"] == {"issued": [], "held": 0}
        assert {file.stem for file in (folder / f"{name}.{rank}.export").iterdir()} == kinds


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def rounded_alike(
    found: Path,
    expected: Path,
    *,
    from_iteration: int = 0,
    weights: Callable[[Path], dict[str, torch.Tensor]] = lora,
    merged: bool = True,
    e4m3: bool = False,
) -> None:
    """Metrics and weights of two runs differ by the order of their sums alone, and none drifts; `merged` False: the
    first has no merged weights, whose error the second measures. `e4m3`: from the second iteration on, adapters that
    differ in a last place round single activations to the next number, a sixteenth away."""
    ours, theirs = metrics(found), metrics(expected)[from_iteration:]
    assert len(ours) == len(theirs)
    for iteration, (one, both) in enumerate(zip(theirs, ours, strict=True), from_iteration):
        if "log_prob_mismatch_max" in one:
            assert both["log_prob_mismatch_max"] == one["log_prob_mismatch_max"] == 0
        names = [n for n in one if "second" not in n and not n.endswith(("flags", "dark_share", "edge_density"))]
        if not merged:
            assert "monitor_merge_error" not in both
            names.remove("monitor_merge_error")
        allowed = {"abs": 1e-4, "rel": 1e-3} if e4m3 and iteration else {"abs": 1e-6, "rel": 1e-5}
        assert {n: both[n] for n in names} == pytest.approx({n: one[n] for n in names}, **allowed)
        assert one["grad_norm"] > 0
    own, others = weights(found), weights(expected)
    assert own.keys() == others.keys()
    # Adam makes a whole step of a gradient that is rounding alone, as a few are: MKL's sums follow buffers' alignment.
    alike = torch.cat([torch.isclose(own[n], t, rtol=1e-4, atol=1e-6).flatten() for n, t in others.items()])
    assert alike.float().mean() > 0.999
    assert max((own[n] - t).abs().max() for n, t in others.items()) < 1e-5


@pytest.mark.parametrize("name", some_weekly(RUNS, {"flux", "flux-fp8", "large-fp8"}))
def test_a_run_of_two_processes_has_the_losses_of_one(name, runs, by_two, folder):
    rounded_alike(folder / f"{name}-2", runs[name], e4m3=name.endswith("fp8"))


def test_a_run_in_parts_has_the_bits_of_one_whose_processes_have_all_of_the_base(by_two, folder):
    ours, theirs = (
        [{name: value for name, value in row.items() if "second" not in name} for row in metrics(folder / run)]
        for run in ("sd3-2", "sd3-2-whole")
    )
    assert ours == theirs
    assert ours[-1]["grad_norm"] > 0
    own, whole = lora(folder / "sd3-2"), lora(folder / "sd3-2-whole")
    assert own.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(own[name], whole[name])] == []


def test_two_processes_go_on_with_what_one_began(runs, by_two, folder):
    for name in GOING_ON:
        if name in runs:
            rounded_alike(folder / f"{name}-1-to-2", runs[name], from_iteration=1, e4m3=name.endswith("fp8"))


def test_one_process_goes_on_with_what_two_began(runs, by_two, folder):
    """Its share is all of the base."""
    settings = config.load(file=folder / "sd3-2-to-1.yaml")
    sharding_worker.train(settings, Distributed.start("cpu"), str(folder / "sd3-2" / FIRST))
    rounded_alike(folder / "sd3-2-to-1", runs["sd3"], from_iteration=1)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_all_processes_run_the_forward_of_which_one_counts(name, base, folder, monkeypatch):
    """The first micro-batch of another process has as many forwards as that of image 0, whose KL is measured."""
    rollout, data = {"initial_noise": "per_image"}, {"held_out_prompts": ""}
    settings = changed(base["sd3"], folder, name, update={"objective": name}, rollout=rollout, data=data)
    made = Run(settings, Distributed.start("cpu"), console=Console(quiet=True))
    objective, calls = made.trainer.objective, []
    table = objective.table(0)
    drawn, values = objective.rollout(table, 0).micro_batches, torch.ones(objective.settings.images)
    predict = objective.policy.predict
    monkeypatch.setattr(objective.policy, "predict", lambda *given: calls.append(given) or predict(*given))

    def counted(micro_batch) -> tuple[int, float]:
        """Forwards, and pairs of the KL."""
        calls.clear()
        own = [micro_batch if name == "nft" else (micro_batch, None)]
        sums = objective.accumulate(own, values, table, 0, total=2, watch_kl=True)
        return len(calls), sums[-1].item()

    (alone, _), (together, counts) = counted(drawn[1]), counted(drawn[0])
    assert (together, counts) == (alone + 1, 2)
    objective.together = True
    assert (counted(drawn[1]), counted(drawn[0])) == ((together, 0), (together, 2))
