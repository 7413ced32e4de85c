"""A rollout engine as a run sees it: brought to the run's weights, probed, and asked for latents of ODE steps.

Nothing it draws is used before, of these weights,

    it says that it draws with the file of this version, and with no other          GET /v1/list_loras
    every tensor of it lies in the network with our SHA-256, all of them counted    the checker
    a trajectory of its is ours, step by step, up to rounding                       probe.py

and after every draw it is asked once more what it draws with: an engine that was restarted meanwhile has the base
weights. It is then brought up to date and the images are drawn again; where several processes draw at it, the run ends.
Of every image the initial noise must be ours to the bit, which tells rows apart, and the schedule ours.

Which steps it takes: of an objective without likelihoods all; of the policy gradient those before the window. What
follows is the sampler's, from the latents that the engine arrived at: likelihoods are those of our own forward at the
very latents that the update sees, exact whatever the engine rounded before them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from advgrpo.config import Config
from advgrpo.engine.probe import compare
from advgrpo.engine.sglang import (
    MODULE,
    NICKNAME,
    SERVED,
    Drawing,
    Mismatch,
    Request,
    SGLangDiffusion,
    check_model,
    check_targets,
)
from advgrpo.engine.weights import Adapter, loud
from advgrpo.errors import RunFailure, UserError
from advgrpo.policy.base import Policy
from advgrpo.policy.pipelines import QWEN_NEGATIVE_PROMPT, pipeline_class
from advgrpo.runtime import rng
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.noise import TORCH_NOISE, row_seeds, torch_noise

_log = logging.getLogger(__name__)
_PROBED_ROWS = 2  # more than one: rows that are handed back in another order are seen
_START = "start"  # the version of the probe's own adapter


@dataclass(frozen=True)
class Rows:
    """Rows of one draw: their prompts, seeds, and initial noise [R, C, H, W] on the policy's device."""

    prompts: list[str]
    seeds: list[int]
    initial: torch.Tensor


