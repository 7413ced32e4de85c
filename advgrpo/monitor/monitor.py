"""Red flags seen while a run runs (docs/method.md section 7): what went wrong, by which number, which knob to turn.

Each flag is a small class that turns an iteration's metrics into a `Reading`. Three guards keep noise from raising one:
- levels are judged by the median of the last `monitor.window` values: one odd iteration cannot move it;
- trends are judged by Kendall's rank correlation with time (the Mann-Kendall statistic) over `monitor.trend_window`
  values: ranks assume neither a noise distribution nor a scale, and an outlier, which would turn a least-squares line,
  counts once;
- a flag appears, and clears, only after `monitor.persistence` readings in a row say so.

Everything a flag remembers is plain numbers, so that a resumed run flags what an uninterrupted one would. Nothing here
touches the training; the same metrics on every process give the same flags.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Any, ClassVar

from advgrpo.config import (
    AdversarySection,
    Config,
    EvaluationSection,
    ModelSection,
    MonitorSection,
    RewardsSection,
    RolloutSection,
    UpdateSection,
)
from advgrpo.config.judge_checks import IMAGE_STATISTICS
from advgrpo.monitor.flag_state import FlagState
from advgrpo.monitor.held_out import HeldOutFalls
from advgrpo.monitor.image_statistics import ImageStatistics
from advgrpo.reporting.metric_names import OF_REFERENCES
from advgrpo.types import Flag

Metrics = Mapping[str, Any]
_DINO_DISTANCE = "DINO distance"
NOT_JUDGED = "is not judged"


@dataclass(frozen=True)
class Reading:
    """What a flag saw in one check."""

    value: float
    threshold: float
    bad: bool
    message: str


@dataclass(frozen=True)
class Knobs:
    """The run's settings that flags read, and name with their values in their advice."""

    model: ModelSection
    rollout: RolloutSection
    update: UpdateSection
    rewards: RewardsSection
    adversary: AdversarySection
    evaluation: EvaluationSection
    learns_adversary: bool
    compares_groups: bool  # images of one prompt with each other

    @classmethod
    def of(cls, config: Config) -> Knobs:
        return cls(
            config.model,
            config.rollout,
            config.update,
            config.rewards,
            config.adversary,
            config.evaluation,
            config.learns_adversary,
            config.objective.compares_groups,
        )


class RedFlag(ABC):
    """One rule. Subclasses say what they read; this class remembers and waits for persistence."""

    name: ClassVar[str]
    needs_warm_discriminator: ClassVar[bool] = (
        True  # not judged while only the adversary trains (adversary.warmup_iterations)
    )
    without_dino: ClassVar[str] = ""  # what it loses where no DINO looks at the images (build.blind_spots says it)

    def __init__(self, section: MonitorSection, knobs: Knobs):
        self.section, self.knobs = section, knobs
        self.series: dict[str, list[float]] = {}  # newest last, at most as many as are judged
        self.baseline: dict[str, float] = {}
        self.active, self.against = False, 0  # readings in a row that contradict `active`
        self.last: Reading | None = None

    @abstractmethod
    def read(self, metrics: Metrics, images: ImageStatistics | None) -> Reading | None:
        """The reading of this iteration; None while there is nothing to judge."""

    @abstractmethod
    def advice(self) -> str:
        """Which knobs, with their current values."""

    @property
    def persistence(self) -> int:
        return self.section.persistence

    def update(self, metrics: Metrics, images: ImageStatistics | None) -> None:
        reading = self.read(metrics, images)
        if reading is None:
            return
        self.last = reading
        self.against = self.against + 1 if reading.bad != self.active else 0
        if self.against >= self.persistence:
            self.active, self.against = not self.active, 0

    @property
    def raised(self) -> bool:
        """Whether it is up."""
        return self.active

    def record_value(self, name: str, value: float, length: int) -> list[float]:
        """Append to a series; returns its last `length` values, newest last."""
        self.series[name] = [*self.series.get(name, []), value][-length:]
        return self.series[name]

    def settled(self, name: str, value: float | None) -> float | None:
        """The median of the last `window` values; None where the metric is absent or the window is not full yet."""
        if value is None:
            return None
        values = self.record_value(name, value, self.section.window)
        return median(values) if len(values) == self.section.window else None

    def flag(self) -> Flag:
        reading, stop = self.last, self.name in self.section.stop
        return Flag(self.name, reading.value, reading.threshold, reading.message, self.advice(), stop)

    def state(self) -> dict[str, Any]:
        last = asdict(self.last) if self.last else None
        return {"series": self.series, "baseline": self.baseline, "active": self.active, "against": self.against,
                "last": last}  # fmt: skip

    def load(self, state: FlagState) -> None:
        self.series = {name: list(values) for name, values in state.series.items()}
        self.baseline, self.active, self.against = dict(state.baseline), state.active, state.against
        self.last = Reading(**state.last.model_dump()) if state.last else None


