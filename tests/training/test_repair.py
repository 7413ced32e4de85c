"""Repair: a run that starts from a trained LoRA and goes on from exactly there.

Bugs planted in a copy, each seen red: the base evaluated as start; start forgotten over a resume; an average that
starts at zero; the LoRA not loaded; a start in a run that has none; no check of ranks and targets.
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

LORA_FILE = "pytorch_lora_weights.safetensors"


def build(settings, *, resume=False) -> Run:
    return Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))


def change(base, **changes):
    return config.build(config.merge(base.model_dump(), changes), "test")


@pytest.fixture
def hacked(unit_config, tmp_path) -> Path:
    """A LoRA folder whose weights change images visibly."""
    made = build(change(unit_config, output_dir=str(tmp_path / "hacked")))
    with torch.no_grad():
        for _, parameter in made.trainer.policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    made.trainer.policy.export(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def settings(unit_config, hacked):
    return change(
        unit_config,
        model={"lora": {"start_from": str(hacked)}},
        update={"kl_weight": 0.01},
        evaluation={"grid_prompts": 1},
    )


@pytest.mark.parametrize("fast", [True, False])
def test_policy_and_average_start_at_the_lora_and_the_base_does_not(settings, hacked, tmp_path, fast):
    made = build(change(settings, fast=fast))
    saved = load_file(hacked / LORA_FILE)
    for weights in ("trained", "average"):
        made.trainer.policy.export(tmp_path / weights) if weights == "trained" else made.export()
        folder = tmp_path / weights if weights == "trained" else Path(settings.output_dir) / "lora"
        found = load_file(folder / LORA_FILE)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    fresh = build(change(settings, fast=fast, model={"lora": {"start_from": ""}}, output_dir=str(tmp_path / "fresh")))
    own, other = (run.evaluator.base().grid_images() for run in (made, fresh))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(own, other))
    assert (made.evaluator.grid_images()[0][1] - own[0][1]).abs().max() > 0.01


def test_summary_tells_base_start_and_final_apart_also_after_a_stop(settings, tmp_path):
    whole = change(settings, iterations=2, output_dir=str(tmp_path / "whole"))
    first = build(whole)
    first.train()
    assert first.base != first.start
    part = change(settings, iterations=1)
    build(part).train()
    resumed = build(change(part, iterations=2), resume=True)
    assert resumed.start == first.start  # of the LoRA, not of the checkpoint
    resumed.train()
    summaries = [json.loads((folder / "summary.json").read_text())
                 for folder in (tmp_path / "whole", Path(part.output_dir))]  # fmt: skip
    for name in ("base", "start", "final"):
        assert summaries[0][name] == summaries[1][name]
    assert summaries[0]["base"] != summaries[0]["start"]
    ours, theirs = (load_file(Path(folder) / "lora" / LORA_FILE) for folder in (part.output_dir, whole.output_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] > 1e-8  # to the base, which the start is far from already
    assert rows[0]["log_prob_mismatch_max"] == 0


def test_a_run_from_nothing_has_no_start(unit_config):
    made = build(change(unit_config, iterations=1))
    made.train()
    assert made.start == {}
    assert "start" not in json.loads((Path(unit_config.output_dir) / "summary.json").read_text())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "rank"),
        ({"targets": ["attn.to_q"]}, "attn"),
        ({"blocks": 1}, "transformer_blocks"),
    ],
)
def test_a_lora_of_another_kind_is_refused_before_work_starts(settings, lora, message, fast):
    with pytest.raises(UserError, match=message):
        build(change(settings, fast=fast, model={"lora": lora}))
    assert not (Path(settings.output_dir) / "metrics.jsonl").exists()


def test_a_folder_without_a_lora_is_named(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.lora\.start_from"):
        build(change(settings, model={"lora": {"start_from": str(tmp_path / "empty")}}))


def test_the_preset_is_the_dino_run(tmp_path):
    repair, tiny = config.load("tiny-repair"), config.load("tiny")
    assert change(repair, output_dir="x") == change(tiny, output_dir="x")