class RolloutEngine:
    """See the module's docstring.

    Args:
        prompts: of the run, from which the probe's is taken.

    Raises:
        UserError: as `connect`.
    """

    def __init__(self, config: Config, policy: Policy, prompts: Sequence[str], distributed: Distributed):
        self.settings, self.distributed, self.policy = config.rollout, distributed, policy
        self.seed, self.dtype = config.seed, config.model.dtype
        section, world = config.rollout.engine, distributed.world_size
        self.number = distributed.rank % len(section.urls)
        self.leads = distributed.rank < len(section.urls)  # brings the engine up to date for those that share it
        self.shared = self.number + len(section.urls) < world
        self.prompts = list(dict.fromkeys(prompts))
        self.drawing = _drawing(config, policy)
        self.engine = connect(config, self.number)
        folder = Path(section.weights_dir or Path(config.output_dir) / "engine").expanduser()
        self.folder = folder / f"engine-{self.number}"
        self.adapter: Adapter | None = None
        self.version = ""

    @property
    def owner(self) -> str:
        return self.engine.owner

    def verify(self) -> None:
        """Before anything is trained: the engine is probed with an adapter that cannot be missed. Every process calls.

        Raises:
            UserError: it is not this run's model, or does not draw with the weights that it is handed.
        """
        with self.distributed.monitored("verify the rollout engine", at_most_seconds=SLOW_SECONDS):
            if not self.leads:
                return
            try:
                check_model(self.engine.model(self.distributed.step), self.dtype, self.owner)
                with loud(self.policy, self.seed):
                    self._bring(_START)
            except RunFailure as error:
                raise UserError(str(error)) from error

    def synchronise(self, iteration: int) -> None:
        """Bring the engine to the policy's weights as they are now. Every process calls it.

        Raises:
            RunFailure: it does not answer, or does not draw with these weights.
        """
        with self.distributed.monitored("synchronise the rollout engine", at_most_seconds=SLOW_SECONDS):
            if self.leads:
                self._bring(f"{iteration:06d}")
            else:
                self.adapter, self.version = self._adapter(f"{iteration:06d}"), f"{iteration:06d}"

    def latents(self, rows: Rows, step: int) -> torch.Tensor:
        """[R, C, H, W] float32 on the policy's device: before step `step`, or the images' for the number of steps.

        An engine that several processes draw at is not brought up to date again in the midst of an iteration: whoever
        asks only after another has done that would take images of the wrong weights for good ones.

        Raises:
            RunFailure: no valid answer, of another request, or by other weights even after these were sent again.
        """
        for again in (False, True):
            found = self._draw(rows, (0, step))
            if not (lost := self._lost()):
                return to_device(found[:, 1].contiguous(), self.policy.device)
            if self.shared:
                raise RunFailure(
                    f"{self.owner}: {lost}. Other processes draw at it as well, and theirs may be drawn with that: "
                    "see why it restarts, or who else sends it adapters, then resume"
                )
            if not again:
                _log.warning("%s: %s; it gets its weights again, and the images are drawn again", self.owner, lost)
                self._bring(self.version)
        raise RunFailure(
            f"{self.owner}: {lost}, again, after version {self.version} was sent a second time; see why it restarts, "
            "or who else sends it adapters, then resume"
        )

    def _bring(self, version: str) -> None:
        """Send the weights and prove that they are drawn with."""
        adapter = self._adapter(version)
        adapter.write()
        self.adapter, self.version, tell = adapter, version, self.distributed.step
        self.engine.install(str(adapter.path), tell)
        if lost := self._lost():
            raise RunFailure(
                f"{self.owner}: {lost}, although it was just told to; it wants a version with /v1/list_loras"
            )
        counted = self.engine.verified(adapter.checksums, tell)
        if counted != len(adapter.checksums):
            raise RunFailure(
                f"{self.owner}: it has bound {counted // 2} modules of version {version}, the LoRA has "
                f"{adapter.modules}; serve the same model.path, or adapt what it has (--model.lora.targets)"
            )
        self._probe(version)
        _log.info("%s draws with version %s, %d modules", self.owner, version, adapter.modules)

    def _adapter(self, version: str) -> Adapter:
        return Adapter.of(self.policy, self.folder, version)

    def _lost(self) -> str:
        """What it draws with instead of the newest version; "" where it draws with that."""
        assert self.adapter is not None  # synchronised
        own = {"path": str(self.adapter.path), "strength": 1.0, "merged": False}
        wanted = {"module": MODULE, "nickname": NICKNAME, **own}
        active = self.engine.active(self.distributed.step)
        if len(active) == 1 and all(active[0].get(key) == value for key, value in wanted.items()):
            return ""
        said = [
            f"{each.get('path')!r} at {each.get('strength')} in {each['module']}{', merged' * bool(each.get('merged'))}"
            for each in active
        ]
        return f"it draws with {' and '.join(said) or 'no LoRA'}, not with version {self.version}"

    def _probe(self, version: str) -> None:
        """Raises RunFailure for a trajectory that is not ours."""
        keyed = rng.derive_seed(self.seed, f"engine_probe:{version}")
        longest = max(self.prompts, key=len)  # where the engine takes fewer tokens, it shows
        prompt = longest if version == _START else self.prompts[keyed % len(self.prompts)]
        seeds = row_seeds(keyed, torch.arange(_PROBED_ROWS))
        noise = torch_noise(seeds, self.drawing.shape, self.settings.noise)
        latents = self._draw(Rows([prompt] * _PROBED_ROWS, seeds, noise), tuple(range(self.drawing.num_steps + 1)))
        dtype, section = getattr(torch, self.dtype), self.settings.engine
        probe = compare(
            self.policy,
            prompt,
            latents,
            guidance=self.drawing.guidance_scale,
            dtype=dtype,
            tolerance=section.probe_tolerance,
        )
        if not probe.agrees:
            lost = f" ({lost})" if (lost := self._lost()) else ""
            raise RunFailure(
                f"{self.owner}: its images are not this policy's (version {version}, prompt {prompt!r}): {probe}. It "
                f"computes with other weights{lost}, guidance ({self.drawing.guidance_scale:g} here), text (model."
                f"max_sequence_length) or precision ({self.dtype} here): correct its settings, or where it only rounds "
                "more, set rollout.engine.probe_tolerance"
            )

    def _draw(self, rows: Rows, steps: tuple[int, ...]) -> torch.Tensor:
        """[R, steps, C, H, W] float32 on the host, in the order of the rows, from our noise."""
        requests, order = _requests(rows, steps)
        try:
            drawn = torch.cat(self.engine.draw(requests, self.drawing, self.distributed.step))
        except Mismatch as error:
            raise RunFailure(f"{self.owner}, {error}. docs/rollout_engines.md says what it is asked for") from None
        found = torch.empty_like(drawn)
        found[torch.tensor(order)] = drawn
        for row, (own, theirs) in enumerate(zip(rows.initial.cpu(), found[:, 0])):
            if not torch.equal(own, theirs):
                raise RunFailure(f"{self.owner}, prompt {rows.prompts[row]!r}: {self._other_noise(rows, row, theirs)}")
        return found

    def _other_noise(self, rows: Rows, row: int, theirs: torch.Tensor) -> str:
        seed, asked = rows.seeds[row], f"seed {rows.seeds[row]}"
        for name in TORCH_NOISE:
            if torch.equal(torch_noise([seed], self.drawing.shape, name)[0], theirs):
                return f"it draws the noise of {asked} as {name}; set rollout.noise = {name}"
        others = [other for other, initial in zip(rows.seeds, rows.initial.cpu()) if torch.equal(initial, theirs)]
        if others:
            other = f"the image of {asked} has the noise of seed {others[0]}"
            return f"{other}: its images are in another order than asked for"
        return (
            f"the image of {asked} does not begin with torch's noise of that seed on a CPU; it wants a version that "
            "honours generator_device = cpu"
        )


