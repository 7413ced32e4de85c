"""The tables of docs/families.md, and what presets say of cards, against what the plan says."""

import copy
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.plan import known_models
from advgrpo.plan.estimate import Estimate
from advgrpo.plan.memory import plan, plan_as_configured
from advgrpo.policy.adapters import block_names
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from tests.plan.counting import MEDIUM, QWEN, one_of

ROOT = Path(__file__).parents[2]
SIZES, BASES, KLEIN = (24, 40, 48, 80, 141), ("model", "fp8"), "black-forest-labs/FLUX.2-klein-base-4B"
FAMILIES = {
    "SD3.5-medium": ("sd35m-dino-paper", MEDIUM),
    "SD3.5-large": ("sd35m-dino-paper", "stabilityai/stable-diffusion-3.5-large"),
    "FLUX.1-dev": ("flux1-dino", "black-forest-labs/FLUX.1-dev"),
    "Qwen-Image": ("qwen-image-dino", "Qwen/Qwen-Image"),
}


def least_gb(
    preset: str,
    path: str,
    way: str,
    processes: int,
    train: str = "lora",
    precision: str = "model",
    sampled: str = "model",
) -> float:
    config = configuration.load(preset)
    config.rollout.precision = sampled
    config.model.base_precision = precision
    config.model.path, config.model.shard_base, config.model.train = path, way, train
    if train == "full":
        config.model.dtype = "float32"
    return min(each.peak_gb for each in Estimate(config, processes).plans(math.inf))


@pytest.mark.weekly
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32, 64])
def test_the_documents_say_what_fits(processes):
    page = (ROOT / "docs" / "families.md").read_text()
    assert "| model | GPUs | whole | in parts | in parts, FP8 | " + " | ".join(f"{size} GB" for size in SIZES) in page
    for name, settings in {**FAMILIES, "FLUX.2 klein": ("flux2-dino", KLEIN)}.items():
        ways = {"whole": least_gb(*settings, "none", processes)}
        if name in FAMILIES:  # FLUX.2's base is not shared out
            in_parts = {precision: least_gb(*settings, "blocks", processes, precision=precision) for precision in BASES}
            ways |= {} if processes == 1 else {"in parts": in_parts["model"]}
            ways |= {"FP8": in_parts["fp8"]}
        cells = [next((way for way, gb in ways.items() if gb <= size), "–") for size in SIZES]
        least = [f"{ways[way]:.0f} GB" if way in ways else "" for way in ("whole", "in parts", "FP8")]
        line = "| " + " | ".join([name, str(processes), *least, *cells]) + " |"
        assert line in page, line


@pytest.mark.weekly
def test_the_families_tables_and_the_presets_say_what_the_command_says():
    """Of one GPU where they say no more; a preset's file names the smallest card that 8 of are enough."""
    page = (ROOT / "docs" / "families.md").read_text()
    said = re.findall(r"`python -m advgrpo\.plan --preset (\S+)` says at least (\d+) GB", page)
    assert {preset.split("-")[0] for preset, _ in said} == {"flux1", "flux2", "qwen"}
    for preset, gb in said:
        refused = plan(configuration.load(preset), 10)
        assert f"at least {refused.peak_gb:.1f} GB" in refused.line()
        assert f"{refused.peak_gb:.0f}" == gb, preset
    assert "21 GB on each of 8 GPUs" in page
    assert plan_as_configured(configuration.load("flux2-dino"), 24, processes=8).peak_gb == pytest.approx(21, abs=0.5)
    cards, named = (24, 40, 48, 80, 96, 141), 0
    for preset in configuration.preset_names():
        comment = re.sub(r"\s*\n#\s*", " ", (ROOT / "advgrpo" / "presets" / f"{preset}.yaml").read_text())
        for card in map(int, re.findall(r"(\d+) GB by (?:its|the plan's) estimate", comment)):
            assert plan(configuration.load(preset), card, processes=8).fits, preset
            assert not plan(configuration.load(preset), cards[cards.index(card) - 1], processes=8).fits, preset
            named += 1
    assert named == 4


