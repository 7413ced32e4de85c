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
or, with `whole`, all steps are one graph, which is captured anew for every window: for a window that stays.

Shapes: P prompts, M images (M >= P), latents [., C, H, W] float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple

import torch

from advgrpo.policy.base import Capturable, Generator, P, Prediction, Trainable, combining_scale
from advgrpo.policy.current_prompts import CurrentPrompts
from advgrpo.runtime.graphs import CapturedFunction, GraphBackend, StaticBuffers
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.sampling.noise import PHILOX, row_seeds, torch_noise
from advgrpo.types import Conditioning, WindowStep
from advgrpo_kernels import GaussianStep, gaussian_step, philox_normal

logger = logging.getLogger(__name__)


class _Plan(NamedTuple):
    """The numbers of a trajectory's steps, which a captured one holds fast."""

    order: tuple[int, ...]  # of the steps that are taken
    window: tuple[int, ...]
    trained: tuple[int, ...]
    second_order: tuple[int, ...]

    def looked_back_at(self, place: int) -> bool:
        """Whether the step after the one at this place of the order wants the image that this one has seen."""
        return place + 1 < len(self.order) and self.order[place + 1] in self.second_order


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
        whole: with graphs, a trajectory is one of them.
        noise: what draws the initial noise, `rollout.noise`.
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
    whole: bool = False
    noise: str = PHILOX

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
        self._prompts = CurrentPrompts(self.policy.device, storage)
        steps: dict[str, Callable[[], Any]] = {
            "ODE step": self._ode_step,
            "second-order step": self._second_order_step,
            "window step": self._window_step,
            "branching step": self._branching_step,
            "trajectory": self._trajectory,
        }
        self._steps = {name: CapturedFunction(function, name=name, backend=backend) for name, function in steps.items()}
        self._inside = False  # the trajectory: its steps are part of what is captured
        self._plan: _Plan | None = None  # of the trajectory
        self._keeps_image = False  # the window's step that runs next hands on the image that it sees

    @property
    def captures(self) -> int:
        """CUDA graphs held."""
        return sum(step.captures for step in self._steps.values())

    def initial_latents(self, seed: int, ids: torch.Tensor) -> torch.Tensor:
        """[ids, C, H, W] unit noise; each row depends on (seed, id) only."""
        shape = (len(ids), *self.policy.latent_shape())
        if self.noise != PHILOX:
            return to_device(torch_noise(row_seeds(seed, ids), shape[1:], self.noise), self.policy.device)
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
        inputs.fill("numbers", torch.cat(table.numbers))
        inputs.fill("row", row)
        inputs.drop("image")
        if table.second_order is not None:
            inputs.fill("corrections", table.second_order.corrections)
            inputs.fill("to_image", table.second_order.to_image)
        if table.window:
            if image_ids is None:
                raise ValueError("a window's noise is keyed by image_ids: give them")
            inputs.fill("seed", to_device(torch.tensor([noise_seed]), self.policy.device))
            inputs.fill("image_ids", image_ids)
        inputs.fill("latents", latents)
        inputs.fill("step", table.numbers[0])
        second_order = () if table.second_order is None else table.second_order.steps
        self._plan = _Plan(tuple(table.taken), table.window, table.trained, second_order)
        if not (self.whole and inputs.static):
            return self._walk(self._plan)
        latents, steps = self._run("trajectory", self._plan)
        return self._keep(latents), [self._kept(step) for step in steps]

    def _trajectory(self) -> tuple[torch.Tensor, list[WindowStep]]:
        """`_walk` of the plan that is set, as one captured function: its steps are not captured for themselves."""
        assert self._plan is not None
        self._inside = True
        try:
            return self._walk(self._plan)
        finally:
            self._inside = False

    def _walk(self, plan: _Plan) -> tuple[torch.Tensor, list[WindowStep]]:
        """From the latents that are set to images: latents [M, ...] and the steps to train on."""
        shared, latents, prompts = self.share_prefix, self._inputs["latents"], self._prompts.get()
        row, numbers = self._inputs["row"], self._inputs["numbers"].split(1)
        steps: list[WindowStep] = []
        image: torch.Tensor | None = None
        for place, i in enumerate(plan.order):
            self._put("latents", latents)
            self._put("step", numbers[i])
            self._keeps_image = plan.looked_back_at(place)
            if i in plan.second_order:
                assert image is not None  # the step before has handed it on: `looked_back_at`
                self._put("image", image)
                latents, image = self._run("second-order step")
                continue
            if i not in plan.window:
                latents = self._run("ODE step")
                continue
            before = self._keep(latents)
            latents, log_prob, mean, image = self._run("branching step" if shared else "window step")
            latents = self._keep(latents)
            if i in plan.trained:
                mean = None if mean is None else self._keep(mean)
                steps.append(WindowStep(i, before, latents, self._keep(log_prob), shared, mean=mean))
            if shared:
                self._prompts.set(prompts.rows(row), copied=not self._inside)
                shared = False
        return (latents.index_select(0, row) if shared else self._keep(latents)), steps

    def _run(self, step: str, plan: _Plan | None = None) -> Any:
        """What one of the steps returns; the next may overwrite it."""
        function = self._steps[step]
        if self._inside:
            return function.function()
        return function((self._inputs.key(), self._prompts.key(), plan, self._keeps_image))

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        """An input of the next step; inside a trajectory where it lies."""
        if self._inside:
            self._inputs.tensors[name] = tensor
        else:
            self._inputs.fill(name, tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self._inputs.static and not self._inside else tensor

    def _kept(self, step: WindowStep) -> WindowStep:
        """The step in memory of its own."""
        mean = None if step.mean is None else self._keep(step.mean)
        latents, after = self._keep(step.latents), self._keep(step.next_latents)
        return replace(step, latents=latents, next_latents=after, log_prob=self._keep(step.log_prob), mean=mean)

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
        table: str = "coefficients",
    ) -> GaussianStep:
        """The step that is set, from latents [R, C, H, W] along what was predicted of them; without noise where its
        coefficients have none.

        Args:
            likelihood: of the log-probability; None computes none.
            seed, sample_ids: int64 [1] and [R], keys of the noise.
            table: the input that has the step's row of coefficients.
        """
        number = self._inputs["step"]
        return gaussian_step(
            latents,
            predicted[0],
            self._inputs[table].index_select(0, number)[0],
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

    def _second_order_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next latents, as multistep.py says, and the image that is seen in these: each [M, C, H, W]."""
        latents, predicted = self._inputs["latents"], self._predict(self.merged)
        after = self._transition(latents, predicted, likelihood=None).next_latents
        image = self._image(latents, predicted)
        correction = self._inputs["corrections"].index_select(0, self._inputs["step"])
        return after + correction * (image - self._inputs["image"]), image

    def _image(self, latents: torch.Tensor, predicted: Prediction) -> torch.Tensor:
        """[R, C, H, W] float32, which the network sees in the latents: one step to the end."""
        return self._transition(latents, predicted, likelihood=None, table="to_image").next_latents

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
        """A step of the window from latents [M, C, H, W]: the next ones, their log-probabilities [M], with `keep_means`
        their mean [M, C, H, W], and where the next step looks back the image seen here [M, C, H, W].

        The second is None on a CPU, where the step is seen to have no noise: the last one, which settings keep out of a
        window.
        """
        seed, ids, means = self._inputs["seed"], self._inputs["image_ids"], self.keep_means
        step = self._transition(
            latents, predicted, likelihood=self.likelihood, seed=seed, sample_ids=ids, return_mean=means
        )
        return (*step, self._image(latents, predicted) if self._keeps_image else None)
