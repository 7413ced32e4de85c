"""The settings as typed, nested, strict models; every field's docstring is its help.

Section `rewards` is in rewards.py. Defaults are the values of Adv-GRPO (arXiv 2511.20256) on SD3.5-medium. Numbers are
finite unless the field is an `OrInfinity`; the upper limits of counts are where a larger one can only be a slip.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PlainSerializer

from advgrpo.config.base import Section
from advgrpo.config.engine import EngineSection

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
MOST_PER_PROMPT = 1000  # held-out images of a prompt: evaluation numbers image k of prompt p as 1000 p + k
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Batch = Annotated[int, Field(ge=1, le=65536)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Steps = Annotated[int, Field(ge=1, le=1000)]
PerPrompt = Annotated[int, Field(ge=1, le=MOST_PER_PROMPT)]
Above0 = Annotated[float, Field(gt=0, le=1e30)]  # float32, which most of these become, ends at 3e38
AtLeast0 = Annotated[float, Field(ge=0, le=1e30)]
Guidance = Annotated[float, Field(ge=1, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ExportFormat = Literal["diffusers", "comfyui", "kohya"]
Decay = Annotated[float, Field(ge=0, lt=1)]
# Where infinity means "no limit". JSON has no infinity: it is the text "inf" in checkpoints and in YAML.
OrInfinity = Annotated[
    float,
    Field(gt=0, allow_inf_nan=True),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json"),
]
FlagName = Literal[
    "reward_collapse",
    "mode_collapse",
    "reward_hacking",
    "dead_groups",
    "slow_convergence",
    "off_policy",
    "adam_eps",
    "overpowered_adversary",
    "sleeping_adversary",
    "shortened_tail",
]


class LoraSection(Section):
    """Low-rank adapters of the transformer."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    """Rank r of every adapter."""
    alpha: Above0 = 64
    """Strength: the update is (alpha / rank) * B @ A."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Initialisation of A; B starts at zero, so training starts from the base model."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_TARGETS
    """Module-name suffixes that get an adapter. The default, the eight attention projections of SD3, FLUX.1 and
    Qwen-Image, stands for attn1 and attn2's to_q, to_k, to_v and to_out.0 where the model is a UNet."""
    blocks: Literal["all"] | Batch = "all"
    """"all", or only the last N transformer blocks."""
    start_from: str = ""
    """Folder of a trained LoRA (such as OUT/lora) to start from instead of zero; same rank, targets and blocks, at the
    strength it was trained with, whatever alpha is here."""
    export_format: ExportFormat = "diffusers"
    """OUT/lora/pytorch_lora_weights.safetensors is always written, for diffusers; "comfyui" and "kohya" (also for web
    UIs) add comfyui.safetensors or kohya.safetensors beside it."""


