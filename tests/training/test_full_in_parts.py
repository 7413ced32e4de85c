"""Every weight trained, in parts on several processes: the bits of the whole network, its runs, and going on with them.

Bugs planted in a copy, each seen red: a mean of the gradients instead of their sum, a norm of this process's rows,
weights that stay where the base's should be, an export of one process's rows, one that gathers each parameter twice,
all processes that keep what is gathered, averages gathered beside the weights.

CI has the network alone; whole runs, of seconds on each of three processes, are weekly.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.config import Config
from advgrpo.policy.adapters import stored_network
from advgrpo.runtime import checkpoint as checkpoints
from advgrpo.runtime.distributed import Distributed
from tests import sharding_worker
from tests.conftest import make_unit_config
from tests.families import PROMPTS, metrics
from tests.training.test_sharding import FIRST, assert_the_bits_of_the_whole, changed, rounded_alike, start

pytestmark = pytest.mark.slow
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
RUNS = {"kl": {}}
WEEKLY = {
    "ema": {"update": {"kl_to": "ema", "kl_weight": 0.1}},
    "nft": {"update": {"objective": "nft", "kl_weight": 0.1}, "rollout": {"initial_noise": "per_image"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def base(unit_pipeline, unit_backbone, folder) -> Config:
    settings = make_unit_config(unit_pipeline, unit_backbone, folder).model_dump()
    changes = {
        "fast": False,
        "model": {"train": "full", "shard_base": "blocks"},
        "data": {"held_out_prompts": ""},
        "rollout": {"micro_batch": 2, "num_steps": 3},
        "update": {"minibatches": 1, "kl_weight": 0.1, "max_grad_norm": 0.01},
        "output": {"checkpoint_every": 1, "keep_checkpoints": 9},
    }
    return config.build(config.merge(settings, changes), "full")


@pytest.fixture(scope="module")
def whole(base, folder) -> dict[str, torch.Tensor]:
    """What is seen of the whole network, by one process."""
    policy = sharding_worker.loaded(changed(base, folder, "network"))
    policy.text_cache.fill([policy.negative_prompt, *PROMPTS])
    return sharding_worker.seen(policy)


def alone(base: Config, folder: Path, runs: dict[str, dict]) -> None:
    """Runs of one process, and the settings of those of others."""
    for name, changes in runs.items():
        settings = changed(base, folder, f"{name}-1", **changes)
        sharding_worker.train(settings, Distributed.start("cpu"))
        for other in ("2", "1-to-2", "2-to-1", "2-stopped", "4"):
            changed(settings, folder, f"{name}-{other}")


@pytest.fixture(scope="module")
def by_two(base, whole, folder) -> list[dict[str, torch.Tensor]]:
    """What each of two processes has seen."""
    start(folder, 2, ["network"], {})
    return [load_file(folder / f"network.{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def runs(base, whole, folder) -> None:
    """Of one process and of two."""
    alone(base, folder, RUNS)
    start(folder, 2, [], {"kl-2": None})


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TRANSFORMER)


alike = partial(rounded_alike, weights=exported)


def test_every_process_has_the_bits_of_the_whole_network(whole, by_two):
    """Also the gradient's, the sum over processes of what each computes alike; but the time's embedding has a sum over
    blocks, which FSDP2 makes in another order."""
    assert torch.equal(whole["base"], whole["base, before the backward"])
    names = [name for name in whole if name.startswith("time_text_embed.")]
    for found in by_two:
        for name in names:
            assert torch.allclose(found[name], whole[name], rtol=1e-5, atol=1e-6 * whole[name].abs().max().item())
    expected, *others = [{n: t for n, t in seen.items() if n not in names} for seen in (whole, *by_two)]
    assert_the_bits_of_the_whole(expected, others)


@pytest.mark.parametrize("when", ["held", "held after the backward"])
def test_every_process_holds_its_share_alone(when, whole, by_two):
    shares = [int(found[when]) for found in by_two]
    assert sum(shares) == int(whole[when])
    assert max(shares) < 1.1 * sum(shares) / 2


def parameters(base: Config) -> dict[str, torch.Size]:
    """Shapes of the whole network's, by name, in its order."""
    return {name: each.shape for name, each in stored_network(Path(base.model.path)).named_parameters()}


def assert_gathered_once(base: Config, found: list[dict]) -> None:
    """What each of two processes has noted of an export (`counted_export`), against the model's own parameters: of each
    a collective of the counts of its rows, and one of the rows, as many from both; nothing else. Process 0 has all
    in the end, the other never more than the one that comes and the one before."""
    shapes, expected, header, float32 = parameters(base), [], 2 * 8, 4
    for shape in shapes.values():
        rows = math.ceil(shape[0] / 2) * shape[1:].numel() * float32
        expected += [[2 * header, header], [2 * rows, rows]]
    for each in found:
        assert {operator for operator, _ in each["issued"]} == {"c10d._allgather_base_.default"}
        assert [sizes for _, sizes in each["issued"]] == expected
    sizes = sorted(shape.numel() * float32 for shape in shapes.values())
    assert found[0]["held"] == sum(sizes)
    assert found[1]["held"] <= sum(sizes[-2:]) < sum(sizes) / 4


