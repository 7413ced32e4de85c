"""Checks across fields of what judges images: rewards, their workers, the adversary, the metrics of evaluations."""

from __future__ import annotations

import re

from advgrpo.config.config import Config
from advgrpo.config.explain import did_you_mean, shown
from advgrpo.config.rewards import RewardSection
from advgrpo.config.sections import AdversarySection
from advgrpo.errors import UserError

NEED_REFERENCES = ("clip_reference_similarity", "dino_similarity")
IMAGE_STATISTICS = ("saturation", "dark_share", "edge_density")  # metrics that need no model; more is not better
LOWER_IS_BETTER: frozenset[str] = frozenset()  # metrics of which less is better; rewards are not among them
JUDGE_METRICS = ("retrieval", "retrieval_top5", "classifier_accuracy")  # of the tiny world's two judges
# What metrics of rewards and evaluations are called besides (reporting/metric_names.py).
_TAKEN_NAMES = ("generated", "reference", "std", "remotes", "custom", "pools", "clip", "rule_accuracy", *JUDGE_METRICS)
_TAKEN_ENDINGS = ("_of_references", "_ci95", "_first")
# Fields of section adversary that kind pickscore has no use for.
_OF_FEATURE_HEADS = ("reward_ema", "gradient_penalty", "feature_layers", "heads", "reset_every", "spectral_norm")
_NEEDED = {"aesthetic": ("head",), "remote": ("url",), "vlm_judge": ("base_url", "model")}  # to be built at all


def check_judges(config: Config) -> None:
    """All of this file; UserError for the first that is wrong."""
    _check_names(config)
    _check_rewards(config)
    _check_pools(config)
    check_learning(config)
    _check_metrics(config)
    _check_best(config)


def needs_references(config: Config) -> list[str]:
    """The settings that compare images with references."""
    itself = [f"update.objective = {config.update.objective}"] if config.objective.learns_from_references else []
    learned = ["adversary.kind"] if config.learns_adversary else []
    fixed = [f"rewards.{name}" for name in config.fixed_rewards if name in NEED_REFERENCES]
    evaluated = [f"evaluation.metrics: {name}" for name in config.evaluation.metrics if name in NEED_REFERENCES]
    return [*itself, *learned, *fixed, *(evaluated if config.data.held_out_prompts else [])]


def _check_rewards(config: Config) -> None:
    """Something rewards the generator, whatever is learned is used, and references are there for those who compare."""
    kind, rewards = config.adversary.kind, config.rewards
    _check_not_looked_at(config)
    weighted = any(section.weight for section in rewards.fixed().values())
    if config.objective.uses_rewards and kind == "none" and not weighted:
        names = ", ".join(name for name in rewards.sections() if name != "adversary")
        raise UserError(f"adversary.kind = none and no fixed reward: give one of rewards.{{{names}}}.weight")
    if config.learns_adversary and not rewards.adversary.used:
        raise UserError(
            f"rewards.adversary.weight = 0: the adversary {kind} would learn for nothing; set adversary.kind = none"
        )
    if config.learns_adversary and not rewards.adversary.weight and not weighted:
        raise UserError(
            f"rewards.adversary.weight = 0 with rewards.adversary.gate = {rewards.adversary.gate:g}, and no other "
            "reward has a weight: a gate only takes away, so every total would be 0 and nothing be trained; give one a "
            "weight"
        )
    for name, entry in rewards.entries().items():
        used = name in config.fixed_rewards
        if not (used or name in config.evaluation.metrics):
            continue
        for field in _NEEDED.get(entry.kind, ()):
            if not getattr(entry.section, field):
                who = entry.owner if used else f"evaluation.metrics: {name}"
                setting = f"{entry.owner}.{field}"
                remedy = f"give {setting}" if "[" in setting else f"pass --{setting}"
                raise UserError(f"{setting} is empty, but {who} needs it: {remedy}")


def _check_names(config: Config) -> None:
    """Rewards of lists have names of their own that can be keys of metrics, and each of them is used."""
    rewards = config.rewards
    built_in = [name for name in type(rewards).model_fields if isinstance(getattr(rewards, name), RewardSection)]
    taken = dict.fromkeys([*built_in, *_TAKEN_NAMES, *IMAGE_STATISTICS], "advgrpo")
    for field in ("remotes", "custom"):
        for number, section in enumerate(getattr(rewards, field)):
            owner = f"rewards.{field}[{number}]"
            where = f"{owner}.name = {section.name!r}"
            if not re.fullmatch("[a-z][a-z0-9_]{0,63}", section.name) or section.name.endswith(_TAKEN_ENDINGS):
                raise UserError(
                    f"{where}: want a name for metrics: a letter, then letters, digits and underscores, all small, "
                    f"at most 64, not ending in {', '.join(_TAKEN_ENDINGS)}"
                )
            if section.name in taken:
                raise UserError(f"{where} is the name of another reward or metric, of {taken[section.name]}: change it")
            taken[section.name] = owner
            if not section.used and section.name not in config.evaluation.metrics:
                raise UserError(
                    f"{owner}.weight = 0, {owner}.gate = None, and evaluation.metrics does not name {section.name}: "
                    "the reward would do nothing; give it a weight, or leave it out"
                )


