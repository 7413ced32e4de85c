"""What a run keeps in GPU memory: a plan before it starts, and advice when it runs out.

Every figure is estimated until measured on a GPU: weights are counted on the meta device, activations follow
activations.py, the context and the allocator's slack are allowances. 1 GB is 10^9 bytes; a card holds a little more
than its nominal size, which is part of the margin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.table import Table

from advgrpo.config import (
    Config,
    ModelSection,
    check_micro_batches,
    fits_micro_batches,
    nearest_prompts,
    no_sequence_groups,
    not_in_sequence,
    not_sharded,
    unevenly_sharded,
)
from advgrpo.errors import UserError
from advgrpo.plan import known_models
from advgrpo.plan.activations import TransformerShape, decode_bytes
from advgrpo.plan.work import drawn_steps, efficiency, learning, micro_batches, sharing
from advgrpo.policy.fused.decoder import GATED_IMAGES, decoded_at_once
from advgrpo.policy.fused.transformer import can_adapt

GB = 1e9
PHASES = ("encode", "sample", "decode", "score", "update")
_CONTEXT = 1.2  # GB: CUDA context, cuBLAS and cuDNN workspaces, NCCL
_SLACK = 0.05  # of what is allocated: the allocator's rounding and fragmentation
_REFERENCES_PER_PROMPT = 8  # docs/method.md section 8
_PROMPTS_IN_MEMORY = 512  # of adversary/reference_features.py
_REFERENCE_VIEWS = 4  # of adversary/augmentation.py
_SMS = 132  # streaming multiprocessors of an H100 or H200
_TILE = (128, 256)  # rows and columns of a matrix product that one of them computes at a time
_CLOSE = 1.03  # costs within 3 % count as equal


@dataclass(frozen=True)
class Knobs:
    """What the plan chooses: settings of training, nothing else."""

    micro_batch: int
    gradient_checkpointing: bool

    def __str__(self) -> str:
        checkpointing = "true" if self.gradient_checkpointing else "false"
        return f"rollout.micro_batch = {self.micro_batch}, model.gradient_checkpointing = {checkpointing}"


@dataclass(frozen=True)
class Component:
    name: str
    bytes: int
    decided_by: str
    phases: tuple[str, ...] = PHASES  # in which it is held


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate for one GPU; where nothing fits, `knobs` need the least and `remedies` say what would fit."""

    gpu_gb: float
    knobs: Knobs
    components: tuple[Component, ...]
    configured_gb: float  # peak with the settings as they are
    remedies: tuple[str, ...]
    uncounted: tuple[str, ...]  # settings and models that the estimate leaves out
    decided: str = ""  # what kept the micro-batch from being larger, where it was not memory
    shared: str = ""  # what the busiest of several processes computes
    copy: str = ""  # that a whole FP8 copy to sample from would fit beside a base in parts
    host_gb: float = 0.0  # of pinned host memory, for each process of a machine

    def phase_gb(self, phase: str) -> float:
        held = sum(c.bytes for c in self.components if phase in c.phases)
        return held / GB * (1 + _SLACK) + _CONTEXT

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.phase_gb)

    @property
    def peak_gb(self) -> float:
        return self.phase_gb(self.peak_phase)

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.gpu_gb

    def line(self) -> str:
        """One line: the knobs, or what would make it fit."""
        size = f"{self.gpu_gb:.4g} GB"
        if self.fits:
            left_out = f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else ""
            host = f"{self.host_gb:.1f} GB of pinned host memory for each process" if self.host_gb else ""
            more = "".join(f"; {said}" for said in (host, self.shared, self.decided, self.copy) if said)
            peak = f"peak {self.peak_gb:.1f} GB while {self.peak_phase}, estimated"
            return f"{size}: {self.knobs}; {peak}{left_out}{more}"
        least = f"at least {self.peak_gb:.1f} GB while {self.peak_phase}, estimated"
        return f"{size}: does not fit; {least}, with {self.knobs}; {'; or '.join(self.remedies)}"