class RewardCollapse(RedFlag):
    """The references' own reward falls and does not stop: the head unlearns what a good image is.

    Definition: Kendall's tau of `reward_reference` against time is at most -collapse_tau over trend_window checks, and
    its median over `window` checks has fallen from its peak by at least collapse_drop times its own noise (scores have
    no unit of their own). Some fall is healthy, as a fooled head's scores of both sides meet, but it ends: three runs
    of the tiny world were 3.5 times the noise below their peak at most while tau was that low.
    """

    name = "reward_collapse"

    def read(self, metrics, images):
        if metrics.get("reward_reference") is None:
            return None
        short, long = self.section.window, self.section.trend_window
        rewards = self.record_value("reward", metrics["reward_reference"], max(short, long))
        if len(rewards) < short:
            return None
        now = median(rewards[-short:])
        peak = self.baseline["peak"] = max(now, self.baseline.get("peak", now))
        if len(rewards) < long:
            return None
        tau, fall = kendall_tau(rewards[-long:]), (peak - now) / noise(rewards[-long:])
        bad = tau <= -self.section.collapse_tau and fall >= self.section.collapse_drop
        message = f"the references' reward fell from {peak:.3g} to {now:.3g} and falls on (Kendall's tau {tau:+.2f})"
        return Reading(fall, self.section.collapse_drop, bad, message)

    def advice(self):
        adversary, update = self.knobs.adversary, self.knobs.update
        return (
            f"Let the head keep up: raise adversary.updates_per_iteration (now {adversary.updates_per_iteration}) or "
            f"adversary.replay_share (now {adversary.replay_share:g}), or lower update.learning_rate "
            f"(now {update.learning_rate:g})"
        )


class ModeCollapse(RedFlag):
    """The images of a group are alike, so group-relative advantages compare nothing (docs/method.md section 4).

    Definition: the mean pairwise cosine distance of backbone features within groups, median over `window` checks, is
    below diversity_share times its value at the start of the run, or below diversity_floor (which catches a run that
    starts collapsed).
    """

    name = "mode_collapse"
    without_dino = NOT_JUDGED

    def read(self, metrics, images):
        distance = self.settled("distance", images.group_diversity if images else None)
        if distance is None:
            return None
        start = self.baseline.setdefault("distance", distance)
        threshold = max(self.section.diversity_floor, self.section.diversity_share * start)
        message = f"images of a prompt are alike: mean pairwise distance {distance:.3g}, {start:.3g} at the start"
        return Reading(distance, threshold, distance < threshold, message)

    def advice(self):
        rollout = self.knobs.rollout
        return (
            f"Raise rollout.eta (now {rollout.eta:g}) or update.kl_weight "
            f"(now {self.knobs.update.kl_weight:g}), or lower rollout.guidance_scale (now {rollout.guidance_scale:g})"
        )


@dataclass(frozen=True)
class _Move:
    """An offset of the images from where they should be, at the start and now."""

    name: str
    before: float
    after: float

    @property
    def growth(self) -> float:
        return abs(self.after) - abs(self.before)


