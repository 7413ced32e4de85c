"""A process of the jobs that tests of sequence parallelism start in forks (zygote.py).

FOLDER/job.json says whether all processes are one sequence group, each of which then leaves what `exchanges` gives in
FOLDER/exchanges.PROCESSES.RANK.safetensors; names models, of each of which it leaves what `seen` and `by_rows` give in
FOLDER/NAME.PROCESSES.RANK.safetensors; and runs, each with the checkpoint that it goes on from or null, whose settings
are in FOLDER/NAME.yaml and which leave FOLDER/NAME.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo import config as configuration
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.fused.transformer import (
    ADAPTABLE,
    WEIGHTS,
    FusedTransformer,
    Prepared,
    TransformerConfig,
    Weights,
)
from advgrpo.policy.sharding import BlockSharding
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.mesh import Mesh
from tests.sharding_worker import train

IN_PARTS = "-in-parts"  # the end of a model's key: its blocks lie in parts on all processes
HEADS, TEXT, SIZE = 4, 7, (8, 12)  # 24 image tokens; 7 are no equal shares of several
_SD3 = {"patch_size": 2, "num_layers": 3, "caption_projection_dim": 64, "pos_embed_max_size": 12, "sample_size": 16}
_ROTARY = {"in_channels": 64, "axes_dims_rope": (4, 6, 6)}
STOCK = {
    "sd35-medium": (SD3Transformer2DModel, {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}),
    "sd35-large": (SD3Transformer2DModel, {**_SD3, "qk_norm": "rms_norm"}),
    "sd3-medium": (SD3Transformer2DModel, _SD3),
    "flux": (FluxTransformer2DModel, {**_ROTARY, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": False}),
    "qwen": (QwenImageTransformer2DModel, {**_ROTARY, "out_channels": 16, "num_layers": 3}),
}


def model(name: str, sequence: SequenceGroup | None = None, *, dtype: torch.dtype = torch.float32, **options):
    """A small one of a family, with weights and adapters that all matter, on every process the same."""
    kind, settings = STOCK[name]
    pooled = {} if name == "qwen" else {"pooled_projection_dim": 24}
    stock = kind(num_attention_heads=HEADS, attention_head_dim=16, joint_attention_dim=32, **pooled, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    stock = stock.eval().requires_grad_(False).to(dtype)
    tensors = {name: t.detach() for name, t in [*stock.named_parameters(), *stock.named_buffers()]}
    ours = FusedTransformer(TransformerConfig.from_stock(stock.config), tensors, sequence=sequence, **options)
    lora = ours.adapt(lambda name: name.endswith(ADAPTABLE), rank=4, alpha=8, init="gaussian", seed=0)
    with torch.no_grad():
        lora.master.add_(0.05 * torch.randn(lora.master.shape, generator=generator))
    return ours


_ATEN = torch.ops.aten
# Which argument's rows are those of the result.
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}


class RowByRow(TorchDispatchMode):
    """Inside, a matrix product computes each row alone: libraries block rows by how many there are, and so round."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs, number = kwargs or {}, _PRODUCTS.get(function.overloadpacket)
        if number is None:
            return function(*args, **kwargs)
        rows = args[number].split(1, dim=-2)
        outs = kwargs["out"].split(1, dim=-2) if "out" in kwargs else [None] * len(rows)
        found = []
        for place, (row, out) in enumerate(zip(rows, outs, strict=True)):
            of_row = [a[..., place : place + 1, :] if i < number and a.dim() > 1 else a for i, a in enumerate(args)]
            of_row[number] = row
            found.append(function(*of_row, **(kwargs if out is None else kwargs | {"out": out})))
        return kwargs["out"] if "out" in kwargs else torch.cat(found, dim=-2)


def given(ours: FusedTransformer, name: str) -> tuple[torch.Tensor, torch.Tensor, Prepared]:
    """Latents, the number of a step, and prompts, on every process the same."""
    generator, rows = torch.Generator().manual_seed(2), 3
    latents = torch.randn(rows, 16, *SIZE, generator=generator)
    text = torch.randn(rows, TEXT, 32, generator=generator).to(ours.dtype)
    pooled = torch.randn(rows, 24, generator=generator).to(ours.dtype)
    mask = torch.arange(TEXT) < torch.tensor([7, 3, 5])[:, None] if name == "qwen" else None
    return latents, torch.tensor([1]), ours.prepare(text, pooled, torch.tensor([900.0, 500.0]), mask=mask)


