"""What an iteration should cost on 1 to 1,024 GPUs: `python -m bench.scaling`. Predicted; nothing here was measured on
a cluster.

Work is counted: FLOPs of a forward on meta tensors, bytes and number of every collective (`collectives`, `exchanges` of
processes that compute an image together, `gathers` of a base in parts; tests/bench/test_scaling.py compares all of them
with those that runs of two to four processes issue), micro-batches of the busiest process. Machine constants are those
of bench/model.py; the links' are `Links`, assumptions with their reasons.

Not in it: waiting for a slower machine, disks, evaluation, checkpoints, the host between launches, and whatever
overlaps: communication is added to the work. Elementwise traffic of FLUX.1 and Qwen-Image is SD3.5-medium's per token,
width and block; how near that is to their own, which is counted for some shapes, docs/scaling.md says.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from advgrpo.config import Config
from advgrpo.plan.known_models import (
    fused_units,
    known_pipeline,
    meta_transformer,
    outside_of,
    share_bytes,
    stock_units,
)
from advgrpo.policy.adapters import block_names, target_modules
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from bench.counters import on_gpu
from bench.model import (
    ADAPTED,
    BACKBONE,
    CONVOLUTION,
    FEATURES,
    H200,
    IMAGE,
    JOINT,
    LAYERS,
    MERGED,
    ROWS,
    TRAINED,
    WIDTH,
    Model,
    Work,
)

GPUS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SOME_GPUS, MEMBERS = (8, 64, 256, 1024), (1, 2, 4, 8)
PRESETS = ("sd35m-dino-paper", "flux1-dino", "qwen-image-dino")
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
FIGURE = PAGE.with_name("figures") / "scaling.png"
GOOD = 0.9
MARK = "<!-- python -m bench.scaling --write -->"
DINO_WIDTH = 1024  # DINOv2-large: 24 blocks
LARGE = 24 * DINO_WIDTH**2 / (12 * 768**2)  # over ViT-B, of which bench/model.py has FEATURES
HEAD_UPDATE = 0.5e-3  # seconds of one update of the discriminator's head; assumed


@dataclass(frozen=True)
class Links:
    """How fast GPUs talk: NCCL's rings within a machine of `local` GPUs and between machines."""

    local: int = 8
    local_gb_s: float = 360.0  # NVLink 4: 450 GB/s a direction, 80 % of it in rings
    remote_gb_s: float = 40.0  # 400 Gbit/s of InfiniBand for each GPU, 80 % of it
    latency_us: float = 8.0  # of a step of a ring or tree, launch included

    def bandwidth(self, processes: int) -> float:
        """Bytes per second of a ring's slowest link."""
        return (self.local_gb_s if processes <= self.local else self.remote_gb_s) * 1e9

    def seconds(self, each: Collective, processes: int) -> float:
        """A ring for an all-gather, a tree's latency and a ring's traffic for a sum, all pairs at once in an
        all-to-all."""
        if processes == 1:
            return 0.0
        others = processes - 1
        if each.kind == "all_reduce":
            steps, moved = 2 * math.ceil(math.log2(processes)), 2 * each.bytes * others / processes
        elif each.kind == "all_to_all":
            steps, moved = 1, each.bytes * others / processes
        else:
            steps, moved = others, each.bytes * others
        return each.times * (steps * self.latency_us * 1e-6 + moved / self.bandwidth(processes))


# 10 Gbit/s for a machine of 8, over TCP. A ring enters and leaves a machine once, so its link there is all of that.
ETHERNET = Links(remote_gb_s=1.0, latency_us=50.0)


@dataclass(frozen=True)
class Collective:
    """A collective of an iteration; `bytes` are those that each process puts in, each time."""

    kind: str  # all_reduce, all_gather, all_to_all
    what: str
    bytes: int
    times: int = 1


@dataclass(frozen=True)
class Sizes:
    """Bytes that depend on the models: the LoRA's float32 gradient, the head's, a DINO class token."""

    lora: int
    head: int
    token: int