def plan(config: Config, gpu_gb: float, *, processes: int = 1) -> MemoryPlan:
    """The fastest knobs that fit one GPU of `gpu_gb` (10^9 bytes), with the breakdown.

    `rollout.micro_batch` is the ceiling of the micro-batches tried. Speed is judged by `relative_time`.

    Args:
        processes: GPUs that share an iteration's images.

    Raises:
        UserError: gpu_gb or processes not positive, images that no micro-batch divides, or none that the processes of
            a base in parts share evenly, or a model whose architecture is not known.
    """
    if not (gpu_gb > 0 and math.isfinite(gpu_gb)) or processes < 1:
        raise UserError(f"GPU size {gpu_gb} GB, {processes} processes: want positive numbers")
    cut = config.rollout, config.update.minibatches
    if not micro_batches(*cut):
        check_micro_batches(*cut)  # says which numbers of prompts would divide
    if reason := no_sequence_groups(config, processes):
        raise UserError(reason)
    if not _accepted(config, processes):
        raise UserError(unevenly_sharded(config, processes, micro_batch=micro_batches(*cut)[-1]))
    estimate = _Estimate(config, processes)
    fitting = [p for p in estimate.plans(gpu_gb) if p.fits]
    if fitting:
        costs = {p: estimate.relative_time(p.knobs) for p in fitting}
        close = [p for p in fitting if costs[p] <= _CLOSE * min(costs.values())]
        chosen = max(close, key=lambda p: p.knobs.micro_batch)
        said = {"decided": _what_decided(chosen, estimate), "shared": _shared(chosen, estimate)}
        return replace(chosen, **said, copy=_copy_that_fits(chosen, estimate))
    least = min(estimate.plans(gpu_gb), key=lambda p: p.peak_gb)
    return replace(least, remedies=tuple(_remedies(config, gpu_gb, processes)))


def plan_as_configured(config: Config, gpu_gb: float, *, processes: int = 1) -> MemoryPlan:
    """What the settings as they are would keep, chosen or not; arguments and errors as of `plan`."""
    for refused in (no_sequence_groups, unevenly_sharded):
        if reason := refused(config, processes):
            raise UserError(reason)
    wanted = Knobs(config.rollout.micro_batch, config.model.gradient_checkpointing)
    return next(each for each in _Estimate(config, processes).plans(gpu_gb) if each.knobs == wanted)


def peak_with_captured_update(config: Config, *, processes: int = 1) -> float:
    """GB that the settings as they are would keep with the update's steps in CUDA graphs.

    Raises:
        UserError: as of `plan`, or the estimate leaves something out, so that nobody can say whether it fits.
    """
    estimate = _Estimate(config, processes)
    if estimate.uncounted:
        raise UserError(f"the memory plan does not count {', '.join(estimate.uncounted)}")
    return estimate.peak_with_captured_update()


def _accepted(config: Config, processes: int) -> list[int]:
    """Micro-batches up to the configured one that so many processes may train with, ascending."""
    sizes = micro_batches(config.rollout, config.update.minibatches)
    return [size for size in sizes if not unevenly_sharded(config, processes, micro_batch=size)]


def _shared(chosen: MemoryPlan, estimate: _Estimate) -> str:
    """What the busiest process computes; empty where there is one."""
    knobs, processes = chosen.knobs, estimate.processes
    how = {"micro_batch": knobs.micro_batch, "checkpointing": knobs.gradient_checkpointing}
    return sharing(estimate.config, processes, **how) if processes > 1 else ""


def _copy_that_fits(chosen: MemoryPlan, estimate: _Estimate) -> str:
    """Whether a base in parts could be sampled from a whole copy in FP8; empty where it is, or cannot be."""
    config = estimate.config
    if not (estimate.sharded and config.model.gathers_stock_blocks and estimate.is_ours) or estimate.copied:
        return ""
    rollout = config.rollout.model_copy(update={"precision": "fp8"})
    copied = _Estimate(config.model_copy(update={"rollout": rollout}), estimate.processes)
    peak = copied.peak_gb(chosen.knobs)
    if peak > chosen.gpu_gb:
        return ""
    return f"rollout.precision = fp8 fits as well, peak {peak:.1f} GB: ODE steps that gather nothing"


def _what_decided(chosen: MemoryPlan, estimate: _Estimate) -> str:
    """Why no larger micro-batch is recommended, where the reason is not memory."""
    rollout, minibatches = estimate.config.rollout, estimate.config.update.minibatches
    group, most, micro = rollout.group_size, rollout.micro_batch, chosen.knobs.micro_batch
    if micro == most:
        return f"rollout.micro_batch = {most}, as set, is the largest tried"
    larger = [m for m in range(micro + 1, most + 1) if group % m == 0 or m % group == 0]
    room = [m for m in larger if estimate.peak_gb(replace(chosen.knobs, micro_batch=m)) <= chosen.gpu_gb]
    if not room:
        return ""
    if fits_micro_batches(rollout, minibatches, micro=room[-1]):
        busiest = estimate.config.balance(estimate.processes, micro_batch=room[-1]).most_images
        return (
            f"speed decided, not memory: rollout.micro_batch = {room[-1]} would fit, and its busiest process compute "
            f"{busiest} images"
        )
    return (
        f"divisibility decided, not memory: rollout.micro_batch = {room[-1]} would fit, but {rollout.images} images "
        "cannot be cut into it; with rollout.prompts_per_iteration = "
        f"{nearest_prompts(rollout, minibatches, room[-1])} they can"
    )


def _adapted_by_ours(model: ModelSection) -> bool:
    """Whether what is trained are adapters that our forward has."""
    return model.train == "lora" and all(map(can_adapt, model.lora.targets))


