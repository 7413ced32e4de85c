"""All settings of a run: what they are, where they come from, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from advgrpo.config.base import Section
from advgrpo.config.explain import explain
from advgrpo.config.objectives import OBJECTIVES, ObjectiveTraits
from advgrpo.config.reading import merge, nested, read
from advgrpo.config.rewards import RewardSection, RewardsSection
from advgrpo.config.sections import (
    Above0,
    AdvantageSection,
    AdversarySection,
    AwmSection,
    Count,
    DataSection,
    EvaluationSection,
    ModelSection,
    MonitorSection,
    NftSection,
    ObserverSettings,
    OutputSection,
    Positive,
    RolloutSection,
    UpdateSection,
)
from advgrpo.errors import UserError
from advgrpo.runtime.shares import Balance


class Config(Section):
    """Adv-GRPO training."""

    iterations: Positive = 1000
    """Iterations: one rollout, discriminator updates when due, and the generator's optimizer steps."""
    global_steps: Count = 0
    """End earlier, as the released code does: once the generator's optimizer steps and the iterations that train the
    reward alone make this many; 0 ends by `iterations` alone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Every random draw derives from it."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/advgrpo"
    """Folder the run writes to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is a GPU."""
    fast: bool = True
    """Use every fast path this machine supports; --no-fast is the plain eager path with the same losses."""
    collective_timeout: Above0 = 40.0
    """Seconds after which a process counts as hanging that others wait for and that begins nothing new."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    advantage: AdvantageSection = AdvantageSection()
    update: UpdateSection = UpdateSection()
    nft: NftSection = NftSection()
    awm: AwmSection = AwmSection()
    adversary: AdversarySection = AdversarySection()
    rewards: RewardsSection = RewardsSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()
    monitor: MonitorSection = MonitorSection()

    @classmethod
    def load(cls, preset: str = "", settings: Mapping[str, Any] | None = None, *, file: str | Path = "") -> Config:
        """A preset with a file's settings and then `settings` laid over it, as a command does with its flags.

        Args:
            preset: its name; "" is the one that `file` names, else "tiny".
            settings: by dotted name, {"rollout.group_size": 8}, or nested, {"rollout": {"group_size": 8}}.
            file: YAML.

        Raises:
            UserError: an unknown preset or setting, a value of the wrong kind, an unreadable file.
        """
        base, source = read(preset or None, Path(file) if file else None)
        return build(merge(base, nested(settings or {})), "settings" if settings else source)

    @property
    def images_per_iteration(self) -> int:
        return self.rollout.images

    def balance(self, processes: int, *, micro_batch: int | None = None) -> Balance:
        """How evenly an iteration's images are shared, in pieces that are micro-batches; in whole groups where the
        update is computed of some of their images alone. Who shares them are processes, or the sequence
        groups of `model.sequence_parallel` of them, which compute every image together.

        Args:
            micro_batch: instead of `rollout.micro_batch`.
        """
        sharing = max(processes // self.model.sequence_parallel, 1)
        rollout, update = self.rollout, self.update
        whole = rollout.group_size if update.informative_share < 1 else 1
        together = max(micro_batch or rollout.micro_batch, whole)
        return Balance(rollout.images // (update.minibatches * together), update.minibatches, sharing, together)

    def most_judged(self, processes: int, *, micro_batch: int | None = None) -> int:
        """Images of an iteration on the process that decodes and judges the most: those of a sequence group take turns
        by micro-batch. Arguments as of `balance`."""
        micro = micro_batch or self.rollout.micro_batch
        micro_batches = -(-self.balance(processes, micro_batch=micro_batch).most_images // micro)
        return -(-micro_batches // self.model.sequence_parallel) * micro

    @property
    def objective(self) -> ObjectiveTraits:
        """What `update.objective` asks of the run."""
        return OBJECTIVES[self.update.objective]

    @property
    def trained_steps(self) -> int:
        """At how many of its steps, or at their noise levels, an image is trained in an iteration."""
        window = self.rollout.window
        if self.objective.forward_process:
            return getattr(self, self.objective.forward_process).trained_of(self.rollout.num_steps)
        return window.trained_of(window.of_image)

    @property
    def why_update_is_not_captured(self) -> str:
        """Why forward and backward of the update are not to be CUDA graphs, by the settings alone; "" where they are,
        if the machine can."""
        graphs = self.update.graphs
        if graphs is False:
            return "update.graphs = false"
        if not self.objective.has_window:
            return f"update.objective = {self.update.objective}: only the policy gradient's is"
        if graphs == "auto" and self.rollout.initial_noise == "per_image":
            return "rollout.initial_noise = per_image: steps of all images hide the CPU's work"
        return ""

    @property
    def has_merged_copy(self) -> bool:
        """Whether each process has merged weights in FP8, whole, beside a base in parts."""
        return self.model.shard_base != "none" and self.rollout.precision == "fp8"

    @property
    def learns_adversary(self) -> bool:
        """Whether an adversary is loaded and trained."""
        return self.adversary.kind != "none" and self.objective.uses_rewards

    @property
    def fixed_rewards(self) -> dict[str, RewardSection]:
        """Those that the generator is trained on, beside the adversary."""
        return self.rewards.fixed() if self.objective.uses_rewards else {}

    @property
    def used_rewards(self) -> list[str]:
        """Built for training or for evaluation; dino_similarity as a metric looks through another DINO."""
        measured = self.evaluation.metrics if self.data.held_out_prompts else ()
        known = [name for name in measured if name in self.rewards.sections() and name != "dino_similarity"]
        return list(dict.fromkeys([*self.fixed_rewards, *known]))

    @property
    def observer(self) -> ObserverSettings | None:
        """The DINO that this run's statistics look through: no other adversary's features ever stand in for it."""
        evaluation, adversary = self.evaluation, self.adversary
        if evaluation.backbone:
            fields = ("evaluation.backbone", "evaluation.backbone_image_size")
            return ObserverSettings(evaluation.backbone, evaluation.backbone_image_size, adversary.dtype, fields)
        if adversary.kind == "dino":
            fields = ("adversary.backbone", "adversary.image_size")
            return ObserverSettings(adversary.backbone, adversary.image_size, adversary.dtype, fields)
        return None

    @property
    def loaded_observer(self) -> ObserverSettings | None:
        """`observer`, where it has something to look at. Where no images are drawn while the generator trains, only
        evaluation looks through it."""
        measured = self.data.held_out_prompts and "dino_similarity" in self.evaluation.metrics
        return self.observer if self.objective.samples_images or measured else None


def build(settings: dict[str, Any], source: str) -> Config:
    """A Config of valid values; UserError naming each wrong field, its value and what is wanted (`explain`)."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config, settings)}") from error


def load(preset: str | None = None, file: Path | None = None) -> Config:
    """Preset (default "tiny", or the file's own `preset:` key), with the file's settings laid over it."""
    return Config.load(preset or "", file=file or "")


def dump(config: Config) -> str:
    """YAML that `load(file=...)` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