class RewardHacking(RedFlag):
    """The reward rises while images leave the references in ways it does not see (arXiv 2511.20256, figure 1).

    Definition: since the generator's training began, (1) a reward it is trained on has risen by at least hacking_gain
    times its noise from check to check over the last trend_window ones; its lead over the references of the same
    prompts is what counts where they are scored, so that a shift of an adversary and the levels of prompts cancel; and
    (2) the distance of mean saturation, dark-pixel share or edge density to that of the same prompts' references, or
    the mean DINO cosine distance to them, has grown by more than hacking_drift. Everything is compared as medians over
    `window` checks. A distance that shrinks is what training is for. Without references it is that to the generator's
    own images at the start, and there is no DINO distance. Or, whatever the images look like: an evaluation's metric
    that nothing is trained on has fallen from its peak while such a reward has risen (held_out.py).

    On the tiny world Flow-GRPO on the preference model rose to 3 times the noise (seed 7) while the DINO distance grew
    by 0.06 to 0.17 (six runs); it grew by less than 0.05 in every run with an adversary or a KL of 0.04 and more. Where
    references are not scored, prompts hide such a rise: then the flag sees coarse hacking only.
    """

    name = "reward_hacking"
    without_dino = "sees colours and edges only"

    @property
    def held_out(self) -> HeldOutFalls:
        """What the evaluations say; it remembers among this flag's own series."""
        knobs = self.knobs
        return HeldOutFalls.of(self.series, knobs.evaluation, knobs.rewards, self.section.hacking_level)

    @property
    def raised(self) -> bool:
        fall = self.held_out.worst()
        return self.active or (fall is not None and fall.certain)

    def flag(self) -> Flag:
        fall = self.held_out.worst()
        if fall is None or not fall.certain:
            return super().flag()
        stop, advice = self.name in self.section.stop, self.advice()
        if not self.knobs.evaluation.keep_best:
            advice += ", or keep the LoRA of the peak: evaluation.keep_best (now unset)"
        return Flag(self.name, fall.loss.mean, fall.loss.mean - fall.loss.low, fall.message, advice, stop)

    def levels(self) -> dict[str, float]:
        """The trained rewards as they are compared: the median of each one's last `window` values, by name."""
        full = {name: values for name, values in self.series.items() if f"{name}, long" in self.series}
        return {name: median(values) for name, values in full.items() if len(values) == self.section.window}

    def read(self, metrics, images):
        if images is None or metrics.get("grad_norm") is None:
            return None  # an iteration that does not train the generator says nothing about what training does
        rewards, offsets = self._rewards(metrics), self._offsets(metrics, images)
        now = {name: self.settled(name, value) for name, value in {**rewards, **offsets}.items()}
        spread = {name: self._spread(name, value) for name, value in rewards.items()}
        if None in now.values():
            return None
        start = self.baseline = self.baseline or now
        gains = {name: (now[name] - start[name]) / spread[name] for name in rewards}
        zero = dict.fromkeys(offsets, 0.0) if images.reference else start
        moves = [_Move(name, start[name] - zero[name], now[name] - zero[name]) for name in offsets]
        best, worst = max(gains, key=gains.get), max(moves, key=lambda move: move.growth)
        bad = gains[best] >= self.section.hacking_gain and worst.growth > self.section.hacking_drift
        message = (
            f"{best} rose by {gains[best]:.1f} times its noise while {worst.name} went from {worst.before:+.3f} to "
            f"{worst.after:+.3f} beside the {'references' if images.reference else 'start'}"
        )
        return Reading(worst.growth, self.section.hacking_drift, bad, message)

    def _offsets(self, metrics: Metrics, images: ImageStatistics) -> dict[str, float]:
        """How far the images are from the references of their prompts, or from zero without references: by name of
        statistic, signed, and as the mean DINO distance."""
        offsets = {name: images.generated[name] - images.reference.get(name, 0.0) for name in IMAGE_STATISTICS}
        if metrics.get("dino_similarity") is not None:
            offsets[_DINO_DISTANCE] = 1 - metrics["dino_similarity"]
        return offsets

    def _spread(self, name: str, value: float) -> float:
        """Noise of the reward `name` from check to check, over the trend's window."""
        return noise(self.record_value(f"{name}, long", value, self.section.trend_window))

    def _rewards(self, metrics: Metrics) -> dict[str, float]:
        """Means of the rewards in training: with several, each by itself, as their normalised sum cannot rise."""
        reference = metrics.get("reward_reference") or 0.0
        parts = {f"reward_{name}" for name, part in self.knobs.rewards.sections().items() if part.weight > 0}
        found = {name: metrics[name] for name in sorted(parts) if metrics.get(name) is not None}
        for name in found:
            found[name] -= reference if name == "reward_adversary" else metrics.get(f"{name}{OF_REFERENCES}") or 0.0
        return found or {"reward_generated": metrics["reward_generated"] - reference}

    def advice(self):
        adversary, update = self.knobs.adversary, self.knobs.update
        if not self.knobs.learns_adversary:
            remedy = "Let a reward learn: set adversary.kind (now none)"
        elif adversary.schedule == "never":
            remedy = "Let the reward learn: set adversary.schedule (now never) to when_fooled"
        else:
            remedy = f"Raise adversary.updates_per_iteration (now {adversary.updates_per_iteration})"
        return f"{remedy}, or raise update.kl_weight (now {update.kl_weight:g})"


