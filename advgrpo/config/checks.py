"""Checks across fields; each names the field to change. Those of what judges images are in judge_checks.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from advgrpo.config.config import Config
from advgrpo.config.engine import check_engine
from advgrpo.config.explain import shown
from advgrpo.config.judge_checks import check_judges, needs_references
from advgrpo.config.sections import RolloutSection, UpdateSection
from advgrpo.errors import UserError


def check(config: Config, *, with_data: bool = True) -> None:
    """Checks across fields; UserError names the field to change. Any number of processes trains what passes them.

    Args:
        with_data: False leaves out whether prompts, images and other files are given, for a plan without them.
    """
    rollout = config.rollout
    _check_branching(config)
    check_micro_batches(rollout, config.update.minibatches)
    if config.objective.forward_process:
        _check_forward_process(config)
    else:
        _check_window(rollout)
    _check_cheaper(config)
    _check_informative(config)
    if rollout.dynamics in ("flow_cps", "ddim") and rollout.eta > 1:
        raise UserError(f"rollout.eta = {rollout.eta:g}: {rollout.dynamics} wants at most 1")
    if config.model.resolution % 8:
        raise UserError(f"model.resolution = {config.model.resolution}: want a multiple of 8")
    _check_kl(config.update, config.model.train)
    if config.update.kl_variance == "unit_time" and rollout.likelihood != "gaussian":
        raise UserError(
            f"update.kl_variance = 'unit_time' divides the KL of likelihood gaussian, but rollout.likelihood = "
            f"{rollout.likelihood!r} divides by nothing; set update.kl_variance = 'step'"
        )
    if config.update.step_weights == "inverse_length" and rollout.dynamics == "ddim":
        raise UserError(
            "update.step_weights = 'inverse_length' divides by a step's length in noise levels of a flow, which "
            "rollout.dynamics = 'ddim' has not; set update.step_weights = 'uniform'"
        )
    _check_precision(config)
    for reason in (not_sharded(config), not_in_sequence(config)):
        if reason:
            raise UserError(reason)
    check_engine(config)
    check_judges(config)
    if with_data:
        _check_data(config)


def _check_kl(update: UpdateSection, train: str) -> None:
    """Whom the KL pulls towards, and whether it pulls at all."""
    if update.kl_to != "base" and not update.kl_weight:
        raise UserError(
            f"update.kl_to = {update.kl_to!r} pulls nowhere with update.kl_weight = 0: give it a weight "
            "(--update.kl-weight 0.1)"
        )
    if (update.kl_to == "teacher") != bool(update.teacher):
        raise UserError(
            f"update.teacher = {update.teacher!r} with update.kl_to = {update.kl_to!r}: the KL to a teacher needs the "
            "folder of its LoRA and update.kl_to = 'teacher'"
        )
    if update.teacher and train != "lora":
        raise UserError(f"update.teacher = {update.teacher!r} is a LoRA, which needs model.train = lora")
    if not update.policy_weight and not update.kl_weight:
        raise UserError(
            "update.policy_weight = 0 and update.kl_weight = 0: nothing would be learned; give one a weight"
        )
    if update.kl_space == "velocity" and update.kl_variance != "step":
        raise UserError(
            f"update.kl_variance = {update.kl_variance!r} would not be looked at: update.kl_space = 'velocity' divides "
            "by nothing; set update.kl_variance = 'step'"
        )


def fits_micro_batches(
    rollout: RolloutSection, minibatches: int, *, prompts: int | None = None, micro: int | None = None
) -> bool:
    """Whether `prompts` groups can be cut into micro-batches of `micro` (default: the configured ones) for every
    minibatch, and shared out among branches."""
    group, branches = rollout.group_size, rollout.window.branches
    micro, prompts = micro or rollout.micro_batch, prompts or rollout.prompts_per_iteration
    whole_groups = group % micro == 0 or (micro % group == 0 and not rollout.window.branching)
    return whole_groups and prompts % branches == 0 and prompts * group % (micro * minibatches) == 0


def check_micro_batches(rollout: RolloutSection, minibatches: int) -> None:
    """UserError unless `fits_micro_batches`; it proposes the nearest settings that do."""
    group, micro, prompts = rollout.group_size, rollout.micro_batch, rollout.prompts_per_iteration
    if group % micro and micro % group:
        raise UserError(
            f"rollout.group_size = {group} is not divisible by rollout.micro_batch = {micro}, nor the other way round; "
            f"choose a micro_batch that divides {group}"
        )
    if not fits_micro_batches(rollout, minibatches):
        raise UserError(
            f"rollout.prompts_per_iteration x group_size = {prompts} x {group} = {prompts * group} images cannot be "
            f"cut into micro-batches of {micro} for {minibatches} minibatches: that needs a multiple of {micro} x "
            f"{minibatches} = {micro * minibatches}; set {micro_batch_remedies(rollout, minibatches)}"
        )


def micro_batch_remedies(rollout: RolloutSection, minibatches: int) -> str:
    """Settings near the configured ones that `fits_micro_batches` takes, in words."""
    smaller = [
        micro
        for micro in range(rollout.micro_batch - 1, 0, -1)
        if fits_micro_batches(rollout, minibatches, micro=micro)
    ]
    found = [f"rollout.micro_batch = {smaller[0]}"] if smaller else []
    prompts = nearest_prompts(rollout, minibatches, rollout.micro_batch)
    found.append(f"rollout.prompts_per_iteration = {prompts}")
    if not smaller:
        micros = [m for m in range(rollout.micro_batch - 1, 0, -1) if rollout.group_size % m == 0]
        each = {m: nearest_prompts(rollout, minibatches, m) for m in micros}
        near = min(each, key=lambda m: (abs(each[m] - rollout.prompts_per_iteration), -m), default=None)
        if near is not None and each[near] != prompts:
            found.append(f"rollout.micro_batch = {near} with rollout.prompts_per_iteration = {each[near]}")
    return ", or ".join(found)


def nearest_prompts(rollout: RolloutSection, minibatches: int, micro: int) -> int:
    """The number of groups nearest to the configured one, the larger of two, that can be cut into `micro`."""
    unit = micro * minibatches
    unit = math.lcm(unit // math.gcd(unit, rollout.group_size), rollout.window.branches)
    below = rollout.prompts_per_iteration // unit * unit
    above = below + unit
    near_below = rollout.prompts_per_iteration - below < above - rollout.prompts_per_iteration
    return below if below and near_below else above


def _check_window(rollout: RolloutSection) -> None:
    """The window's order has what it needs, and the schedule has the steps."""
    window = rollout.window
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
    if order != "fixed" and len(eligible_steps(rollout)) < window.size:
        raise UserError(
            f"rollout.window: noise_range {list(window.noise_range)} of {rollout.num_steps} steps holds "
            f"{len(eligible_steps(rollout))} usable steps, fewer than size = {window.size}; widen noise_range"
        )
    if window.trained_of(window.count) == 0:
        raise UserError(
            f"rollout.window.train_share = {window.train_share:g} of a window of {window.count} steps trains none; "
            f"want at least {1 / window.count:.3g}"
        )


