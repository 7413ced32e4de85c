"""bench/scaling.py against what runs issue, and its page against what it prints.

Planted bugs that turn it red: a sum of the LoRA's gradient an iteration instead of one a minibatch; rows of the mean
process instead of the busiest one's; three columns of statistics; a latency that does not grow with the processes; an
Ethernet divided by a machine's GPUs; attention counted among the other products.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.plan.estimate import Estimate
from advgrpo.plan.known_models import known_pipeline
from advgrpo.plan.work import efficiency
from advgrpo.policy.adapters import stored_network
from bench import scaling
from tests import flux_models, qwen_models
from tests.conftest import make_unit_config
from tests.faults.job import environment
from tests.unit_size import UNIT
from tests.zygote import run

STRUCTURE = Path(__file__).parents[1] / "golden" / "structure.json"
CI = [(2, 2, "none"), (2, 1, "blocks")]
WEEKLY = [(2, 1, "none"), (3, 1, "none"), (4, 2, "none"), (2, 2, "blocks"), (4, 2, "blocks")]
WAYS = [*CI, *(pytest.param(*each, marks=pytest.mark.weekly) for each in WEEKLY)]


@pytest.mark.parametrize(("processes", "members", "base"), WAYS)
@pytest.mark.in_ci(1)
def test_a_run_issues_the_collectives_that_are_counted(
    processes, members, base, unit_pipeline, unit_backbone, tmp_path
):
    """Of processes alone, and of sequence groups, with tokens that are no equal shares; of blocks in parts, by
    diffusers' forward, and by ours in sequence groups."""
    plain, text = make_unit_config(unit_pipeline, unit_backbone, tmp_path), UNIT.clip_tokens + UNIT.t5_tokens
    assert_collectives(plain, text, processes, members, base, tmp_path)


@pytest.mark.weekly
@pytest.mark.parametrize(("processes", "members", "base"), [(2, 1, "none"), (2, 1, "blocks"), (2, 2, "none")])
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_run_of_another_family_issues_the_collectives_that_are_counted(
    family, processes, members, base, unit_backbone, tmp_path
):
    """FLUX.1's blocks of two streams and of one, Qwen-Image's text with a mask; small, by the run's own classes."""
    save = {"flux": flux_models.save_pipeline, "qwen": qwen_models.save_pipeline}[family]
    plain = make_unit_config(str(save(tmp_path / "pipeline")), unit_backbone, tmp_path)
    assert_collectives(plain, scaling.text_tokens(plain), processes, members, base, tmp_path)