def collectives(config: Config, processes: int, sizes: Sizes, updates: int) -> Iterator[Collective]:
    """What an iteration of a DINO job issues on each of several processes, in order.

    A `Distributed.all_gather` is two: how many rows each has, then the rows, padded to the most. JSON is counted as 0
    bytes: a few tens, whose number depends on digits.

    Args:
        updates: of the discriminator in this iteration.

    Raises:
        ValueError: a replay buffer.
    """
    if config.adversary.replay_capacity:
        raise ValueError("adversary.replay_capacity must be 0: how many of its rows a process has, a draw says")
    most, rounds = config.most_judged(processes), config.update.minibatches

    def gather(what: str, payload: int) -> Iterator[Collective]:
        yield Collective("all_gather", f"{what}: rows", 16)
        yield Collective("all_gather", what, payload)

    yield from gather("numbers of scored images", 8 * most)
    yield from gather("rewards", 3 * 4 * most)  # adversary, its reward of the reference, similarity
    yield from gather("JSON: updates", 0)
    yield Collective("all_reduce", "discriminator's loss", 8)
    for _ in range(updates):
        yield Collective("all_reduce", "head's gradient and loss", sizes.head + 4)
    for _ in range(rounds):
        yield Collective("all_reduce", "LoRA's gradient", sizes.lora)
    yield from gather("the update's report", 8 * 9 * rounds)
    yield from gather("numbers of measured images", 8 * most)
    yield from gather("image statistics", 6 * 4 * most)
    yield from gather("class tokens", sizes.token * most)
    yield from gather("JSON: stop", 0)


class _Counted(SequenceGroup):
    """A process of a sequence group whose exchanges are noted, by the bytes that it puts in, and not made."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank, self.noted = size, rank, []

    def exchange(self, x: torch.Tensor, found: torch.Tensor, given: list[int], taken: list[int]) -> None:
        self.noted.append(x.nbytes)


@dataclass(frozen=True)
class Exchanges:
    """Bytes that a process of a sequence group puts into each exchange, in order."""

    drawn: tuple[int, ...]  # of a forward without a gradient
    trained: tuple[int, ...]  # of a forward and its backward


def exchanges(
    config: Config, stock: Any, side: int, text: int, members: int, *, rows: int = 1, rank: int = 0
) -> Exchanges:
    """Those of a forward of our transformer, which is run on the meta device.

    Args:
        stock: diffusers' network on the meta device, in the model's dtype.
        side: of a latent.
        text: tokens.
        members: processes of a sequence group, of which this is number `rank`; the first has the most tokens.
        rows: of the forward.
    """
    group, tensors = _Counted(members, rank), dict(stock.named_parameters()) | dict(stock.named_buffers())
    ours = FusedTransformer(
        TransformerConfig.from_stock(stock.config),
        {name: tensor.detach() for name, tensor in tensors.items()},
        attention="math",
        checkpointing=config.model.gradient_checkpointing,
        sequence=group,
    )
    targets, lora = set(target_modules(stock, config.model.lora)), config.model.lora
    ours.adapt(targets.__contains__, rank=lora.rank, alpha=lora.alpha, init=lora.init, seed=0)
    settings = stock.config
    with torch.device("meta"):
        embedded = torch.empty(rows, text, settings.joint_attention_dim, dtype=stock.dtype)
        pooled = torch.empty(rows, settings.get("pooled_projection_dim") or 0, dtype=stock.dtype)
        guidance = 1.0 if settings.get("guidance_embeds") else None
        mask = None if pooled.numel() else torch.ones(rows, text, dtype=torch.bool)
        prepared = ours.prepare(embedded, pooled, torch.empty(1), guidance, mask)
        latents = torch.empty(rows, ours.config.in_channels, side, side)
        step = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        ours.predict(latents, step, prepared, "adapted")
    drawn, group.noted = tuple(group.noted), []
    velocity = ours.predict(latents, step, prepared, "adapted")
    velocity.backward(torch.empty_like(velocity))
    return Exchanges(drawn, tuple(group.noted))


def exchanged(config: Config, processes: int, each: Exchanges, *, measures_kl: bool = False) -> Iterator[Collective]:
    """The exchanges of an iteration on a process of the busiest sequence group.

    Args:
        measures_kl: whether it is one of those that measure a KL of no weight, by a forward of the base.
    """
    shared, trained = config.balance(processes), config.trained_steps
    updated = shared.rounds * shared.most_of_a_round * trained
    drawn = shared.most * config.rollout.num_steps + measures_kl
    for sizes, times in ((each.drawn, drawn), (each.trained, updated)):
        for size in sorted(set(sizes)):
            yield Collective("all_to_all", "tokens and heads", size, sizes.count(size) * times)


@dataclass(frozen=True)
class Gathers:
    """Bytes of its share that a process puts into each gather of a base in parts, in the order of blocks."""

    run: tuple[int, ...]  # of a forward, and again of its backward
    prepared: tuple[int, ...]  # of a trajectory's modulation, by our forward


Units = list[list[torch.Tensor]]


def units_in_parts(config: Config, stock: Any) -> tuple[Units, Units]:
    """Parameters that are gathered together: in every forward, and for a trajectory's modulation.

    Args:
        stock: diffusers' network on the meta device, in the dtype in which it is trained; its blocks may be quantised.
    """
    if not config.model.gathers_stock_blocks:
        units, blocks = fused_units(stock), len(block_names(stock))
        return units[:blocks], units[blocks:]
    blocks, _ = stock_units(stock, config.model.base_precision == "fp8")
    return [outside_of(stock, blocks), *blocks], []


def gathers(units: tuple[Units, Units], processes: int) -> Gathers:
    """Those of `units_in_parts`."""
    return Gathers(*(tuple(sum(share_bytes(p, processes) for p in unit) for unit in each) for each in units))


def gathered(config: Config, processes: int, each: Gathers, *, measures_kl: bool = False) -> Iterator[Collective]:
    """The gathers of an iteration on every process, which all have as many micro-batches.

    A forward that is recomputed in the backward pass is of a block that has been gathered for that pass already.

    Args:
        measures_kl: whether one of them measures a KL of no weight, by a forward of the base that all run.
    """
    shared, trained = config.balance(processes), config.trained_steps
    updated = shared.rounds * shared.most_of_a_round
    forwards = shared.most * config.rollout.num_steps + measures_kl + 2 * updated * trained
    for sizes, times, what in (
        (each.run, forwards, "a block of the base"),
        (each.prepared, shared.most + updated, "a block's modulation"),
    ):
        for size in sorted(set(sizes)):
            yield Collective("all_gather", what, size, sizes.count(size) * times)


@dataclass(frozen=True)
class Family:
    """A transformer on one GPU: passes over an image, and what its frozen weights take."""

    merged: Work  # of one image, all its guided rows
    adapted: Work
    trained: Work
    decode: float  # seconds
    sizes: Sizes


@dataclass(frozen=True)
class Cost:
    """An iteration's seconds by part, and what they are made of."""

    gpus: int
    sampling: float
    scoring: float
    update: float
    communication: float
    bytes: int  # that each GPU puts into collectives
    messages: int
    images: int  # of the busiest GPU

    @property
    def seconds(self) -> float:
        return self.sampling + self.scoring + self.update + self.communication

    def efficiency(self, one: Cost) -> float:
        """Speed over the number of GPUs times one GPU's speed."""
        return one.seconds / (self.gpus * self.seconds)


