"""What a run keeps in GPU memory, component by component and phase by phase: the estimate behind the plan.

Every figure is estimated until measured on a GPU: weights are counted on the meta device, activations follow
activations.py, the context and the allocator's slack are allowances. 1 GB is 10^9 bytes; a card holds a little more
than its nominal size, which is part of the margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from advgrpo.config import Config, unevenly_sharded
from advgrpo.plan import known_models
from advgrpo.plan.activations import TransformerShape, decode_bytes, encode_bytes
from advgrpo.plan.captured import needs_room, why_no_graphs, why_not_captured, why_not_fused, why_not_ours
from advgrpo.plan.component import PHASES, Component
from advgrpo.plan.judges import Judges
from advgrpo.plan.work import drawn_steps, efficiency, learning, micro_batches
from advgrpo.policy.fused.decoder import GATED_IMAGES, decoded_at_once

GB = 1e9
CONTEXT = 1.2  # GB: CUDA context, cuBLAS and cuDNN workspaces, NCCL
SLACK = 0.05  # of what is allocated: the allocator's rounding and fragmentation
_SMS = 132  # streaming multiprocessors of an H100 or H200
_TILE = (128, 256)  # rows and columns of a matrix product that one of them computes at a time


@dataclass(frozen=True)
class Knobs:
    """What the plan chooses: settings of training, nothing else."""

    micro_batch: int
    gradient_checkpointing: bool

    def __str__(self) -> str:
        checkpointing = "true" if self.gradient_checkpointing else "false"
        return f"rollout.micro_batch = {self.micro_batch}, model.gradient_checkpointing = {checkpointing}"


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
        return held / GB * (1 + SLACK) + CONTEXT

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


def accepted(config: Config, processes: int) -> list[int]:
    """Micro-batches up to the configured one that so many processes may train with, ascending."""
    sizes = micro_batches(config.rollout, config.update.minibatches)
    return [size for size in sizes if not unevenly_sharded(config, processes, micro_batch=size)]


class Estimate:
    """Everything that does not depend on the knobs, counted once."""

    def __init__(self, config: Config, processes: int):
        self.config, self.processes = config, processes
        self.pipeline = known_models.known_pipeline(config.model.path)
        self.lora = config.model.train == "lora"
        self.sharded = config.model.is_sharded(processes)
        self.is_ours = config.fast and not why_not_ours(config.model, self.pipeline.kind)
        self.fused = not why_not_fused(config, self.pipeline.kind)
        self.graphs = self.fused and not why_no_graphs(config.model)
        self.judges = Judges(config, processes, graphs=self.graphs)
        self.uncounted = self.judges.uncounted
        unknown = bool(self.uncounted) and needs_room(config)
        self.captures = not why_not_captured(config, self.pipeline.kind) and not unknown
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
        optional = self.captures and needs_room(self.config)
        return planned(captured=False) if optional and not found.fits else found

    def _knobs(self) -> Iterator[Knobs]:
        rollout, update = self.config.rollout, self.config.update
        kept = round(rollout.group_size * update.informative_share)
        for micro in accepted(self.config, self.processes):
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
        judges = self.judges.components(knobs.micro_batch, self.judged(knobs))
        return tuple(c for c in (*self._weights(), *judges, *self._activations(knobs, captured)) if c.bytes)

    def _weights(self) -> Iterator[Component]:
        config, weights = self.config, self.weights
        dtype = f"model.path, model.dtype = {config.model.dtype}"
        if self.sharded:
            yield Component(
                "share of the transformer", self._count_share().held, f"{dtype}, model.base_precision, processes"
            )
            yield self._fp8_weight()
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

    def _gathered(self, knobs: Knobs, forward: int, backward: int) -> Iterator[Component]:
        """What is gathered of a base in parts: what is outside of blocks but by our forward, and blocks.

        Forward, the one that runs is there twice, as a parameter and as what its gather gave, which FSDP2 lets go of
        with the next one's, and that is on its way. Backward, the one that runs and the one before it are there once;
        where they are trained, also its gradient, and that of the one after it until it is summed. An update is at its
        largest where these and what is saved until then are.

        Args:
            forward, backward: bytes alive at once in a pass, beside what is saved.
        """
        if not self.sharded:
            return
        share, shape, sequences = self._count_share(), self.shape, knobs.micro_batch * self.guided
        decides, checkpointing = "model.shard_base = blocks", knobs.gradient_checkpointing
        around = list(zip([0, *share.blocks], share.blocks, [*share.blocks[1:], 0]))
        running = [2 * block + following for _, block, following in around]
        yield Component("gathered blocks, sampling", share.outside + max(running), decides, ("sample",))
        kept = shape.kept_after(checkpointing=checkpointing)
        there = max(held + sequences * each for held, each in zip(running, kept, strict=True))
        saved = shape.saved_at(checkpointing=checkpointing)
        learned = [before + block + (0 if self.lora else block + after) for before, block, after in around]
        learned = learned[shape.first_trained :]
        back = max(held + sequences * each for held, each in zip(learned, saved, strict=True))
        most = max(forward + there, backward + back) - backward - sequences * max(saved)
        yield Component("gathered blocks, training", share.outside + most, decides, ("update",))

    @property
    def _draws_with_adapters(self) -> bool:
        """Whether some step of the sampler has adapters beside frozen weights: by our forward the window's, and all
        where nothing is merged."""
        window = self.config.objective.has_window and self.config.rollout.window_forward != "merged"
        return window or self.sharded

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
        adapters = self.element * self.weights.lora if self.fused else 0  # theirs in the model's dtype, while they run
        forward = sequences * (max(path.forward_bytes() for path in paths) + 4 * latents) + modulation
        forward += adapters if self._draws_with_adapters else 0
        graphs = self.graphs  # a captured one keeps its pool for as long as it may run
        name = "sampler's forward, in the CUDA graphs' pool" if graphs else "sampler's forward"
        yield Component(name, forward, decides, ("sample", *held) if graphs else ("sample",))
        if config.objective.learns_from_references:  # one image at a time (training/supervised.py)
            encode = encode_bytes(self.pipeline.decoder, resolution)
            yield Component("encoding a reference", encode, "model.resolution", ("update",))
        decode = self._decoding_bytes(knobs.micro_batch)
        decided = "model.resolution, rollout.micro_batch, rollout.decode_stream"
        yield Component("decoding", decode, decided, self._decoding_phases())
        both = "rollout.micro_batch, model.gradient_checkpointing, model.lora.blocks"
        saved = sequences * shape.saved_bytes(checkpointing=knobs.gradient_checkpointing)
        during = ("sample", *held) if captured else ("update",)  # in the graphs' pool, always
        yield Component("activations saved for the backward", saved, both, during)
        backward = sequences * shape.backward_bytes() + adapters
        yield Component("gradients within the backward", backward, decides, during)
        yield from self._gathered(knobs, sequences * shape.forward_bytes() + adapters, backward)
        if captured:
            yield Component(
                "the same, while graphs of the update are made", saved + backward, "update.graphs", ("update",)
            )