def _check_branching(config: Config) -> None:
    """Groups that branch apart leave one trajectory, and what is computed together has one step."""
    rollout, window = config.rollout, config.rollout.window
    if not window.branching:
        return
    asked, count = "rollout.window.branching = True", window.branches
    if not config.objective.has_window:
        raise UserError(
            f"{asked} is of the policy gradient's window, but update.objective = {config.update.objective} has none; "
            "set rollout.window.branching = false"
        )
    if rollout.initial_noise != "shared":
        raise UserError(
            f"{asked} leaves one trajectory of a prompt, but rollout.initial_noise = {rollout.initial_noise} gives "
            "every image its own; set rollout.initial_noise = shared"
        )
    if window.train_share != 1:
        raise UserError(
            f"rollout.window.train_share = {window.train_share:g} would not be looked at: with {asked} an image has "
            "one stochastic step, and is trained on it; set rollout.window.train_share = 1, and leave steps out of the "
            "window"
        )
    if rollout.micro_batch > rollout.group_size:  # one that does not divide the groups: check_micro_batches
        raise UserError(
            f"rollout.micro_batch = {rollout.micro_batch} would hold several groups of rollout.group_size = "
            f"{rollout.group_size}, whose steps differ with {asked}; set rollout.micro_batch = {rollout.group_size}"
        )
    groups = rollout.prompts_per_iteration
    if groups % count:
        raise UserError(
            f"rollout.prompts_per_iteration = {groups} groups cannot be shared out among the {count} steps of the "
            f"window, as {asked} wants; set a multiple of {count}, such as {groups + count - groups % count}"
        )