def ways(ours: FusedTransformer) -> list[Weights]:
    """Weights that it has: none are merged where blocks lie in parts."""
    in_parts = any(isinstance(parameter, DTensor) for parameter in ours.linears()[0].parameters())
    return [weights for weights in WEIGHTS if weights != "merged" or not in_parts]


@torch.no_grad()
def by_rows(ours: FusedTransformer, name: str) -> dict[str, torch.Tensor]:
    """Velocities of which no bit depends on how many tokens are computed at once."""
    inputs = given(ours, name)
    with RowByRow():
        return {f"{weights}, by rows": ours.predict(*inputs, weights) for weights in ways(ours)}


def seen(ours: FusedTransformer, name: str) -> dict[str, torch.Tensor]:
    """Velocities by all weights, with and without a gradient, and the gradient: one process's part of it."""
    inputs = given(ours, name)
    if "merged" in ways(ours):
        ours.prepare_merged(fp8=False)
        ours.merge()
    with torch.no_grad():
        found = {weights: ours.predict(*inputs, weights) for weights in ways(ours)}
    velocity = ours.predict(*inputs, "adapted")
    with torch.no_grad():  # as the KL of the update does it
        found["base, before the backward"] = ours.predict(*inputs, "base")
    upstream = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(4))
    velocity.backward(upstream.to(velocity.dtype))
    return found | {"trained": velocity.detach(), "gradient": ours.lora.master.grad}


# q, k and v of 8 heads, of an image's tokens and then its text's.
WHOLE = torch.randn(24 + TEXT, 2, 3, 8, 5, generator=torch.Generator().manual_seed(3))


def exchanges(group: SequenceGroup) -> dict[str, torch.Tensor]:
    """What a process gets of WHOLE by its tokens or heads, and their gradients where WHOLE is that of the result."""
    streams, mine = (24, TEXT), slice(8 // group.size * group.rank, 8 // group.size * (group.rank + 1))
    own = torch.cat([part[group.own(len(part))] for part in WHOLE.split(streams)])
    tokens, attended = own.clone().requires_grad_(), WHOLE[:, :, :, mine].clone().requires_grad_()
    heads, back = group.heads(tokens, streams), group.tokens(attended, streams)
    (of_tokens,) = torch.autograd.grad(heads, tokens, WHOLE[:, :, :, mine])
    (of_heads,) = torch.autograd.grad(back, attended, own)
    image = own[: group.count(24)].clone().requires_grad_()
    gathered = group.gathered(image, 24)
    (of_gathered,) = torch.autograd.grad(gathered, image, WHOLE[:24])
    half = group.heads(tokens.bfloat16(), streams)
    found = {"heads": heads, "bfloat16": half, "tokens": back, "gathered": gathered, "gradient of heads": of_tokens}
    found |= {"gradient of tokens": of_heads, "gradient of gathered": of_gathered}
    return {name: tensor.detach() for name, tensor in found.items()}


def options(settings: dict[str, Any]) -> dict[str, Any]:
    """Of `model`, from JSON."""
    return {name: getattr(torch, value) if name == "dtype" else value for name, value in settings.items()}


def main(arguments: list[str]) -> int:
    """[folder]"""
    folder = Path(arguments[0])
    job = Distributed.start("cpu")
    with job.guard():
        asked, where = json.loads((folder / "job.json").read_text()), f"{job.world_size}.{job.rank}.safetensors"
        group = SequenceGroup(job, Mesh.of(job, job.world_size)) if asked["group"] else None
        if group is not None:
            save_file({n: t.contiguous() for n, t in exchanges(group).items()}, folder / f"exchanges.{where}")
        sharding = BlockSharding(job)
        for key, (name, settings) in asked["models"].items():
            own = options(settings)
            ours = model(name, group, **own, sharding=sharding if key.endswith(IN_PARTS) else None)
            found = seen(ours, name) | by_rows(ours, name)
            job.all_reduce_sum([found["gradient"]])
            save_file(found, folder / f"{key}.{where}")
        for name, checkpoint in asked["runs"].items():
            train(configuration.load(file=folder / f"{name}.yaml"), job, checkpoint)
    job.close()
    return 0