def connect(config: Config, number: int = 0) -> SGLangDiffusion:
    """The engine with that number.

    Raises:
        UserError: an address or token that cannot be used.
    """
    section, pixels = config.rollout.engine, 3 * config.model.resolution**2
    images = config.rollout.micro_batch + _PROBED_ROWS
    # A value in float32 and base64 is 5.4 bytes. An image is a picture and, smaller, latents of T + 1 steps.
    most = 1_000_000 + images * pixels * 6 * (2 + config.rollout.num_steps)
    return SGLangDiffusion(section.urls[number], section, max_answer_bytes=most)


def check_reachable(config: Config, distributed: Distributed) -> None:
    """Before a model is loaded: whether the engine of this process can draw for this run.

    Raises:
        UserError: a model or LoRA that it cannot serve, more engines than processes, as `connect`, or nobody answers as
            an engine of this run's precision.
    """
    if not config.rollout.engine.draws:
        return
    name = pipeline_class(config.model.path)
    if name not in SERVED:
        raise UserError(
            f"rollout.engine.kind = {config.rollout.engine.kind!r} serves {', '.join(SERVED)}, but model.path = "
            f"{config.model.path!r} holds a {name}; set rollout.engine.kind = none"
        )
    check_targets(name, config.model.lora.targets)
    urls, world = config.rollout.engine.urls, distributed.world_size
    if len(urls) > world:
        raise UserError(
            f"rollout.engine.urls names {len(urls)} engines for {world} process{'es' * (world > 1)}, each of which "
            f"draws at one: name at most {world}, or start more processes"
        )
    engine = connect(config, distributed.rank % len(urls))
    try:
        check_model(engine.model(distributed.step), config.model.dtype, engine.owner)
    except RunFailure as error:
        raise UserError(f"{error}; start it, or correct rollout.engine.urls") from error


def _drawing(config: Config, policy: Policy) -> Drawing:
    name, rollout = pipeline_class(config.model.path), config.rollout
    return Drawing(
        pipeline=name,
        num_steps=rollout.num_steps,
        guidance_scale=rollout.guidance_scale,
        negative_prompt=QWEN_NEGATIVE_PROMPT if name == "QwenImagePipeline" else "",
        resolution=config.model.resolution,
        shape=policy.latent_shape(),
        sigmas=tuple(policy.schedule(rollout.num_steps)[0].tolist()),
    )


def _requests(rows: Rows, steps: tuple[int, ...]) -> tuple[list[Request], list[int]]:
    """Requests, one per prompt and run of seeds that follow each other, and which row each of their images is."""
    order = sorted(range(len(rows.seeds)), key=lambda row: (rows.seeds[row], row))
    requests: list[Request] = []
    for row in order:
        prompt, seed = rows.prompts[row], rows.seeds[row]
        last = requests[-1] if requests else None
        if last is not None and last.prompt == prompt and last.seed + last.count == seed:
            requests[-1] = Request(prompt, last.seed, last.count + 1, steps)
        else:
            requests.append(Request(prompt, seed, 1, steps))
    return requests, order