class ModelSection(Section):
    """The generator being trained."""

    path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Diffusers pipeline: folder, hub id, or "tiny" for the shipped one ("tiny:words" for the one that draws words)."""
    resolution: Pixels = 512
    """Height and width of the images in pixels: they are squares (docs/bad_input.md says why)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights and activations of the frozen base; adapters and latents are float32 always."""
    train: Literal["lora", "full"] = "lora"
    """"full" trains every transformer weight: it learns faster and forgets more (a warning is printed)."""
    lora: LoraSection = LoraSection()
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 128
    """Tokens of the T5 prompt (SD3 and FLUX.1; 1 where the pipeline has no T5), of Qwen-Image's, whose template takes
    five of them, or of FLUX.2's with its chat template."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more work, far less memory."""
    decoder_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the image decoder with --fast; auto follows dtype on a GPU. In bfloat16 the run's first images
    must reach 40 dB against float32."""
    attention: Literal["auto", "flash3", "flash2", "flash4", "cudnn", "flash", "efficient", "cpu", "math"] = "auto"
    """Attention of the fused transformer (policy/fused/attention.py says what each needs); auto takes the first that
    runs, never flash4."""
    base_precision: Literal["model", "fp8"] = "model"
    """Frozen weights while training: the model's dtype, or FP8 quantised once (adapters never are); needs --fast, or
    shard_base = blocks, which then has the only copy."""
    shard_base: Literal["none", "blocks"] = "none"
    """"blocks": each process holds its share of the transformer's frozen weights, or with train = full of the trained
    ones and of all that the optimizer keeps, and gathers a block when it runs, by diffusers' forward, or by ours where
    sequence_parallel shares out tokens (docs/families.md, "Models larger than a GPU"); "none": each holds them all."""
    offload: Literal["none", "text", "text_vae"] = "none"
    """Frozen weights that lie in the host's memory, with the same results to the bit: "text": the text encoders', of
    which one layer at a time is on the GPU while prompts are encoded; "text_vae": the VAE's as well, which are there
    while it decodes; on a CPU nothing changes."""
    sequence_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that compute the same images together, each a share of their tokens and, in attention, of the heads, by
    our forward (docs/families.md, "Images larger than a GPU"): activations are divided by so many, and the processes of
    the run must be a multiple of it; 1: each computes images of its own."""

    @property
    def in_parts(self) -> bool:
        """Whether what is trained lies in parts on several processes."""
        return self.train == "full" and self.shard_base == "blocks"

    @property
    def gathers_stock_blocks(self) -> bool:
        """Whether blocks lie in parts that diffusers' forward runs; ours does where tokens are shared out."""
        return self.shard_base == "blocks" and self.sequence_parallel == 1

    def is_sharded(self, processes: int) -> bool:
        """Whether so many processes hold the network in parts, and so run every forward together; one holds all."""
        return self.shard_base == "blocks" and processes > 1


class DataSection(Section):
    """Prompts and reference images."""

    prompts: str = ""
    """Training prompts: one per line, or JSONL with a "prompt" key; a .parquet, webdataset .tar, folder with
    metadata.jsonl, or data set of the hub, such as hf:OWNER/NAME:split=S:column=C (docs/data.md); "tiny" or
    "tiny:words" for the shipped."""
    held_out_prompts: str = ""
    """Prompts for evaluation only, from the same sources; empty switches evaluation off. "tiny" and
    "tiny:words" for the shipped ones; "tiny:tuning" for those that settings are chosen on; "tiny:report" and
    "tiny:names" (of things no other list names) for others kept for reported results."""
    references: str = ""
    """Folder with references.json: {prompt: [image files]}; must cover both prompt lists; `advgrpo.references import`
    makes one of any source; "tiny" or "tiny:words" for the shipped."""
    style: str = ""
    """Folder of images without prompts that are the references of every prompt (style transfer), instead; for the
    tiny world "tiny:ink" or "tiny:outline"."""
    reference_count: Count = 0
    """Train with only N reference images: on prompts in a seeded order until theirs make N; 0 takes all."""
    min_reference_size: Pixels = 256
    """Smallest accepted side of a reference image, in pixels."""
    fit: Literal["refuse", "crop", "letterbox", "stretch"] = "refuse"
    """References that are not square: an error (`advgrpo.references import` makes squares), the middle cropped, white
    bars added, or stretched, which teaches the adversary that good images are squashed."""
    decode_workers: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Processes that decode an iteration's references while its images are sampled, for each process that trains; auto:
    none on a CPU, up to 8 beside a GPU."""
    cache_dir: Annotated[str, Field(min_length=1)] = "~/.cache/advgrpo"
    """Where text embeddings and reference features are kept, keyed by content hash: one folder for all machines of a
    run, or one on each machine's own disk, between which embeddings are then exchanged."""