class DeadGroups(RedFlag):
    """Groups whose images all have the same reward teach nothing (docs/method.md section 4; Flow-GRPO logs them).

    Definition: `zero_std_fraction`, median over `window` checks, is at least dead_groups.
    """

    name = "dead_groups"

    def read(self, metrics, images):
        share = self.settled("share", metrics.get("zero_std_fraction"))
        if share is None:
            return None
        message = f"{share:.0%} of the groups have one and the same reward for all images"
        return Reading(share, self.section.dead_groups, share >= self.section.dead_groups, message)

    def advice(self):
        rollout = self.knobs.rollout
        return (
            f"Raise rollout.group_size (now {rollout.group_size}) or rollout.eta (now "
            f"{rollout.eta:g}), take prompts out of data.prompts that are always or never solved, or use a "
            "reward with finer steps"
        )


class SlowConvergence(RedFlag):
    """Few images per prompt make noisy advantages: fewer than 8 learn slowly (the paper uses 16).

    Definition: `rollout.group_size` is below monitor.group_size. Known before training, so it appears at once.
    """

    name = "slow_convergence"
    needs_warm_discriminator = False
    persistence = 1

    def read(self, metrics, images):
        if not self.knobs.compares_groups:
            return None
        size, threshold = self.knobs.rollout.group_size, self.section.group_size
        return Reading(size, threshold, size < threshold, f"groups of {size} images learn slowly")

    def advice(self):
        return f"Raise rollout.group_size (now {self.knobs.rollout.group_size}) to {self.section.group_size} or more"


class OffPolicy(RedFlag):
    """The update does not repeat the rollout's likelihoods, so the clipping acts on noise (docs/method.md section 5).

    Definition: before the first optimizer step `log_prob_mismatch_max` exceeds monitor.log_prob_mismatch or
    `pre_update_clip_fraction` exceeds monitor.pre_update_clip_fraction; on-policy exactness wants exactly 0 of both.
    """

    name = "off_policy"

    def read(self, metrics, images):
        drift, clipped = metrics.get("log_prob_mismatch_max"), metrics.get("pre_update_clip_fraction")
        if drift is None or clipped is None:
            return None
        bounds = self.section.log_prob_mismatch, self.section.pre_update_clip_fraction
        by_clipping = drift <= bounds[0] and clipped > bounds[1]
        value, threshold = (clipped, bounds[1]) if by_clipping else (drift, bounds[0])
        message = f"before any step log-probabilities moved by {drift:.2e} and {clipped:.1%} of the ratios were clipped"
        return Reading(value, threshold, drift > bounds[0] or clipped > bounds[1], message)

    def advice(self):
        update = self.knobs.update
        return (
            f"Rollout and update must run the same forward: set update.old_log_prob (now {update.old_log_prob}) to "
            f"recompute, raise model.dtype (now {self.knobs.model.dtype}) to float32 or update.clip_range (now "
            f"{update.clip_range:g}) well above the drift; update.max_log_prob_mismatch (now "
            f"{update.max_log_prob_mismatch:g}) ends a run that drifts further"
        )