def test_an_export_gathers_each_parameter_once_and_process_0_alone_keeps_it(base, by_two, folder):
    assert_gathered_once(base, [json.loads((folder / f"network.{rank}.json").read_text())["export"] for rank in (0, 1)])
    assert load_file(folder / "network.0.export" / Path(TRANSFORMER).name).keys() >= parameters(base).keys()
    assert not (folder / "network.1.export").exists()


@pytest.mark.weekly
def test_a_run_exports_its_averages_without_gathering_the_weights(base, runs, folder):
    """Once, in its end."""
    exports = [json.loads((folder / f"kl-2.{rank}.exports.json").read_text()) for rank in (0, 1)]
    assert [len(each) for each in exports] == [1, 1]
    assert_gathered_once(base, [each[0] for each in exports])


@pytest.mark.weekly
def test_a_run_of_two_processes_has_the_losses_of_one(runs, folder):
    alike(folder / "kl-2", folder / "kl-1")
    assert metrics(folder / "kl-1")[1]["kl"] > 0
    assert metrics(folder / "kl-1")[0]["grad_norm"] > 0.01  # it is clipped


@pytest.mark.weekly  # who reads which rows is tested in tests/runtime/test_checkpoint_parts.py
def test_two_processes_go_on_with_what_one_began(runs, folder):
    start(folder, 2, [], {"kl-1-to-2": folder / "kl-1" / FIRST})
    alike(folder / "kl-1-to-2", folder / "kl-1", from_iteration=1)


@pytest.mark.weekly
def test_one_process_goes_on_with_what_two_began(runs, folder):
    settings = config.load(file=folder / "kl-2-to-1.yaml")
    sharding_worker.train(settings, Distributed.start("cpu"), str(folder / "kl-2" / FIRST))
    alike(folder / "kl-2-to-1", folder / "kl-1", from_iteration=1)


@pytest.mark.weekly
def test_two_processes_that_stopped_go_on_with_the_same_bits(runs, folder):
    """Asked to stop in their first iteration, they ended, and exported, together after it."""
    start(folder, 2, [], {"kl-2-stopped": None})
    assert (folder / "kl-2-stopped" / TRANSFORMER).exists()
    start(folder, 2, [], {"kl-2-stopped": folder / "kl-2-stopped" / FIRST})
    stopped, never = folder / "kl-2-stopped", folder / "kl-2"
    assert [row["iteration"] for row in metrics(stopped)] == [0, 1]
    assert {n: t.tolist() for n, t in exported(stopped).items()} == {n: t.tolist() for n, t in exported(never).items()}
    (ours, _), (theirs, _) = (
        checkpoints.load_checkpoint(run / "checkpoints/iteration-000002") for run in (stopped, never)
    )
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.weekly
def test_a_checkpoint_of_two_is_as_large_on_each(runs, folder):
    """And what is not in parts is in one place."""
    saved = folder / "kl-2" / FIRST
    parts = sorted(saved.glob("shard-*"))
    sizes = [file.stat().st_size for file in parts]
    assert len(parts) == 2
    assert max(sizes) < 1.1 * min(sizes)
    assert not [name for name in load_file(saved / "tensors.safetensors") if name.startswith(("policy.", "ema."))]
    assert not list((folder / "kl-1" / FIRST).glob("shard-*"))


@pytest.mark.weekly
def test_stock_diffusers_loads_the_export(runs, folder):
    network = SD3Transformer2DModel.from_pretrained(folder / "kl-2" / "transformer")
    assert (
        json.loads((folder / "kl-2" / "transformer/config.json").read_text())["_class_name"] == type(network).__name__
    )
    averages, _ = checkpoints.load_checkpoint(folder / "kl-2" / "checkpoints/iteration-000002")
    assert all(torch.equal(weight, averages[f"ema.{name}"]) for name, weight in network.named_parameters())


@pytest.mark.weekly
def test_other_objectives_and_targets_and_four_processes(base, runs, folder):
    alone(base, folder, WEEKLY)
    start(folder, 2, [], {f"{name}-2": None for name in WEEKLY})
    start(folder, 4, [], {"kl-4": None})
    for name in WEEKLY:
        alike(folder / f"{name}-2", folder / f"{name}-1")
    alike(folder / "kl-4", folder / "kl-1")