def _check_pools(config: Config) -> None:
    """Every pool is of one reward that is used and needs no references, and its devices are those of its kind."""
    seen: dict[str, str] = {}
    for number, pool in enumerate(config.rewards.pools):
        owner = f"rewards.pools[{number}]"
        where = f"{owner}.reward = {pool.reward!r}"
        if pool.reward in seen:
            raise UserError(f"{where} has workers in {seen[pool.reward]} already: leave one out")
        seen[pool.reward] = owner
        if pool.reward in NEED_REFERENCES:
            raise UserError(f"{where} compares with the references, which workers do not have: leave the pool out")
        if pool.reward not in config.used_rewards:
            known = ", ".join(name for name in config.used_rewards if name not in NEED_REFERENCES) or "none"
            raise UserError(f"{where} is no fixed reward in use; those that can have workers: {known}")
        if pool.kind == "processes" and pool.gpus:
            raise UserError(f"{owner}.gpus = {pool.gpus:g} is what Ray reserves: want kind ray, or device cuda:N")
        ray = pool.kind == "ray"
        if not re.fullmatch("cpu|cuda" if ray else "cpu|cuda:[0-9]{1,3}", pool.device):
            want = "cpu, or cuda, of which Ray chooses one" if ray else "cpu or cuda:N"
            raise UserError(f"{owner}.device = {pool.device!r} with kind = {pool.kind}: want {want}")
        if ray and (pool.device == "cuda") != (pool.gpus > 0):
            raise UserError(
                f"{owner}.device = {pool.device!r} with gpus = {pool.gpus:g}: Ray gives a worker the GPUs that it asks "
                "for; want cpu and gpus 0, or cuda and gpus above 0"
            )


def check_learning(config: Config) -> None:
    """Weights that leave nothing to learn from are slips."""
    adversary = config.adversary
    if not config.learns_adversary:
        return
    if adversary.kind == "pickscore":
        _check_no_feature_head(adversary)
    _check_feature_layers(adversary)
    pairs = () if adversary.kind == "pickscore" else ("reward_weights", "loss_weights")
    for name in pairs:
        if not any(getattr(adversary, name)):
            raise UserError(
                f"adversary.{name} = [0, 0]: nothing would be rewarded or learned; give the global or the local part a "
                f"weight above 0 (--adversary.{name.replace('_', '-')} 0.7 0.3)"
            )
    if adversary.schedule == "never" and not adversary.warmup_iterations and pairs:
        raise UserError(
            "adversary.schedule = never without adversary.warmup_iterations: the head would stay random and its reward "
            "mean nothing; set adversary.kind = none with a fixed reward, or another schedule"
        )
    if adversary.kind == "pickscore" and adversary.objective == "pairwise" and adversary.replay_capacity:
        raise UserError(
            f"adversary.replay_capacity = {adversary.replay_capacity} does not go with adversary.objective = pairwise, "
            "in which every generation is compared with a reference of its own prompt; set it to 0"
        )


def _check_feature_layers(adversary: AdversarySection) -> None:
    """They are a DINOv2's, and in order."""
    layers = list(adversary.feature_layers)
    if layers and adversary.kind == "siglip":
        raise UserError(
            f"adversary.feature_layers = {layers} are layers of a DINOv2, but adversary.kind = siglip; leave it out, "
            "or set adversary.kind = dino"
        )
    if layers != sorted(set(layers)):
        raise UserError(
            f"adversary.feature_layers = {layers}: want different layers in ascending order; use {sorted(set(layers))}"
        )


def _check_no_feature_head(adversary: AdversarySection) -> None:
    """UserError for what only a head on frozen features has."""
    for name in _OF_FEATURE_HEADS:
        value, plain = getattr(adversary, name), AdversarySection.model_fields[name].default
        if value != plain:
            raise UserError(
                f"adversary.{name} = {shown(value)} is of a head on frozen features, but adversary.kind = pickscore "
                f"trains layers of its own; leave it out, or set adversary.kind to dino or siglip"
            )


