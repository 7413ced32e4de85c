"""Merged weights alone, in our forward, whole beside a base in parts: `rollout.precision fp8` of one.

What is trained, and what the window's steps run, stays in the network's own blocks (sharding.py), so that likelihoods
repeat. ODE steps have none: they run this copy, which is what our forward has as "merged" where the base is whole
(fused/transformer.py), the same bits, and gather nothing. e4m3 with a scale for each row in the linears of all blocks
but the first and the last; those two, the modulation and what is outside of blocks in the model's dtype.

It holds no frozen weight beside the merged one: `merge` gathers a block after the other, adds its adapters and writes
its rows, so that no process ever has the whole base in the model's dtype. Of a base in e4m3 (fp8_base.py) the codes of
linears without an adapter are taken over; the others are read in the model's dtype, merged and quantised again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

import torch
from diffusers import ModelMixin
from torch import nn

from advgrpo.policy.adapters import LoraAdapters, block_names, block_of
from advgrpo.policy.fp8_base import Fp8Linear
from advgrpo.policy.fused.linear import as_written
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig, merge_error
from advgrpo_kernels import Fp8Tensor, fp8_quantize, merge_lora

_UNDER_ADAPTER = ".base_layer"  # PEFT's name for what an adapter stands beside
_OUTSIDE = ""  # the network itself, of which only what is outside of blocks is gathered


class MergedCopy:
    """See the module's docstring. Where the base is in parts, its methods are for all processes at the same place.

    Args:
        network: of an architecture that our forward computes, with adapters, its frozen weights whole or in parts.
        adapters: of it, read when they are merged.
        gathered: module -> context within which all of that module's own weights are here.
        attention: name of fused/attention.py.
    """

    def __init__(
        self,
        network: ModelMixin,
        adapters: LoraAdapters,
        gathered: Callable[[nn.Module], AbstractContextManager[None]],
        attention: str,
    ):
        self._network, self._adapters, self._gathered = network, adapters, gathered
        self._linears = _frozen_linears(network)
        config = TransformerConfig.from_stock(network.config)
        tensors = self._small_tensors(set(chain.from_iterable(config.modulation)))
        self.transformer = FusedTransformer(config, tensors, attention=attention)
        self._rows = self.transformer.hold_merged_alone()
        self._by_unit: dict[str, list[str]] = {}
        for name in self._rows:
            self._by_unit.setdefault(_unit(name), []).append(name)
        self._merged_of: tuple[int, ...] = ()  # `as_written` of the adapters
        self.merge()

    def _small_tensors(self, modulation: set[str]) -> dict[str, torch.Tensor]:
        """What our forward takes, by stock name; of weights that `_rows` is for the shapes, on the meta device."""
        tensors, dtype = dict(self._network.named_buffers()), self._network.dtype
        for name, linear in self._linears.items():
            if _unit(name) != _OUTSIDE or name in modulation:
                shape = linear.out_features, linear.in_features
                tensors[f"{name}.weight"] = torch.empty(shape, dtype=dtype, device="meta")
        for unit in [*block_names(self._network), _OUTSIDE]:
            module = self._network.get_submodule(unit)
            with self._gathered(module):
                for own, parameter in module.named_parameters(prefix=unit):
                    name = own.replace(_UNDER_ADAPTER, "")
                    if _unit(name) == unit and not parameter.requires_grad and name not in tensors:
                        tensors[name] = parameter.detach().clone()
        return tensors

    @torch.no_grad()
    def merge(self) -> None:
        """W + (alpha/r)·B·A of the linears with adapters, rounded once, in place; nothing where adapters are as they
        were, since evaluations ask before every few prompts."""
        adapted, filled = self._adapters.modules(), bool(self._merged_of)
        merging_of = as_written(chain.from_iterable(adapted.values()))
        if merging_of == self._merged_of:
            return
        for unit, names in self._by_unit.items():
            if filled and adapted.keys().isdisjoint(names):
                continue
            with self._gathered(self._network.get_submodule(unit)):
                for name in [] if filled else [name for name in names if name not in adapted]:
                    self._copy(name)
                self._merge([name for name in names if name in adapted])
        self._merged_of = merging_of

    def _copy(self, name: str) -> None:
        """The weight of a linear without an adapter, gathered, into its rows."""
        rows, linear = self._rows[name], self._linears[name]
        if isinstance(rows, torch.Tensor):
            rows.copy_(linear.weight)
            return
        codes = Fp8Tensor(linear.weight, linear.scale) if isinstance(linear, Fp8Linear) else fp8_quantize(linear.weight)
        rows.data.copy_(codes.data)
        rows.scale.copy_(codes.scale)

    def _merge(self, names: list[str]) -> None:
        """The weights of linears with adapters, gathered, merged into their rows."""
        pairs = self._adapters.modules()
        columns = [(self._weight(name), *(each.detach() for each in pairs[name]), self._rows[name]) for name in names]
        plain = [each for each in columns if isinstance(each[-1], torch.Tensor)]
        quantised = [each for each in columns if isinstance(each[-1], Fp8Tensor)]
        if plain:
            weights, a, b, outs = zip(*plain, strict=True)
            merge_lora(weights, a, b, self._adapters.scale, outs=outs)
        if quantised:
            weights, a, b, outs = zip(*quantised, strict=True)
            merge_lora(weights, a, b, self._adapters.scale, fp8=outs)

    def _weight(self, name: str) -> torch.Tensor:
        """[N, K] of a linear, gathered, in the model's dtype."""
        linear = self._linears[name]
        if isinstance(linear, Fp8Linear):
            return Fp8Tensor(linear.weight, linear.scale).dequantize().to(self.transformer.dtype)
        return linear.weight.detach()

    @torch.no_grad()
    def merge_error(self) -> torch.Tensor:
        """`transformer.merge_error` of one adapted linear, in the middle of the model, in e4m3 where any is."""
        pairs = self._adapters.modules()
        adapted = [name for name in self._rows if name in pairs]
        quantised = [name for name in adapted if isinstance(self._rows[name], Fp8Tensor)]
        chosen = quantised or adapted
        name = chosen[len(chosen) // 2]
        with self._gathered(self._network.get_submodule(_unit(name))):
            return merge_error(self._weight(name), pairs[name], self._adapters.scale, self._rows[name])


def _unit(name: str) -> str:
    """The block that a module or parameter of that stock name is in, which is gathered at once."""
    place = block_of(name)
    return _OUTSIDE if place is None else place[0]


def _frozen_linears(network: ModelMixin) -> dict[str, nn.Linear | Fp8Linear]:
    """By stock name, those under an adapter, too."""
    return {
        name.replace(_UNDER_ADAPTER, ""): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear) and not module.weight.requires_grad
    }
