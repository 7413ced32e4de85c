"""Section `rewards`: how each reward counts, what it is built with, and the workers that score it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from advgrpo.config.base import Section
from advgrpo.config.sections import AtLeast0, Batch, Fraction, Pixels


class RewardSection(Section):
    """How one reward counts in the total (rewards/compose.py)."""

    weight: AtLeast0 = 0.0
    """Weight in the sum; 0 leaves the reward out."""
    normalize: Literal["none", "group", "global"] = "none"
    """As it is, or with mean 0 and standard deviation 1 over the prompt's group or over the iteration."""
    gate: float | None = None
    """Images whose raw reward is below this get their group's lowest total."""

    @property
    def used(self) -> bool:
        return self.weight > 0 or self.gate is not None

    def arguments(self) -> dict[str, Any]:
        """What the reward itself is built with."""
        return {n: getattr(self, n) for n in type(self).model_fields if n not in RewardSection.model_fields}


class AdversaryReward(RewardSection):
    """The learned reward of section `adversary`."""

    weight: AtLeast0 = 1.0
    """Weight in the sum."""


class PickScoreReward(RewardSection):
    """PickScore, fixed: logit_scale * cos(text, image) / 26."""

    path: str = "yuvalkirstain/PickScore_v1"
    """CLIPModel folder or hub id; "tiny" for the shipped one."""
    processor: str | None = None
    """Where tokenizer and preprocessor come from; unset: beside the model."""


class ClipSimilarityReward(RewardSection):
    """CLIP cosine of image and prompt."""

    path: str = "openai/clip-vit-large-patch14"
    """CLIPModel folder or hub id; "tiny" for the shipped one."""


class ClipReferenceSimilarityReward(ClipSimilarityReward):
    """CLIP cosine of image and the prompt's references (eq. 8)."""

    reduction: Literal["mean", "max"] = "mean"
    """Over the references."""


class DinoSimilarityReward(RewardSection):
    """DINOv2 cosine of image and the prompt's references."""

    path: str = "facebook/dinov2-base"
    """Dinov2Model folder or hub id; "tiny" for the shipped one."""
    image_size: Pixels = 518
    """Images are resized to this."""
    reduction: Literal["mean", "max"] = "mean"
    """Over the references; the released code's OCR partner is max."""


class AestheticReward(RewardSection):
    """A head on CLIP embeddings (LAION's aesthetic predictors)."""

    head: str = ""
    """safetensors file of the head."""
    path: str = "openai/clip-vit-large-patch14"
    """CLIPModel folder or hub id."""


class OcrReward(RewardSection):
    """Edit distance of the text read in the image to the prompt's quoted text."""

    detection_size: Pixels = 736
    """Images are scaled up to this side before text is looked for."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads that read."""


class RuleReward(RewardSection):
    """The tiny world's rule-based judge: it sees background, place and size of a drawing, not what is drawn."""

    strict: bool = False
    """1 or 0 for the whole image instead of a graded score."""


class WaitsForServer(RewardSection):
    """What every reward behind HTTP has (rewards/judge_client.py)."""

    timeout: Annotated[float, Field(ge=0.001, le=86400)] = 60.0
    """Seconds a request may take."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """Further attempts after a lost connection, a time-out or a server error."""
    backoff: Annotated[float, Field(ge=0.001, le=30)] = 1.0
    """Seconds before the first of them; doubles each time, up to 30."""
    wait: Annotated[float, Field(ge=0, le=604800)] = 300.0
    """Seconds that a judge which is down (nobody listens; status 502, 503, 504) is waited for; 0: only `retries`."""


class RemoteReward(WaitsForServer):
    """A scorer behind HTTP (rewards/remote.py)."""

    url: str = ""
    """Where to POST images and prompts, e.g. http://host:8000/score."""
    protocol: Literal["advgrpo", "flow_grpo"] = "advgrpo"
    """What the server speaks: our JSON and PNG, or the pickles of flow_grpo's reward servers (GenEval, DeQA), of whose
    answers nothing but plain numbers is read (rewards/flow_grpo.py)."""
    scores_key: str = ""
    """Protocol flow_grpo: which list of the answer is the reward, such as strict_rewards of GenEval; empty: "scores",
    or "outputs" where there is no such list."""
    batch_size: Batch = 16
    """Images per request."""
    token_file: str = ""
    """File with the server's token (rewards.serve --token-file), which stands in no output of the run; empty: that of
    environment variable ADVGRPO_REWARD_TOKEN, or none. In rewards.remotes the variable is ADVGRPO_REWARD_TOKEN_NAME."""


class NamedRemote(RemoteReward):
    """One more scorer behind HTTP, with a name of its own."""

    name: Annotated[str, Field(min_length=1)]
    """What it is called: metric reward_NAME, evaluation.metrics, errors."""


