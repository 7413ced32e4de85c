"""Our trainer, B0 and B1 side by side: one configuration, the same weights, the same iteration.

All take steps of a learning rate so small that no weight changes, so a rollout stays on-policy however often its update
is timed; the head trains in every iteration on all sides. The window's steps are fixed, so every repetition is the same
work: the released {0, 1} at full size, and {6, 7} for the tiny model, which leaves a prefix to share where the images
of a prompt start from one noise.

What is timed is what a run does: references are files, which are decoded when their prompt is drawn for the first time,
as at full size in every iteration; prompts come from the host's text cache, and the monitor looks at every iteration.
B0 and B1 have references and embeddings on the device and no monitor, which is in their favour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from advgrpo import config as configuration
from advgrpo.adversary.build import build_adversary
from advgrpo.config import Config
from advgrpo.data.sources import Sources
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import CudaGraphs, GraphBackend
from advgrpo.sampling.dynamics import StepTable, window_steps
from advgrpo.training.build import build_observer, build_scorer, build_trainer
from advgrpo.training.fast import FastPaths
from advgrpo.training.policy_gradient import PolicyGradient
from advgrpo.training.trainer import Trainer

from .baseline import B0, B1, Baseline, Recipe
from .pair import baseline_of, compile_blocks, stock_config, stock_transformer, vae_decoder
from .random_policy import SMALL, RandomPolicy, Size, save_backbone, save_references
from .stock_model import StockConfig, StockTransformer

FROZEN = 1e-30  # learning rate: p - 1e-30 = p in float32 for every p that is not tiny itself
SETTINGS = {
    "evaluation": {"every": 0},
    "output": {"tensorboard": False, "checkpoint_every": 0},
    # B0 and B1 average at every optimizer step, and draw patches and references, as our defaults do and the released
    # code does not.
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
    """Ours and those that it is measured against.

    Args:
        config, trainer: ours.
        fast: of our fast paths those that are on.
        baselines: "b1" and "b0".
    """

    config: Config
    trainer: Trainer
    fast: FastPaths
    baselines: dict[str, Baseline]

    def with_noise(self, noise: str) -> Contenders:
        """The same over the same weights, where the images of a prompt start from one noise ("shared") or each from its
        own ("per_image").

        With shared noise only those are left that have a use for it: B0 is the released loop, which has none.
        """
        rollout = self.config.rollout.model_copy(update={"initial_noise": noise})
        config, own = self.config.model_copy(update={"rollout": rollout}), self.objective
        captured = self.fast.graphs and not config.why_update_is_not_captured
        fast = replace(self.fast, share_prefix=noise == "shared", captured_update=captured)
        trainer = build_trainer(
            config,
            self.trainer.policy,
            own.micro_batches.prompts,
            own.scorer.references,
            lambda: replace(own.scorer, rollout=rollout),
            own.distributed,
            fast,
            own.sampler.graphs,
        )
        baselines = {
            name: replace(each, config=config)
            for name, each in self.baselines.items()
            if noise == "per_image" or each.recipe.share_prefix
        }
        return Contenders(config, trainer, fast, baselines)

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


def tiny(folder: Path, device: str, *, compiled: bool | None = None, **changes: dict) -> Contenders:
    """The embedded default as `python -m advgrpo.train --fast` builds it; `changes` are sections of the settings.

    Args:
        compiled: whether B1's blocks are; on a GPU unless given.
    """
    from advgrpo.training.run import Run  # needs diffusers, as does the run

    settings = configuration.read_preset("tiny")
    for change in (SETTINGS, TINY_SETTINGS, {"output_dir": str(folder / "run"), "device": device}, changes):
        settings = configuration.merge(settings, change)
    config = configuration.build(settings, "bench")
    trainer = Run(config, Distributed.start(device), resume=False, console=Console(quiet=True)).trainer
    policy = trainer.policy
    _wake(policy.network.lora)
    stock = partial(
        _stock, config, stock_config(policy.transformer.config), policy.transformer.state_dict(), policy.network.lora
    )
    baselines = _baselines(config, trainer, stock, partial(vae_decoder, policy.vae), compiled)
    return Contenders(config, trainer, FastPaths.choose(config, policy.device), baselines)


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
    compiled: bool | None = None,
    **changes: dict,
) -> Contenders:
    """Random weights of `size`, without diffusers; see `tiny`. `graphs` are CUDA graphs on a GPU unless given.

    Without diffusers there is no stock VAE: B0 decodes by our decoder in float32, and B1 as we do, by one that it could
    not have.
    """
    config, trainer = random_trainer(
        folder, device, size, precision=precision, graphs=graphs, **configuration.merge(SETTINGS, changes)
    )
    policy, fast = trainer.policy, _fast_of_random(config, trainer.objective.sampler.graphs)
    stock = partial(_stock, config, size.transformer, policy.stock.state_dict(), policy.lora)

    def decoder(*, fast: bool) -> Callable[[Tensor], Tensor]:
        return policy.decode if fast else policy.reference_decoder.images

    return Contenders(config, trainer, fast, _baselines(config, trainer, stock, decoder, compiled))


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
        "data": {"cache_dir": str(folder / "cache")},
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
    prompts = [f"prompt {i}" for i in range(size.prompts)]
    references = save_references(folder / "references", prompts, size.backbone["image_size"], config.seed)
    observer = build_observer(config, adversary, place.device)
    scorer = partial(build_scorer, config, Sources(prompts, [], references), adversary, observer, place)
    if graphs is None and place.device.type == "cuda":
        graphs = CudaGraphs(place.device)
    fast = _fast_of_random(config, graphs)
    return config, build_trainer(config, policy, prompts, references, scorer, place, fast, graphs)


def _fast_of_random(config: Config, graphs: GraphBackend | None) -> FastPaths:
    """All that there is: what `FastPaths.choose` finds out of a model's files is known."""
    return FastPaths(
        share_prefix=config.rollout.initial_noise == "shared",
        fused=True,
        fused_optimizer=True,
        graphs=graphs is not None,
        captured_update=graphs is not None and not config.why_update_is_not_captured,
        table=(),
    )


