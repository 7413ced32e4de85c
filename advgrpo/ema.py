"""Exponential moving average of the trained parameters, for evaluation and export."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from advgrpo.errors import UserError


class Ema:
    """`average = decay·average + (1-decay)·parameter`, once per optimizer step; starts at the parameters' values.

    Args:
        parameters: (name, float32 tensor) pairs, as `module.named_parameters()` gives them. They are kept by reference:
            their storage is written only inside `swap`.
        decay: in [0, 1); 0 follows the parameters exactly.

    Raises:
        ValueError: no parameters, a repeated name, a dtype other than float32 (an average in bfloat16 stops moving: at
            decay 0.999 its steps are below half an ulp), or a decay outside [0, 1).
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
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
        self.decay = decay
        self._averages = {name: parameter.detach().clone() for name, parameter in pairs}
        self._swapped = False

    @torch.no_grad()
    def step(self) -> None:
        """Move the average towards the parameters; call it right after `optimizer.step()`."""
        self._refuse_if_swapped()
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - self.decay)

    def averages_for_update(self) -> dict[str, Tensor]:
        """The averages by name, for an optimizer step that moves them itself."""
        self._refuse_if_swapped()
        return self._averages

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Inside, the parameters hold the averages in the same storage; after, their own values again, bit for bit."""
        self._refuse_if_swapped()
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._swapped = True
        try:
            self._write(list(self._averages.values()))
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