class _Estimate:
    """Everything that does not depend on the knobs, counted once."""

    def __init__(self, config: Config, processes: int):
        self.config, self.processes = config, processes
        self.pipeline = known_models.known_pipeline(config.model.path)
        learned = config.adversary.kind if config.learns_adversary else "none"
        self.dino = learned == "dino"
        other = [] if learned in ("dino", "none") else [f"adversary.kind = {learned}"]
        entries = config.rewards.entries()
        fixed = [entries[name].owner for name in config.fixed_rewards if config.rewards.pool(name) is None]
        observer = ["evaluation.backbone"] if config.evaluation.backbone else []
        encoder = ["the VAE's encoder"] if config.objective.learns_from_references else []
        self.uncounted = (*other, *fixed, *observer, *encoder)
        self.lora = config.model.train == "lora"
        self.sharded = config.model.is_sharded(processes)
        self.is_ours = config.fast and self.pipeline.has_own_forward and _adapted_by_ours(config.model)
        self.fused = self.is_ours and not config.model.gathers_stock_blocks
        by_itself = self.pipeline.captured_by_itself and not self.uncounted
        wanted = not config.why_update_is_not_captured and (by_itself or config.update.graphs is True)
        self.captures = self.fused and config.model.sequence_parallel == 1 and wanted
        self.copied = config.has_merged_copy
        self.own_decoder = self.fused and not self.pipeline.is_qwen
        self.element = 2 if config.model.dtype == "bfloat16" else 4
        self.weights = known_models.count_transformer(self.pipeline.transformer, config.model.lora)
        guided = config.rollout.guidance_scale != 1.0 and not self.pipeline.embeds_guidance
        self.guided = 2 if guided else 1
        self.latent_side = config.model.resolution // self.pipeline.decoder.scale
        self.shape = self._shape()

    def _shape(self) -> TransformerShape:
        stock, model = self.pipeline.transformer, self.config.model
        layers, blocks = stock["num_layers"], model.lora.blocks
        every = layers + self.pipeline.single_layers
        return TransformerShape(
            path="fused" if self.fused else "stock",
            width=stock["num_attention_heads"] * stock["attention_head_dim"],
            heads=stock["num_attention_heads"],
            layers=layers,
            dual=frozenset(stock.get("dual_attention_layers") or ()),
            qk_norm=stock.get("qk_norm") is not None,
            image_tokens=(self.latent_side // self.pipeline.patch) ** 2,
            text_tokens=self.pipeline.text_tokens(model.max_sequence_length),
            element=self.element,
            rank=model.lora.rank if self.lora else 0,
            first_trained=0 if blocks == "all" or not self.lora else every - blocks,
            math_attention=self.fused and model.attention == "math",
            swiglu=self.pipeline.is_gated,
            single_layers=self.pipeline.single_layers if self.pipeline.is_flux or self.pipeline.is_qwen else None,
            processes=model.sequence_parallel,
        )

    def plans(self, gpu_gb: float) -> list[MemoryPlan]:
        """One plan for every setting of the knobs."""
        configured = self._plan(gpu_gb, self._as_configured, 0.0).peak_gb
        return [self._plan(gpu_gb, knobs, configured) for knobs in self._knobs()]

    @property
    def _as_configured(self) -> Knobs:
        return Knobs(self.config.rollout.micro_batch, self.config.model.gradient_checkpointing)

    def peak_gb(self, knobs: Knobs) -> float:
        """The least that these knobs need."""
        return self._plan(0.0, knobs, 0.0).peak_gb

    def peak_with_captured_update(self) -> float:
        return self._plan(math.inf, self._as_configured, 0.0).peak_gb

    def _plan(self, gpu_gb: float, knobs: Knobs, configured_gb: float) -> MemoryPlan:
        """With graphs of the update where update.graphs = auto finds room for them."""

        def planned(*, captured: bool) -> MemoryPlan:
            known = self.components(knobs, captured=captured), configured_gb, (), self.uncounted
            return MemoryPlan(gpu_gb, knobs, *known, host_gb=self.host_gb())

        found = planned(captured=self.captures)
        optional = self.captures and self.config.update.graphs == "auto"
        return planned(captured=False) if optional and not found.fits else found

    def _knobs(self) -> Iterator[Knobs]:
        rollout, update = self.config.rollout, self.config.update
        kept = round(rollout.group_size * update.informative_share)
        for micro in _accepted(self.config, self.processes):
            if update.informative_share < 1 and (kept % micro or rollout.group_size % micro):
                continue  # training/informative.py keeps the micro-batches' shape
            for checkpointing in (False, True):
                yield Knobs(micro, checkpointing)

    def relative_time(self, knobs: Knobs) -> float:
        """Matrix-product time of an image's sampling and update on the busiest process, in forwards at full occupancy
        that are shared evenly.

        Occupancy is the share of the last wave of micro-batches over 132 multiprocessors that is filled, over products
        1, 3 and 4 D wide.
        """
        config, micro, checkpointing = self.config, knobs.micro_batch, knobs.gradient_checkpointing
        work = drawn_steps(config) + learning(config, checkpointing=checkpointing)
        work /= efficiency(config, self.processes, micro_batch=micro, checkpointing=checkpointing)
        rows = math.ceil(knobs.micro_batch * self.guided * self.shape.tokens / _TILE[0])
        time = filled = 0
        for columns in (1, 3, 4):
            micro_batches = rows * math.ceil(columns * self.shape.width / _TILE[1])
            time += math.ceil(micro_batches / _SMS) * _SMS
            filled += micro_batches
        return work * time / filled

    def images(self, knobs: Knobs) -> int:
        """Of an iteration, on the process that computes the most, alone or with others."""
        return self.config.balance(self.processes, micro_batch=knobs.micro_batch).most_images

    def judged(self, knobs: Knobs) -> int:
        """Of these, on the process that decodes and judges the most: those of a sequence group take turns."""
        return self.config.most_judged(self.processes, micro_batch=knobs.micro_batch)

    def components(self, knobs: Knobs, *, captured: bool = False) -> tuple[Component, ...]:
        """Those with bytes. `captured`: forward and backward of the update are CUDA graphs."""
        reward = self._dino(knobs) if self.dino else ()
        return tuple(c for c in (*self._weights(), *reward, *self._activations(knobs, captured)) if c.bytes)

    def _weights(self) -> Iterator[Component]:
        config, weights = self.config, self.weights
        dtype = f"model.path, model.dtype = {config.model.dtype}"
        if self.sharded:
            yield from self._share(dtype)
        else:
            in_parts = config.model.shard_base != "none"  # by one process, whose share is all of it
            held = self._count_share().held if in_parts else weights.total * self.element
            yield Component("transformer", held, dtype)
            if in_parts and config.model.base_precision == "fp8":
                yield self._fp8_weight()
        if self.fused and not self.sharded:
            yield Component("merged weights", self._merged_bytes(), f"rollout.precision = {config.rollout.precision}")
            if config.model.base_precision == "fp8":  # the weight and its transpose, beside the pristine one
                yield Component("FP8 base weights", 2 * weights.inner, "model.base_precision = fp8")
        if self.copied:  # what merging reads is gathered block by block, before there is anything of a step
            yield Component("merged weights, whole", self._copy_bytes(), "rollout.precision = fp8")
        trained = weights.lora if self.lora else self._held()
        if self.lora:
            yield Component("LoRA, float32", 4 * trained, "model.lora")
            if config.update.kl_to == "teacher":
                yield Component("LoRA of the teacher, float32", 4 * trained, "update.kl_to = teacher")
        else:
            yield Component("frozen base beside the trained weights", 4 * trained, "model.train = full")
            aside = ("sample", "decode")  # Ema.swap, in an evaluation
            yield Component("weights that the average stands in for", 4 * trained, "model.train = full", aside)
        moving = ("sample", "decode", "score", "update")
        decides = "model.lora" if self.lora else "model.train = full"
        yield Component("gradient, Adam's moments, average, float32", 4 * 4 * trained, decides, moving)
        old = self.config.objective.old_policy  # training/nft.py
        if old:  # while it draws, the trained weights are set aside
            yield Component("old policy, and the weights that it stands in for", 2 * 4 * trained, decides, moving)
        if self.lora:  # clean_start.py
            kept, phases = (5, moving) if old else (4, ("score", "update"))
            yield Component("copy of the iteration's start", 4 * kept * trained, "model.lora", phases)
        side = self.pipeline.transformer.get("pos_embed_max_size") or 0
        yield Component("table of positions", side**2 * self.shape.width * self.element, "model.path")
        decoder, vae = self._vae_phases()
        yield Component("image decoder", self._decoder_bytes(), "model.path, fast, model.offload", decoder)
        yield Component("stock VAE, float32", 4 * self._vae_parameters(), "model.path, fast, model.offload", vae)

    def _decoding_phases(self) -> tuple[str, ...]:
        """When what decoding allocates is held: of a side stream, beside the sampler and from then on."""
        side = self.config.rollout.decode_stream == "side"
        return ("sample", "decode", "score", "update") if side else ("decode",)

    def _vae_phases(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """When the decoder in use is on the GPU, and what of the stock VAE is not in use as that."""
        if self.config.model.offload != "text_vae":
            return PHASES, PHASES
        encodes = ("update",) if self.config.objective.learns_from_references else ()
        decodes = self._decoding_phases()
        return (decodes, encodes) if self.own_decoder else ((*decodes, *encodes), (*decodes, *encodes))

    def host_gb(self) -> float:
        """What `model.offload` pins in the host's memory until all prompts are cached, 10^9 bytes."""
        offload = self.config.model.offload
        encoders = known_models.pinned_text_encoders(self.pipeline, self.element) if offload != "none" else 0
        own = self._decoder_dtype().itemsize if self.own_decoder else None
        vae = known_models.pinned_vae(self.pipeline.decoder, own) if offload == "text_vae" else 0
        return (encoders + vae) / GB

    def _held(self) -> int:
        """Elements of the transformer that a process has at rest."""
        if not self.sharded:
            return self.weights.total
        return self._count_share().held // self.element

    def _count_share(self) -> known_models.ShareCount:
        model = self.config.model
        how = {"dtype": getattr(torch, model.dtype), "fp8": model.base_precision == "fp8", "fused": self.fused}
        return known_models.count_share(self.pipeline.transformer, self.processes, **how)

    def _share(self, dtype: str) -> Iterator[Component]:
        """A process's part of the transformer, and what it gathers: what is outside of blocks but by our forward, the
        block that runs and the next one, these in what the gather gives and in the parameters that it is copied into.
        Where they are trained, also their gradients until they are summed: of a block, and of two in what the sum
        reads."""
        share, decides = self._count_share(), f"{dtype}, model.base_precision, processes"
        yield Component("share of the transformer", share.held, decides)
        gathered = share.outside + 2 * share.pair
        yield Component("gathered blocks", gathered, "model.shard_base = blocks", ("sample", "update"))
        yield self._fp8_weight()
        if not self.lora:
            unsummed = share.outside + 3 * share.block
            yield Component("gradients of gathered blocks", unsummed, "model.shard_base = blocks", ("update",))

    def _fp8_weight(self) -> Component:
        """A product of the backward pass reads it so."""
        read = self._count_share().largest_fp8 * self.element
        return Component("an FP8 weight in the model's dtype", read, "model.base_precision = fp8", ("update",))

    def _merged_bytes(self) -> int:
        weights = self.weights
        if self.config.rollout.precision == "fp8":
            return weights.inner + weights.stacked_ends * self.element
        return weights.stacked * self.element

    def _copy_bytes(self) -> int:
        """Of policy/merged_copy.py: it has every weight once, and quantises what a base in FP8 does."""
        dtype = getattr(torch, self.config.model.dtype)
        return known_models.count_share(self.pipeline.transformer, 1, dtype, fp8=True).held

    def _vae_parameters(self) -> int:
        """What of the stock VAE stays on the GPU beside the decoder in use, which may be the stock one itself."""
        decoder = known_models.count_decoder(self.pipeline.decoder)
        return known_models.count_vae(self.pipeline.decoder) - (0 if self.own_decoder else decoder)

    def _decoder_dtype(self) -> torch.dtype:
        """As `SD3Policy` decodes on a GPU."""
        model = self.config.model
        if not self.own_decoder:
            return torch.float32
        return getattr(torch, model.dtype if model.decoder_dtype == "auto" else model.decoder_dtype)

    def _decoder_bytes(self) -> int:
        return known_models.count_decoder(self.pipeline.decoder) * self._decoder_dtype().itemsize

    def _decoding_bytes(self, micro_batch: int) -> int:
        """While a micro-batch is decoded as `SD3Policy.decode` does it; the first one through the gate in float32 as
        well."""
        at_once = min(decoded_at_once(self.config.model.resolution), micro_batch) if self.own_decoder else micro_batch
        at_once = 1 if self.pipeline.is_qwen else at_once
        dtype, decoder = self._decoder_dtype(), self.pipeline.decoder
        micro_batch = at_once * decode_bytes(decoder, dtype, self.latent_side)
        if dtype == torch.float32:
            return micro_batch
        gated = min(at_once, GATED_IMAGES) * decode_bytes(decoder, torch.float32, self.latent_side)
        return max(micro_batch, gated + 4 * known_models.count_decoder(decoder))

    def _dino(self, knobs: Knobs) -> Iterator[Component]:
        adversary = self.config.adversary
        backbone = known_models.known_backbone(adversary.backbone)
        hidden = backbone["hidden_size"]
        width = hidden * max(1, len(adversary.feature_layers))
        element = 2 if adversary.dtype == "bfloat16" else 4
        tokens = (adversary.image_size // backbone["patch_size"]) ** 2 + 1
        per_image = 4 * tokens * width
        iteration = "rollout.prompts_per_iteration, group_size, processes"
        kept = 4 * width * (min(adversary.cached_patches, tokens - 1) + 1)
        stored = kept * element // 4  # reference_features.py packs what a bfloat16 backbone gives
        count = known_models.count_backbone(backbone)
        yield Component("DINO backbone", count * element, f"adversary.backbone = {adversary.backbone}")
        after = ("score", "update")
        images = self.judged(knobs)
        yield Component("features of an iteration's images", images * per_image, iteration, after)
        yield Component("the same, while joined", images * per_image, iteration, ("score",))
        yield Component("features of their references", images * kept, "adversary.cached_patches", after)
        views = 1 if adversary.augment == "none" else _REFERENCE_VIEWS
        cached = _PROMPTS_IN_MEMORY * _REFERENCES_PER_PROMPT * stored * views
        yield Component(
            "reference features in memory, at most", cached, "adversary.cached_patches", ("score", "update")
        )
        replay = 4 * width * adversary.replay_capacity * (adversary.num_patches * adversary.heads + 1)
        yield Component("replay buffer", replay, "adversary.replay_capacity", ("sample", "decode", "score", "update"))
        if self.lora:
            yield Component("copy of the replay buffer", replay, "adversary.replay_capacity", ("score", "update"))
        drawn = min(adversary.batch_size, self.config.images_per_iteration) * per_image
        yield Component("rows of a discriminator update", drawn, "adversary.batch_size", ("score",))
        alive = round(14 * element * tokens * hidden * knobs.micro_batch)
        yield Component("DINO forward", alive, "rollout.micro_batch", ("score",))

    def _activations(self, knobs: Knobs, captured: bool) -> Iterator[Component]:
        config, shape = self.config, self.shape
        sequences = knobs.micro_batch * self.guided
        decides = "rollout.micro_batch"
        whole = config.model.offload == "none"
        count = known_models.count_text_encoders if whole else known_models.count_largest_text_layer
        encoders = "text encoders, until cached" if whole else "a text encoder's layer, until cached"
        yield Component(encoders, count(self.pipeline) * self.element, "model.path, model.offload", ("encode",))
        side, resolution = self.latent_side, config.model.resolution
        latents = 4 * self.pipeline.decoder.latent_channels * side**2
        forward_process = config.objective.forward_process
        kept = 2 + (config.update.trust_region != "ratio")  # before and after a step, and its mean
        held_latents = (1 if forward_process else kept * config.trained_steps) * latents
        rollout = self.judged(knobs) * 4 * 3 * resolution**2 + self.images(knobs) * held_latents
        held = ("decode", "score", "update")
        lies = ("sample", *held) if config.rollout.decode_stream == "side" else held
        yield Component("images and window latents", rollout, "rollout.prompts_per_iteration, processes", lies)
        share = config.update.informative_share
        if share < 1:  # training/informative.py copies them; what it leaves out is held until the iteration ends
            copied = round(self.images(knobs) * share) * held_latents
            yield Component("window latents that are trained on", copied, "update.informative_share", ("update",))
        if forward_process:  # noised latents, their flow, and two policies' velocities
            levels = 4 * config.trained_steps * knobs.micro_batch * latents
            decides = f"{forward_process}.step_share, rollout.micro_batch"
            yield Component("noise levels of a micro-batch", levels, decides, ("update",))
        kept = 1 if self.pipeline.is_qwen else sequences  # which has one modulation for all prompts
        ours = self.fused or self.copied
        modulation = config.rollout.num_steps * kept * self.weights.modulation * self.element if ours else 0
        paths = [shape, *([replace(shape, path="fused")] if self.copied else [])]  # in the window, and outside of it
        forward = sequences * (max(path.forward_bytes() for path in paths) + 4 * latents) + modulation
        graphs = self.fused and shape.processes == 1  # a captured graph keeps its pool for as long as it may run
        name = "sampler's forward, in the CUDA graphs' pool" if graphs else "sampler's forward"
        yield Component(name, forward, decides, ("sample", *held) if graphs else ("sample",))
        decode = self._decoding_bytes(knobs.micro_batch)
        decided = "model.resolution, rollout.micro_batch, rollout.decode_stream"
        yield Component("decoding", decode, decided, self._decoding_phases())
        both = "rollout.micro_batch, model.gradient_checkpointing, model.lora.blocks"
        saved = sequences * shape.saved_bytes(checkpointing=knobs.gradient_checkpointing)
        during = ("sample", *held) if captured else ("update",)  # in the graphs' pool, always
        yield Component("activations saved for the backward", saved, both, during)
        backward = sequences * shape.backward_bytes() + (self.element * self.weights.lora if self.fused else 0)
        yield Component("gradients within the backward", backward, decides, during)
        if captured:
            yield Component(
                "the same, while graphs of the update are made", saved + backward, "update.graphs", ("update",)
            )


def _changes(config: Config, processes: int) -> Iterator[tuple[str, Callable[[Config], None]]]:
    """Settings beyond the knobs that save memory, as (what to set, change), what costs least first."""

    def setting(name: str, value) -> tuple[str, Callable[[Config], None]]:
        section, field = name.split(".")
        return f"{name} = {value}", lambda c: setattr(getattr(c, section), field, value)

    adversary, model = config.adversary, config.model
    if config.update.graphs is True and not config.why_update_is_not_captured:
        yield setting("update.graphs", False)
    if model.offload != "text_vae":
        yield setting("model.offload", "text_vae")
    if config.has_merged_copy:
        yield setting("rollout.precision", "model")
    if model.base_precision == "fp8" and model.shard_base == "none":  # beside the pristine weights
        yield setting("model.base_precision", "model")
    if not config.fast and model.train == "lora" and model.shard_base == "none":
        yield "fast = true", lambda c: setattr(c, "fast", True)
    dino = adversary.kind == "dino" and config.learns_adversary
    if dino and adversary.cached_patches > adversary.num_patches:
        yield setting("adversary.cached_patches", adversary.num_patches)
    if fewer := _fewer_prompts(config, processes):
        yield setting("rollout.prompts_per_iteration", fewer)
    blocks = config.model_copy(update={"model": model.model_copy(update={"shard_base": "blocks"})})
    if (
        processes > 1
        and model.shard_base == "none"
        and not (not_sharded(blocks) or not_in_sequence(blocks) or unevenly_sharded(blocks, processes))
    ):
        yield setting("model.shard_base", "blocks")
    if model.dtype == "float32" and model.train == "lora":
        yield setting("model.dtype", "bfloat16")
    if dino and adversary.backbone in ("facebook/dinov2-large", "facebook/dinov2-giant"):
        yield setting("adversary.backbone", "facebook/dinov2-base")
    if model.lora.blocks == "all" and model.train == "lora":
        yield "model.lora.blocks = 2", lambda c: setattr(c.model.lora, "blocks", 2)
    if model.resolution >= 512:
        yield setting("model.resolution", model.resolution // 2)
    if model.train == "full":
        yield "model.train = lora", lambda c: setattr(c.model, "train", "lora")


def _groups(config: Config, processes: int) -> Iterator[dict[str, Any]]:
    """Settings of `model` by which processes compute images together that training accepts, few to an image first, and
    then the same with blocks in parts where they are not yet."""
    pipeline, model = known_models.known_pipeline(config.model.path), config.model
    if not (pipeline.has_own_forward and _adapted_by_ours(model)) or model.sequence_parallel > 1:
        return
    tokens = min((model.resolution // pipeline.decoder.scale // pipeline.patch) ** 2, model.max_sequence_length)
    heads = pipeline.transformer["num_attention_heads"]
    sizes = [size for size in range(2, min(processes, tokens) + 1) if processes % size == heads % size == 0]
    for besides in ({}, {"shard_base": "blocks"}) if model.shard_base == "none" else ({},):
        for members in sizes:
            own = {"sequence_parallel": members, **besides}
            changed = config.model_copy(update={"model": model.model_copy(update=own)})
            if not (not_sharded(changed) or not_in_sequence(changed)):
                yield own


def _set_model(values: Mapping[str, Any], config: Config) -> None:
    for name, value in values.items():
        setattr(config.model, name, value)


def _fewer_prompts(config: Config, processes: int) -> int:
    """The largest number up to a quarter of `rollout.prompts_per_iteration` that training accepts; 0: there is none."""
    rollout = config.rollout
    for prompts in range(rollout.prompts_per_iteration // 4, 0, -1):
        fewer = config.model_copy(update={"rollout": rollout.model_copy(update={"prompts_per_iteration": prompts})})
        if fits_micro_batches(fewer.rollout, config.update.minibatches) and _accepted(fewer, processes):
            return prompts
    return 0


def _remedies(config: Config, gpu_gb: float, processes: int) -> Iterator[str]:
    """Every single change that makes it fit, of sequence groups the smallest; else these with blocks in parts; else the
    shortest prefix of all changes that does; else what is needed."""
    changes = list(_changes(config, processes))
    alone = [name for name, change in changes if _least(config, [change], processes) <= gpu_gb]
    groups = list(_groups(config, processes))
    in_parts = [group for group in groups if "shard_base" in group]
    for tried in ([group for group in groups if group not in in_parts], [] if alone else in_parts):
        fitting = (group for group in tried if _least(config, [partial(_set_model, group)], processes) <= gpu_gb)
        alone += [", ".join(f"model.{name} = {value}" for name, value in group.items()) for group in islice(fitting, 1)]
    if alone:
        yield from (f"set {name}" for name in alone)
        return
    least = math.inf
    for count in range(len(changes) + 1):
        peak = _least(config, [change for _, change in changes[:count]], processes)
        if peak <= gpu_gb:
            yield "set " + ", ".join(name for name, _ in changes[:count])
            return
        least = min(least, peak)
    yield f"no setting makes it fit: {config.model.path} needs {least:.1f} GB; take a larger GPU or a smaller model"


def _least(config: Config, changes: list[Callable[[Config], None]], processes: int) -> float:
    """The smallest peak over all knobs with these changes, GB; infinite where they leave no micro-batch."""
    changed = config.model_copy(deep=True)
    for change in changes:
        change(changed)
    return min((p.peak_gb for p in _Estimate(changed, processes).plans(0.0)), default=math.inf)


def table(plans: list[MemoryPlan]) -> Table:
    """Components by GPU size, in GB; held in the phase of the peak unless in brackets."""
    result = Table(title="GPU memory in GB, estimated; in brackets: not held at the peak", title_justify="left")
    result.add_column("component")
    for each in plans:
        result.add_column(f"{each.gpu_gb:.4g} GB", justify="right")
    result.add_column("decided by")
    by_name = [{c.name: c for c in each.components} for each in plans]
    for name in dict.fromkeys(name for components in by_name for name in components):
        cells = [_cell(components.get(name), each) for components, each in zip(by_name, plans)]
        decided = dict.fromkeys(c[name].decided_by for c in by_name if name in c)
        result.add_row(name, *cells, " | ".join(decided))
    context = [f"{each.peak_gb - (each.peak_gb - _CONTEXT) / (1 + _SLACK):.2f}" for each in plans]
    result.add_row("context, workspaces, allocator's slack", *context, f"{_CONTEXT} GB and {_SLACK:.0%}, an allowance")
    result.add_section()
    if any(each.host_gb for each in plans):
        pinned = (f"({each.host_gb:.2f})" for each in plans)
        result.add_row("pinned memory of the host, for each process", *pinned, "model.offload")
    result.add_row("peak", *(f"{each.peak_gb:.2f}" for each in plans), " | ".join(each.peak_phase for each in plans))
    result.add_row("peak as configured", *(f"{each.configured_gb:.2f}" for each in plans), "settings as they are")
    return result


def _cell(component: Component | None, each: MemoryPlan) -> str:
    if component is None:
        return "-"
    size = f"{component.bytes / GB:.2f}"
    return size if each.peak_phase in component.phases else f"({size})"


def advice(error: BaseException, config: Config, *, processes: int = 1) -> str:
    """What to change after torch.cuda.OutOfMemoryError, in this order, with this run's values.

    Graphs of the update first (they change no bit), the micro-batch (no result but rounding), checkpointing (one more
    forward in the update), then what changes the run: fewer cached patches, fewer images, adapters in fewer blocks.

    Args:
        error: the exception; its own text is quoted, and the card's capacity is read from it where it is given.
    """
    rollout, model = config.rollout, config.model
    steps = []
    if config.update.graphs == "auto" and _captures(config, _capacity_gb(error), processes):
        steps.append("update.graphs = false instead of auto")
    smaller = [micro for micro in _accepted(config, processes) if micro < rollout.micro_batch]
    if smaller:
        steps.append(f"rollout.micro_batch = {smaller[-1]} instead of {rollout.micro_batch}")
    if not model.gradient_checkpointing:
        steps.append("model.gradient_checkpointing = true instead of false")
    steps += [f"{name} instead of {_current(config, name)}" for name, _ in _changes(config, processes)]
    if not steps:
        steps = ["a GPU with more memory: every knob is at its smallest"]
    order = "; ".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return (
        f"out of GPU memory ({_first_sentence(error)}). Try in this order: {order}.{_planned(error, config, processes)}"
    )


def _captures(config: Config, gpu_gb: float | None, processes: int) -> bool:
    """Whether a run captures its update on a GPU of `gpu_gb`; of any size where that is not known."""
    try:
        estimate = _Estimate(config, processes)
    except UserError:  # an architecture that is not known is not captured by itself
        return False
    return estimate.captures and (gpu_gb is None or estimate.peak_with_captured_update() <= gpu_gb)


def _current(config: Config, change: str) -> str:
    value = config
    for part in change.split(" = ")[0].split("."):
        value = getattr(value, part)
    return str(value)


def _first_sentence(error: BaseException) -> str:
    sentences = re.split(
        r"(?<=[a-zA-Z])\. ", str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    )
    return ". ".join(sentences[:2]).rstrip(".")


def _capacity_gb(error: BaseException) -> float | None:
    """Of the card that is full, where the error says it."""
    found = re.search(r"total capacity of ([\d.]+) GiB", str(error))
    return float(found[1]) * 2**30 / GB if found else None


def _planned(error: BaseException, config: Config, processes: int) -> str:
    """The plan for this card, where its capacity is known."""
    capacity = _capacity_gb(error)
    if capacity is None:
        return " `python -m advgrpo.plan` shows what fits which GPU"
    try:
        return f" Plan for {plan(config, capacity, processes=processes).line()}"
    except UserError as unknown:
        return f" No plan: {unknown}"