def predict(
    preset: str,
    gpus: int,
    links: Links = Links(),
    *,
    sharded: bool = False,
    micro_batch: int = 0,
    resolution: int = 512,
    members: int = 1,
) -> Cost:
    """An iteration of a preset.

    Args:
        sharded: with model.shard_base blocks: each forward gathers the frozen weights, a backward once more; the
            work is counted as our forward's.
        micro_batch: instead of the preset's.
        members: GPUs of a sequence group, by model.sequence_parallel: they divide the transformer's work evenly, which
            what is of no token (modulation, the adapters' sums) and smaller products would add to.

    Raises:
        ValueError: a base in parts, on GPUs that do not share the micro-batches evenly; incomplete sequence groups.
    """
    settings: dict[str, Any] = {"model.resolution": resolution, "model.sequence_parallel": members}
    settings |= {"rollout.micro_batch": micro_batch} if micro_batch else {}
    settings |= {"model.shard_base": "blocks"} if sharded else {}
    config, family, model = Config.load(preset, settings), family_of(preset, resolution), Model(H200)
    if gpus % members:
        raise ValueError(f"{gpus} GPUs are no sequence groups of {members}")
    shared, judged = config.balance(gpus), config.most_judged(gpus)
    if sharded and not shared.even:
        raise ValueError(f"{gpus} GPUs do not share {preset}'s micro-batches evenly, which a base in parts needs")
    steps, trained, rounds = config.rollout.num_steps, config.trained_steps, shared.rounds
    merged, adapted = model.forward(family.merged), model.forward(family.adapted, adapters=_adapters(family))
    backward = model.backward(
        family.trained.flops - family.adapted.flops,
        family.adapted.attention,
        family.trained.bytes - family.adapted.bytes,
    )
    again = adapted if config.model.gradient_checkpointing else 0.0
    of_a_round = shared.most_of_a_round
    issued = list(collectives(config, gpus, family.sizes, config.adversary.updates_per_iteration)) if gpus > 1 else []
    if sharded and gpus > 1:
        issued += gathered(config, gpus, gathers(_units_of(preset, members > 1), gpus))
    together = list(exchanged(config, gpus, _exchanges_of(preset, resolution, members, shared.images)))
    communication = sum(links.seconds(each, gpus) for each in issued)
    communication += sum(links.seconds(each, members) for each in together)
    head = config.adversary.updates_per_iteration * HEAD_UPDATE
    outside_window = adapted if sharded else merged
    drawn = shared.most_images * ((steps - trained) * outside_window + trained * adapted) / members
    return Cost(
        gpus=gpus,
        sampling=drawn + judged * family.decode,
        scoring=judged * LARGE * model.products(FEATURES, BACKBONE) + head,
        update=rounds * of_a_round * shared.images * trained * (adapted + again + backward) / members,
        communication=communication,
        bytes=sum(each.bytes * each.times for each in (*issued, *together)),
        messages=sum(each.times for each in (*issued, *together)),
        images=shared.most_images,
    )