def _check_cheaper(config: Config) -> None:
    """Shorter tails and scouts belong to a window, and are shorter and cheaper than what they stand for."""
    rollout = config.rollout
    asked = (("tail_steps", 0), ("tail_solver", "euler"), ("scouts", 1), ("scout_tail_steps", 0))
    for name, plain in asked:
        value = getattr(rollout, name)
        if value != plain and not config.objective.has_window:
            raise UserError(
                f"rollout.{name} = {value} is of the policy gradient's window, but update.objective = "
                f"{config.update.objective} has none; set rollout.{name} = {plain}"
            )
    if rollout.scout_tail_steps and rollout.scouts == 1:
        raise UserError(
            f"rollout.scout_tail_steps = {rollout.scout_tail_steps} would not be looked at: rollout.scouts = 1 draws "
            "none; leave rollout.scout_tail_steps out, or set rollout.scouts = 2"
        )
    if not config.objective.has_window:
        return
    most = most_steps_after_window(rollout)
    for name in ("tail_steps", "scout_tail_steps"):
        value = getattr(rollout, name)
        if value and value >= most:
            raise UserError(
                f"rollout.{name} = {value} shortens nothing: at most {most} of rollout.num_steps = {rollout.num_steps} "
                f"steps follow the window; set rollout.{name} = "
                + (f"{max(1, most // 2)} or " if most > 1 else "")
                + "0"
            )
    longest = max(rollout.tail_steps, rollout.scout_tail_steps)
    if rollout.tail_solver != "euler" and longest < 2:
        why = (
            "one step to the image is of first order" if longest else "all steps after the window are taken one by one"
        )
        raise UserError(
            f"rollout.tail_solver = {rollout.tail_solver} would not be looked at: with rollout.tail_steps = "
            f"{rollout.tail_steps} and rollout.scout_tail_steps = {rollout.scout_tail_steps} {why}; set one of them to "
            "2 or more, or rollout.tail_solver = euler"
        )
    if rollout.tail_steps and rollout.scout_tail_steps > rollout.tail_steps:
        raise UserError(
            f"rollout.scout_tail_steps = {rollout.scout_tail_steps} is more than rollout.tail_steps = "
            f"{rollout.tail_steps}: scouts would cost more than the images they are drawn for; set "
            f"rollout.scout_tail_steps = {rollout.tail_steps} or less"
        )


def _check_informative(config: Config) -> None:
    """What is left out of the update leaves micro-batches of the rollout's shape, and nothing that pulls on all."""
    if not config.objective.has_window:
        return  # whose objective says itself that it does not look at these
    update, rollout = config.update, config.rollout
    share, asked = update.informative_share, f"update.informative_share = {update.informative_share:g}"
    left_out = asked if share != 1 else "update.skip_dead_groups = True" if update.skip_dead_groups else ""
    if left_out and update.kl_weight:
        raise UserError(
            f"{left_out} would leave images out of the KL of update.kl_weight = {update.kl_weight:g}, which is of all; "
            "set update.kl_weight = 0, or train on all images"
        )
    if share == 1:
        return
    group, micro = rollout.group_size, rollout.micro_batch
    kept = round(share * group)
    if abs(share * group - kept) > 1e-3 or not kept or kept % micro or group % micro:  # 0.333333 is a third
        fitting = [f"{n / group:g}" for n in range(micro, group, micro)] if group % micro == 0 else []
        shares = f"update.informative_share to one of {', '.join(fitting)}, or " if fitting else ""
        raise UserError(
            f"{asked} of rollout.group_size = {group} images cannot be cut into micro-batches of rollout.micro_batch = "
            f"{micro}, whose shape the update must keep; set {shares}rollout.micro_batch to a divisor of both"
        )
    if rollout.prompts_per_iteration % update.minibatches:
        raise UserError(
            f"{asked} needs whole groups in every minibatch: set rollout.prompts_per_iteration (now "
            f"{rollout.prompts_per_iteration}) to a multiple of update.minibatches = {update.minibatches}"
        )


def _check_forward_process(config: Config) -> None:
    """Each image has noise of its own, which nothing else tells from the others of its prompt, and is trained on."""
    rollout, chosen = config.rollout, f"update.objective = {config.update.objective}"
    if rollout.initial_noise == "shared":
        raise UserError(
            f"rollout.initial_noise = 'shared': {chosen} adds no noise on the way, so the images of a prompt would all "
            "be the same; set rollout.initial_noise = per_image"
        )
    if rollout.window_forward != "trainer":
        raise UserError(
            f"rollout.window_forward = {rollout.window_forward!r} is of the policy gradient's window, but {chosen} has "
            "none; set rollout.window_forward = trainer"
        )
    if config.trained_steps == 0:
        section = config.objective.forward_process
        raise UserError(
            f"{section}.step_share = {getattr(config, section).step_share:g} of rollout.num_steps = "
            f"{rollout.num_steps} trains at no noise level; want at least {1 / rollout.num_steps:.3g}"
        )


