"""What the real networks of FLUX.1-dev and Qwen-Image hold, counted on the meta device: weights as they are placed, a
forward of the sampler, a forward and backward of the update, at full size, with the run's own classes.

Blocks in parts are shared out by `fully_shard` itself, as the first of processes that are made up; a gather moves
nothing, but what it is put into is allocated, and let go of, where it would be.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from advgrpo.config import Config
from advgrpo.plan import known_models
from advgrpo.plan.activations import AliveBytes
from advgrpo.policy import sharding
from advgrpo.policy.adapters import network_class
from advgrpo.policy.flux import FluxPolicy, PackedNetwork
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.guidance import GuidedPolicy
from advgrpo.policy.networks import FusedNetwork, StockNetwork
from advgrpo.policy.qwen import QwenNetwork, QwenPolicy
from advgrpo.policy.sharding import BlockSharding
from advgrpo.training.ema import Ema
from advgrpo.training.optimizer import build_optimizer
from advgrpo.types import Conditioning
from advgrpo_kernels import _runtime
from bench import counters  # noqa: F401  knows FP8's product into a given result on the meta device, which PyTorch does not

META = torch.device("meta")
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
FLUX, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"


def flash(query, key, value, **_):
    """What a GPU runs; on meta PyTorch would take the backend that keeps the attention matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def one_of(processes: int) -> SequenceGroup | None:
    """The first of so many processes that share out tokens, in whose exchanges nothing moves."""
    if processes == 1:
        return None
    group = SequenceGroup.__new__(SequenceGroup)
    group.size, group.rank = processes, 0
    group.exchange = lambda x, found, given, taken: None
    return group


class Counting(AliveBytes):
    """`AliveBytes` that also sees storage grow and shrink in place, as FSDP2 does with a gathered parameter's."""

    def resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            self.alive += storage.nbytes() - self._known[id(storage)]
            self._known[id(storage)] = storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def most(self, run) -> int:
        """Bytes alive at once beside those before."""
        before = self.peak = self.alive
        run()
        return self.peak - before


class _MovesNothing(sharding.DefaultAllGather):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        return None


class _SumsNothing(sharding.DefaultReduceScatter):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        return None


@contextlib.contextmanager
def first_of(processes: int):
    """`BlockSharding` of the first of so many processes, of parameters on the meta device."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    collective = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    try:
        made = BlockSharding(
            SimpleNamespace(device=torch.device("cpu"), patient_group=dist.new_group, collective=collective)
        )
        made.device, made._gather, made._sum = META, _MovesNothing(), _SumsNothing()
        yield made
    finally:
        dist.destroy_process_group()


def on_meta(monkeypatch, counting: Counting) -> None:
    """Kernels and attention as on a GPU, and FSDP2 with parameters on the meta device, whose streams are a CPU's."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(_runtime, "DEFAULT_BACKEND", "triton")  # what a GPU runs saves other tensors than the reference
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)
    monkeypatch.setattr(_fully_shard, "_get_device_from_mesh", lambda mesh: META)
    monkeypatch.setattr(_fsdp_param_group.FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage, size):
        found = resize(storage, size)
        counting.resized(storage)
        return found

    monkeypatch.setattr(torch.UntypedStorage, "resize_", resize_and_count)


@dataclass(frozen=True)
class Counted:
    """Bytes on one process."""

    weights: int  # of the network, merged and quantised ones among them, and the LoRA
    moments: int  # the gradient, the optimizer's moments, and the average
    sampled: int  # alive at once in a step of the sampler, with what its prompts are prepared as
    updated: int  # alive at once in a step of the update


def counted(config: Config, monkeypatch, processes: int = 8) -> Counted:
    """Of a preset of FLUX.1 or Qwen-Image with its settings, trained with LoRA."""
    counting, policy = Counting(), _Policy(config)
    on_meta(monkeypatch, counting)
    in_parts = config.model.shard_base != "none"
    with contextlib.ExitStack() as stack:
        sharing = stack.enter_context(first_of(processes)) if in_parts else None
        stack.enter_context(counting)
        policy.network = policy.build(sharing)
        weights = counting.alive
        parameters = list(policy.network.parameters())
        ema = Ema.of(parameters, config.update)
        ours = isinstance(policy.network, FusedNetwork) and not in_parts
        optimizer = build_optimizer([p for _, p in parameters], config.update, ema, fused=ours)
        if not optimizer.optimizer.state:  # PyTorch's makes them at its first step
            for _, p in parameters:
                optimizer.optimizer.state[p] = {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")}
        for _, p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        moments = counting.alive - weights
        latents, step = policy.latents(), torch.zeros(1, dtype=torch.int64, device=META)
        text = policy.text(config.rollout.micro_batch)
        times = torch.empty(config.rollout.num_steps, device=META)

        def prepared():
            return policy.prepare(text, times, guidance=config.rollout.guidance_scale)

        policy._trained = "base"
        with torch.no_grad():
            policy.predict(latents, step, prepared())  # makes the table of rotations, which stays
        policy._trained = "adapted"

        @torch.no_grad()
        def sample():
            prompts = prepared()
            policy.predict(latents, step, prompts)
            if policy.network.has_merged:
                policy.predict_merged(latents, step, prompts)

        def update():
            conditional, unconditional = policy.predict(latents, step, prepared())
            loss = conditional.float().square().sum()
            loss = loss if unconditional is None else loss + unconditional.float().square().sum()
            loss.backward()

        return Counted(weights, moments, counting.most(sample), counting.most(update))


class _Policy(GuidedPolicy):
    """A family's network and guidance, without a pipeline's files."""

    def __init__(self, config: Config):
        self.config, self.pipeline = config, known_models.known_pipeline(config.model.path)
        self.stock = self.pipeline.transformer

    guidance_method = property(
        lambda self: (QwenPolicy if self.pipeline.is_qwen else FluxPolicy).guidance_method.fget(self)
    )

    @property
    def transformer(self):
        return SimpleNamespace(config=SimpleNamespace(**self.stock))

    def build(self, sharing: BlockSharding | None) -> StockNetwork | FusedNetwork:
        model, precision = self.config.model, self.config.rollout.precision
        settings = {name: value for name, value in self.stock.items() if not name.startswith("_")}
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, model.dtype))
        try:
            with META:
                network = network_class(self.stock)(**settings).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        if model.gathers_stock_blocks or model.train == "full":
            with META:
                made = (QwenNetwork if self.pipeline.is_qwen else PackedNetwork)(network, model, 0)
            made.place(META, sharing)
            return made
        sequence = one_of(model.sequence_parallel)
        math = model.model_copy(update={"attention": "math"})
        made = FusedNetwork(network, math, 0, precision=precision, sequence=sequence, sharding=sharing)
        made.transformer._attend = lambda q, k, v, *mask: flash(q, k, v).transpose(1, 2).flatten(2)
        return made

    def latents(self) -> torch.Tensor:
        side = self.config.model.resolution // 8
        return torch.empty(self.config.rollout.micro_batch, 16, side, side, device=META)

    def text(self, rows: int) -> Conditioning:
        tokens, half = (
            self.config.model.max_sequence_length,
            {"dtype": getattr(torch, self.config.model.dtype), "device": META},
        )
        text = torch.empty(rows, tokens, self.stock["joint_attention_dim"], **half)
        pooled = torch.empty(rows, self.stock.get("pooled_projection_dim", 0), **half)
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=META) if self.pipeline.is_qwen else None
        return Conditioning(text, pooled, mask)

    def unconditional(self) -> Conditioning:
        return self.text(1)