class AdamEps(RedFlag):
    """Gradients at the size of Adam's eps: steps are no longer of the size of the learning rate.

    Definition: Adam's step is lr * m / (sqrt(v) + eps). With sqrt(v) = the gradient's root mean square g over all
    trained elements, after clipping (`monitor_gradient_rms`), eps takes the share eps / (g + eps) of the step away; its
    median over `window` checks is at least adam_eps_share.
    """

    name = "adam_eps"

    def read(self, metrics, images):
        rms = self.settled("rms", metrics.get("monitor_gradient_rms"))
        if rms is None:
            return None
        eps, threshold = self.knobs.update.eps, self.section.adam_eps_share
        lost = eps / (rms + eps)
        message = f"gradients of {rms:.1e} beside Adam's eps of {eps:.0e}: eps takes {lost:.0%} of every step"
        return Reading(lost, threshold, lost >= threshold, message)

    def advice(self):
        return f"Lower update.eps (now {self.knobs.update.eps:g}) to a hundredth of the gradient's size"


class OverpoweredAdversary(RedFlag):
    """The adversary tells everything apart, so its reward hardly says which image is better.

    Definition: `discriminator_accuracy`, median over `window` checks, is at least overpowered_accuracy. That is by the
    head's own threshold where it has one (DINO, SigLIP: every hinge is nearly satisfied), else by pairs of a prompt.
    Pairs alone would not do for a head: in a healthy run of the tiny preset it ranks 99 % of them right for 30
    iterations, while 84 to 94 % of the images are on their side of the threshold.
    """

    name = "overpowered_adversary"

    def read(self, metrics, images):
        accuracy = self.settled("accuracy", metrics.get("discriminator_accuracy"))
        if accuracy is None:
            return None
        threshold = self.section.overpowered_accuracy
        message = f"the adversary tells {accuracy:.1%} of the images apart"
        return Reading(accuracy, threshold, accuracy >= threshold, message)

    def advice(self):
        adversary = self.knobs.adversary
        return (
            f"Lower adversary.updates_per_iteration (now {adversary.updates_per_iteration}), adversary.learning_rate "
            f"(now {adversary.learning_rate:g}) or adversary.warmup_updates (now {adversary.warmup_updates})"
        )


class SleepingAdversary(RedFlag):
    """The adversary guesses: its reward is noise, and the generator learns nothing from it.

    Definition: `discriminator_paired_accuracy`, the share of (reference, generation) pairs of one prompt that it ranks
    right, is at most sleeping_accuracy as a median over `window` checks; guessing is 0.5. Pairs of one prompt are all
    that group-relative advantages feel. A threshold on pooled scores reads 0.5 for a PickScore that ranks well, and
    0.57 for a DINO head of the tiny preset (eq. 7, no margin) that ranks 0.78 of the pairs right.
    """

    name = "sleeping_adversary"

    def read(self, metrics, images):
        accuracy = self.settled("accuracy", metrics.get("discriminator_paired_accuracy"))
        if accuracy is None:
            return None
        threshold = self.section.sleeping_accuracy
        message = (
            f"the adversary puts the reference above the generation in {accuracy:.1%} of a prompt's pairs; guessing "
            "gives 50%"
        )
        return Reading(accuracy, threshold, accuracy <= threshold, message)

    def advice(self):
        adversary = self.knobs.adversary
        if adversary.schedule == "never":
            return "Let the adversary train: set adversary.schedule (now never) to when_fooled"
        margin = ""
        if adversary.schedule == "when_fooled":
            margin = f"adversary.fooled_margin (now {adversary.fooled_margin:g}), the lead below which it trains, "
        return (
            f"Raise {margin}adversary.updates_per_iteration "
            f"(now {adversary.updates_per_iteration}), adversary.learning_rate (now {adversary.learning_rate:g}) or "
            f"adversary.warmup_iterations (now {adversary.warmup_iterations})"
        )


