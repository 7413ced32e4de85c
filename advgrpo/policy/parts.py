"""What of trained weights that lie in parts on all processes is of the whole: norms, sizes, gathers.

A policy of another kind than ours needs none of it: `parts_of` is then None, and each process has all of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from advgrpo.runtime.distributed import Distributed

_PIECE = 1 << 24  # elements that are copied to float64 at a time, 128 MiB


class Parts:
    """How trained weights lie on the processes of a job: rows of each, in the order of the ranks.

    Args:
        trained: this process's rows of every parameter, by name, in the policy's order.
        shapes: of the whole parameters.
    """

    def __init__(
        self,
        distributed: Distributed,
        trained: Mapping[str, torch.nn.Parameter],
        shapes: Mapping[str, torch.Size],
    ):
        self.distributed, self.trained, self.shapes = distributed, dict(trained), dict(shapes)

    @property
    def elements(self) -> int:
        """Of all parameters, over all processes."""
        return sum(shape.numel() for shape in self.shapes.values())

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """L2 norm, a float32 scalar, of tensors whose rows all processes share; the same on each, and NaN if one is.

        Squares are summed in float64, as `multi_tensor_adamw` sums those of whole gradients: in float32 the square of a
        norm beyond 2**64 is infinite, and of one below 2**-75 it is 0.
        """
        pieces = (piece for tensor in tensors for piece in tensor.flatten().split(_PIECE))
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        square = torch.stack(norms).square().sum()
        return self.distributed.all_gather(square[None]).sum().sqrt().float()

    def gathered(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of this process's rows of parameter `name`; a collective."""
        whole = self.distributed.all_gather(part)
        if whole.shape != self.shapes[name]:
            raise RuntimeError(f"the parts of {name} make {list(whole.shape)}, not {list(self.shapes[name])}")
        return whole

    @contextlib.contextmanager
    def lent(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within it the parameters hold `values`, by name, and these hold the parameters' own: no third copy is made.

        A backward pass gathers the weights anew, so one that is to come may wait outside.
        """
        self._exchange(values)
        try:
            yield
        finally:
            self._exchange(values)

    @torch.no_grad()
    def _exchange(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            own = parameter.detach().clone()
            parameter.copy_(values[name])
            values[name].copy_(own)
        device = self.distributed.device
        if device.type == "cuda":  # gathers of a backward pass run on a stream that does not wait for this one
            torch.cuda.current_stream(device).synchronize()


def parts_of(policy: object) -> Parts | None:
    """How what a policy trains lies on the processes; None where each has all of it."""
    return getattr(policy, "parts", None)