class WindowSection(Section):
    """The steps that are stochastic and trained on."""

    order: Literal["auto", "random", "contiguous", "sliding", "fixed"] = "auto"
    """How an iteration's steps are chosen: fixed, those of `steps`; random, any `size` steps of `noise_range`;
    contiguous, `size` consecutive ones from a random start; sliding, consecutive ones that move from the noisiest to
    the cleanest over the iterations and start over (MixGRPO); auto, fixed where `steps` is set and random otherwise."""
    steps: tuple[Count, ...] | None = None
    """Order fixed: the steps, such as 0 1."""
    size: Positive = 2
    """The other orders: number of steps."""
    noise_range: tuple[Fraction, Fraction] = (0.5, 1.0)
    """The other orders: share of the schedule to choose from; 1.0 is the noisiest step, 0.5-1.0 the noisier half."""
    slide_every: Positive = 25
    """Order sliding: iterations after which the window moves (MixGRPO's shift interval)."""
    slide_by: Positive = 1
    """Order sliding: steps it moves by (MixGRPO's stride)."""
    branching: bool = False
    """Each of the window's steps is the only stochastic one of a group of its own (TempFlow-GRPO): consecutive groups
    have one prompt and one initial noise, leave its ODE trajectory at one step each, and follow the ODE after it."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the window's steps that are trained on, from the noisiest, rounded down: Flow-GRPO's timestep_fraction,
    whose 0.99 leaves the last of ten steps noisy but untrained."""

    @property
    def chosen_order(self) -> str:
        """`order`, with auto resolved."""
        if self.order != "auto":
            return self.order
        return "random" if self.steps is None else "fixed"

    @property
    def count(self) -> int:
        """Stochastic steps of an iteration."""
        return self.size if self.chosen_order != "fixed" else len(self.steps or ())

    @property
    def branches(self) -> int:
        """Groups of an iteration that have one prompt and one initial noise: 1 but where they branch apart."""
        return max(self.count, 1) if self.branching else 1

    @property
    def of_image(self) -> int:
        """Stochastic steps of an image."""
        return self.count // self.branches

    @property
    def one_for_all(self) -> bool:
        """Whether every image of every iteration has the same stochastic steps."""
        return self.chosen_order == "fixed" and not self.branching

    def trained_of(self, count: int) -> int:
        """How many of `count` stochastic steps are trained on."""
        return int(count * self.train_share)


class RolloutSection(Section):
    """Sampling of one iteration's images."""

    prompts_per_iteration: Batch = 48
    """Groups per iteration over all processes."""
    group_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """Images per prompt; fewer than 8 learn slowly."""
    micro_batch: Batch = 8
    """Images computed at once; divides group_size or is a multiple of it. Training uses the same micro-batches."""
    num_steps: Steps = 10
    """Sampler steps."""
    guidance_scale: Guidance = 4.5
    """Guidance in sampling and training: classifier-free, 1 switches it off (for Qwen-Image its true_cfg_scale), or
    the scale that FLUX.1-dev is given."""
    dynamics: Literal["flow_cps", "flow_sde", "dance_sde", "ddim"] = "flow_cps"
    """Stochastic sampler on the window's steps (arXiv 2509.05952, 2505.05470, 2505.07818); ddim for models that predict
    noise (SD1.5, SDXL), and for no others."""
    eta: Above0 = 0.8
    """Strength eta of the noise on the window's steps."""
    likelihood: Literal["squared_error", "gaussian"] = "squared_error"
    """Log-probability: Flow-CPS drops constants and variance (squared_error), Flow-GRPO keeps them (gaussian)."""
    initial_noise: Literal["per_image", "shared"] = "per_image"
    """Every image's own initial noise (the paper, the released code), or one for the images of a prompt, which up
    to the window are then one trajectory that --fast computes once (Flow-GRPO-Fast: one per mini-group, 8 of 16)."""
    noise: Literal["philox", "torch_float32", "torch_bfloat16", "torch_float16"] = "philox"
    """What draws the initial noise: our generator, which depends on nothing but seed and image, or torch's on the CPU
    in that dtype, which an engine draws as well when it is handed the seed (rollout.engine); each gives other images.
    """
    window: WindowSection = WindowSection()
    engine: EngineSection = EngineSection()
    precision: Literal["model", "fp8"] = "model"
    """ODE steps, which have no likelihood: merged weights in the model's dtype, or in FP8; needs --fast. Beside
    model.shard_base = blocks "model" gathers each block as the update does, and "fp8" is a whole copy on every process,
    which gathers nothing (docs/families.md, "Sampling from a whole copy in FP8")."""
    decode_stream: Literal["main", "side"] = "main"
    """CUDA stream that decodes a micro-batch's images: before the next micro-batch is sampled (main) or beside it
    (side), with the same bits; side keeps the decoder's memory through the iteration."""
    window_forward: Literal["trainer", "merged"] = "trainer"
    """Forward of the stochastic steps: the trainer's own, so that likelihood ratios start at exactly 1, or the merged
    weights in `precision`, which needs another update.old_log_prob."""
    tail_steps: Count = 0
    """Deterministic steps after the window, fewer and longer than the schedule's; 0 takes all. Likelihoods keep their
    bits, images are other ones: `tail_agreement` says whether rewards rank them alike."""
    tail_solver: Literal["euler", "dpm2"] = "euler"
    """How those steps are taken: one by one (Euler's, or DDIM), or by DPM-Solver++ of second order, which looks back at
    the step before (MixGRPO-Flash)."""
    tail_agreement: Fraction = 0.85
    """Least rank agreement (Kendall's tau within groups) of images by tail_steps with the same images by all steps. A
    mean below it raises the red flag shortened_tail; a 95 % interval below it ends a run before its generator learns.
    """
    tail_check_every: Count = 50
    """Iterations between measurements of that agreement, each of which draws and scores the images once more; 0: once,
    before the generator learns."""
    scouts: Annotated[int, Field(ge=1, le=64)] = 1
    """Images drawn by the cheapest path for each one kept: of group_size x scouts per prompt the best and the worst are
    drawn again, exactly, and trained on (Sol-RL, arXiv 2604.06916); 1 draws all exactly."""
    scout_tail_steps: Count = 0
    """Steps of a scout after the window, such as 2; 0: as tail_steps says."""

    @property
    def images(self) -> int:
        """Of an iteration, over all processes."""
        return self.prompts_per_iteration * self.group_size

    @property
    def of_scouts(self) -> RolloutSection:
        """The same rollout with as many images to a prompt as scouts are drawn, by their steps."""
        tail = self.scout_tail_steps or self.tail_steps
        return self.model_copy(update={"group_size": self.group_size * self.scouts, "tail_steps": tail})


