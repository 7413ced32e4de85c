"""Guidance over any network, in the ways that families have: a policy names its `GuidanceMethod`.

    method           rows       at scale s
    CLASSIFIER_FREE  2, or 1    (1 - s) u + s c, which the kernels of the step and the loss combine; 1 row at s = 1
    EMBEDDED         1          the network is told s, 1 like any other number
    Rescaled         2, or 1    the same as the first, each token then as long as c there: combined here, 1 row at s = 1

with c and u the conditional and the unconditional prediction. Of two rows the unconditional ones come first, one for
each conditional row, in one forward. The third is not affine in c and u, so that what comes after it, likelihoods among
it, sees one prediction, and gradients go through `rescaled_guidance`.

Apart from `diffusers_policy.py`, so that the benchmark at full size can use it without diffusers.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from advgrpo.policy.base import Prediction, PreparedPrompts
from advgrpo.policy.fused.transformer import Weights
from advgrpo.types import Conditioning

Own = TypeVar("Own")


class NetworkPrompts(PreparedPrompts, Protocol):
    """Prepared rows of a network, by tensors that can be exchanged."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything it holds on the device, by name."""
        ...

    def with_tensors(self: Own, tensors: dict[str, torch.Tensor]) -> Own:
        """The same over other tensors of the same shapes."""
        ...


class _RescaledGuidance(torch.autograd.Function):
    """See `rescaled_guidance`. With w = (1 - s) u + s c, n = w / |w|, m = c / |c| and ρ = |c| / |w| per token, and the
    gradient g of the result ρ w = |c| n:

        gradient of w   ρ (g - n ⟨n, g⟩), since a token's length is not w's own
        gradient of c   s times that, and m ⟨n, g⟩ for the length
        gradient of u   (1 - s) times that
    """

    @staticmethod
    def forward(ctx, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, patch: int) -> torch.Tensor:
        combined = torch.lerp(unconditional, conditional, scale)
        length, own = _token_norm(conditional, patch), _token_norm(combined, patch)
        ctx.scale, ctx.patch = scale, patch
        ctx.save_for_backward(conditional, combined, length, own)
        return combined * (length / own)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        (gradient,) = gradients
        conditional, combined, length, own = ctx.saved_tensors
        direction = combined / own
        along = _token_sum(direction * gradient, ctx.patch)
        of_combined = (gradient - direction * along) * (length / own)
        of_length = conditional * torch.where(length > 0, along / length, 0.0)  # a length's subgradient at 0
        return ctx.scale * of_combined + of_length, (1 - ctx.scale) * of_combined, None, None