def _adapters(family: Family) -> int:
    return family.adapted.flops - family.merged.flops


def text_tokens(config: Config) -> int:
    """Of a row of the network."""
    return known_pipeline(config.model.path).text_tokens(config.model.max_sequence_length)


def _guided_rows(preset: str) -> int:
    """Of the network, to an image: FLUX.1's guidance is an input, the others' a second row."""
    return 1 if "flux" in preset else 2


@cache
def _exchanges_of(preset: str, resolution: int, members: int, images: int) -> Exchanges:
    """Of a micro-batch of so many images, in bfloat16."""
    if members == 1:
        return Exchanges((), ())
    config = Config.load(preset, {"model.resolution": resolution})
    one = exchanges(config, _in_bfloat16(config), resolution // 8, text_tokens(config), members)
    rows = images * _guided_rows(preset)
    return Exchanges(*(tuple(rows * size for size in sizes) for sizes in (one.drawn, one.trained)))


@cache
def _units_of(preset: str, in_groups: bool) -> tuple[Units, Units]:
    """Of a preset's transformer in bfloat16, alone or in sequence groups of whatever size."""
    config = Config.load(preset, {"model.shard_base": "blocks", "model.sequence_parallel": 1 + in_groups})
    return units_in_parts(config, _in_bfloat16(config))


def _in_bfloat16(config: Config) -> Any:
    whole = copy.deepcopy(meta_transformer(known_pipeline(config.model.path).transformer))
    return torch.nn.Module.to(whole, torch.bfloat16)  # diffusers' own warns of what is to stay float32: nothing


@cache
def family_of(preset: str, resolution: int = 512) -> Family:
    """Counted: SD3.5-medium's are bench/model.py's; the others' are counted on the plan's networks, of meta tensors.

    Raises:
        ValueError: SD3.5-medium at another resolution than 512.
    """
    config, image = Config.load(preset), (resolution // 16) ** 2
    decode = image / IMAGE * Model(H200).decode(CONVOLUTION, 1)
    network: Any = meta_transformer(known_pipeline(config.model.path).transformer)
    targets, rank = target_modules(network, config.model.lora), config.model.lora.rank
    linear: dict[str, Any] = {name: network.get_submodule(name) for name in targets}
    parameters = sum(rank * (each.in_features + each.out_features) for each in linear.values())
    sizes = Sizes(4 * parameters, 4 * _head_parameters(config), 4 * DINO_WIDTH)
    if preset.startswith("sd35m"):
        if resolution != 512:
            raise ValueError(f"{preset} was counted at 512 pixels, not at {resolution}")
        of_an_image = (_divided(work, ROWS // 2) for work in (MERGED, ADAPTED, TRAINED))
        return Family(*of_an_image, decode, sizes)
    text, rows = text_tokens(config), _guided_rows(preset)
    flops, attention = _forward_flops(network, image, text)
    adapters = sum(
        2 * rank * (m.in_features + m.out_features) * _tokens(name, image, text) for name, m in linear.items()
    )
    width, tokens, blocks = network.inner_dim, image + text, len(block_names(network))
    scale = rows * tokens * width * blocks / (ROWS * JOINT * WIDTH * LAYERS)
    merged = Work(rows * flops, rows * attention, round(scale * MERGED.bytes), 0)
    adapted = replace(merged, flops=rows * (flops + adapters), bytes=round(scale * ADAPTED.bytes))
    backward = rows * round(flops - attention + 2.5 * attention + 2 * adapters)
    trained = replace(adapted, flops=adapted.flops + backward, bytes=round(scale * TRAINED.bytes))
    return Family(merged, adapted, trained, decode, sizes)


def _head_parameters(config: Config) -> int:
    """Of the head: D -> H -> 1."""
    hidden = config.adversary.hidden_size
    return DINO_WIDTH * hidden + 2 * hidden + 1


def _divided(work: Work, images: int) -> Work:
    return Work(work.flops // images, work.attention // images, work.bytes // images, 0)


def _tokens(linear: str, image: int, text: int) -> int:
    """How many tokens of a row pass a linear layer, by its name."""
    if "single_transformer_blocks" in linear:
        return image + text
    return text if "add_" in linear.rsplit(".", 2)[-1] or linear.endswith("to_add_out") else image


def _forward_flops(network: Any, image: int, text: int) -> tuple[int, int]:
    """FLOPs of a forward of one row, and those of attention among them."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = network.config
    # As a GPU runs it, attention is one operator; else it would be counted among the other products.
    with on_gpu(), torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs = {
            "hidden_states": torch.empty(1, image, settings.in_channels),
            "encoder_hidden_states": torch.empty(1, text, settings.joint_attention_dim),
            "timestep": torch.empty(1),
        }
        if "pooled_projection_dim" in settings:
            inputs["pooled_projections"] = torch.empty(1, settings.pooled_projection_dim)
            inputs |= {"img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3), "guidance": torch.empty(1)}
        else:
            inputs["encoder_hidden_states_mask"] = None
            inputs["img_shapes"] = [[(1, math.isqrt(image), math.isqrt(image))]]
        network(**inputs)
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(count for operator, count in by_operator.items() if "attention" in str(operator))
    return counter.get_total_flops(), attention


def why(cost: Cost, one: Cost) -> str:
    """Which term keeps most GPUs' time from being a share of one GPU's."""
    even = one.seconds / cost.gpus
    lost = {"shares": cost.seconds - cost.communication - even, "communication": cost.communication}
    return "even" if cost.efficiency(one) >= 0.995 else max(lost, key=lambda name: lost[name])


def table(preset: str, *, micro_batch: int = 0) -> list[Cost]:
    """One row for every number of `GPUS`."""
    return [predict(preset, gpus, micro_batch=micro_batch) for gpus in GPUS]


def badly_used(costs: list[Cost], one: Cost) -> str:
    """At which numbers of GPUs less than `GOOD` of their speed is used, and by what, in words; "" where at none."""
    bad = [cost for cost in costs if cost.efficiency(one) < GOOD]
    return ", ".join(f"{cost.gpus:,} ({cost.efficiency(one):.0%}, {why(cost, one)})" for cost in bad)


def in_groups(gpus: int, members: int, *, sharded: bool = False) -> Cost:
    """Of Qwen-Image at 1024 pixels, by sequence groups, with a micro-batch of one image; where every forward gathers
    the base, of one for each GPU of a group, so that each GPU has as many tokens as with groups of one."""
    micro_batch = members if sharded else 1
    return predict("qwen-image-dino", gpus, micro_batch=micro_batch, resolution=1024, members=members, sharded=sharded)


def _groups() -> Iterator[str]:
    """What sequence groups predict, as a table."""
    columns = ("GPUs", "of a sequence group", "s an iteration", "images/s", "efficiency", "communication", "messages")
    yield "### qwen-image-dino at 1024 px, micro-batch 1, with `model.sequence_parallel`\n"
    yield f"| {' | '.join(columns)} | GB put in | most is lost to |"
    yield f"|{'---|' * (len(columns) + 2)}"
    one, images = in_groups(1, 1), Config.load("qwen-image-dino").images_per_iteration
    for gpus in SOME_GPUS:
        for members in MEMBERS:
            cost = in_groups(gpus, members)
            yield (
                f"| {gpus:,} | {members} | {cost.seconds:.3g} | {images / cost.seconds:.3g} | "
                f"{cost.efficiency(one):.0%} | {cost.communication:.3g} s | {cost.messages:,} | "
                f"{cost.bytes / 1e9:.3g} | {why(cost, one)} |"
            )
    yield "\nWith `model.shard_base blocks` and a micro-batch of one image for each GPU of a group; nothing overlaps:\n"
    columns = ("GPUs", "of a sequence group", "s of work", "communication", "messages", "GB put in")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for gpus in SOME_GPUS[:2]:
        for members in MEMBERS:
            cost = in_groups(gpus, members, sharded=True)
            yield (
                f"| {gpus:,} | {members} | {cost.seconds - cost.communication:.3g} | {cost.communication:.3g} s | "
                f"{cost.messages:,} | {cost.bytes / 1e9:.3g} |"
            )


def lines() -> Iterator[str]:
    """The page's generated part, as Markdown."""
    columns = ("GPUs", "s an iteration", "images/s", "efficiency", "images of the busiest", "communication", "messages")
    for preset in PRESETS:
        costs, images = table(preset), Config.load(preset).images_per_iteration
        one = costs[0]
        yield f"### {preset}\n"
        yield f"| {' | '.join(columns)} | MB put in | most is lost to |"
        yield f"|{'---|' * (len(columns) + 2)}"
        for cost in costs:
            yield (
                f"| {cost.gpus:,} | {cost.seconds:.3g} | {images / cost.seconds:.3g} | {cost.efficiency(one):.0%} | "
                f"{cost.images} | {cost.communication * 1e3:.3g} ms | {cost.messages} | {cost.bytes / 1e6:.3g} | "
                f"{why(cost, one)} |"
            )
        yield ""
        yield from _summary(preset, costs)
        yield ""
    yield from _groups()


def _summary(preset: str, costs: list[Cost]) -> Iterator[str]:
    one, none = costs[0], "at no number here"
    yield f"Below {GOOD:.0%}: {badly_used(costs, one) or none}."
    finer = badly_used(table(preset, micro_batch=1), one)
    yield f"With `rollout.micro_batch` 1 (what smaller products cost a GPU is not in it): {finer or none}."
    slow = predict(preset, 64, ETHERNET)
    share = f"{slow.communication:.3g} s of {slow.seconds:.3g} s"
    yield f"64 GPUs on 10 Gbit/s for each machine of 8: {share} are communication."
    parts = predict(preset, 8, sharded=True)
    yield (
        f"8 GPUs with `model.shard_base blocks`: {parts.messages:,} messages, {parts.communication:.3g} s if nothing "
        f"overlapped, beside {parts.seconds - parts.communication:.3g} s of work."
    )


def draw(file: Path) -> None:
    """Efficiency over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for preset in PRESETS:
        one = predict(preset, 1)
        for micro, style in ((0, "-"), (1, ":")):
            costs = table(preset, micro_batch=micro)
            label = f"{preset}{', micro-batch 1' if micro else ''}"
            axes.plot(GPUS, [100 * each.efficiency(one) for each in costs], style, label=label, linewidth=1.4)
    for members, style in ((1, ":"), (8, "-")):
        costs = [in_groups(gpus, members) for gpus in GPUS if gpus % members == 0]
        share = [100 * each.efficiency(in_groups(1, 1)) for each in costs]
        label = f"qwen-image-dino, 1024 px, micro-batch 1, groups of {members}"
        axes.plot([each.gpus for each in costs], share, style, label=label, linewidth=1.4, color="black")
    axes.axhline(100 * GOOD, color="grey", linewidth=0.6)
    axes.set(xscale="log", xlabel="GPUs", ylabel="efficiency, % (predicted)", ylim=(0, 105))
    axes.set_xticks([1, 8, 64, 256, 1024], ["1", "8", "64", "256", "1,024"])
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}'s table and its figure")
    args = parser.parse_args(argv)
    found = "\n".join(lines()).rstrip()
    print(found)
    if args.write:
        above = PAGE.read_text(encoding="utf-8").split(MARK)[0]
        PAGE.write_text(f"{above}{MARK}\n\n{found}\n", encoding="utf-8")
        draw(FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