class AdvantageSection(Section):
    """Group-relative advantages (arXiv 2511.20256, eq. 1)."""

    std: Literal["group", "global", "none"] = "group"
    """Normalise by the group's standard deviation, the iteration's, or not at all."""
    eps: Above0 = 1e-4
    """Added to the standard deviation."""
    clip: Above0 = 5.0
    """Advantages are clipped to +-clip."""


class UpdateSection(Section):
    """The generator's optimizer and loss (arXiv 2511.20256, eqs. 2-3)."""

    objective: Literal["policy", "nft", "awm", "sft"] = "policy"  # the names of objectives.py
    """Policy gradient on the rewards; nft or awm, the same rewards without likelihoods (sections nft and awm); or sft,
    supervised fine-tuning on the references: nothing is sampled, no reward and no adversary is loaded or trained, and
    prompts_per_iteration x group_size references are learned from per iteration, without guidance."""
    trust_region: Literal["ratio", "normalized_ratio", "divergence"] = "ratio"
    """What keeps the update near the policy of the rollout: PPO's clip of the likelihood ratio; that of GRPO-Guard's
    ratio, normalised by the step's noise (arXiv 2510.22319); or Flow-DPPO's mask (arXiv 2606.11025), which leaves
    out images whose step has moved too far and would move on, and clips nothing (docs/jobs/objectives.md)."""
    clip_range: OrInfinity = 1e-5
    """PPO clip epsilon on the ratio; inf does not clip. Trust region "divergence" does not look at it."""
    max_divergence: Above0 = 1e-5
    """Trust region "divergence": the KL of a step to the rollout's, a mean over elements, from which it is masked."""
    step_weights: Literal["uniform", "inverse_length", "noise"] = "uniform"
    """Weights of the steps' policy losses: all 1; 1 / (sigma - sigma') by the step's noise levels (GRPO-Guard); or the
    standard deviation of the step's noise over its mean over the schedule (TempFlow-GRPO, arXiv 2508.04324)."""
    policy_weight: AtLeast0 = 1.0
    """Weight of the policy loss beside the KL; 0 leaves the KL alone, which to a teacher is distillation."""
    kl_weight: AtLeast0 = 0.0
    """Weight beta of the KL."""
    kl_to: Literal["base", "ema", "teacher"] = "base"
    """Whom the KL pulls towards: the model without adapters, the moving average of the policy itself, or `teacher`."""
    teacher: str = ""
    """With kl_to teacher: folder of a trained LoRA (such as OUT/lora) of the rank, targets and blocks of this run."""
    kl_space: Literal["latent", "velocity"] = "latent"
    """Where the KL is taken: between the means of a step, or as the squared difference of the velocities, which is
    divided by nothing and weighs all steps alike."""
    kl_variance: Literal["step", "unit_time"] = "step"
    """What the KL in latent space divides by with likelihood gaussian: 2s², s the noise of the step, which makes it the
    KL of the two steps; or 2·std², std the noise per unit of time, as Flow-GRPO's code, which is smaller by the step's
    length."""
    minibatches: Positive = 2
    """Optimizer steps per iteration: the rollout is cut into this many parts."""
    informative_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a group's images that is trained on: those with the largest |advantage|. The others, whose part of the
    gradient is the smallest, are left out of it; group_size x this must be a multiple of rollout.micro_batch."""
    skip_dead_groups: bool = False
    """Leave out micro-batches whose advantages are all 0, those of groups without spread in their rewards: the gradient
    keeps its bits, and their forward and backward are saved."""
    learning_rate: Above0 = 3e-4
    """AdamW's learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    weight_decay: AtLeast0 = 1e-4
    """AdamW's decoupled weight decay."""
    eps: Above0 = 1e-8
    """Adam's eps; LoRA gradients can be this small, in which case a smaller eps speeds learning up."""
    max_grad_norm: OrInfinity = 1.0
    """The gradient is scaled down to this norm; inf leaves it as it is."""
    optimizer: Literal["auto", "fused", "torch", "apex"] = "auto"
    """AdamW by our fused kernel (what auto takes with --fast), torch's, or NVIDIA Apex's FusedAdam when installed."""
    graphs: Literal["auto"] | bool = "auto"
    """With CUDA graphs, capture the update's forward and backward as well: fewer waits for the CPU, but a micro-batch's
    activations stay in memory, twice over while graphs are made. auto: with rollout.initial_noise = shared, whose first
    step is too small to hide the CPU's work, on SD3's family, where the memory plan counts all models and every
    GPU of the job has that much free."""
    ema_decay: Decay = 0.9
    """Moving average of the adapters, which is what is evaluated and exported."""
    ema_rule: Literal["optimizer_step", "mini_batch"] = "optimizer_step"
    """When it averages: once per optimizer step, or as Flow-GRPO's and the released code does: after every mini-batch,
    at the global steps s of which s + 1 is a multiple of 8, with a decay of at most (1 + s)/(10 + s)."""
    ema_mini_batches: Batch = 6
    """Rule mini_batch: mini-batches whose gradients make an optimizer step, on one GPU of theirs (released: 6 of 8)."""
    old_log_prob: Literal["rollout", "recompute", "truncated_importance"] = "rollout"
    """Behaviour policy of the ratio: the rollout's own log-probabilities; the trainer's, recomputed before the first
    optimizer step; or those with each image's loss weighted by min(p_trainer / p_rollout, importance_cap)."""
    importance_cap: OrInfinity = 2.0
    """Largest weight of "truncated_importance"; inf caps nothing."""
    max_log_prob_mismatch: AtLeast0 = 0.0
    """Largest |log p - log p_old| tolerated before the first optimizer step; on-policy it is exactly 0."""