@pytest.mark.weekly
def test_the_documents_say_what_a_whole_copy_takes():
    page = (ROOT / "docs" / "families.md").read_text()
    assert "| model | the copy | in parts | with the copy | in parts, FP8 | with the copy |" in page
    for name, (preset, path) in FAMILIES.items():
        config = known_models.known_pipeline(path).transformer
        cells = [known_models.count_share(config, 1, torch.bfloat16, fp8=True).held / 1e9]
        for base, sampled in itertools.product(("model", "fp8"), repeat=2):
            cells.append(least_gb(preset, path, "blocks", 8, precision=base, sampled=sampled))
        line = f"| {name} | {cells[0]:.1f} GB | " + " | ".join(f"{gb:.0f} GB" for gb in cells[1:]) + " |"
        assert line in page, line


@pytest.mark.weekly
def test_the_documents_say_where_every_weight_can_be_trained():
    counts = (1, 8, 16, 64)
    heads = " | ".join(f"{count} GPU{'s' * (count > 1)}" for count in counts)
    lines = [f"| model | {heads} |", "|---|" + "---|" * len(counts)]
    for name, settings in FAMILIES.items():
        ways = {count: "none" if count == 1 else "blocks" for count in counts}
        least = [least_gb(*settings, way, count, "full") for count, way in ways.items()]
        lines.append(f"| {name} | " + " | ".join(f"{gb:.0f} GB" for gb in least) + " |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text


def sent(processes: int) -> tuple[float, int]:
    """(GB that a process sends to others, messages) in a forward of one row of Qwen-Image of 1024 pixels."""
    group, messages = one_of(processes), []
    group.exchange = lambda x, found, given, taken: messages.append(x.nbytes * (sum(given) - given[0]) // sum(given))
    config = known_models.known_pipeline("Qwen/Qwen-Image").transformer
    stock = known_models._meta_transformer(json.dumps(config, sort_keys=True))
    tensors = {name: p.detach().bfloat16() for name, p in stock.named_parameters()}
    ours = FusedTransformer(TransformerConfig.from_stock(stock.config), tensors, attention="math", sequence=group)
    text, none = (torch.empty(1, *shape, dtype=torch.bfloat16, device="meta") for shape in ((128, 3584), (0,)))
    mask = torch.ones(1, 128, dtype=torch.bool, device="meta")
    prepared = ours.prepare(text, none, torch.empty(1, device="meta"), mask=mask)
    step, latents = torch.zeros(1, dtype=torch.int64, device="meta"), text.new_empty(1, 16, 128, 128)
    with torch.no_grad():
        ours.predict(latents, step, prepared, "base")
    return sum(messages) / 1e9, len(messages)


@pytest.mark.weekly
def test_the_documents_say_what_tokens_shared_out_need_and_cost():
    config, lines = configuration.load("qwen-image-dino"), []
    config.model.resolution, config.rollout.micro_batch = 1024, 1
    for members in (1, 2, 4, 8):
        config.model.sequence_parallel = members
        plain, recomputed = (each.phase_gb("update") for each in Estimate(config, 8).plans(math.inf))
        gb, messages = sent(members) if members > 1 else (0.0, 0)
        lines.append(f"| {members} | {plain:.0f} GB | {recomputed:.0f} GB | {gb:.2f} GB in {messages} |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text


def received(fused: bool) -> float:
    """GB that a process of 8 gets of Qwen-Image's blocks in a forward."""
    stock = copy.deepcopy(known_models.meta_transformer(known_models.known_pipeline(QWEN).transformer))
    stock, blocks = torch.nn.Module.to(stock, torch.bfloat16), len(block_names(stock))
    units = known_models.fused_units(stock)[:blocks] if fused else known_models.stock_units(stock, fp8=False)[0]
    return 7 * sum(known_models.share_bytes(parameter, 8) for unit in units for parameter in unit) / 1e9


@pytest.mark.weekly
def test_the_documents_say_what_sequence_groups_with_blocks_in_parts_need():
    config, lines = configuration.load("qwen-image-dino"), []
    config.model.resolution, config.rollout.micro_batch, config.model.shard_base = 1024, 1, "blocks"
    for members in (1, 2, 4, 8):
        config.model.sequence_parallel = members
        plain, recomputed = (each.phase_gb("update") for each in Estimate(config, 8).plans(math.inf))
        moved = received(fused=members > 1)
        lines.append(f"| {members} | {plain:.0f} GB | {recomputed:.0f} GB | {moved:.1f} GB |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text