class VlmJudgeReward(WaitsForServer):
    """A vision-language model's yes or no, as the probability of yes (rewards/vlm_judge.py)."""

    base_url: str = ""
    """OpenAI-compatible server (vLLM, SGLang), e.g. http://host:8000/v1."""
    model: str = ""
    """The model's name there."""
    question: Annotated[str, Field(min_length=1)] = (
        'Does this image show exactly what the caption says: "{prompt}"? Answer with one word, yes or no.'
    )
    """What it is asked about each image; {prompt} stands for the prompt."""
    min_probability: Fraction = 0.1
    """Share of the first token's probability that yes and no must have together; with less it is an error."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests under way at once; each is about one image."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More keys of the request, as YAML, e.g. {chat_template_kwargs: {enable_thinking: false}}."""
    token_file: str = ""
    """File with the API key; empty: that of environment variable ADVGRPO_REWARD_TOKEN_VLM_JUDGE, or none."""


if TYPE_CHECKING:
    _Imported = RewardSection
else:
    _Imported = create_model(
        "_Imported",
        __base__=RewardSection,
        **{  # "import" is a word of Python: it can be no attribute of a class body
            "import": (
                Annotated[str, Field(min_length=1)],
                Field(
                    description='Where it is: "file.py:NAME" or "package.module:NAME", a class or a function '
                    "(rewards/custom.py says what it must look like). Its file's content is part of the run: a "
                    "checkpoint is continued with another only by --accept-changed rewards."
                ),
            )
        },
    )


class CustomReward(_Imported):
    """A reward of your own, by name."""

    name: Annotated[str, Field(min_length=1)]
    """What it is called: metric reward_NAME, evaluation.metrics, errors."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, or of the function at every call."""


class PoolSection(Section):
    """Workers of one reward, which score while the next images are drawn."""

    reward: Annotated[str, Field(min_length=1)]
    """Whose: pickscore, ocr, ..., or a name of rewards.custom or rewards.remotes; none that looks at references."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many, of each process of the run."""
    kind: Literal["processes", "ray"] = "processes"
    """Processes of this machine, or actors of the Ray cluster that RAY_ADDRESS names."""
    device: str = "cpu"
    """Where their models are: cpu, or cuda:3; with Ray cpu or cuda, and Ray chooses which."""
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs that Ray reserves for each; a part of one if below 1."""
    batch_size: Batch = 16
    """Images that a worker gets at once."""
    queue: Annotated[int, Field(ge=1, le=1024)] = 2
    """Batches that wait, per worker; where there are more, drawing waits."""
    timeout: Annotated[float, Field(ge=0.1, le=86400)] = 600.0
    """Seconds for a batch; a worker that takes longer is ended and replaced, and the batch is scored again."""


@dataclass(frozen=True)
class RewardEntry:
    """One reward of the settings."""

    kind: str  # the name in rewards.REWARDS
    owner: str  # how errors call its settings: "rewards.ocr", "rewards.custom[0]"
    section: RewardSection


class RewardsSection(Section):
    """What the generator is trained on: a weighted sum (eq. 8)."""

    adversary: AdversaryReward = AdversaryReward()
    pickscore: PickScoreReward = PickScoreReward()
    clip_similarity: ClipSimilarityReward = ClipSimilarityReward()
    clip_reference_similarity: ClipReferenceSimilarityReward = ClipReferenceSimilarityReward()
    dino_similarity: DinoSimilarityReward = DinoSimilarityReward()
    aesthetic: AestheticReward = AestheticReward()
    ocr: OcrReward = OcrReward()
    rule: RuleReward = RuleReward()
    remote: RemoteReward = RemoteReward()
    vlm_judge: VlmJudgeReward = VlmJudgeReward()
    remotes: tuple[NamedRemote, ...] = ()
    """More scorers behind HTTP: a list of {name, url, weight, ...}, with the settings of `remote`; on the command line
    as JSON, --rewards.remotes '[{"name": "geneval", "url": "http://host:8000", "weight": 1}]'."""
    custom: tuple[CustomReward, ...] = ()
    """Rewards of your own: a list of {name, import, weight, options, ...}; on the command line as JSON,
    --rewards.custom '[{"name": "red", "import": "my_reward.py:redness", "weight": 1}]' (docs/rewards.md)."""
    pools: tuple[PoolSection, ...] = ()
    """Workers for slow rewards: a list of {reward, workers, device, ...}; on the command line as JSON,
    --rewards.pools '[{"reward": "ocr", "workers": 4}]' (docs/rewards.md)."""

    def entries(self) -> dict[str, RewardEntry]:
        """Every reward by name; `check` has seen to it that no two have the same."""
        lists = {"remotes": "remote", "custom": "custom"}
        found = {
            name: RewardEntry(name, f"rewards.{name}", getattr(self, name))
            for name in type(self).model_fields
            if name not in (*lists, "pools")
        }
        for field, kind in lists.items():
            for number, section in enumerate(getattr(self, field)):
                found.setdefault(section.name, RewardEntry(kind, f"rewards.{field}[{number}]", section))
        return found

    def sections(self) -> dict[str, RewardSection]:
        """Every reward's section by name."""
        return {name: entry.section for name, entry in self.entries().items()}

    def pool(self, name: str) -> PoolSection | None:
        """The workers of a reward; None where it is scored by the run's own processes."""
        return next((pool for pool in self.pools if pool.reward == name), None)

    def fixed(self) -> dict[str, RewardSection]:
        """Those in use that do not learn."""
        return {name: section for name, section in self.sections().items() if name != "adversary" and section.used}