class NoiseLevelsSection(Section):
    """Of an objective that learns from drawn images, noised again."""

    step_share: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the sampler's steps at whose noise levels an image is trained, drawn anew for each image, rounded down:
    0.99 of ten are nine."""

    def trained_of(self, num_steps: int) -> int:
        """At how many noise levels each image is trained."""
        return int(num_steps * self.step_share)


class NftSection(NoiseLevelsSection):
    """Negative-aware fine-tuning, update.objective nft (DiffusionNFT, arXiv 2509.16117): images are drawn by ODE steps
    alone, and their latents, noised again, are fitted or avoided by their reward. No likelihood and no window; guidance
    counts in sampling only."""

    beta: Above0 = 1.0
    """Good images are fitted by v_old + beta (v - v_old), bad ones by v_old - beta (v - v_old); v may leave the old
    policy by about 1/beta (released: 1, and 0.1 for OCR and for several rewards)."""
    old_decay_start: Count = 0
    """Optimizer steps during which the old policy, which draws the images, is the trained one of the iteration before
    (released: 0, and 75 for OCR)."""
    old_decay_rate: AtLeast0 = 0.001
    """After them it keeps a share of itself in every iteration: this times the optimizer steps since (released: 0.001,
    and 0.0075 for OCR)."""
    old_decay_max: Decay = 0.5
    """That share grows to this (released: 0.5, and 0.999 for OCR)."""

    def old_decay(self, steps: int) -> float:
        """What the old policy keeps of itself after the iteration that ends with `steps` optimizer steps in all."""
        since = max(0, steps - self.old_decay_start)
        return min(since * self.old_decay_rate, self.old_decay_max)


class AwmSection(NoiseLevelsSection):
    """Advantage-weighted matching, update.objective awm (AWM, arXiv 2509.25050): images are drawn by ODE steps alone,
    and their latents, noised again, are fitted or avoided by their advantage, with PPO's clip (update.clip_range) on
    how much better they are fitted than when they were drawn. The KL (update.kl_weight, update.kl_to) is of
    velocities."""

    weighting: Literal["uniform", "sigma", "sigma_squared", "huber", "generalized_huber"] = "generalized_huber"
    """How the squared error l of the velocity counts at noise level sigma: l, sigma l, sigma² l, sigma sqrt(l), or
    sigma l^p / p."""
    huber_power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """p of generalized_huber."""


class AdversarySection(Section):
    """The learned reward: a head on frozen DINOv2 features (arXiv 2511.20256, eqs. 9-14)."""

    kind: Literal["dino", "siglip", "pickscore", "none"] = "dino"
    """What discriminates: a head on DINOv2 or SigLIP features, the last layers of PickScore, or nothing (fixed
    rewards only: Flow-GRPO)."""
    backbone: str = "facebook/dinov2-large"
    """Folder or hub id of its model (a CLIPModel for pickscore); "tiny" for the shipped one."""
    processor: str | None = None
    """Kind pickscore: where tokenizer and preprocessor come from; unset: beside the backbone."""
    trainable_layers: Positive = 2
    """Kind pickscore: how many of the last vision layers learn (paper 2, released 1)."""
    objective: Literal["binary", "pairwise"] = "binary"
    """Kind pickscore: cross-entropy of each image, or of (reference, generation) pairs (released)."""
    image_size: Pixels = 518
    """Images are resized to this before the backbone."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen backbone; the head is float32."""
    hidden_size: Batch = 512
    """Width of the head."""
    num_patches: Batch = 64
    """Random patches scored per image."""
    patch_sampling: Literal["without_replacement", "with_replacement"] = "without_replacement"
    """Whether a patch can be drawn twice in one image (released). Drawn from all patches of a generation, and from
    the `cached_patches` of a reference."""
    reward_weights: tuple[AtLeast0, AtLeast0] = (0.7, 0.3)
    """Weights of the global (cls) and local (patches) score in the reward."""
    loss_weights: tuple[AtLeast0, AtLeast0] = (0.7, 0.3)
    """Weights of the global and local hinge loss."""
    normalize: Literal["never", "always", "reward_only"] = "never"
    """L2-normalised features; "reward_only" reproduces the released code's mismatch."""
    learning_rate: Above0 = 1e-4
    """Adam's learning rate for the head."""
    betas: tuple[Decay, Decay] = (0.5, 0.999)
    """Adam's moment decays for the head."""
    schedule: Literal["when_fooled", "fooled_or_generator", "always", "ratio", "never", "alternate"] = "when_fooled"
    """When the head trains: when generations outscore references (eq. 7), or then and the generator not (released,
    PickScore), always, at a fixed ratio of discriminator updates to optimizer steps, never, or alternating with the
    generator (released, DINO)."""
    fooled_margin: AtLeast0 = 0.0
    """Generations outscore references when mean R(gen) > mean R(ref) - margin; 0 is eq. 7. A converged hinge head
    separates by 2."""
    updates_per_iteration: Positive = 10
    """Discriminator updates in an iteration in which it trains."""
    ratio: Above0 = 10.0
    """Discriminator updates per optimizer step of the generator; used by schedule "ratio"."""
    alternate_period: Annotated[int, Field(ge=2, le=2**31 - 1)] = 10
    """Schedule "alternate": of this many iterations only the last trains the generator."""
    warmup_iterations: Count = 0
    """First iterations that train only the head, whatever the schedule: a random head is a random reward."""
    warmup_updates: Positive = 10
    """Discriminator updates in each of those iterations."""
    batch_size: Batch = 64
    """Generated images, and as many references, per discriminator update, over all processes."""
    reference_choice: Literal["random", "in_turn"] = "random"
    """The reference that a generation is compared with in R(ref), discriminator batches and pairs: a random one of its
    prompt, or that of the image's place in the group modulo their number, so that all are seen alike (released)."""
    replay_capacity: Annotated[int, Field(ge=0, le=65536)] = 1024
    """Older generations kept as negatives."""
    replay_share: Fraction = 0.25
    """Share of each discriminator batch drawn from the replay buffer once it holds anything."""
    cached_patches: Batch = 256
    """Patch features kept per reference (a random subset when the backbone has more)."""
    reward_ema: Decay = 0.0
    """The reward is given by a moving average of the head's weights with this decay per discriminator update, while the
    head itself learns; 0: by the head."""
    gradient_penalty: AtLeast0 = 0.0
    """Strength gamma of R1 in the head's loss: the squared slope of its score at the references' features
    (arXiv 1801.04406); 0: none."""
    spectral_norm: bool = False
    """Both linear layers of the head are divided by their largest singular value (arXiv 1802.05957)."""
    feature_layers: tuple[Positive, ...] = ()
    """Kind dino: layers whose tokens are joined, such as 12 24, each behind the model's final LayerNorm; empty: those
    of the last one."""
    heads: Annotated[int, Field(ge=1, le=64)] = 1
    """Heads with initial weights and patch draws of their own; the reward is the mean of their scores."""
    reset_every: Count = 0
    """Iterations, from the end of the warm-up, after which the head begins anew and trains `warmup_updates` at once,
    whatever the schedule; 0: never."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """What reward and head see of an image: all, a random 7/8 of each side, anew in every iteration, or that mirrored
    at random. Of a reference four such views are cached, of which one is drawn."""


class EvaluationSection(Section):
    """Held-out evaluation: fixed prompts, fixed noise, exported (EMA) weights."""

    every: Count = 50
    """Iterations between evaluations; 0 evaluates only before and after training."""
    images_per_prompt: PerPrompt = 4
    """Images per held-out prompt before and after training."""
    during_images_per_prompt: PerPrompt = 1
    """Images per held-out prompt while training."""
    num_steps: Steps = 40
    """Sampler steps in evaluation."""
    guidance_scale: Guidance = 4.5
    """Guidance in evaluation, as rollout.guidance_scale."""
    metrics: tuple[str, ...] = ("dino_similarity",)
    """Names of rewards, with the options of section rewards; dino_similarity is to the prompt's own references, by
    `backbone`; rule_accuracy is the strict verdict of the reward rule on the tiny world's captions; retrieval and
    retrieval_top5 are its independent judge's, classifier_accuracy its second judge's; saturation, dark_share and
    edge_density are statistics of the images."""
    backbone: str = ""
    """Dinov2Model for dino_similarity and the monitor, whatever the adversary; empty: the adversary's own where
    adversary.kind = dino, else none (the monitor then says what it cannot judge)."""
    backbone_image_size: Pixels = 518
    """Images are resized to this before it."""
    grid_prompts: Positive = 6
    """Prompts shown in the sample grids."""
    keep_best: str = ""
    """One of `metrics`: after each evaluation that is its best so far, the LoRA is kept as OUT/lora-best beside the
    last one, OUT/lora; empty keeps the last alone."""
    stop_after: Count = 0
    """End the run, as at its normal end, after this many evaluations in a row without gain of `keep_best`; 0: never."""


class OutputSection(Section):
    """Checkpoints and logs."""

    checkpoint_every: Count = 20
    """Iterations between checkpoints; one is written at the end and on interruption in any case."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Report to Weights & Biases under this project when set (extra `wandb`; WANDB_MODE=offline works)."""
    trackio_project: str = ""
    """Report to trackio under this project when set (extra `trackio`)."""
    run_name: str = ""
    """What wandb and trackio call the run; empty: the name of the output folder."""
    group: str = ""
    """Runs that belong together, such as the seeds of a comparison, for the trackers."""
    tags: tuple[str, ...] = ()
    """Words to find the run by in the trackers."""


