"""From a checked configuration to the parts of a run: policy, adversary, rewards, metrics, objective, trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from advgrpo.adversary.base import Adversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.config import NEED_REFERENCES, Config, RewardEntry
from advgrpo.config import CustomReward as CustomRewardSection
from advgrpo.data.decoding import DecodingWorkers, workers_for
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.evaluation.evaluator import ImageStatistic
from advgrpo.monitor.monitor import NOT_JUDGED, RED_FLAGS, Knobs, Monitor
from advgrpo.policy.base import Policy
from advgrpo.policy.parts import parts_of
from advgrpo.policy.pipelines import PREDICTION_TYPES, pipeline_class
from advgrpo.reporting.display import Display
from advgrpo.rewards import build_reward, prompt_options, reward_class
from advgrpo.rewards.base import Reward
from advgrpo.rewards.custom import try_out
from advgrpo.rewards.dino_similarity import DinoSimilarity
from advgrpo.rewards.pool.recipe import Recipe
from advgrpo.rewards.pool.reward import PooledReward
from advgrpo.rewards.retrieval import judge_metrics
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.graphs import GraphBackend
from advgrpo.runtime.mesh import Mesh
from advgrpo.sampling.dynamics import check_dynamics, check_objective
from advgrpo.training.awm import AdvantageWeightedMatching
from advgrpo.training.fast import FastPaths
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.nft import NegativeAwareFineTuning
from advgrpo.training.objective import Objective, Parts
from advgrpo.training.observer import DinoObserver
from advgrpo.training.policy_gradient import PolicyGradient
from advgrpo.training.scoring import Scorer
from advgrpo.training.supervised import SupervisedFineTuning
from advgrpo.training.text_caches import fill_caches
from advgrpo.training.trainer import Length, Trainer
from advgrpo.training.update import Updater
from advgrpo.vision.dino import DinoBackbone, backbone_folder


def check_prompts(config: Config, sources: Sources) -> None:
    """UserError for a prompt that a reward or metric cannot use, or a remote judge that does not answer.

    Rewards that judge any prompt are not built for it, so no model is loaded.
    """
    measured = {"rule" if name == "rule_accuracy" else name for name in config.evaluation.metrics}
    for name, entry in config.rewards.entries().items():
        trained = sources.prompts if name in config.fixed_rewards else []
        read = [*trained, *(sources.held_out if name in measured else [])]
        if entry.kind in ("adversary", "custom") or not read:  # custom ones are tried out (build_early_rewards)
            continue
        if reward_class(entry.kind).check_prompts is Reward.check_prompts:
            continue
        try:
            _recipe(entry, "cpu", config, sources).build().check_prompts(read)
        except UserError as error:
            raise UserError(str(error).replace(f"reward {name}", entry.owner, 1)) from error


def build_policy(config: Config, sources: Sources, distributed: Distributed, fast: FastPaths, display: Display):
    """The generator, with all prompts in the text cache of every process."""
    cache = Path(config.data.cache_dir).expanduser()
    prediction_type = PREDICTION_TYPES[pipeline_class(config.model.path)]
    check_dynamics(prediction_type, config.rollout.dynamics)
    check_objective(prediction_type, config.update.objective)
    # These need diffusers, which a trainer around another policy does not.
    from advgrpo.policy.fused.sequence import SequenceGroup
    from advgrpo.policy.loading import load_policy
    from advgrpo.policy.sharding import BlockSharding

    mesh = Mesh.of(distributed, config.model.sequence_parallel)
    with distributed.monitored("load the generator", at_most_seconds=SLOW_SECONDS):
        policy = load_policy(
            config.model,
            device=distributed.device,
            cache_dir=cache,
            seed=config.seed,
            fused=fast.fused,
            precision=config.rollout.precision,
            sharding=BlockSharding(distributed) if config.model.is_sharded(distributed.world_size) else None,
            sequence=SequenceGroup(distributed, mesh) if mesh.sequence_size > 1 else None,
        )
    texts = [policy.negative_prompt, *sources.prompts, *sources.held_out]
    fill_caches(policy.text_cache, texts, cache, display, distributed)
    return policy


def build_early_rewards(config: Config, sources: Sources, distributed: Distributed) -> dict[str, Reward]:
    """Rewards in use that are built before other models are loaded, and once for training and evaluation: those of
    section rewards.custom, which are tried out, and those with workers, which start.

    Raises:
        UserError: see `CustomReward`, `custom.try_out` and `PooledReward`.
    """
    found: dict[str, Reward] = {}
    entries = config.rewards.entries()
    for name in config.used_rewards:
        is_custom, pool = entries[name].kind == "custom", config.rewards.pool(name)
        if not (is_custom or pool):
            continue
        distributed.progress(f"load reward {name}", within_seconds=SLOW_SECONDS)
        recipe = _recipe(entries[name], pool.device if pool else str(distributed.device), config, sources)
        found[name] = reward = PooledReward(recipe, pool, distributed.step) if pool else _told(recipe, distributed)
        if is_custom:
            distributed.progress(f"try out reward {name}", within_seconds=SLOW_SECONDS)
            trained = sources.prompts if name in config.fixed_rewards else []
            measured = sources.held_out if name in config.evaluation.metrics else []
            references = None if pool else sources.references
            where, size = f"{recipe.owner}.import = {recipe.source!r}", config.model.resolution
            if pool and sources.references is not None and not reward.scores_references:
                raise UserError(
                    f"rewards.pools: reward = {name!r}, but {where} takes the references, which workers do not have: "
                    "leave the pool out, or set scores_references = True on it if it does without them"
                )
            try_out(reward, where, [*trained, *measured], references, size, distributed.device)
    return found


def _recipe(entry: RewardEntry, device: str, config: Config, sources: Sources) -> Recipe:
    """A reward of the settings, with what the prompt file adds to its options."""
    section, dtype = entry.section, config.adversary.dtype
    if isinstance(section, CustomRewardSection):
        name, source = section.name, getattr(section, "import")
        return Recipe(entry.kind, name, entry.owner, device, dtype, section.options, source, sources.metadata)
    options = {**section.arguments(), **prompt_options(entry.kind, sources.metadata)}
    return Recipe(entry.kind, options.get("name", entry.kind), entry.owner, device, dtype, options)


def _told(recipe: Recipe, distributed: Distributed) -> Reward:
    """The reward, which says what it begins where that takes long or waits for others: it is not stuck meanwhile."""
    reward = recipe.build()
    if hasattr(reward, "progress"):
        reward.progress = distributed.step
    return reward


def build_rewards(
    config: Config, sources: Sources, distributed: Distributed, early: Mapping[str, Reward] | None = None
) -> dict[str, Reward]:
    """The fixed rewards that the generator is trained on.

    Args:
        early: those of `build_early_rewards`; built here where not given.
    """
    early = build_early_rewards(config, sources, distributed) if early is None else early
    return {name: _build_reward(name, config, sources, distributed, early) for name in config.fixed_rewards}


def _build_reward(
    name: str, config: Config, sources: Sources, distributed: Distributed, early: Mapping[str, Reward]
) -> Reward:
    if name in early:
        return early[name]
    return _told(_recipe(config.rewards.entries()[name], str(distributed.device), config, sources), distributed)


def build_observer(config: Config, adversary: Adversary | None, device: torch.device) -> DinoObserver | None:
    """Who looks at images for statistics: the DINO that `config.loaded_observer` names; None where there is none, or
    no use.

    One that the adversary has loaded already, at the same size, is shared.
    """
    wanted = config.loaded_observer
    if wanted is None:
        return None
    own = None if adversary is None else adversary.backbone
    if isinstance(own, DinoBackbone):
        same = (own.folder, own.image_size) == (backbone_folder(wanted.backbone), wanted.image_size)
        if same:
            return DinoObserver(DinoSimilarity(backbone=own.of_last_layer()))
    return DinoObserver(
        DinoSimilarity(
            path=wanted.backbone,
            image_size=wanted.image_size,
            device=device,
            dtype=getattr(torch, wanted.dtype),
            fields=wanted.fields,
        )
    )


def blind_spots(config: Config, observer: DinoObserver | None) -> str:
    """What the monitor cannot judge in a run without an observer, for the user; empty where nothing is lost.

    Raises:
        UserError: monitor.stop names a flag that would never be judged.
    """
    if observer is not None or config.monitor.every == 0 or not config.objective.samples_images:
        return ""
    lost = {flag.name: flag.without_dino for flag in RED_FLAGS if flag.without_dino}
    why = f"evaluation.backbone is empty and adversary.kind = {config.adversary.kind} has no DINO"
    never = [name for name in config.monitor.stop if lost.get(name) == NOT_JUDGED]
    if never:
        raise UserError(f"monitor.stop names {never[0]}, which {NOT_JUDGED}: {why}; set evaluation.backbone")
    told = ", ".join(f"{name} {what}" for name, what in lost.items())
    return f"monitor: {told}: {why}; set evaluation.backbone to a Dinov2Model"


def build_metrics(
    config: Config,
    sources: Sources,
    observer: DinoObserver | None,
    distributed: Distributed,
    early: Mapping[str, Reward] | None = None,
) -> dict[str, Reward]:
    """What evaluation.metrics names; UserError for one this run cannot compute. `early`: as in `build_rewards`."""
    if not sources.held_out:
        return {}
    early = build_early_rewards(config, sources, distributed) if early is None else early
    metrics: dict[str, Reward] = {}
    judged = judge_metrics(config.evaluation.metrics, Path(config.data.cache_dir))
    for name in config.evaluation.metrics:
        if name == "dino_similarity":
            if observer is None:
                raise UserError(
                    "evaluation.metrics: dino_similarity needs a DINO; set evaluation.backbone, since the adversary "
                    f"is {config.adversary.kind}"
                )
            metrics[name] = observer.metric
        elif name == "rule_accuracy":
            metrics[name] = build_reward("rule", strict=True)
        elif name in judged:
            metrics[name] = judged[name]
        elif name in ImageStatistic.NAMES:
            metrics[name] = ImageStatistic(name)
        else:
            metrics[name] = _build_reward(name, config, sources, distributed, early)
        if name in NEED_REFERENCES and sources.references is None:
            raise UserError(f"evaluation.metrics: {name} compares with references; set data.references")
    return metrics


def build_scorer(
    config: Config,
    sources: Sources,
    adversary: Adversary | None,
    observer: DinoObserver | None,
    distributed: Distributed,
    early: Mapping[str, Reward] | None = None,
) -> Scorer:
    """Rewards, references and their cached features in one place. `early`: as in `build_rewards`."""
    cache = Path(config.data.cache_dir).expanduser()
    workers = workers_for(config.data.decode_workers, distributed.device.type)
    if sources.references is not None and workers:
        sources.references.workers = DecodingWorkers(workers)
    features = None if adversary is None else ReferenceFeatures(sources.references, adversary, cache)
    return Scorer(
        rollout=config.rollout,
        seed=config.seed,
        adversary=adversary,
        reference_features=features,
        rewards=build_rewards(config, sources, distributed, early),
        weights=config.rewards.sections(),
        references=sources.references,
        observer=observer,
        distributed=distributed,
        watches=config.monitor.every > 0,
        size=(config.model.resolution, config.model.resolution),
    )


OBJECTIVES: dict[str, Callable[[Parts], Objective]] = {
    "policy": PolicyGradient.build,
    "nft": NegativeAwareFineTuning.build,
    "awm": AdvantageWeightedMatching.build,
    "sft": SupervisedFineTuning.build,
}


def _sum_over(distributed: Distributed, config: Config) -> Callable[[list[torch.Tensor]], None]:
    """Sums tensors over processes: at once, or where some have more to compute before it, when all have come so far.

    A collective's own timeout is not made for waiting until another process has finished its micro-batches.
    """
    if config.balance(distributed.world_size).even and not config.update.skip_dead_groups:
        return distributed.all_reduce_sum

    def meet_and_sum(tensors: list[torch.Tensor]) -> None:
        with distributed.monitored("update"):
            pass
        distributed.all_reduce_sum(tensors)

    return meet_and_sum


def _nothing_to_sum(gradients: list[torch.Tensor]) -> None:
    """Of weights in parts: each backward pass has summed its own, and left every process its rows."""


def build_trainer(
    config: Config,
    policy: Policy,
    prompts: list[str],
    references: ReferenceSet | None,
    scorer: Callable[[], Scorer],
    distributed: Distributed,
    fast: FastPaths,
    graphs: GraphBackend | None = None,
) -> Trainer:
    """A trainer at iteration 0.

    Args:
        policy: the generator.
        prompts, references: what it is trained on.
        scorer: builds what judges its images, if the objective wants it.
        fast: which of the machine's fast paths are used.
        graphs: captures functions; None runs them eagerly.

    Raises:
        UserError: processes are to share out tokens, which the policy does not.
    """
    mesh = Mesh.of(distributed, config.model.sequence_parallel)
    if mesh.sequence_size > 1 and getattr(policy, "sequence", None) is None:
        raise UserError(
            f"model.sequence_parallel = {mesh.sequence_size}: a {type(policy).__name__} does not share out tokens, and "
            "its gradient would be counted by each process; set model.sequence_parallel = 1"
        )
    updater = Updater(
        policy,
        config.update,
        config.rollout,
        config.advantage,
        reduce=_sum_over(distributed, config) if parts_of(policy) is None else _nothing_to_sum,
        fused=fast.fused_optimizer,
        graphs=graphs if fast.captured_update else None,
    )
    micro_batches = MicroBatches(
        prompts,
        config.rollout,
        config.update.minibatches,
        seed=config.seed,
        mesh=mesh,
        together=config.balance(distributed.world_size).images,
    )
    monitor = Monitor(config.monitor, Knobs.of(config))
    parts = Parts(config, policy, updater, micro_batches, monitor, references, scorer, distributed, fast, graphs)
    return Trainer(
        policy,
        updater,
        OBJECTIVES[config.update.objective](parts),
        monitor,
        distributed,
        length=Length(config.iterations, config.global_steps, config.images_per_iteration),
        seed=config.seed,
        max_grad_norm=config.update.max_grad_norm,
        copies=config.model.train == "lora",  # after full fine-tuning weights and moments would not fit a second time
    )
