"""Exponential moving average of the trained parameters, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from advgrpo.config import UpdateSection
from advgrpo.errors import UserError

INTERVAL = 8  # global steps between the averages of the mini-batch rule


class Ema:
    """`average = decay·average + (1-decay)·parameter`; starts at the parameters' values.

    By default once per optimizer step. With `mini_batches` = n as in Flow-GRPO's code, which Adv-GRPO's uses: after
    each of the n mini-batches whose gradients make an optimizer step, the last of which takes it, while s + 1 is a
    multiple of 8 at global step s, with min(decay, (1 + s)/(10 + s)). So where a step is due, it averages n - 1 times
    the weights before it, or once those after it.

    Args:
        parameters: (name, float32 tensor) pairs, as `module.named_parameters()` gives them. They are kept by reference:
            their storage is written only inside `swap`.
        decay: in [0, 1); 0 follows the parameters exactly.
        mini_batches: of an optimizer step; 0 averages once per optimizer step.

    Attributes:
        global_step: optimizer steps so far, and whatever else the trainer counts as steps: iterations that train the
            reward alone.

    Raises:
        ValueError: no parameters, a repeated name, a dtype other than float32 (an average in bfloat16 stops moving: at
            decay 0.999 its steps are below half an ulp), or a decay outside [0, 1).
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float, *, mini_batches: int = 0) -> None:
        pairs = list(parameters)
        self._parameters = dict(pairs)
        if not pairs or len(self._parameters) != len(pairs):
            raise ValueError(
                f"parameters must be at least one pair with different names, got {[name for name, _ in pairs]}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        for name, parameter in pairs:
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name} is {parameter.dtype}; the average is kept in float32 only")
        self.decay, self.mini_batches, self.global_step = decay, mini_batches, 0
        self._averages = {name: parameter.detach().clone() for name, parameter in pairs}
        self._swapped = False

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]], section: UpdateSection) -> Ema:
        """As section `update` says."""
        mini_batches = section.ema_mini_batches if section.ema_rule == "mini_batch" else 0
        return cls(parameters, section.ema_decay, mini_batches=mini_batches)

    def before_step(self) -> None:
        """Call it before `optimizer.step()`: averages what the mini-batches before the last look at."""
        if self.mini_batches > 1:
            self._move(self._kept(self.mini_batches - 1))

    def count_step(self) -> float:
        """Count the optimizer step; the share of the average that the look after it keeps, 1 where it is not due."""
        self.global_step += 1
        return self._kept(1) if self.mini_batches else self.decay

    def step(self) -> None:
        """Count the step and average; call it right after `optimizer.step()`."""
        self._move(self.count_step())

    def _kept(self, looks: int) -> float:
        """What mini-batches' looks at the same weights keep of the average at this global step."""
        if (self.global_step + 1) % INTERVAL:
            return 1.0
        return min(self.decay, (1 + self.global_step) / (10 + self.global_step)) ** looks

    @torch.no_grad()
    def _move(self, kept: float) -> None:
        self._refuse_if_swapped()
        if kept < 1:
            torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - kept)

    def average(self, kept: float) -> None:
        """Keep `kept` in [0, 1] of the average, for a rule that is the caller's; the steps are not counted."""
        self._move(kept)

    def averages_for_update(self) -> dict[str, Tensor]:
        """The averages by name, for an optimizer step that moves them itself."""
        self._refuse_if_swapped()
        return self._averages

    @contextmanager
    def swap(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Inside, the parameters hold the averages in the same storage; after, their own values again, bit for bit.

        `values`: others in the averages' place, by parameter name.
        """
        self._refuse_if_swapped()
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._swapped = True
        try:
            held = self._averages if values is None else values
            self._write([held[name] for name in self._parameters])
            yield
        finally:
            self._write(own)
            self._swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name: the live tensors, to be copied or saved at once."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, bit for bit.

        Raises:
            UserError: other names, shapes or dtypes than this run's parameters.
        """
        if state.keys() != self._averages.keys():
            different = sorted(state.keys() ^ self._averages.keys())
            raise UserError(f"the checkpoint's EMA is of another model: {different[0]!r} is only in one of the two")
        for name, average in self._averages.items():
            saved = state[name]
            if saved.shape != average.shape or saved.dtype != average.dtype:
                raise UserError(
                    f"the checkpoint's EMA of {name!r} is {saved.dtype} {list(saved.shape)}, this run's is "
                    f"{average.dtype} {list(average.shape)}: resume with the configuration it was written with"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(list(self._parameters.values()), values)

    def _refuse_if_swapped(self) -> None:
        if self._swapped:
            raise RuntimeError("the parameters hold the averages now: leave swap() first")
