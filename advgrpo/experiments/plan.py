"""The experiments as data: which runs are made, what is compared, and what the paper (arXiv 2511.20256) reports.

An arm is one way of training, a preset with a few changes; every (arm, seed) is one ordinary run, and experiments share
arms. While they train, all are evaluated on the world's held-out prompts. When they have trained, the independent judge
looks at pictures of the report prompts, on which nothing was chosen, at several guidance scales (judging.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError

# The only place where the world and its presets are named.
WORLD, PRESET = "tiny", "tiny"

REPORT_PROMPTS, TUNING_PROMPTS = f"{WORLD}:report", f"{WORLD}:tuning"
GUIDANCE = 2.0  # at which the preset draws and evaluates; what "at equal guidance" means in a claim
GUIDANCE_SCALES, IMAGES_PER_PROMPT = (1.0, 2.0, 3.0), 2  # what the judge sees where nothing else is asked for
_EVALUATIONS = 8  # per run, beside those before and after training
_CURVE_METRICS = ("retrieval", "dino_similarity")  # of the held-out prompts, while a run trains

Metric = Literal["retrieval", "kid", "diversity", "saturation_distance", "pickscore", "style_share"]
METRIC_LABELS: dict[str, str] = {
    "retrieval": "retrieval",
    "kid": "KID × 1000",
    "diversity": "diversity",
    "saturation_distance": "saturation, distance from the references'",
    "pickscore": "preference reward",
    "style_share": "share in the artist's style",
    "dino_similarity": "DINO similarity",
}
Expected = Literal["rises", "falls", "does not fall", "does not rise", "stays", "reaches"]
Where = Literal["equal", "best"]


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""  # the arm whose LoRA, of the same seed, this one starts from
    teacher: str = ""  # the arm whose LoRA, of the same seed, this one's update.teacher is
    style: str = ""  # whose artist it is to draw like
    trains: bool = True  # False: the base model, which is only judged
    longer: float = 1.0  # iterations, in units of the plan's

    @property
    def follows(self) -> str:
        """The arm without whose LoRA this one cannot be made."""
        return self.start_from or self.teacher


@dataclass(frozen=True)
class Claim:
    """What the paper leads to expect of an arm against the base model, or against another arm of the same seed.

    `margin` is how far "does not fall", "does not rise" and "stays" may move, since absence of a change is never exact,
    and for "reaches" the level itself, whatever the base model has.
    """

    arm: str
    metric: Metric
    expected: Expected
    against: str = ""  # the arm that it is compared with; "": the base model
    margin: float = 0.0
    where: Where = "equal"  # both at GUIDANCE, or each at its own best, which the tuning prompts choose


@dataclass(frozen=True)
class Experiment:
    title: str
    question: str
    paper: str
    arms: dict[str, str]  # arm -> label in tables and figures
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    note: str = ""  # what a reader of the counts must know; stands on the page and in the index
    base: str = "base"  # of BASES
    against: str = ""  # the arm that every other one is compared with, also without a claim


@dataclass(frozen=True)
class Job:
    """One training run and what the judge sees of it, or what the judge sees of the base model."""

    arm: str
    seed: int = 0

    @property
    def made(self) -> Arm:
        return ARMS[self.arm] if self.arm in ARMS else BASES[self.arm]

    def folder(self, work: Path) -> Path:
        return work / self.arm / f"seed-{self.seed}" if self.made.trains else work / self.arm

    @property
    def origin(self) -> Job | None:
        """The run whose LoRA this one starts from or is taught by."""
        return Job(self.made.follows, self.seed) if self.made.follows else None

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}" if self.made.trains else self.arm


_DINO_SEES = {"backbone": WORLD, "backbone_image_size": 48}  # where no adversary brings a DINO
_PREFERENCE = {
    "adversary": {"kind": "none", "warmup_iterations": 0},
    "rewards": {"pickscore": {"weight": 1.0, "path": WORLD}},
}
_ADV_PREFERENCE = {
    "adversary": {"kind": "pickscore", "learning_rate": 1.0e-4},  # of the model's own last layers
    "rewards": {"pickscore": {"weight": 0.0, "path": WORLD}},
}
_HACKED = {"rewards": {"pickscore": {"weight": 0.0, "path": WORLD}}}  # it is still measured
_COUNTS = (100, 200, 500, 1000)
_LONGER = 10 / 3  # 200 iterations for 60
_TO_THE_STYLE = 5 / 3  # 100
_RELEASED = 91 / 60  # 91, of two optimizer steps each: the released run's 182
_EQUAL_ROWS = 33 / 60  # 33: an image of twice the scouts is 18 rows of the network, one of the default's 10
_KL = {"update": {"kl_weight": 0.1}}
_AWM_ADV = {"update": {"objective": "awm", "kl_to": "ema", "kl_weight": 1.0, "clip_range": 1.0}}
_AWM_ADV |= {"awm": {"step_share": 0.45}, "advantage": {"clip": 1.0}}

# Each is one change to the default.
LEVERS: dict[str, dict[str, Any]] = {
    "kl-velocity": {"update": {"kl_weight": 0.1, "kl_space": "velocity"}},
    "kl-average": {"update": {"kl_weight": 0.1, "kl_to": "ema"}},
    "noise-per-image": {"rollout": {"initial_noise": "per_image"}},
    "window-contiguous": {"rollout": {"window": {"order": "contiguous"}}},
    "window-all": {"rollout": {"window": {"noise_range": [0.0, 1.0]}}},
    "window-released": {"rollout": {"window": {"order": "fixed", "steps": [0, 1]}}},
    "guidance-1": {"rollout": {"guidance_scale": 1.0}},
    "learning-rate-low": {"update": {"learning_rate": 1e-4}},
    "learning-rate-high": {"update": {"learning_rate": 1e-3}},
    "one-step": {"update": {"minibatches": 1}},
    "head-layers": {"adversary": {"feature_layers": [2, 4]}},
    "head-augment": {"adversary": {"augment": "crop_flip"}},
    "head-spectral-norm": {"adversary": {"spectral_norm": True}},
    "head-r1": {"adversary": {"gradient_penalty": 1.0}},
    "head-average": {"adversary": {"reward_ema": 0.95}},
    "head-ensemble": {"adversary": {"heads": 4}},
    "head-resets": {"adversary": {"reset_every": 20}},
    "no-replay": {"adversary": {"replay_capacity": 0}},
    "eq7-margin": {"adversary": {"schedule": "when_fooled", "fooled_margin": 1.0}},
    "tail-4": {"rollout": {"tail_steps": 4}},
    "tail-3": {"rollout": {"tail_steps": 3}},  # two are refused by the run itself: rewards rank otherwise (tau .67)
    "scouts": {"rollout": {"scouts": 2, "scout_tail_steps": 2}},
    "informative": {"update": {"informative_share": 0.5}, "rollout": {"micro_batch": 4}},  # half a group
    "fp8-sampling": {"rollout": {"precision": "fp8"}},
    "fp8-everywhere": {"rollout": {"precision": "fp8"}, "model": {"base_precision": "fp8"}},
}

ARMS = {
    "dino": Arm(PRESET),
    "eq7": Arm(PRESET, {"adversary": {"schedule": "when_fooled", "fooled_margin": 0.0}}),
    "nft": Arm(f"{PRESET}-nft-adv"),
    "nft-preference": Arm(f"{PRESET}-nft"),
    "sft": Arm(PRESET, {"update": {"objective": "sft"}}),
    **{f"references-{count}": Arm(PRESET, {"data": {"reference_count": count}}) for count in _COUNTS},
    "flow": Arm(PRESET, _PREFERENCE),
    "flow-kl-low": Arm(PRESET, {**_PREFERENCE, "update": {"kl_weight": 0.04}}),
    "flow-kl-high": Arm(PRESET, {**_PREFERENCE, "update": {"kl_weight": 0.4}}),
    "adv-preference": Arm(PRESET, _ADV_PREFERENCE),
    "flow-long": Arm(PRESET, _PREFERENCE, longer=_LONGER),
    "adv-preference-long": Arm(PRESET, _ADV_PREFERENCE, longer=_LONGER),
    "repair": Arm(PRESET, _HACKED, start_from="flow"),
    "repair-long": Arm(PRESET, _HACKED, start_from="flow-long"),
    "style-ink": Arm(f"{PRESET}-style-ink", style="ink"),
    "style-ink-nft": Arm(f"{PRESET}-style-ink-nft", style="ink", longer=_TO_THE_STYLE),
    "style-ink-kl": Arm(f"{PRESET}-style-ink", _KL, style="ink"),
    "style-outline": Arm(f"{PRESET}-style-outline", style="outline"),
    "style-outline-kl": Arm(f"{PRESET}-style-outline", _KL, style="outline"),
    "guard": Arm(f"{PRESET}-grpo-guard"),
    "dppo": Arm(f"{PRESET}-flow-dppo"),
    "tempflow": Arm(f"{PRESET}-tempflow"),
    "mixgrpo": Arm(f"{PRESET}-mixgrpo"),
    "mixgrpo-flash": Arm(f"{PRESET}-mixgrpo-flash"),
    "gdpo": Arm(f"{PRESET}-gdpo"),
    "awm": Arm(f"{PRESET}-nft-adv", _AWM_ADV),
    "distill": Arm(f"{PRESET}-distill", teacher="dino"),
    "released-steps": Arm(PRESET, longer=_RELEASED),
    "scouts-equal": Arm(PRESET, LEVERS["scouts"], longer=_EQUAL_ROWS),
    **{arm: Arm(PRESET, changes) for arm, changes in LEVERS.items()},
}
BASES = {
    "base": Arm(PRESET, trains=False),
    "base-preference": Arm(PRESET, _HACKED, trains=False),
}

_EXPLORED = "There is no claim: nothing was expected of a change, and nothing was chosen by what is found here."
_UNTUNED = "None was tuned."
_OF_PRESETS = "have the settings of their presets (docs/jobs/objectives.md)"
_INDEPENDENT: tuple[Metric, ...] = ("retrieval", "kid", "diversity")
_HACKING: tuple[Metric, ...] = ("pickscore", "retrieval", "kid", "diversity", "saturation_distance")


def _beside_default(
    title: str, question: str, arms: dict[str, str], *, default: str = "default", note: str = _EXPLORED, rise: str = ""
) -> Experiment:
    """The default beside other arms, of which those named in `rise` are claimed to gain retrieval."""
    return Experiment(
        title=title,
        question=question,
        paper="The paper has no such arms.",
        note=note,
        arms={"dino": default, **arms},
        metrics=_INDEPENDENT,
        claims=tuple(Claim(arm, "retrieval", "rises") for arm in rise.split()),
        against="dino",
    )


EXPERIMENTS = {
    "dino": Experiment(
        title="The DINO reward and a judge that is in no reward",
        question="A head on frozen DINOv2 features is the only reward. The default trains the head in every iteration; "
        "eq. 7 as published trains it only when the generator fools it (margin 0).",
        paper="The DINO reward raises PickScore 21.70 → 21.90, OCR accuracy .58 → .69, and reaches GenEval .69.",
        arms={"dino": "default", "eq7": "eq. 7 as published"},
        metrics=_INDEPENDENT,
        claims=(
            Claim("dino", "retrieval", "rises"),
            Claim("dino", "retrieval", "rises", where="best"),
            Claim("dino", "kid", "falls"),
            Claim("dino", "diversity", "does not fall", margin=0.1),
            Claim("eq7", "retrieval", "rises"),
            Claim("eq7", "kid", "falls"),
            Claim("eq7", "retrieval", "does not fall", against="dino", margin=0.03),
        ),
    ),
    "nft": Experiment(
        title="DiffusionNFT on the same adversary",
        question="The reward is the default's; the generator learns from its own images noised again, without "
        "likelihoods (arXiv 2509.16117).",
        paper="The paper has no such arm; DiffusionNFT's own reports more reward per image than Flow-GRPO.",
        arms={"nft": "DiffusionNFT", "dino": "policy gradient"},
        metrics=_INDEPENDENT,
        claims=(
            Claim("nft", "retrieval", "rises"),
            Claim("nft", "retrieval", "does not fall", against="dino", margin=0.03),
        ),
    ),
    "sft": Experiment(
        title="Supervised fine-tuning on the references against Adv-GRPO",
        question="Both see the same reference images: SFT fits them, Adv-GRPO learns from a reward made of them.",
        paper="SFT stays below: PickScore 21.60 and OCR accuracy .68, against 21.90 and .69 with the DINO reward.",
        arms={"sft": "SFT", "dino": "Adv-GRPO, DINO"},
        metrics=_INDEPENDENT,
        claims=(
            Claim("dino", "retrieval", "rises", against="sft"),
            Claim("dino", "retrieval", "rises", against="sft", where="best"),
            Claim("dino", "kid", "falls", against="sft"),
        ),
    ),
    "references": Experiment(
        title="How many reference images the DINO reward needs",
        question="Training with 100, 200, 500, 1000 or all 1,152 reference images.",
        paper="DINO similarity by number of references: 200 → .621, 500 → .618, 1000 → .619, all → .621 (base .592): a "
        "few hundred do.",
        note="There are 384 training prompts with 3 references each. Prompts are taken whole, in an order that the "
        "seed draws: 100 means 34 prompts with 102 images, 200 means 67 with 201, 500 means 167 with 501, 1000 means "
        "334 with 1,002. Fewer references are therefore fewer training prompts, too.",
        arms={**{f"references-{count}": str(count) for count in _COUNTS}, "dino": "all (1,152)"},
        metrics=_INDEPENDENT,
        claims=(
            *(Claim(f"references-{count}", "retrieval", "rises") for count in _COUNTS),
            *(Claim(f"references-{count}", "retrieval", "stays", against="dino", margin=0.03) for count in _COUNTS),
        ),
    ),
    "hacking": Experiment(
        title="Reward hacking: Flow-GRPO against Adv-GRPO on the same preference model",
        question="Flow-GRPO maximises a fixed preference model; Adv-GRPO starts from the same model, whose last layers "
        "keep learning to tell references from generations.",
        paper="PickScore 21.70 (SD3) → 22.82 (Flow-GRPO) and 22.78 (Adv-GRPO): about the same reward, but people "
        "prefer the quality of Adv-GRPO's images in 70.0 % of comparisons.",
        arms={"flow": "Flow-GRPO", "adv-preference": "Adv-GRPO"},
        metrics=_HACKING,
        base="base-preference",
        claims=(
            Claim("flow", "pickscore", "rises"),
            Claim("flow", "saturation_distance", "rises"),
            Claim("flow", "retrieval", "falls"),
            Claim("flow", "kid", "rises"),
            Claim("adv-preference", "pickscore", "rises"),
            Claim("adv-preference", "saturation_distance", "does not rise", margin=0.01),
            Claim("adv-preference", "retrieval", "rises", against="flow"),
            Claim("adv-preference", "kid", "falls", against="flow"),
        ),
    ),
    "over-optimisation": Experiment(
        title="Over-optimisation: the same two, more than three times as long",
        question="A fixed preference model is right near the base model and wrong far away. What becomes of retrieval "
        "when its reward is maximised for 10/3 of the iterations, when the same model keeps learning, and when the "
        "DINO reward takes over from a LoRA that was spoilt?",
        paper="PickScore 22.82 (Flow-GRPO) and 22.78 (Adv-GRPO): about the same reward, but people prefer the quality "
        "of Adv-GRPO's images in 70.0 % of comparisons.",
        note="These claims were written after some of the runs had been seen: those of Flow-GRPO and Adv-GRPO after "
        "Flow-GRPO's long one of seed 0, those of the repair after both long ones of seeds 0 and 1. Flow-GRPO and "
        "Adv-GRPO of 60 iterations are not here but in the experiment on reward hacking, with the same seeds and other "
        "evaluations, so that the four claims against them are not tested. Beside the verdicts, from the figures of "
        "both, at guidance 2, the mean of three seeds with Student's t over seeds alone: Flow-GRPO, long less "
        "Flow-GRPO: retrieval -.248 [-.297, -.199], preference reward +.042 [+.040, +.043], KID × 1000 "
        "+115 [+42, +187], saturation's distance +.025 [-.008, +.057]; Adv-GRPO, long less Adv-GRPO: retrieval "
        "-.050 [-.212, +.111].",
        arms={
            "flow": "Flow-GRPO",
            "flow-long": "Flow-GRPO, long",
            "adv-preference": "Adv-GRPO",
            "adv-preference-long": "Adv-GRPO, long",
            "repair-long": "Flow-GRPO, long, repaired",
        },
        metrics=_HACKING,
        base="base-preference",
        claims=(
            Claim("flow-long", "pickscore", "rises", against="flow"),
            Claim("flow-long", "retrieval", "falls", against="flow"),
            Claim("flow-long", "saturation_distance", "rises", against="flow"),
            Claim("adv-preference-long", "retrieval", "does not fall", against="adv-preference", margin=0.03),
            Claim("adv-preference-long", "retrieval", "rises", against="flow-long"),
            Claim("adv-preference-long", "kid", "falls", against="flow-long"),
            Claim("repair-long", "retrieval", "rises", against="flow-long"),
            Claim("repair-long", "kid", "falls", against="flow-long"),
        ),
    ),
    "kl": Experiment(
        title="KL trades hacking for progress",
        question="Flow-GRPO on the fixed preference model with a growing weight β of the KL to the base model.",
        paper="Flow-GRPO with KL reaches PickScore 21.84 and OCR accuracy .80, against 22.82 and .91 without: less "
        "hacking and less progress.",
        arms={"flow": "β = 0", "flow-kl-low": "β = 0.04", "flow-kl-high": "β = 0.4"},
        metrics=_HACKING,
        base="base-preference",
        claims=(
            Claim("flow-kl-low", "pickscore", "falls", against="flow"),
            Claim("flow-kl-low", "retrieval", "rises", against="flow"),
            Claim("flow-kl-high", "pickscore", "falls", against="flow"),
            Claim("flow-kl-high", "retrieval", "rises", against="flow"),
            Claim("flow-kl-high", "pickscore", "falls", against="flow-kl-low"),
        ),
    ),
    "repair": Experiment(
        title="Repair of a hacked LoRA",
        question="Flow-GRPO's LoRA of the same seed is the start; the DINO reward trains it towards the references.",
        paper="There is no figure to compare with; expected is the way back towards the references.",
        arms={"flow": "hacked", "repair": "repaired"},
        metrics=_HACKING,
        base="base-preference",
        claims=(
            Claim("repair", "retrieval", "rises", against="flow"),
            Claim("repair", "kid", "falls", against="flow"),
            Claim("repair", "saturation_distance", "falls", against="flow"),
            Claim("repair", "retrieval", "does not fall", margin=0.03),
        ),
    ),
    "style": Experiment(
        title="Style transfer from images without prompts",
        question="300 drawings by one artist, without prompts, are the references of every prompt. Is the drawing "
        "nearest to a picture, of anything by any of seven artists, that artist's? And is the thing still found? "
        "Nothing in such a run reads the prompt, so a KL to the base model is tried as what keeps the content.",
        paper="Shown by examples; there is no figure to compare with.",
        note="The retrieval judge's gallery holds no drawing by the two artists, so a picture can be in the style, as "
        "asked, and be found less. The artist of outline drew 44 of the 64 things. "
        "The claims of DiffusionNFT were written after a run of another seed had been seen.",
        arms={
            "style-ink": "ink",
            "style-ink-nft": "ink by DiffusionNFT",
            "style-ink-kl": "ink, β = 0.1",
            "style-outline": "outline",
            "style-outline-kl": "outline, β = 0.1",
        },
        metrics=("style_share", "retrieval", "diversity"),
        claims=tuple(
            claim
            for arm in ("style-ink", "style-ink-nft", "style-ink-kl", "style-outline", "style-outline-kl")
            for claim in (
                Claim(arm, "style_share", "reaches", margin=0.8),
                Claim(arm, "retrieval", "does not fall", margin=0.03),
            )
        ),
    ),
    "trust-region": _beside_default(
        title="How far a step may go: other clips, and a KL to other things",
        question="The default clips PPO's ratio. GRPO-Guard clips a normalised one, Flow-DPPO masks by a divergence; a "
        "KL of velocities pulls towards the base model, another towards the policy's own average.",
        default="PPO's clip, the default",
        note=f"GRPO-Guard and Flow-DPPO {_OF_PRESETS}. KL of velocities and KL to the average are the default with one "
        f"change. {_UNTUNED}",
        arms={
            "guard": "GRPO-Guard",
            "dppo": "Flow-DPPO",
            "kl-velocity": "KL of velocities, β = 0.1",
            "kl-average": "KL to the average, β = 0.1",
        },
        rise="guard dppo kl-velocity kl-average",
    ),
    "stochastic-steps": _beside_default(
        title="Which steps are noisy and learned from",
        question="The default draws two of the noisier half anew in every iteration. TempFlow-GRPO gives each of four "
        "steps groups of its own, MixGRPO moves two in a row from noise to image.",
        note=f"TempFlow-GRPO, MixGRPO and MixGRPO-Flash {_OF_PRESETS}. {_UNTUNED} TempFlow-GRPO draws two prompts in "
        "an iteration instead of eight, at four steps each. The default, two in a row, differs from it by that alone. "
        "MixGRPO's window moves over the four pairs of the noisier half and has begun anew when 60 iterations end.",
        arms={
            "tempflow": "TempFlow-GRPO",
            "mixgrpo": "MixGRPO",
            "mixgrpo-flash": "MixGRPO-Flash",
            "window-contiguous": "default, two in a row",
        },
        rise="tempflow mixgrpo mixgrpo-flash",
    ),
    "signal": _beside_default(
        title="Other ways to learn, and DiffusionNFT without an adversary",
        question="AWM has no likelihoods, GDPO adds the fixed preference model, each reward normalised by itself, "
        "distillation learns from the default's LoRA of the same seed instead of a reward, and DiffusionNFT from the "
        "fixed preference model alone.",
        note=f"GDPO, distillation and DiffusionNFT {_OF_PRESETS}. AWM has not: tiny-awm learns from the fixed "
        f"preference model, so this arm is tiny-nft-adv, which has the adversary, with tiny-awm's loss. {_UNTUNED}",
        arms={
            "awm": "AWM",
            "gdpo": "GDPO, with the preference model",
            "distill": "distillation from the default's LoRA",
            "nft-preference": "DiffusionNFT on the fixed preference model",
        },
        rise="awm gdpo distill",
    ),
    "noise": _beside_default(
        title="Levers: noise and guidance",
        question="The default has one noise per prompt, its window in the noisier half, and guidance 2 in rollout "
        "and update.",
        arms={
            "noise-per-image": "a noise per image",
            "window-all": "a window over all steps",
            "window-released": "always the first two steps, as released",
            "guidance-1": "no guidance in rollout and update",
        },
    ),
    "step-size": _beside_default(
        title="Levers: learning rate and optimizer steps",
        question="The default has learning rate 3e-4 and two optimizer steps in an iteration, 120 in all; the released "
        "run takes 182 at the same rate.",
        arms={
            "learning-rate-low": "learning rate 1e-4",
            "learning-rate-high": "learning rate 1e-3",
            "one-step": "one optimizer step in an iteration",
            "released-steps": "182 optimizer steps, as released",
        },
    ),
    "fewer-rows": _beside_default(
        title="Levers: fewer rows of the network, or better chosen ones",
        question="Options that draw or train fewer rows (docs/performance.md): fewer steps after the window, twice "
        "as many images drawn cheaply of which half are kept, and the half with the larger advantages trained on.",
        note=f"{_EXPLORED} Two steps after the window are refused by the run itself: in its first iteration rewards "
        "rank images otherwise than by all steps (Kendall's tau .67, at most .84, where .85 is asked for). The "
        "default's 60 iterations have as many rows of the sampler as 33 with scouts, 10 and 18 an image; decoding and "
        "scoring three images for each that is kept are not in it.",
        arms={
            "tail-4": "four steps after the window",
            "tail-3": "three steps after the window",
            "scouts": "twice the scouts, by two steps",
            "scouts-equal": "the same, by as many rows as the default",
            "informative": "the more informative half, in micro-batches of 4",
        },
    ),
    "precision": _beside_default(
        title="Levers: FP8",
        question="The default computes in float32 here. Sampling in FP8 runs the ODE steps, which have no likelihood, "
        "with merged weights and activations in e4m3; training in FP8 as well runs the window's steps and the update, "
        "forward and backward, with a frozen base in e4m3. Adapters never are.",
        note=f"{_EXPLORED} On a CPU the products of e4m3 are emulated, with the tensor cores' roundings of inputs and "
        "weights but float32 sums, and are slower than without; a GPU's speed is no part of this page.",
        arms={"fp8-sampling": "sampling in FP8", "fp8-everywhere": "sampling and training in FP8"},
    ),
    "head": _beside_default(
        title="Levers: what the head sees and how it is held back",
        question="The default's head is on the last layer's features of the whole image, without regularisation.",
        arms={
            "head-layers": "features of two layers",
            "head-augment": "crops and flips",
            "head-spectral-norm": "spectral norm",
            "head-r1": "R1, γ = 1",
        },
    ),
    "head-over-time": _beside_default(
        title="Levers: the head over time",
        question="The default has one head, which gives the reward as it is, never begins anew and sees a quarter "
        "of older generations. It trains in every iteration; eq. 7 with a margin of 1 trains it while references are "
        "ahead by less than that.",
        arms={
            "head-average": "reward by the head's average",
            "head-ensemble": "four heads",
            "head-resets": "a new head every 20 iterations",
            "no-replay": "no older generations",
            "eq7-margin": "eq. 7 with a margin of 1",
        },
    ),
}


def select(names: Sequence[str]) -> list[str]:
    """Experiments by name, in the order of `EXPERIMENTS`; "all" is every one. UserError for an unknown name."""
    unknown = [name for name in names if name not in (*EXPERIMENTS, "all")]
    if unknown or not names:
        raise UserError(f"experiment {', '.join(unknown) or '(none)'}: want all, or some of {', '.join(EXPERIMENTS)}")
    return [name for name in EXPERIMENTS if name in names or "all" in names]


def chains(names: Sequence[str], seeds: Sequence[int]) -> list[list[Job]]:
    """All that the experiments need, once: the base models, which are only judged, then every run. A chain is a run
    followed by those that start from it; chains are independent of each other."""
    bases = dict.fromkeys(EXPERIMENTS[name].base for name in names)
    arms = {arm for name in names for arm in EXPERIMENTS[name].arms}
    arms |= {ARMS[arm].follows for arm in arms} - {""}
    roots = [arm for arm in ARMS if arm in arms and not ARMS[arm].follows]
    followers = {root: [arm for arm in ARMS if arm in arms and ARMS[arm].follows == root] for root in roots}
    runs = [[Job(arm, seed) for arm in (root, *followers[root])] for seed in dict.fromkeys(seeds) for root in roots]
    return [[Job(base)] for base in bases] + runs


def take_shard(every: list[list[Job]], shard: str) -> list[list[Job]]:
    """The chains of shard "i/n", numbered from 0; UserError for anything else."""
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {shard}: want I/N with 0 <= I < N, such as 0/2 and 1/2")
    return every[int(number) :: int(count)]


def length(arm: str, iterations: int) -> int:
    """Iterations of an arm's runs, where the plan's are so many."""
    return round(iterations * ARMS[arm].longer) if arm in ARMS else iterations


def settings(job: Job, work: Path, iterations: int, file: Path | None = None) -> Config:
    """The run's configuration: preset, what all arms share, the arm's own changes, then the file's."""
    arm = job.made
    metrics = [*_CURVE_METRICS, *(["pickscore"] if "rewards" in arm.overrides else [])]
    common = {
        "evaluation": {
            "every": max(1, iterations // _EVALUATIONS),
            "images_per_prompt": 2,  # the ends of a curve rest on as many pictures as its middle
            "during_images_per_prompt": 2,
            "guidance_scale": GUIDANCE,
            "metrics": metrics,
            **_DINO_SEES,
        },
        "output": {"tensorboard": False},
    }
    own = {"iterations": length(job.arm, iterations), "seed": job.seed, "output_dir": str(job.folder(work))}
    if job.origin is not None:
        lora = str(job.origin.folder(work) / "lora")
        own |= {"model": {"lora": {"start_from": lora}}} if arm.start_from else {"update": {"teacher": lora}}
    merged = configuration.read_preset(arm.preset)
    for layer in (common, arm.overrides, configuration.read_yaml(file) if file else {}, own):
        merged = configuration.merge(merged, layer)
    return configuration.build(merged, f"experiment arm {job.arm}" + (f" with {file}" if file else ""))