def _check_precision(config: Config) -> None:
    """Merged and quantised weights and a captured update exist on the fused path only, but for a frozen base in parts,
    which may be in FP8; merged ones cost on-policy exactness in the window."""
    fused = (config.fast, "--fast")
    fused_or_in_parts = (config.fast or config.model.shard_base != "none", "--fast or model.shard_base = blocks,")
    needs = {
        "rollout.precision": (config.rollout.precision, "model", fused),
        "rollout.window_forward": (config.rollout.window_forward, "trainer", fused),
        "model.base_precision": (config.model.base_precision, "model", fused_or_in_parts),
        "update.graphs": (config.update.graphs or "auto", "auto", fused),
    }
    for name, (value, plain, (there, ways)) in needs.items():
        if value != plain and not (there and config.model.train == "lora"):
            raise UserError(f"{name} = {value!r} needs {ways} and model.train = lora; use them, or {name} = {plain}")
    if config.rollout.window_forward == "merged" and config.update.old_log_prob == "rollout":
        raise UserError(
            "rollout.window_forward = 'merged' samples from other weights than are trained, so ratios would not start "
            "at 1: set update.old_log_prob to recompute or truncated_importance"
        )
    if config.model.train == "full" and config.model.dtype != "float32":
        raise UserError(
            f"model.train = full needs float32 weights, but model.dtype = {config.model.dtype}: set model.dtype = "
            "float32, or model.train = lora"
        )
    start = config.model.lora.start_from
    if start and config.model.train != "lora":
        raise UserError(f"model.lora.start_from = {start!r} needs model.train = lora")
    if config.model.attention != "auto" and not (config.fast and config.model.train == "lora"):
        raise UserError(
            f"model.attention = {config.model.attention!r} is the fused transformer's, which needs --fast and "
            "model.train = lora; use them, or model.attention = auto"
        )


_FUSED = "is the fused transformer's, which wants whole weights"
# Settings that a base in parts has not, with what they are where nothing is asked, and why.
_NOT_OF_STOCK_BLOCKS = (("model.attention", "auto", "is the fused transformer's, and those blocks are diffusers'"),)
_NOT_SHARDED = (
    ("rollout.window_forward", "trainer", _FUSED),
    ("update.graphs", False, "captures the fused transformer, which wants whole weights"),
    ("update.skip_dead_groups", False, "leaves out forwards on some processes alone, which all run together"),
)


def not_sharded(config: Config) -> str:
    """Why the settings do not go with model.shard_base = blocks, as an error; "" where they do, or do not ask."""
    if config.model.shard_base == "none":
        return ""
    asked, without = "model.shard_base = 'blocks'", "or model.shard_base = none"
    plain = (*(_NOT_OF_STOCK_BLOCKS if config.model.gathers_stock_blocks else ()), *_NOT_SHARDED)
    if reason := _other_than_plain(config, plain, asked, without):
        return reason
    if config.model.in_parts and config.update.optimizer not in ("auto", "torch"):
        return (
            f"update.optimizer = {config.update.optimizer!r} clips by the norm of whole gradients, which model.train = "
            f"full has in parts, but {asked}; set update.optimizer = torch, {without}"
        )
    rollout = config.rollout
    for name in ("tail_steps", "scout_tail_steps"):
        if getattr(rollout, name) and rollout.window.branching:
            return (
                f"rollout.{name} = {getattr(rollout, name)} gives the branches of rollout.window.branching = True "
                f"different numbers of steps, which processes run together, but {asked}; set rollout.{name} = 0, "
                f"{without}"
            )
    return ""


# Settings under which no processes can share out an image's tokens, with what they are else, and why.
_NOT_IN_SEQUENCE = (
    ("fast", True, "has diffusers' forward, and ours shares out tokens"),
    ("model.train", "lora", "trains diffusers' modules, and our forward shares out tokens"),
    ("update.graphs", False, "captures a forward in whose middle processes exchange tokens"),
)
# The same of blocks that lie in parts besides.
_NOT_IN_SEQUENCE_AND_PARTS = (
    ("rollout.precision", "model", "of a base in parts samples from a whole copy, which computes all tokens"),
    ("model.base_precision", "model", "of a base in parts is of diffusers' blocks, which compute all tokens"),
)