def _token_sum(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[R, 1, H, W] sums of x [R, C, H, W] over each token's channels and `patch` x `patch` latents, at all of them."""
    rows, _, height, width = x.shape
    sums = x.reshape(rows, -1, height // patch, patch, width // patch, patch).sum((1, 3, 5), keepdim=True)
    return sums.expand(-1, -1, -1, patch, -1, patch).reshape(rows, 1, height, width)


def _token_norm(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[R, 1, H, W] lengths of the tokens of x [R, C, H, W], at all of a token's latents."""
    return _token_sum(x.square(), patch).sqrt()


def rescaled_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, patch: int) -> torch.Tensor:
    """(1 - s) u + s c with every token as long as it is in c: diffusers' QwenImagePipeline at true_cfg_scale s.

    Args:
        conditional, unconditional: c and u, [R, C, H, W] of one dtype; computed in float32. Differentiable in both.
        scale: s.
        patch: latents of a token's side; a token is the vector of C·patch² numbers at one place.

    Returns:
        [R, C, H, W] float32; not finite where a token of (1 - s) u + s c is zero, as the pipeline's.
    """
    return _RescaledGuidance.apply(conditional.float(), unconditional.float(), scale, patch)


@dataclass(frozen=True)
class GuidanceMethod:
    """How a scale becomes a prediction; the module's docstring has all of them.

    Args:
        embedded: the network is told the scale, whose one prediction is guided.
        rescaled_patch: latents of the side of a token that keeps its length; 0: what is combined is not rescaled.
    """

    embedded: bool = False
    rescaled_patch: int = 0

    def has_two_rows(self, scale: float) -> bool:
        return scale != 1.0 and not self.embedded

    def combined(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> Prediction:
        """Of predictions [R, C, H, W] at `scale`: what `Generator.predict` returns."""
        if not self.rescaled_patch:
            return conditional, unconditional
        return rescaled_guidance(conditional, unconditional, scale, self.rescaled_patch), None


CLASSIFIER_FREE = GuidanceMethod()
EMBEDDED = GuidanceMethod(embedded=True)


N = TypeVar("N", bound=NetworkPrompts)


class Network(Protocol[N]):
    """A way to run one network, with the trained weights, the frozen ones or the merged ones."""

    def prepare(
        self,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> N:
        """What the steps at `timesteps` [T] need of text [R, L, D] and pooled [R, E].

        Args:
            guidance: of a network that is told it.
            mask: [R, L] bool, the text tokens that are attended to; None: all.
        """
        ...

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: N, weights: Weights) -> torch.Tensor:
        """[R, C, H, W] in the model's dtype at step number `step`, int64 [1] on the device, or [R] for one per row."""
        ...

    def merge(self) -> None:
        """Bring merged weights up to date; nothing where there are none."""
        ...

    def merge_error(self) -> torch.Tensor | None:
        """See `Trainable.merge_error`."""
        ...


@dataclass
class Guided:
    """A network's prepared rows; with guidance the unconditional ones come first, one for each conditional row."""

    rows_of_network: NetworkPrompts
    count: int  # prompts
    guided: bool  # by two rows
    scale: float

    def rows(self, index: torch.Tensor) -> Guided:
        both = torch.cat([index, index + self.count]) if self.guided else index
        return replace(self, rows_of_network=self.rows_of_network.rows(both), count=len(index))


Net = TypeVar("Net", bound=Network[Any])  # whatever its prompts are: what it prepares is what it is given


class GuidedPolicy(ABC, Generic[Net]):
    """The parts of `Generator`, `Trainable` and `Capturable` (base.py) that run the network."""

    network: Net
    has_merged: bool
    _trained: Weights = "adapted"  # the weights that `predict` runs

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """One row: what guidance leads away from, the embeddings of the empty prompt."""

    @property
    def guidance_method(self) -> GuidanceMethod:
        return CLASSIFIER_FREE

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> Guided:
        rows, method = len(conditioning.text), self.guidance_method
        guided = method.has_two_rows(guidance)
        if guided:
            conditioning = Conditioning.joined([*[self.unconditional()] * rows, conditioning])
        told = guidance if method.embedded else None
        prompts = self.network.prepare(conditioning.text, conditioning.pooled, timesteps, told, conditioning.mask)
        return Guided(prompts, rows, guided, guidance)

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Prediction:
        return self._forward(latents, step, prepared, self._trained)

    def predict_merged(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Prediction:
        return self._forward(latents, step, prepared, "merged")

    def _forward(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided, weights: Weights) -> Prediction:
        hidden = torch.cat([latents, latents]) if prepared.guided else latents
        predicted = self.network.predict(hidden, step, prepared.rows_of_network, weights)
        if not prepared.guided:
            return predicted, None
        unconditional, conditional = predicted.split(len(latents))
        return self.guidance_method.combined(conditional, unconditional, prepared.scale)

    def prompt_tensors(self, prepared: Guided) -> dict[str, torch.Tensor]:
        return prepared.rows_of_network.tensors()

    def with_prompt_tensors(self, prepared: Guided, tensors: dict[str, torch.Tensor]) -> Guided:
        return replace(prepared, rows_of_network=prepared.rows_of_network.with_tensors(tensors))

    def merge(self) -> None:
        self.network.merge()

    def merge_error(self) -> torch.Tensor | None:
        return self.network.merge_error()

    @contextlib.contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        before, self._trained = self._trained, "base"
        try:
            yield
        finally:
            self._trained = before