class ShortenedTail(RedFlag):
    """Rewards rank images by fewer steps after the window otherwise than by all: advantages follow another order.

    Definition: `tail_agreement`, Kendall's tau within groups of the iteration's own images, is below
    rollout.tail_agreement. It is a mean over groups and seldom measured (rollout.tail_check_every), so one reading is
    enough.
    """

    name = "shortened_tail"
    persistence = 1

    def read(self, metrics, images):
        tau, threshold = metrics.get("tail_agreement"), self.knobs.rollout.tail_agreement
        if tau is None:
            return None
        message = (
            f"images by rollout.tail_steps = {self.knobs.rollout.tail_steps} and by all steps are ranked alike to "
            f"Kendall's tau {tau:.2f}"
        )
        return Reading(tau, threshold, tau < threshold, message)

    def advice(self):
        rollout = self.knobs.rollout
        return (
            f"Raise rollout.tail_steps (now {rollout.tail_steps}) or set it to 0; a lower rollout.tail_agreement (now "
            f"{rollout.tail_agreement:g}) accepts it"
        )


RED_FLAGS: tuple[type[RedFlag], ...] = (
    RewardCollapse,
    ModeCollapse,
    RewardHacking,
    DeadGroups,
    SlowConvergence,
    OffPolicy,
    AdamEps,
    OverpoweredAdversary,
    SleepingAdversary,
    ShortenedTail,
)


class Monitor:
    """All red flags of a run."""

    def __init__(self, section: MonitorSection, knobs: Knobs):
        self.section, self.knobs = section, knobs
        self.red_flags = [kind(section, knobs) for kind in RED_FLAGS]

    def due(self, iteration: int) -> bool:
        """Whether this iteration is looked at."""
        return self.section.every > 0 and iteration % self.section.every == 0

    def check(self, metrics: Metrics, images: ImageStatistics | None = None) -> list[Flag]:
        """Take in one iteration's metrics and return the flags that are active after it.

        Args:
            metrics: the iteration's record; a metric that is absent or None leaves its flags as they are.
            images: statistics of its images; None leaves the flags on images as they are.
        """
        warming_up = metrics["iteration"] < self.knobs.adversary.warmup_iterations
        for red_flag in self.red_flags:
            if not (warming_up and red_flag.needs_warm_discriminator):
                red_flag.update(metrics, images)
        return self.active()

    def evaluated(self, iteration: int, scores: Mapping[str, Sequence[float]]) -> list[Flag]:
        """Take in an evaluation and return the flags that are active after it.

        Args:
            iteration: how many are done.
            scores: metric -> a value per held-out prompt, of the same images-to-be every time.
        """
        hacking = self._hacking
        if self.section.every:
            hacking.held_out.evaluated(iteration, scores, hacking.levels() if iteration else {})
        return self.active()

    def levels(self) -> dict[str, float]:
        """The trained rewards' levels that evaluations are compared beside, by name; empty at the start."""
        return self._hacking.levels()

    @property
    def _hacking(self) -> RewardHacking:
        return next(each for each in self.red_flags if isinstance(each, RewardHacking))

    def active(self) -> list[Flag]:
        return [red_flag.flag() for red_flag in self.red_flags if red_flag.raised]

    def state(self) -> dict[str, Any]:
        """Everything the next check depends on, as JSON."""
        return {red_flag.name: red_flag.state() for red_flag in self.red_flags}

    def checked(self, state: Mapping[str, Any]) -> dict[str, FlagState]:
        """`state()`'s result for `load`; UserError naming the flag whose entry is none."""
        names = [red_flag.name for red_flag in self.red_flags if red_flag.name in state]
        return {name: FlagState.read(state[name], f"monitor.{name}") for name in names}

    def load(self, state: Mapping[str, FlagState]) -> None:
        """Continue from what `checked` returned as if never stopped; a flag it does not know starts anew."""
        for red_flag in self.red_flags:
            if red_flag.name in state:
                red_flag.load(state[red_flag.name])


def kendall_tau(values: Sequence[float]) -> float:
    """Kendall's rank correlation with time, in [-1, 1]: rising minus falling pairs over all pairs (Mann 1945)."""
    pairs = list(combinations(values, 2))
    return sum((later > earlier) - (later < earlier) for earlier, later in pairs) / len(pairs)


def noise(values: Sequence[float]) -> float:
    """Standard deviation from one value to the next that a trend does not inflate: 1.048 x the median |difference|.

    The factor makes it that of white Gaussian noise. At least 1e-12, as any change of a constant counts; infinite for a
    single value.
    """
    steps = [abs(later - earlier) for earlier, later in pairwise(values)]
    return max(1.048 * median(steps), 1e-12) if steps else math.inf
