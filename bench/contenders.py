"""Our trainer and B0 side by side: one configuration, the same weights, the same iteration.

Both take steps of a learning rate so small that no weight changes, so a rollout stays on-policy however often its
update is timed; the head trains in every iteration on both sides. The window's steps are fixed, so every repetition is
the same work: the released {0, 1} at full size, and {6, 7} for the tiny model, later than its preset draws, which
lengthens the shared prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.adversary.build import build_adversary
from advgrpo.config import Config
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import CudaGraphs, GraphBackend
from advgrpo.sampling.dynamics import StepTable, window_steps
from advgrpo.training.build import build_trainer
from advgrpo.training.fast import FastPaths
from advgrpo.training.policy_gradient import PolicyGradient
from advgrpo.training.scoring import Scorer
from advgrpo.training.trainer import Trainer

from .baseline import Baseline
from .pair import baseline_of, stock_config, stock_transformer
from .random_policy import SMALL, RandomPolicy, RandomReferences, Size, save_backbone

FROZEN = 1e-30  # learning rate: p - 1e-30 = p in float32 for every p that is not tiny itself
SETTINGS = {
    "rollout": {"initial_noise": "shared"},  # Flow-GRPO-Fast's, without which there is no prefix to share
    "evaluation": {"every": 0},
    "monitor": {"every": 0},
    "output": {"tensorboard": False, "checkpoint_every": 0},
    # B0 averages at every optimizer step and draws patches and references as our defaults do, not as the released code.
    "update": {"learning_rate": FROZEN, "weight_decay": 0.0, "ema_rule": "optimizer_step"},
    "adversary": {
        "schedule": "always",
        "warmup_iterations": 0,
        "updates_per_iteration": 10,
        "patch_sampling": "without_replacement",
        "reference_choice": "random",
    },
}
TINY_SETTINGS = {"rollout": {"window": {"steps": [6, 7]}}}
SMALL_SETTINGS = {
    "model": {"dtype": "float32", "lora": {"rank": 4, "alpha": 8}},
    "adversary": {"dtype": "float32", "num_patches": 8, "hidden_size": 16, "updates_per_iteration": 2},
    "rollout": {"group_size": 4, "micro_batch": 4, "num_steps": 4},
}
FULL_SETTINGS = {
    "rollout": {"prompts_per_iteration": 2, "micro_batch": 8, "window": {"steps": [0, 1]}},
    "adversary": {"batch_size": 32, "replay_capacity": 64},
}


@dataclass
class Contenders:
    config: Config
    trainer: Trainer
    baseline: Baseline

    @property
    def objective(self) -> PolicyGradient:
        """Our parts, which are timed apart."""
        return self.trainer.objective

    @property
    def device(self) -> torch.device:
        return self.trainer.policy.device

    @property
    def window(self) -> tuple[int, ...]:
        return window_steps(self.config.rollout, self.config.seed, 0)

    @property
    def prompts(self) -> list[str]:
        """One per group, those of our iteration 0."""
        return self.objective.micro_batches.prompts_of(0)

    @property
    def images(self) -> int:
        return self.config.images_per_iteration

    def table(self) -> StepTable:
        return self.objective.table(0)


def tiny(folder: Path, device: str, **changes: dict) -> Contenders:
    """The embedded default as `python -m advgrpo.train --fast` builds it; `changes` are sections of the settings."""
    from advgrpo.policy.diffusers_policy import DiffusersPolicy  # needs diffusers, as does the run
    from advgrpo.training.run import Run

    settings = configuration.read_preset("tiny")
    for change in (SETTINGS, TINY_SETTINGS, {"output_dir": str(folder / "run"), "device": device}, changes):
        settings = configuration.merge(settings, change)
    config = configuration.build(settings, "bench")
    trainer = Run(config, Distributed.start(device), resume=False, console=Console(quiet=True)).trainer
    policy, lora = trainer.policy, trainer.policy.network.lora
    _wake(lora)
    stock = stock_transformer(
        stock_config(policy.transformer.config),
        policy.transformer.state_dict(),
        lora.state_dict(),
        rank=config.model.lora.rank,
        alpha=config.model.lora.alpha,
    )
    own = trainer.objective.scorer.references
    return Contenders(
        config,
        trainer,
        _baseline(
            config,
            trainer,
            stock,
            lambda latents: DiffusersPolicy.decode(policy, latents),
            lambda prompt: own.load_images(own.files(prompt)),
        ),
    )


def small(folder: Path, device: str, **changes: dict) -> Contenders:
    """A random model of milliseconds in float32: what is at full size, for tests and rehearsals."""
    return random(folder, device, SMALL, **configuration.merge(SMALL_SETTINGS, changes))


def random(
    folder: Path,
    device: str,
    size: Size,
    *,
    precision: str = "model",
    graphs: GraphBackend | None = None,
    **changes: dict,
) -> Contenders:
    """Random weights of `size`, without diffusers; see `tiny`. `graphs` are CUDA graphs on a GPU unless given."""
    config, trainer = random_trainer(
        folder, device, size, precision=precision, graphs=graphs, **configuration.merge(SETTINGS, changes)
    )
    policy, lora = trainer.policy, config.model.lora
    stock = stock_transformer(
        size.transformer, policy.stock.state_dict(), policy.lora.state_dict(), rank=lora.rank, alpha=lora.alpha
    )
    references = trainer.objective.scorer.reference_features
    theirs = _baseline(config, trainer, stock, policy.reference_decoder.images, references.images)
    return Contenders(config, trainer, theirs)


def random_trainer(
    folder: Path,
    device: str,
    size: Size,
    *,
    precision: str = "model",
    graphs: GraphBackend | None = None,
    **changes: dict,
) -> tuple[Config, Trainer]:
    """Ours alone, with whatever learning rate `changes` say: what a run of that size keeps in memory."""
    settings = configuration.read_preset("sd35m-dino-released")
    given = {
        "device": device,
        "adversary": {"backbone": str(folder / "backbone"), "image_size": size.backbone["image_size"]},
    }
    for change in (FULL_SETTINGS, given, changes):
        settings = configuration.merge(settings, change)
    config = configuration.build(settings, "bench")
    place = Distributed.start(device)
    save_backbone(size, folder / "backbone", config.seed)
    policy = RandomPolicy(config.model, size, device=place.device, seed=config.seed, precision=precision)
    _wake(policy.lora)
    adversary = build_adversary(config.adversary, device=place.device, seed=config.seed)
    references = RandomReferences(
        adversary.backbone.width,
        config.adversary.cached_patches,
        config.adversary.image_size,
        place.device,
        config.seed,
    )
    if graphs is None and place.device.type == "cuda":
        graphs = CudaGraphs(place.device)
    fast = FastPaths(
        share_prefix=config.rollout.initial_noise == "shared",
        fused=True,
        fused_optimizer=True,
        graphs=graphs is not None,
        table=(),
    )
    scorer = Scorer(
        rollout=config.rollout,
        seed=config.seed,
        adversary=adversary,
        reference_features=references,
        rewards={},
        weights=config.rewards.sections(),
        references=None,
        observer=None,
        distributed=place,
    )
    prompts = [f"prompt {i}" for i in range(8)]
    return config, build_trainer(config, policy, prompts, None, lambda: scorer, place, fast, graphs)


def _baseline(config: Config, trainer: Trainer, stock, decode, references) -> Baseline:
    return baseline_of(
        config,
        transformer=stock,
        policy=trainer.policy,
        decode=decode,
        adversary=trainer.objective.scorer.adversary,
        references=references,
        prompts=trainer.objective.micro_batches.prompts,
    )


def _wake(lora) -> None:
    """Adapters as training leaves them: fresh ones add nothing."""
    with torch.no_grad():
        noise = torch.randn(lora.master.shape, generator=torch.Generator().manual_seed(0))
        lora.master.add_(0.01 * noise.to(lora.master.device))
