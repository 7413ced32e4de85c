"""LoRA weights as one float32 vector, with the names and file format of PEFT and diffusers.

The adapters of all linears lie one after the other in one trainable vector: one tensor to reduce over processes, to
step, to average and to cast to the compute dtype. Linears that read the same input are stacked (q, k and v), so their A
is one matrix product.

Shapes, per stacked linear: g parts of n outputs each over K inputs, rank r: A [g, r, K], B [g, n, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from advgrpo.errors import UserError
from advgrpo.runtime import rng

Pair = tuple[torch.Tensor, torch.Tensor]  # A [g, r, K], B [g, n, r]


@dataclass(frozen=True)
class StackedAdapter:
    """The adapters of linears that read the same input."""

    names: tuple[str, ...]  # g stock module names
    in_features: int
    out_features: int  # of each part

    def sizes(self, rank: int) -> tuple[int, int]:
        """Elements of A and of B."""
        return len(self.names) * rank * self.in_features, len(self.names) * self.out_features * rank


def initial_pair(name: str, in_features: int, out_features: int, rank: int, init: str, seed: int) -> Pair:
    """(A [r, K], B [n, r] = 0) of the module `name`, keyed by (seed, name): any set of targets starts the same.

    "gaussian" is PEFT's: standard deviation 1/r. "kaiming" is torch.nn.Linear's default, uniform in ±1/sqrt(K).
    """
    generator = rng.generator(seed, f"lora_init:{name}")
    a = torch.empty(rank, in_features)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
    else:
        bound = in_features**-0.5
        a.uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(out_features, rank)


class LoraWeights:
    """The trainable vector `master` and its views."""

    def __init__(self, adapters: Sequence[StackedAdapter], *, rank: int, alpha: float, init: str, seed: int, device):
        self.adapters, self.rank, self.alpha = list(adapters), rank, alpha
        self._sizes = [size for adapter in self.adapters for size in adapter.sizes(rank)]
        self.master = torch.nn.Parameter(torch.zeros(sum(self._sizes), dtype=torch.float32, device=device))
        if self.master.is_meta:
            return
        for name, (a, b) in self.modules().items():
            start_a, start_b = initial_pair(name, a.shape[1], b.shape[0], rank, init, seed)
            a.copy_(start_a)
            b.copy_(start_b)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def pairs(self, dtype: torch.dtype) -> list[Pair]:
        """(A, B) of every stacked linear in the compute dtype: one cast, then views; differentiable."""
        return self._views(self.master.to(dtype))

    def _views(self, vector: torch.Tensor) -> list[Pair]:
        parts = iter(vector.split(self._sizes))
        shapes = ((len(a.names), a.in_features, a.out_features) for a in self.adapters)
        return [(next(parts).view(g, self.rank, k), next(parts).view(g, n, self.rank)) for g, k, n in shapes]

    def modules(self, vector: torch.Tensor | None = None) -> dict[str, Pair]:
        """Stock module name -> (A [r, K], B [n, r]): views of the master, detached, or of a vector laid out like it."""
        views = self._views(self.master.detach() if vector is None else vector)
        return {
            name: (a[part], b[part])
            for adapter, (a, b) in zip(self.adapters, views)
            for part, name in enumerate(adapter.names)
        }

    def state_dict(self, vector: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """PEFT's names without a prefix: MODULE.lora_A.weight [r, K] and MODULE.lora_B.weight [n, r], float32."""
        state = {}
        for name, (a, b) in self.modules(vector).items():
            state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Overwrite the master with `state`, which must hold exactly these adapters.

        Raises:
            UserError: other modules or shapes; names the first, and `source`.
        """
        own = self.state_dict()
        check_lora_state(own, state, source)
        for name, view in own.items():
            view.copy_(state[name])

    def name_at(self, index: int) -> str:
        """The stock module that element `index` of the master belongs to."""
        for adapter in self.adapters:
            for size in adapter.sizes(self.rank):
                if index < size:
                    return adapter.names[index * len(adapter.names) // size]
                index -= size
        raise IndexError(index)


def check_lora_state(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: str) -> None:
    """UserError unless `state` has exactly the names and shapes of `own`."""
    for name in sorted(own.keys() ^ state.keys()):
        where = "is missing" if name in own else "is not adapted in this run"
        raise UserError(f"{source}: {name} {where}; set model.lora.targets, rank and blocks as it was trained with")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} is {list(state[name].shape)}, this run has {list(tensor.shape)}; set "
                "model.lora.rank as it was trained with"
            )
