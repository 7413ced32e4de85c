"""The experiments as data: which runs are made, what is compared, and what the paper (arXiv 2511.20256) reports.

An arm is one way of training, a preset with a few changes; every (arm, seed) is one ordinary run, and experiments share
arms. All are evaluated on prompts that no setting was chosen on (`data.held_out_prompts: tiny:report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError

REFERENCE_METRICS = ("saturation", "edge_density")  # what is a good value is what the references have
METRICS = ("dino_similarity", "rule_accuracy", "pickscore", *REFERENCE_METRICS)
DISTANCES = {f"{name}_distance": name for name in REFERENCE_METRICS}
METRIC_LABELS = {
    "dino_similarity": "DINO similarity",
    "rule_accuracy": "rule-judge accuracy",
    "pickscore": "preference reward",
    "saturation": "saturation",
    "edge_density": "edge density",
    "saturation_distance": "saturation, distance from the references'",
    "edge_density_distance": "edge density, distance from the references'",
}
_EVALUATIONS = 4  # per run, beside those before and after training

Expected = Literal["rises", "falls", "does not fall", "does not rise", "stays"]


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""  # the arm whose LoRA, of the same seed, this one starts from


@dataclass(frozen=True)
class Claim:
    """What the paper leads to expect of one arm's change from its start, or of its difference from another arm.

    `margin` is how far "does not fall", "does not rise" and "stays" may move: absence of a change is never exact.
    """

    arm: str
    metric: str
    expected: Expected
    against: str = ""  # compare final values with this arm's, instead of with the base model's
    margin: float = 0.0


@dataclass(frozen=True)
class Experiment:
    title: str
    question: str
    paper: str
    arms: dict[str, str]  # arm -> label in tables and figures
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...]
    note: str = ""  # what a reader of the counts must know; stands on the page and in the index


@dataclass(frozen=True)
class Job:
    """One training run."""

    arm: str
    seed: int

    def folder(self, work: Path) -> Path:
        return work / self.arm / f"seed-{self.seed}"

    @property
    def origin(self) -> Job | None:
        """The run whose LoRA this one starts from."""
        return Job(ARMS[self.arm].start_from, self.seed) if ARMS[self.arm].start_from else None

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


ARMS = {
    "flow-pickscore": Arm("tiny-flow-grpo-pickscore"),
    "flow-pickscore-kl-low": Arm("tiny-flow-grpo-pickscore-kl", {"update": {"kl_weight": 0.04}}),
    "flow-pickscore-kl-high": Arm("tiny-flow-grpo-pickscore-kl", {"update": {"kl_weight": 0.4}}),
    "adv-pickscore": Arm("tiny-adv-pickscore"),
    "dino": Arm("tiny"),
    "sft": Arm("tiny-sft"),
    "references-100": Arm("tiny", {"data": {"reference_count": 100}}),
    "references-200": Arm("tiny", {"data": {"reference_count": 200}}),
    "references-500": Arm("tiny", {"data": {"reference_count": 500}}),
    "style-outline": Arm("tiny-style-outline"),
    "style-hatched": Arm("tiny-style-hatched"),
    "style-pastel": Arm("tiny-style-pastel"),
    "style-outline-kl": Arm("tiny-style-outline", {"update": {"kl_weight": 0.1}}),
    "style-hatched-kl": Arm("tiny-style-hatched", {"update": {"kl_weight": 0.1}}),
    "style-pastel-kl": Arm("tiny-style-pastel", {"update": {"kl_weight": 0.4}}),
    "repair": Arm("tiny-repair", start_from="flow-pickscore"),
}

_INDEPENDENT = ("rule_accuracy", "dino_similarity", "pickscore", "saturation_distance", "edge_density_distance")

EXPERIMENTS = {
    "hacking": Experiment(
        title="Reward hacking: Flow-GRPO against Adv-GRPO on the same preference reward",
        question="The tiny preference model over-rates saturated colours. Flow-GRPO maximises it as it is; Adv-GRPO "
        "starts from the same model, whose last layers keep learning to tell references from generations.",
        paper="PickScore 21.70 (SD3) → 22.82 (Flow-GRPO) and 22.78 (Adv-GRPO): about the same reward, but people "
        "prefer the quality of Adv-GRPO's images in 70.0 % of comparisons.",
        note="The preference model ranks the reference above the base model's image in about half of the report "
        "prompts' pairs (53 %), and with seeds 0 to 2 its reward hardly moves. So what is called hacked here rests on "
        "the falls of the judge and of DINO similarity; the samples show no over-saturation.",
        arms={"flow-pickscore": "Flow-GRPO", "adv-pickscore": "Adv-GRPO"},
        metrics=("pickscore", "saturation", "saturation_distance", "rule_accuracy", "dino_similarity"),
        claims=(
            Claim("flow-pickscore", "pickscore", "rises"),
            Claim("flow-pickscore", "saturation_distance", "rises"),
            Claim("flow-pickscore", "rule_accuracy", "falls"),
            Claim("flow-pickscore", "dino_similarity", "falls"),
            Claim("adv-pickscore", "pickscore", "rises"),
            Claim("adv-pickscore", "saturation_distance", "does not rise", margin=0.01),
            Claim("adv-pickscore", "saturation_distance", "falls", against="flow-pickscore"),
            Claim("adv-pickscore", "rule_accuracy", "rises", against="flow-pickscore"),
            Claim("adv-pickscore", "dino_similarity", "rises", against="flow-pickscore"),
        ),
    ),
    "dino": Experiment(
        title="The DINO reward and independent metrics",
        question="A head on frozen DINOv2 features is the only reward; none of these metrics is.",
        paper="The DINO reward raises PickScore 21.70 → 21.90, OCR accuracy .58 → .69, and reaches GenEval .69.",
        arms={"dino": "Adv-GRPO, DINO"},
        metrics=_INDEPENDENT,
        claims=(
            Claim("dino", "rule_accuracy", "rises"),
            Claim("dino", "dino_similarity", "rises"),
            Claim("dino", "pickscore", "rises"),
            Claim("dino", "saturation_distance", "falls"),
            Claim("dino", "edge_density_distance", "falls"),
        ),
    ),
    "kl": Experiment(
        title="KL trades hacking for progress",
        question="Flow-GRPO on the fixed preference reward with a growing weight β of the KL to the base model.",
        paper="Flow-GRPO with KL reaches PickScore 21.84 and OCR accuracy .80, against 22.82 and .91 without: less "
        "hacking and less progress.",
        arms={
            "flow-pickscore": "β = 0",
            "flow-pickscore-kl-low": "β = 0.04",
            "flow-pickscore-kl-high": "β = 0.4",
        },
        metrics=("pickscore", "saturation_distance", "rule_accuracy", "dino_similarity"),
        claims=(
            Claim("flow-pickscore-kl-low", "pickscore", "falls", against="flow-pickscore"),
            Claim("flow-pickscore-kl-low", "saturation_distance", "falls", against="flow-pickscore"),
            Claim("flow-pickscore-kl-high", "pickscore", "falls", against="flow-pickscore"),
            Claim("flow-pickscore-kl-high", "saturation_distance", "falls", against="flow-pickscore"),
            Claim("flow-pickscore-kl-high", "pickscore", "falls", against="flow-pickscore-kl-low"),
        ),
    ),
    "sft": Experiment(
        title="Supervised fine-tuning on the references against Adv-GRPO",
        question="Both see the same reference images: SFT fits them, Adv-GRPO learns from a reward made of them.",
        paper="SFT stays below: PickScore 21.60 and OCR accuracy .68, against 21.90 and .69 with the DINO reward.",
        arms={"sft": "SFT", "dino": "Adv-GRPO, DINO"},
        metrics=_INDEPENDENT,
        claims=(
            Claim("dino", "rule_accuracy", "rises", against="sft"),
            Claim("dino", "dino_similarity", "rises", against="sft"),
            Claim("dino", "pickscore", "rises", against="sft"),
        ),
    ),
    "references": Experiment(
        title="How many reference images the DINO reward needs",
        question="Training with 100, 200, 500 or all 768 reference images.",
        paper="DINO similarity by number of references: 200 → .621, 500 → .618, 1000 → .619, all → .621 (base .592): a "
        "few hundred do.",
        note="The tiny world has 96 training prompts with 8 references each, so 1000 is not available and 768 is all. "
        "Prompts are taken whole, in an order that the seed draws: 100 means 13 prompts with 104 images, 200 means "
        "25 with 200, 500 means 63 with 504. Fewer references are therefore fewer training prompts, too.",
        arms={
            "references-100": "100",
            "references-200": "200",
            "references-500": "500",
            "dino": "all (768)",
        },
        metrics=("dino_similarity", "rule_accuracy"),
        claims=(
            *(Claim(f"references-{count}", "dino_similarity", "rises") for count in (100, 200, 500)),
            Claim("dino", "dino_similarity", "rises"),
            *(
                Claim(f"references-{count}", "dino_similarity", "stays", against="dino", margin=0.01)
                for count in (100, 200, 500)
            ),
        ),
    ),
    "style": Experiment(
        title="Style transfer from images without prompts",
        question="300 drawings in one style, without prompts, are the references of every prompt. DINO similarity "
        "is to that set; the rule-based judge reads shape and colour as everywhere else. Nothing in such a run reads "
        "the prompt, so a KL to the base model is tried as what keeps the content.",
        paper="Shown by examples; there is no figure to compare with.",
        note="Style transfer was **not reproduced** with seeds 0 to 2, whatever the counts say: similarities rise, but "
        "in the samples outline is filled, hatched has no hatching and pastel has lost its shapes. The judge was made "
        "for filled shapes on plain backgrounds, so an image can be in the style, as asked, and fail it.",
        arms={
            "style-outline": "outline",
            "style-outline-kl": "outline, β = 0.1",
            "style-hatched": "hatched",
            "style-hatched-kl": "hatched, β = 0.1",
            "style-pastel": "pastel",
            "style-pastel-kl": "pastel, β = 0.4",
        },
        metrics=("dino_similarity", "rule_accuracy", "saturation", "edge_density"),
        claims=tuple(
            claim
            for style in ("outline", "hatched", "pastel")
            for arm in (f"style-{style}", f"style-{style}-kl")
            for claim in (
                Claim(arm, "dino_similarity", "rises"),
                Claim(arm, "rule_accuracy", "does not fall", margin=0.05),
            )
        ),
    ),
    "repair": Experiment(
        title="Repair of a hacked LoRA",
        question="Flow-GRPO's hacked LoRA of the same seed is the start; the DINO reward trains it towards the "
        "references.",
        paper="There is no figure to compare with; expected is the way back towards the references.",
        arms={"flow-pickscore": "hacked", "repair": "repaired"},
        metrics=("rule_accuracy", "dino_similarity", "pickscore", "saturation", "saturation_distance"),
        claims=(
            Claim("repair", "saturation_distance", "falls", against="flow-pickscore"),
            Claim("repair", "rule_accuracy", "rises", against="flow-pickscore"),
            Claim("repair", "dino_similarity", "rises", against="flow-pickscore"),
            Claim("repair", "rule_accuracy", "does not fall", margin=0.05),
            Claim("repair", "dino_similarity", "does not fall", margin=0.01),
        ),
    ),
}


def select(names: Sequence[str]) -> list[str]:
    """Experiments by name, in the order of `EXPERIMENTS`; "all" is every one. UserError for an unknown name."""
    unknown = [name for name in names if name not in (*EXPERIMENTS, "all")]
    if unknown or not names:
        raise UserError(f"experiment {', '.join(unknown) or '(none)'}: want all, or some of {', '.join(EXPERIMENTS)}")
    return [name for name in EXPERIMENTS if name in names or "all" in names]


def chains(names: Sequence[str], seeds: Sequence[int]) -> list[list[Job]]:
    """Every run of the experiments, once. A chain is a run followed by those that start from it; chains are
    independent of each other."""
    arms = {arm for name in names for arm in EXPERIMENTS[name].arms}
    arms |= {ARMS[arm].start_from for arm in arms} - {""}
    roots = [arm for arm in ARMS if arm in arms and not ARMS[arm].start_from]
    followers = {root: [arm for arm in ARMS if arm in arms and ARMS[arm].start_from == root] for root in roots}
    return [[Job(arm, seed) for arm in (root, *followers[root])] for seed in dict.fromkeys(seeds) for root in roots]


def take_shard(every: list[list[Job]], shard: str) -> list[list[Job]]:
    """The chains of shard "i/n", numbered from 0; UserError for anything else."""
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {shard}: want I/N with 0 <= I < N, such as 0/2 and 1/2")
    return every[int(number) :: int(count)]


def settings(job: Job, work: Path, iterations: int, file: Path | None = None) -> Config:
    """The run's configuration: preset, what all arms share, the arm's own changes, then the file's."""
    arm = ARMS[job.arm]
    common = {
        "data": {"held_out_prompts": "tiny:report"},
        "rewards": {"pickscore": {"path": "tiny"}},
        "evaluation": {
            "every": max(1, iterations // _EVALUATIONS),
            "during_images_per_prompt": 2,
            "backbone": "tiny",
            "backbone_image_size": 32,
            "metrics": list(METRICS),
        },
        "output": {"tensorboard": False},
    }
    own = {"iterations": iterations, "seed": job.seed, "output_dir": str(job.folder(work))}
    if job.origin is not None:
        own["model"] = {"lora": {"start_from": str(job.origin.folder(work) / "lora")}}
    merged = configuration.read_preset(arm.preset)
    for layer in (common, arm.overrides, configuration.read_yaml(file) if file else {}, own):
        merged = configuration.merge(merged, layer)
    return configuration.build(merged, f"experiment arm {job.arm}" + (f" with {file}" if file else ""))