def assert_collectives(plain: Config, text: int, processes: int, members: int, base: str, tmp_path: Path) -> None:
    """A training with these settings and so many text tokens issues what is counted, on every process in its second
    iteration."""
    changes = {
        "iterations": 2,
        "data": {"held_out_prompts": ""},
        "model": {"sequence_parallel": members, "shard_base": base, "gradient_checkpointing": base == "blocks"},
        "rollout": {"micro_batch": 1, "group_size": 2, "num_steps": 3, "guidance_scale": 1.0},
        "adversary": {"schedule": "always", "replay_capacity": 0, "batch_size": 4},
        "evaluation": {"metrics": ["dino_similarity"], "grid_prompts": 1},
    }
    settings = configuration.build(configuration.merge(plain.model_dump(), changes), "test")
    file = tmp_path / "settings.yaml"
    file.write_text(configuration.dump(settings))
    how = {"environment": environment(), "processes": processes, "merged": True}
    done = run("tests.collectives_worker:run", [str(tmp_path), "--config", str(file)], **how)
    assert done.returncode == 0, done.stdout
    lora = sum(p.numel() for p in _tensors(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"))
    hidden, width = settings.adversary.hidden_size, 64
    sizes = scaling.Sizes(4 * lora, 4 * (width * hidden + 2 * hidden + 1), 4 * width)
    counted = list(scaling.collectives(settings, processes, sizes, settings.adversary.updates_per_iteration))
    for rank in range(processes):
        by_iteration = json.loads((tmp_path / f"{rank}.json").read_text())
        issued = [each for each in by_iteration["1"] if each[0] not in ("all_to_all", "block")]
        assert [kind for kind, _ in issued] == [each.kind for each in counted]
        wrong = [
            (each, size)
            for each, (_, size) in zip(counted, issued)
            if size != each.bytes and not each.what.startswith("JSON")
        ]
        assert wrong == []
        together = Counter(size for kind, size in by_iteration["1"] if kind == "all_to_all")
        assert together == _exchanged(settings, text, processes, rank)
        assert Counter(size for kind, size in by_iteration["1"] if kind == "block") == _gathered(settings, processes)


def _gathered(settings: Config, processes: int) -> Counter[int]:
    """How many gathers of so many bytes every process is counted to issue in an iteration."""
    found = Counter()
    if settings.model.shard_base == "blocks":
        each = scaling.gathers(scaling.units_in_parts(settings, stored_network(Path(settings.model.path))), processes)
        for counted in scaling.gathered(settings, processes, each, measures_kl=True):
            found[counted.bytes] += counted.times
    return found


def _exchanged(settings: Config, text: int, processes: int, rank: int) -> Counter[int]:
    """How many exchanges of so many bytes a process is counted to issue in an iteration."""
    members, found = settings.model.sequence_parallel, Counter()
    if members > 1:
        stock = stored_network(Path(settings.model.path))
        side = settings.model.resolution // known_pipeline(settings.model.path).decoder.scale
        each = scaling.exchanges(settings, stock, side, text, members, rank=rank % members)
        measures_kl = rank < members or settings.model.shard_base == "blocks"
        for counted in scaling.exchanged(settings, processes, each, measures_kl=measures_kl):
            found[counted.bytes] += counted.times
    return found


def _tensors(file: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(file).values())


@pytest.mark.parametrize("preset", scaling.PRESETS)
def test_a_row_has_as_many_text_tokens_as_the_plan_gives_it(preset):
    """128 of T5 and CLIP's 77, T5's 128, Qwen2.5-VL's 128: the presets', not the families' most."""
    config = Config.load(preset)
    assert scaling.text_tokens(config) == Estimate(config, 8).shape.text_tokens
    assert scaling.text_tokens(config) == {"sd35m-dino-paper": 205}.get(preset, 128)


def test_a_sum_over_more_gpus_costs_more_and_one_gpu_nothing():
    links, each = scaling.Links(), scaling.Collective("all_reduce", "", 75_000_000)
    seconds = [links.seconds(each, gpus) for gpus in (1, 2, 8, 16, 1024)]
    assert seconds[0] == 0
    assert seconds == sorted(set(seconds))
    assert seconds[3] > 5 * seconds[2], "machines are further apart than GPUs of one"


def test_a_ring_has_all_of_a_machines_ethernet():
    """It enters and leaves each machine once, so no GPU shares that link: 10 Gbit/s are 1.25 GB/s."""
    assert 0.75e9 < scaling.ETHERNET.bandwidth(64) <= 1.25e9


def test_efficiency_is_that_of_the_shares_where_talk_is_free():
    free = scaling.Links(local_gb_s=1e9, remote_gb_s=1e9, latency_us=0.0)
    preset = "sd35m-dino-paper"
    one = scaling.predict(preset, 1, free)
    for gpus, most in ((8, 96), (64, 16), (1024, 8)):
        cost = scaling.predict(preset, gpus, free)
        assert cost.images == most
        assert cost.efficiency(one) == pytest.approx(efficiency(Config.load(preset), gpus), abs=0.02)


@pytest.mark.weekly
def test_the_page_says_how_near_the_assumed_traffic_is_to_what_is_counted():
    """tests/golden/structure.json: 8 images of each, of 512 pixels and 128 text tokens."""
    counted, said = json.loads(STRUCTURE.read_text()), []
    for preset, kind in (("flux1-dino", "flux1-dev"), ("qwen-image-dino", "qwen-image")):
        family = scaling.family_of(preset)
        assumed = {"merged": family.merged, "adapted": family.adapted, "train": family.trained}
        shares = [8 * work.bytes / counted[kind][name]["elementwise_bytes"] for name, work in assumed.items()]
        said.append(f"{min(shares):.2f} to {max(shares):.2f} of")
        for name, work in assumed.items():  # with what is of a prompt, which our forward computes once
            assert 1 < 8 * work.flops / counted[kind][name]["flops"] < 1.01
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert f"which is {said[0]} what is" in page, said
    assert f"of FLUX.1 and {said[1]} Qwen-Image" in page, said


@pytest.mark.weekly
def test_sequence_groups_of_the_first_preset_are_predicted_too():
    """The page has Qwen-Image's."""
    alone, pairs = (scaling.predict("sd35m-dino-paper", 8, members=members) for members in (1, 2))
    assert pairs.messages > alone.messages
    assert pairs.seconds > alone.seconds


@pytest.mark.weekly
def test_an_image_of_another_size_is_other_work():
    """Of half as much again to a side, which is 2.25 times the tokens and pixels."""
    plain, larger = (scaling.family_of("flux1-dino", side) for side in (512, 768))
    assert larger.decode == 2.25 * plain.decode
    assert 1.8 < larger.merged.flops / plain.merged.flops < 2.25, "the text has no more tokens"


@pytest.mark.weekly
def test_the_page_has_what_the_model_prints():
    below = scaling.PAGE.read_text(encoding="utf-8").split(scaling.MARK)[1]
    assert below.strip() == "\n".join(scaling.lines()).strip()