class MonitorSection(Section):
    """Red flags while the run runs (monitor.py has each one's definition); lengths are counted in checks."""

    every: Count = 1
    """Iterations between checks; 0 switches the monitor off."""
    stop: tuple[FlagName, ...] = ()
    """Flags that end the run, with a checkpoint, once they appear."""
    window: Annotated[int, Field(ge=2, le=2**31 - 1)] = 10
    """Levels are judged by the median of this many checks."""
    trend_window: Annotated[int, Field(ge=3, le=2**31 - 1)] = 30
    """Trends are judged over this many checks."""
    persistence: Positive = 3
    """Checks in a row that must agree before a flag appears or clears."""
    collapse_tau: Fraction = 0.4
    """reward_collapse: minus Kendall's tau of the references' reward with time; 0.4 means 70 % of all pairs fall."""
    collapse_drop: AtLeast0 = 6.0
    """reward_collapse: and a fall from its peak of at least this many times its own noise."""
    diversity_share: Fraction = 0.25
    """mode_collapse: diversity within groups below this share of the one at the start."""
    diversity_floor: AtLeast0 = 1e-3
    """mode_collapse: mean pairwise cosine distance that is too small whatever the start was."""
    hacking_gain: AtLeast0 = 2.0
    """reward_hacking: rise of a trained reward since the start, in times of its noise from check to check."""
    hacking_drift: Fraction = 0.05
    """reward_hacking: growth of an image statistic's or DINO's distance from the references."""
    hacking_level: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """reward_hacking: or, while a trained reward rises, a fall of a held-out metric that nothing is trained on from its
    peak, prompt by prompt; one-sided level of that comparison, divided by evaluations and metrics. By default at most
    5 in 100 runs are flagged wrongly whose metrics stand still over 16 evaluations; hardly any that improve."""
    dead_groups: Fraction = 0.3
    """dead_groups: share of groups without any spread of rewards."""
    group_size: Positive = 8
    """slow_convergence: smallest rollout.group_size that is not flagged."""
    log_prob_mismatch: AtLeast0 = 0.0
    """off_policy: largest log-probability mismatch before the first optimizer step."""
    pre_update_clip_fraction: Fraction = 0.0
    """off_policy: largest share of clipped ratios before the first optimizer step."""
    adam_eps_share: Fraction = 0.1
    """adam_eps: share of the optimizer's step that Adam's eps takes away."""
    overpowered_accuracy: Fraction = 0.99
    """overpowered_adversary: accuracy by the head's own threshold, or by pairs where it has none, at or above this."""
    sleeping_accuracy: Fraction = 0.55
    """sleeping_adversary: share of (reference, generation) pairs of a prompt ranked right, at or below this; guessing
    gives 0.5."""


class ObserverSettings(NamedTuple):
    """A DINO that nothing is trained on."""

    backbone: str
    image_size: int
    dtype: str
    fields: tuple[str, str]  # the settings that backbone and image size come from, for error messages