def _stock(config: Config, of: StockConfig, base: dict[str, Tensor], lora, recipe: Recipe) -> StockTransformer:
    """The stock model over `base`, with our adapters' values."""
    made = stock_transformer(of, base, lora.state_dict(), rank=config.model.lora.rank, alpha=config.model.lora.alpha)
    if recipe.compiled:
        compile_blocks(made)
    return made


def _baselines(
    config: Config,
    trainer: Trainer,
    stock: Callable[[Recipe], StockTransformer],
    decoder: Callable[..., Callable[[Tensor], Tensor]],
    compiled: bool | None,
) -> dict[str, Baseline]:
    """B1 and B0 by name, over transformers and decoders made as their recipes say."""
    policy, scorer = trainer.policy, trainer.objective.scorer
    compiled = policy.device.type == "cuda" if compiled is None else compiled
    references = scorer.references
    return {
        name: baseline_of(
            config,
            transformer=stock(recipe),
            policy=policy,
            decode=decoder(fast=recipe.fast_decoder),
            adversary=scorer.adversary,
            references=lambda prompt: references.load_images(references.files(prompt)),
            prompts=trainer.objective.micro_batches.prompts,
            recipe=recipe,
        )
        for name, recipe in {"b1": replace(B1, compiled=compiled), "b0": B0}.items()
    }


def _wake(lora) -> None:
    """Adapters as training leaves them: fresh ones add nothing."""
    with torch.no_grad():
        noise = torch.randn(lora.master.shape, generator=torch.Generator().manual_seed(0))
        lora.master.add_(0.01 * noise.to(lora.master.device))