def not_in_sequence(config: Config) -> str:
    """Why the settings do not go with model.sequence_parallel, as an error; "" where they do, or do not ask."""
    members = config.model.sequence_parallel
    if members == 1:
        return ""
    asked, without = f"model.sequence_parallel = {members}", "or model.sequence_parallel = 1"
    plain = _NOT_IN_SEQUENCE if config.model.shard_base == "none" else (*_NOT_IN_SEQUENCE, *_NOT_IN_SEQUENCE_AND_PARTS)
    return _other_than_plain(config, plain, asked, without)


def _other_than_plain(config: Config, plain: Sequence[tuple[str, Any, str]], asked: str, without: str) -> str:
    """The first of some settings, (name, what it must be, why), that is something else, as an error; "" for none."""
    for name, needed, why in plain:
        value = attrgetter(name)(config)
        if value not in (needed, "auto"):  # which asks for nothing
            return f"{name} = {shown(value)} {why}, but {asked}; set {name} = {shown(needed)}, {without}"
    return ""


def no_sequence_groups(config: Config, processes: int) -> str:
    """Why so many processes are no sequence groups, which share out tokens, as an error; "" where they are."""
    members = config.model.sequence_parallel
    if processes % members == 0:
        return ""
    fitting = [n for n in range(members, 1, -1) if processes % n == 0]
    smaller = f", or model.sequence_parallel = {fitting[0] if fitting else 1}"
    return (
        f"model.sequence_parallel = {members} puts processes into sequence groups of {members}, but there "
        f"{'is' if processes == 1 else 'are'} {processes}; take a multiple of {members} (torchrun --nproc-per-node="
        f"{members}, advgrpo.plan --processes {members}){smaller}"
    )


def unevenly_sharded(config: Config, processes: int, *, micro_batch: int | None = None) -> str:
    """Why so many processes cannot hold the base in parts, as an error; "" where they can, or each holds it all.

    Every forward is theirs together, so none may have more micro-batches of a minibatch than another.

    Args:
        micro_batch: instead of `rollout.micro_batch`.
    """
    shared = config.balance(processes, micro_batch=micro_batch)
    if not config.model.is_sharded(processes) or shared.even:
        return ""
    alone = config.model.sequence_parallel == 1
    by = "them" if alone else f"their {shared.processes} sequence groups (model.sequence_parallel)"
    return (
        f"model.shard_base = 'blocks' has {processes} processes run every forward together, but the {shared.pieces} "
        f"micro-batches of a minibatch ({shared.images} images each) are not shared evenly by {by}; set "
        f"rollout.prompts_per_iteration or rollout.micro_batch so that they are a multiple of {shared.processes}, take "
        "another number of processes, or model.shard_base = none"
    )


def _check_data(config: Config) -> None:
    """Files are named where they are needed, and only there."""
    if not config.data.prompts:
        raise UserError("data.prompts is empty: pass --data.prompts PATH")
    if config.data.references and config.data.style:
        raise UserError("data.references and data.style are both set: leave one empty")
    needed = needs_references(config)
    if needed and not (config.data.references or config.data.style):
        raise UserError(f"data.references is empty, but {needed[0]} needs references: pass --data.references PATH")
    for name, folder in (
        ("model.lora.start_from", config.model.lora.start_from),
        ("update.teacher", config.update.teacher),
    ):
        if folder and not Path(folder).expanduser().exists():
            raise UserError(f"{name} = {folder!r} does not exist; pass a folder that OUT/lora was exported to")


def noisy_steps(rollout: RolloutSection) -> int:
    """How many steps, from the first, can be stochastic: the last of flow_cps and ddim arrives without any noise."""
    return rollout.num_steps - 1 if rollout.dynamics in ("flow_cps", "ddim") else rollout.num_steps


def eligible_steps(rollout: RolloutSection) -> list[int]:
    """Consecutive steps that a window may contain unless it is fixed: their share of the schedule left is in the range.

    The range is open below: of ten steps, 0.5 to 1.0 holds the first five.
    """
    low, high = rollout.window.noise_range
    return [i for i in range(noisy_steps(rollout)) if low < 1 - i / rollout.num_steps <= high]


def most_steps_after_window(rollout: RolloutSection) -> int:
    """How many steps follow the window's last one where it is as early as it can be."""
    window = rollout.window
    if window.chosen_order == "fixed":
        steps = sorted(window.steps or (0,))
    else:
        steps = eligible_steps(rollout)[: window.size]
    return rollout.num_steps - 1 - steps[0 if window.branching else -1]
