"""Checks across fields; each names the field to change."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .sections import Config, RolloutSection

NEED_REFERENCES = ("clip_reference_similarity", "dino_similarity")


def check(config: Config, world_size: int) -> None:
    """Checks across fields; UserError names the field to change."""
    rollout = config.rollout
    group, micro = rollout.group_size, rollout.micro_batch
    if group % micro and micro % group:
        raise UserError(
            f"rollout.group_size = {group} is not divisible by rollout.micro_batch = {micro}, nor the other way round; "
            f"choose a micro_batch that divides {group}"
        )
    images, parts = config.images_per_iteration, world_size * config.update.optimizer_windows
    if images % (micro * parts):
        raise UserError(
            f"prompts_per_iteration x group_size = {images} pictures cannot be cut into micro-batches of {micro} for "
            f"{config.update.optimizer_windows} optimizer_windows on {world_size} processes; make "
            f"rollout.prompts_per_iteration x group_size a multiple of {micro * parts}"
        )
    _check_window(config)
    if rollout.dynamics in ("flow_cps", "ddim") and rollout.noise_level > 1:
        raise UserError(f"rollout.noise_level = {rollout.noise_level:g}: {rollout.dynamics} wants at most 1")
    _check_precision(config)
    _check_rewards(config)
    if not config.data.prompts:
        raise UserError("data.prompts is empty: pass --data.prompts PATH")
    if config.model.resolution % 8:
        raise UserError(f"model.resolution = {config.model.resolution}: want a multiple of 8")


def _check_window(config: Config) -> None:
    """The window's order has what it needs, and the schedule has the steps."""
    rollout, window = config.rollout, config.rollout.window
    order, steps, last = window.chosen_order, window.steps, noisy_steps(rollout)
    if steps is not None and order != "fixed":
        raise UserError(
            f"rollout.window.steps = {list(steps)} would not be looked at: rollout.window.order = {order}; leave "
            "rollout.window.steps out, or set rollout.window.order = fixed"
        )
    if order == "fixed" and (not steps or len(set(steps)) != len(steps) or max(steps) >= last):
        given = None if steps is None else list(steps)
        raise UserError(
            f"rollout.window.steps = {given}: want distinct steps within 0..{last - 1} "
            f"(num_steps = {rollout.num_steps}, dynamics {rollout.dynamics})"
        )
    if order != "fixed" and len(eligible_steps(config)) < window.size:
        raise UserError(
            f"rollout.window: noise_range {list(window.noise_range)} of {rollout.num_steps} steps holds "
            f"{len(eligible_steps(config))} usable steps, fewer than size = {window.size}; widen noise_range"
        )
    if window.trained_of(window.count) == 0:
        raise UserError(
            f"rollout.window.train_share = {window.train_share:g} of a window of {window.count} steps trains none; "
            f"want at least {1 / window.count:.3g}"
        )


def _check_precision(config: Config) -> None:
    """Merged and quantised weights exist on the fused path only, and cost on-policy exactness in the window."""
    needs_fused = {
        "rollout.precision": (config.rollout.precision, "model"),
        "rollout.window_forward": (config.rollout.window_forward, "trainer"),
        "model.base_precision": (config.model.base_precision, "model"),
    }
    for name, (value, plain) in needs_fused.items():
        if value != plain and not (config.fast and config.model.train == "lora"):
            raise UserError(f"{name} = {value!r} needs --fast and model.train = lora; use them, or {name} = {plain}")
    if config.rollout.window_forward == "merged" and config.update.old_log_prob == "rollout":
        raise UserError(
            "rollout.window_forward = 'merged' samples from other weights than are trained, so ratios would not start "
            "at 1: set update.old_log_prob to recompute or truncated_importance"
        )
    start = config.model.lora.start_from
    if start and config.model.train != "lora":
        raise UserError(f"model.lora.start_from = {start!r} needs model.train = lora")
    if start and not Path(start).expanduser().is_dir():
        raise UserError(f"model.lora.start_from = {start!r} is not a folder; pass one that OUT/lora was exported to")


def needs_references(config: Config) -> list[str]:
    """The settings that compare pictures with references."""
    supervised = config.update.objective == "sft"
    learned = ["update.objective = sft"] if supervised else ["adversary.kind"] if config.learns_adversary else []
    rewarded = {} if supervised else config.rewards.fixed()
    fixed = [f"rewards.{name}" for name in rewarded if name in NEED_REFERENCES]
    evaluated = [f"evaluation.metrics: {name}" for name in config.evaluation.metrics if name in NEED_REFERENCES]
    return [*learned, *fixed, *(evaluated if config.data.held_out_prompts else [])]


def _check_rewards(config: Config) -> None:
    """Something rewards the generator, whatever is learned is used, and references are there for those who compare."""
    kind, rewards = config.adversary.kind, config.rewards
    if config.update.objective == "sft":
        _check_supervised(config)
    elif kind == "none" and not any(section.weight for section in rewards.fixed().values()):
        names = ", ".join(name for name in rewards.sections() if name != "adversary")
        raise UserError(f"adversary.kind = none and no fixed reward: give one of rewards.{{{names}}}.weight")
    if config.learns_adversary and not rewards.adversary.used:
        raise UserError(
            f"rewards.adversary.weight = 0: the adversary {kind} would learn for nothing; set adversary.kind = none"
        )
    for name, field in (("aesthetic", "head"), ("remote", "url")):
        section = getattr(rewards, name)
        if section.used and not getattr(section, field):
            raise UserError(f"rewards.{name}.{field} is empty: rewards.{name} needs it")
    if config.data.references and config.data.style:
        raise UserError("data.references and data.style are both set: leave one empty")
    needed = needs_references(config)
    if needed and not (config.data.references or config.data.style):
        raise UserError(f"data.references is empty, but {needed[0]} needs references: pass --data.references PATH")


def _check_supervised(config: Config) -> None:
    """UserError for settings that supervised fine-tuning would ignore although they ask for something."""
    update = config.update
    for name, plain in (("kl_weight", 0.0), ("old_log_prob", "rollout")):
        if getattr(update, name) != plain:
            raise UserError(
                f"update.{name} = {getattr(update, name)!r} is the policy gradient's, but update.objective = sft; "
                f"set update.{name} = {plain}"
            )


def noisy_steps(rollout: RolloutSection) -> int:
    """How many steps, from the first, can be stochastic: the last of flow_cps and ddim arrives without any noise."""
    return rollout.num_steps - 1 if rollout.dynamics in ("flow_cps", "ddim") else rollout.num_steps


def eligible_steps(config: Config) -> list[int]:
    """Consecutive steps that a window may contain unless it is fixed: their share of the schedule left is in the range.

    The range is open below: of ten steps, 0.5 to 1.0 holds the first five.
    """
    rollout = config.rollout
    low, high = rollout.window.noise_range
    return [i for i in range(noisy_steps(rollout)) if low < 1 - i / rollout.num_steps <= high]
