"""One head of a discriminator on frozen features: its weights, those that its loss sees, those that give the reward.

Shapes: D feature width, H hidden width; w1 [H, D], b1 [H], w2 [1, H], b2 [1], float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device

_INITIAL_POWER_ITERATIONS = 50  # torch.nn.utils.parametrizations.spectral_norm makes 15

Weights = dict[str, torch.Tensor]


class Head:
    """Linear(D, H) -> GELU -> Linear(H, 1) of `score_features`, initialised as torch.nn.Linear is.

    Args:
        width, hidden: D and H.
        seed: of the initialisation.
        reward_ema: decay of the average that gives the reward; 0: what the loss sees does.
        spectral_norm: both linear layers are divided by their largest singular value.

    Attributes:
        weights: what the optimizer steps; their storage stays for the whole run.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        seed: int,
        device: torch.device,
        reward_ema: float = 0.0,
        spectral_norm: bool = False,
    ):
        initial = _initial(width, hidden, seed)
        self.weights = {name: torch.nn.Parameter(tensor.to(device)) for name, tensor in initial.items()}
        self.spectral = SpectralNorm(self.weights["w1"], seed) if spectral_norm else None
        self.average = WeightAverage(self.learning(), reward_ema) if reward_ema else None

    def restart(self, seed: int) -> None:
        """Begin anew from other initial weights, in the storage that is there."""
        initial = _initial(self.weights["w1"].shape[1], len(self.weights["b1"]), seed)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(to_device(initial[name], parameter.device))
        if self.spectral is not None:
            self.spectral.restart(self.weights["w1"], seed)
        if self.average is not None:
            self.average.restart(self.learning())

    def learning(self) -> Weights:
        """The weights that the loss sees, differentiable in `weights`."""
        return self.weights if self.spectral is None else self.spectral.normalised(self.weights)

    def rewarding(self) -> Weights:
        """The weights that score images for the reward."""
        return self.learning() if self.average is None else self.average.weights

    def stepped(self) -> None:
        """Hear that the optimizer has stepped; runs inside captured graphs (`base.Adversary`)."""
        if self.spectral is not None:
            self.spectral.iterate(self.weights["w1"])
        if self.average is not None:
            self.average.update(self.learning())

    def state_dict(self) -> Weights:
        """Everything the next update and the next reward depend on, detached."""
        found = {name: p.detach() for name, p in self.weights.items()}
        for part in (self.spectral, self.average):
            found |= {} if part is None else part.state_dict()
        return found


class WeightAverage:
    """The mean of a head's weights over its updates, which becomes an exponential one.

    After update n, with a = max(1 - decay, 1/n):  average += a · (weights - average)

    So the initial weights, which judge nothing, leave with the first update, and from update 1/(1 - decay) on older
    ones fade by `decay` per update. (torch.optim.swa_utils has both halves; Adam's bias correction is another way to
    join them.)
    """

    def __init__(self, weights: Weights, decay: float):
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.updates = torch.zeros((), device=weights["w1"].device)  # float32: a graph divides by it

    @torch.no_grad()
    def restart(self, weights: Weights) -> None:
        """Forget the updates."""
        self.updates.zero_()
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Take in the weights after an update."""
        self.updates.add_(1)
        share = self.updates.reciprocal().clamp_min(1 - self.decay)
        for name, average in self.weights.items():
            average.lerp_(weights[name], share)

    def state_dict(self) -> Weights:
        """Tensors named average.NAME, and average.updates."""
        return {f"average.{name}": tensor for name, tensor in {**self.weights, "updates": self.updates}.items()}


class SpectralNorm:
    """Both layers of a head divided by their largest singular value (arXiv 1802.05957, eqs. 8-11).

    w1's is uᵀ w1 v, where u [H] and v [D] come nearer to its singular vectors by one power iteration per update, and
    are constants for the gradient. w2 is one row, whose only singular value is its length. Scores then change by at
    most 1.13 (GELU's steepest slope) times what the feature does.
    """

    def __init__(self, w1: torch.Tensor, seed: int):
        self.u, self.v = w1.new_empty(w1.shape[0]), w1.new_empty(w1.shape[1])
        self.restart(w1, seed)

    @torch.no_grad()
    def restart(self, w1: torch.Tensor, seed: int) -> None:
        """Begin from a random vector; far more iterations than the vectors then need to follow the weights."""
        start = torch.randn(len(self.u), generator=rng.generator(seed, "spectral_norm"))
        self.u.copy_(to_device(F.normalize(start, dim=0), w1.device))
        for _ in range(_INITIAL_POWER_ITERATIONS):
            self.iterate(w1)

    @torch.no_grad()
    def iterate(self, w1: torch.Tensor) -> None:
        """One power iteration."""
        self.v.copy_(F.normalize(w1.T @ self.u, dim=0))
        self.u.copy_(F.normalize(w1 @ self.v, dim=0))

    def normalised(self, weights: Weights) -> Weights:
        """The weights with w1 and w2 divided."""
        w1, w2 = weights["w1"], weights["w2"]
        return {**weights, "w1": w1 / torch.dot(self.u, w1 @ self.v), "w2": w2 / w2.norm()}

    def state_dict(self) -> Weights:
        """The vectors."""
        return {"spectral.u": self.u, "spectral.v": self.v}


def _initial(width: int, hidden: int, seed: int) -> Weights:
    """On the CPU, whatever device the head is for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, 1)
    tensors = {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias}
    return {name: tensor.detach() for name, tensor in tensors.items()}
