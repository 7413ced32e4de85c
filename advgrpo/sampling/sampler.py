"""The sampler: ODE steps, and on the window's steps noise and log-probabilities.

Where the rows of a prompt share their initial noise (in Flow-GRPO-Fast those of a mini-group do), they are one
trajectory up to the window's first step: `share_prefix` computes it once per prompt and branches at that step;
without it every row is computed, with the same result up to rounding. Where every image has its own noise (the
released Adv-GRPO code), nothing is shared. The window's steps always run the trainer's own forward, so that
log-probabilities can be repeated to the last bit; merged weights serve ODE steps only, unless `window_merged` gives
that exactness up.

Every step does the same operations whatever its number: coefficients, timesteps and modulations are device tables read
at a device step counter, noise is keyed by device tensors, and nothing waits for the device. With a graph backend each
kind of step (ODE, window, the window's first) is one CUDA graph per shape, replayed for every step and every iteration;
one graph of all ten steps would have to be captured anew for every window that is drawn.

Shapes: P prompts, M images (M >= P), latents [., C, H, W] float32.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic

import torch

from advgrpo.policy.base import Capturable, Generator, P, Prediction, Trainable, combining_scale
from advgrpo.runtime.graphs import CapturedFunction, GraphBackend, StaticBuffers
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.types import Conditioning, WindowStep
from advgrpo_kernels import GaussianStep, gaussian_step, philox_normal

logger = logging.getLogger(__name__)


class _CurrentPrompts(Generic[P]):
    """The prepared prompts of the step under way: a captured step takes no arguments and finds them here.

    For one that is captured they lie in storage that stays the same for each shape; else they are the ones given.
    """

    def __init__(self, device: torch.device, storage: Capturable[P] | None):
        self.storage = storage
        self._buffers = StaticBuffers(device, static=storage is not None)
        self._prepared: P | None = None

    def set(self, prepared: P) -> None:
        if self.storage is None:
            self._prepared = prepared
            return
        self._buffers.reset()
        for name, tensor in self.storage.prompt_tensors(prepared).items():
            self._buffers.fill(name, tensor)
        self._prepared = self.storage.with_prompt_tensors(prepared, self._buffers.tensors)

    def get(self) -> P:
        if self._prepared is None:
            raise RuntimeError("no prompts are set")
        return self._prepared

    def key(self) -> Hashable:
        """What a capture freezes of them."""
        return self._buffers.key()


@dataclass
class Sampler(Generic[P]):
    """See the module's docstring.

    Args:
        policy: what is sampled; merged weights need a `Trainable` one, and graphs a `Capturable` one: another runs
            eagerly, and says so.
        merged, window_merged: whether ODE steps and the window's steps run merged weights.
        graphs: captures the steps; None runs them eagerly.
        shared_noise: the images of a prompt start from one noise.
        keep_means: the steps to train on hold the means of their distributions, for trust regions that compare them.
    """

    policy: Generator[P]
    guidance_scale: float
    likelihood: str
    share_prefix: bool
    merged: bool
    window_merged: bool = False
    graphs: GraphBackend | None = None
    shared_noise: bool = True
    keep_means: bool = False

    def __post_init__(self):
        if self.share_prefix and not self.shared_noise:
            raise ValueError("share_prefix needs shared_noise: images with their own noise have no common prefix")
        self._trainable = self.policy if isinstance(self.policy, Trainable) else None
        if (self.merged or self.window_merged) and self._trainable is None:
            raise ValueError(f"merged steps need a Trainable policy, which a {type(self.policy).__name__} is not")
        storage = self.policy if self.graphs is not None and isinstance(self.policy, Capturable) else None
        if self.graphs is not None and storage is None:
            logger.warning("a %s is not Capturable: its sampling steps run eagerly", type(self.policy).__name__)
        backend = None if storage is None else self.graphs
        # What the steps below read, since a captured function takes no arguments (runtime/graphs.py).
        self._inputs = StaticBuffers(self.policy.device, static=storage is not None)
        self._prompts = _CurrentPrompts(self.policy.device, storage)
        steps = {"ODE step": self._ode_step, "window step": self._window_step, "branching step": self._branching_step}
        self._steps = {name: CapturedFunction(function, name=name, backend=backend) for name, function in steps.items()}

    @property
    def captures(self) -> int:
        """CUDA graphs held."""
        return sum(step.captures for step in self._steps.values())

    def initial_latents(self, seed: int, ids: torch.Tensor) -> torch.Tensor:
        """[ids, C, H, W] unit noise; each row depends on (seed, id) only."""
        shape = (len(ids), *self.policy.latent_shape())
        return philox_normal(shape, seed=seed, sample_ids=to_device(ids, self.policy.device))

    @torch.no_grad()
    def run(
        self,
        table: StepTable,
        conditioning: Conditioning,
        initial: torch.Tensor,
        row: torch.Tensor,
        *,
        noise_seed: int = 0,
        image_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[WindowStep]]:
        """Denoise `initial` into the M images of `row` [M]; returns latents [M, ...] and the steps to train on.

        `initial` is [P, ...], from which a prompt's images branch; without `shared_noise` it is [M, ...].
        `noise_seed` and `image_ids` [M] key the noise of the window's steps.
        """
        prompts = self.policy.prepare(conditioning, table.timesteps, guidance=self.guidance_scale)
        shared, inputs = self.share_prefix, self._inputs
        latents = initial if shared or not self.shared_noise else initial.index_select(0, row)
        self._prompts.set(prompts if shared else prompts.rows(row))
        inputs.fill("coefficients", table.coefficients)
        if table.window:
            if image_ids is None:
                raise ValueError("a window's noise is keyed by image_ids: give them")
            inputs.fill("seed", to_device(torch.tensor([noise_seed]), self.policy.device))
            inputs.fill("image_ids", image_ids)
            inputs.fill("row", row)
        steps: list[WindowStep] = []
        for i, number in enumerate(table.numbers):
            inputs.fill("latents", latents)
            inputs.fill("step", number)
            if i not in table.window:
                latents = self._run("ODE step")
                continue
            before = self._keep(latents)
            latents, log_prob, *means = self._run("branching step" if shared else "window step")
            latents = self._keep(latents)
            if i in table.trained:
                mean = self._keep(means[0]) if means else None
                steps.append(WindowStep(i, before, latents, self._keep(log_prob), shared, mean=mean))
            if shared:
                self._prompts.set(prompts.rows(row))
                shared = False
        return (latents.index_select(0, row) if shared else self._keep(latents)), steps

    def _run(self, step: str) -> Any:
        """What one of the steps returns; the next may overwrite it."""
        return self._steps[step]((self._inputs.key(), self._prompts.key()))

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self._inputs.static else tensor

    def _predict(self, merged: bool) -> Prediction:
        """Of the latents, step and prompts that are set."""
        latents, step, prompts = self._inputs["latents"], self._inputs["step"], self._prompts.get()
        if not merged:
            return self.policy.predict(latents, step, prompts)
        assert self._trainable is not None  # __post_init__ has seen to it
        return self._trainable.predict_merged(latents, step, prompts)

    def _transition(
        self,
        latents: torch.Tensor,
        predicted: Prediction,
        *,
        likelihood: str | None,
        seed: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        return_mean: bool = False,
    ) -> GaussianStep:
        """The step that is set, from latents [R, C, H, W] along what was predicted of them; without noise where its
        coefficients have none.

        Args:
            likelihood: of the log-probability; None computes none.
            seed, sample_ids: int64 [1] and [R], keys of the noise.
        """
        number = self._inputs["step"]
        return gaussian_step(
            latents,
            predicted[0],
            self._inputs["coefficients"].index_select(0, number)[0],
            uncond_velocity=predicted[1],
            guidance_scale=combining_scale(predicted, self.guidance_scale),
            step=number,
            likelihood=likelihood,
            seed=seed,
            sample_ids=sample_ids,
            return_mean=return_mean,
        )

    def _ode_step(self) -> torch.Tensor:
        """The next latents, of as many rows."""
        return self._transition(self._inputs["latents"], self._predict(self.merged), likelihood=None).next_latents

    def _window_step(self) -> tuple[torch.Tensor | None, ...]:
        """As `_noisy`."""
        return self._noisy(self._inputs["latents"], self._predict(self.window_merged))

    def _branching_step(self) -> tuple[torch.Tensor | None, ...]:
        """The window's first step: one row per prompt goes in, one per image comes out."""
        row, (conditional, unconditional) = self._inputs["row"], self._predict(self.window_merged)
        of_images = None if unconditional is None else unconditional.index_select(0, row)
        predicted = conditional.index_select(0, row), of_images
        return self._noisy(self._inputs["latents"].index_select(0, row), predicted)

    def _noisy(self, latents: torch.Tensor, predicted: Prediction) -> tuple[torch.Tensor | None, ...]:
        """A step of the window from latents [M, C, H, W]: the next ones, their log-probabilities [M], and with
        `keep_means` their mean [M, C, H, W].

        The second is None on a CPU, where the step is seen to have no noise: the last one, which settings keep out of a
        window.
        """
        keys = {"seed": self._inputs["seed"], "sample_ids": self._inputs["image_ids"]}
        step = self._transition(latents, predicted, likelihood=self.likelihood, return_mean=self.keep_means, **keys)
        return tuple(step) if self.keep_means else (step.next_latents, step.log_prob)