def untrained(config: Config) -> str:
    """Why a run of these settings would leave the generator as it is; "" where it trains it."""
    adversary, iterations, flag = config.adversary, config.iterations, "--iterations"
    if not config.learns_adversary:
        return ""
    if 0 < config.global_steps < iterations:  # until the generator is trained, an iteration is a global step
        iterations, flag = config.global_steps, "--global-steps"
    if adversary.warmup_iterations >= iterations:
        return (
            f"all {iterations} iterations are warm-up of the adversary's head (adversary.warmup_iterations = "
            f"{adversary.warmup_iterations}): the generator is not trained; raise {flag} above it"
        )
    if adversary.schedule == "alternate":
        period, first = adversary.alternate_period, adversary.warmup_iterations
        if not any(number % period == period - 1 for number in range(first, min(iterations, first + period))):
            return (
                f"adversary.schedule = alternate trains the generator in every {period}th iteration, and there are "
                f"{iterations}: the generator is not trained; raise {flag} or lower adversary.alternate_period"
            )
    return ""


def _check_metrics(config: Config) -> None:
    """Metrics exist, are named once, and have what they look through."""
    rewards = (name for name in config.rewards.sections() if name != "adversary")
    known = [*rewards, "rule_accuracy", *JUDGE_METRICS, *IMAGE_STATISTICS]
    metrics = config.evaluation.metrics
    for name in metrics:
        if name not in known:
            raise UserError(f"evaluation.metrics: unknown metric {name!r}{did_you_mean(name, known, cutoff=0.4)}")
        if metrics.count(name) > 1:
            raise UserError(f"evaluation.metrics names {name} {metrics.count(name)} times; leave it once")
    if not config.data.held_out_prompts:
        return
    if "dino_similarity" in metrics and config.observer is None:
        raise UserError(
            "evaluation.metrics: dino_similarity needs a DINO; set evaluation.backbone, since the adversary is "
            f"{config.adversary.kind}"
        )


def direction(metric: str) -> int:
    """1 where more of a held-out metric is better, -1 where less is, 0 where neither is."""
    return 0 if metric in IMAGE_STATISTICS else -1 if metric in LOWER_IS_BETTER else 1


def _check_best(config: Config) -> None:
    """The metric that decides which LoRA is kept, and when the run ends, is evaluated, and says what is better."""
    evaluation = config.evaluation
    metric, metrics = evaluation.keep_best, evaluation.metrics
    if evaluation.stop_after and not metric:
        raise UserError(
            f"evaluation.stop_after = {evaluation.stop_after} needs a metric: pass --evaluation.keep-best with one of "
            f"{', '.join(name for name in metrics if direction(name)) or 'evaluation.metrics'}"
        )
    if not metric:
        return
    where = f"evaluation.keep_best = {metric!r}"
    if metric not in metrics:
        known = [name for name in metrics if direction(name)]
        raise UserError(
            f"{where} is not evaluated: evaluation.metrics has {', '.join(metrics) or 'nothing'}"
            f"{did_you_mean(metric, known, cutoff=0.4)}"
        )
    if not direction(metric):
        raise UserError(
            f"{where}: neither more nor less of it is better; name a metric that says which image is better"
        )
    if not config.data.held_out_prompts:
        raise UserError(f"{where}, but nothing is evaluated: pass --data.held-out-prompts PATH")
    if not evaluation.every:
        raise UserError(f"{where}, but evaluation.every = 0 evaluates at the end alone; pass --evaluation.every N")
    if config.model.train != "lora":
        raise UserError(
            f"{where} keeps a LoRA, but model.train = {config.model.train}; leave evaluation.keep_best empty"
        )


def _check_not_looked_at(config: Config) -> None:
    """UserError for settings that the objective would ignore although they ask for something."""
    update, evaluation, chosen = config.update, config.evaluation, f"update.objective = {config.update.objective}"
    for name, section in config.rewards.fixed().items():
        if name not in config.fixed_rewards:
            field, owner = "weight" if section.weight else "gate", config.rewards.entries()[name].owner
            raise UserError(
                f"{owner}.{field} = {getattr(section, field):g} would not be looked at: {chosen} learns from the "
                "references; leave it out"
            )
    for name, plain in config.objective.not_looked_at:
        if getattr(update, name) != plain:
            raise UserError(
                f"update.{name} = {getattr(update, name)!r} is the policy gradient's, but {chosen}; set update.{name} "
                f"= {plain}"
            )
    if update.graphs is True and not config.objective.has_window:
        raise UserError(
            f"update.graphs = True captures the policy gradient's update, but {chosen}; set update.graphs = auto"
        )
    watches = config.objective.samples_images or "dino_similarity" in evaluation.metrics
    if evaluation.backbone and not watches:
        raise UserError(
            f"evaluation.backbone = {evaluation.backbone!r} would not be looked through: {chosen} samples no images "
            "while it trains, and evaluation.metrics does not name dino_similarity; add it or leave "
            "evaluation.backbone empty"
        )
