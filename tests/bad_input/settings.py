"""Values of settings, metrics, files of settings, flags, and settings that contradict each other."""

from tests.bad_input.case import Case, changed, flagged, written

_NOT_FINITE = (
    "update.eps",
    "update.learning_rate",
    "update.kl_weight",
    "update.weight_decay",
    "advantage.clip",
    "advantage.eps",
    "adversary.fooled_margin",
    "adversary.learning_rate",
    "adversary.ratio",
    "rewards.adversary.weight",
    "rewards.adversary.gate",
    "rewards.remote.timeout",
    "rollout.guidance_scale",
    "rollout.eta",
    "evaluation.guidance_scale",
    "model.lora.alpha",
    "monitor.hacking_gain",
    "collective_timeout",
)
_UNLIMITED = ("update.max_grad_norm", "update.clip_range", "update.importance_cap")


def _infinite() -> list[Case]:
    cases = [
        flagged("settings", f"--{name} inf", f"{name} = inf: not finite; want", f"--{name.replace('_', '-')}")
        for name in _NOT_FINITE
    ]
    cases += [flagged("settings", f"--{name} nan", f"{name} = nan: not finite; want") for name in _NOT_FINITE[:9]]
    cases += [flagged("settings", f"--{name} nan", f"{name} = nan", "or inf for no limit") for name in _UNLIMITED]
    cases += [changed("settings", {"update": {"eps": float("inf")}}, "update.eps = inf: not finite")]
    cases += [
        changed("settings", {"adversary": {"reward_weights": [float("nan"), 1]}}, "adversary.reward_weights = [nan, 1]")
    ]
    cases += [flagged("settings", "--update.betas 0.9 inf", "update.betas = [0.9, inf]")]
    return cases


def _out_of_range() -> list[Case]:
    values = {
        "--iterations 0": "iterations = 0: want a whole number of at least 1",
        "--iterations -3": "iterations = -3",
        "--iterations 2.5": "iterations = 2.5: want a whole number",
        "--iterations many": "iterations = 'many': want a whole number",
        "--iterations 99999999999999": "want a whole number from 1 to 2147483647",
        "--seed -1": "seed = -1",
        "--seed 9223372036854775808": "seed = 9223372036854775808",
        "--device gpu": "device = 'gpu': want one of auto, cpu, cuda",
        "--update.trust_region kl": "update.trust_region = 'kl': want one of ratio, normalized_ratio, divergence",
        "--update.max_divergence 0": "update.max_divergence = 0: want a number above 0",
        "--update.step_weights dt": "update.step_weights = 'dt': want",
        "--update.kl_to reference": "update.kl_to = 'reference': want one of base, ema, teacher",
        "--update.policy_weight -1": "update.policy_weight = -1",
        "--device cuda": "device='cuda' but torch sees no GPU",
        "--model.resolution 33": "model.resolution = 33: want a multiple of 8",
        "--model.resolution 0": "model.resolution = 0",
        "--model.resolution 100000": "model.resolution = 100000",
        "--model.dtype float16": "model.dtype = 'float16': want bfloat16 or float32",
        "--model.train half": "model.train = 'half'",
        "--model.max_sequence_length 100000": "model.max_sequence_length = 100000: want a whole number from 1 to 512",
        "--model.lora.rank 100000": "model.lora.rank = 100000: want a whole number from 1 to 4096",
        "--model.lora.rank 0": "model.lora.rank = 0",
        "--model.lora.alpha 0": "model.lora.alpha = 0: want a number above 0",
        "--model.lora.targets": "model.lora.targets = []: want one or more values",
        "--model.lora.targets attn.to_qq": "model.lora.targets: ['attn.to_qq'] match no linear layer",
        "--model.lora.blocks 0": "model.lora.blocks = 0: want all or a whole number",
        "--model.lora.blocks 77": "model.lora.blocks = 77: the model has 2 transformer blocks",
        "--model.lora.blocks some": "model.lora.blocks = 'some'",
        "--model.shard_base layers": "model.shard_base = 'layers': want none or blocks",
        "--model.offload vae": "model.offload = 'vae': want one of none, text, text_vae",
        "--model.sequence_parallel 0": "model.sequence_parallel = 0: want a whole number from 1 to 64",
        "--model.attention flash9": "model.attention = 'flash9': want one of auto, flash3, flash2",
        "--model.attention cudnn": "model.attention = 'cudnn': it needs a CUDA device",
        "--model.decoder_dtype int8": "model.decoder_dtype = 'int8'",
        "--rollout.decode_stream beside": "rollout.decode_stream = 'beside': want main or side",
        "--rollout.group_size 1": "rollout.group_size = 1: want a whole number from 2",
        "--rollout.group_size 1000000": "rollout.group_size = 1000000",
        "--rollout.prompts_per_iteration 0": "rollout.prompts_per_iteration = 0",
        "--rollout.micro_batch 3": "is not divisible by rollout.micro_batch = 3",
        "--rollout.num_steps 0": "rollout.num_steps = 0",
        "--rollout.num_steps 5000": "rollout.num_steps = 5000: want a whole number from 1 to 1000",
        "--rollout.guidance_scale 0.5": "rollout.guidance_scale = 0.5",
        "--rollout.eta 1.5": "rollout.eta = 1.5: flow_cps wants at most 1",
        "--rollout.eta 0": "rollout.eta = 0",
        "--rollout.dynamics flow_cp": "did you mean 'flow_cps'?",
        "--rollout.window.steps 9": "rollout.window.steps = [9]: want distinct steps",
        "--rollout.window.steps 0 0": "rollout.window.steps = [0, 0]: want distinct steps",
        "--rollout.window.steps one": "rollout.window.steps = ['one']",
        "--rollout.window.size 9": "widen noise_range",
        "--rollout.window.noise_range 0.9 0.2": "widen noise_range",
        "--rollout.window.noise_range 0.5": "rollout.window.noise_range = [0.5]: want 2 values",
        "--rollout.tail_steps -1": "rollout.tail_steps = -1",
        "--rollout.tail_solver heun": "rollout.tail_solver = 'heun': want euler or dpm2",
        "--rollout.window.branching perhaps": "'perhaps'",
        "--rollout.tail_agreement 1.5": "rollout.tail_agreement = 1.5: want a number from 0 to 1",
        "--rollout.scouts 0": "rollout.scouts = 0: want a whole number from 1 to 64",
        "--update.informative_share 0": "update.informative_share = 0: want a number above 0",
        "--update.skip_dead_groups maybe": "'maybe'",
        "--advantage.std groups": "did you mean 'group'?",
        "--advantage.clip 0": "advantage.clip = 0: want a number above 0",
        "--update.betas 1 1": "update.betas = [1, 1]: want 2 values, each a number from 0 to below 1",
        "--update.clip_range 0": "update.clip_range = 0",
        "--update.ema_decay 1": "update.ema_decay = 1: want a number from 0 to below 1",
        "--update.minibatches 3": "minibatches",
        "--update.optimizer sgd": "update.optimizer = 'sgd'",
        "--update.objective ppo": "update.objective = 'ppo'",
        "--nft.beta 0": "nft.beta = 0: want a number above 0",
        "--nft.step_share 0": "nft.step_share = 0",
        "--nft.old_decay_max 1": "nft.old_decay_max = 1: want a number from 0 to below 1",
        "--awm.weighting linear": "awm.weighting = 'linear': want one of uniform, sigma, sigma_squared, huber",
        "--awm.huber_power 0": "awm.huber_power = 0: want a number above 0 to 1",
        "--awm.step_share 2": "awm.step_share = 2",
        "--evaluation.images_per_prompt 1001": "evaluation.images_per_prompt = 1001: want a whole number from 1 to 1000",
        "--evaluation.num_steps 0": "evaluation.num_steps = 0",
        "--evaluation.stop_after -1": "evaluation.stop_after = -1",
        "--monitor.hacking_level 0.5": "monitor.hacking_level = 0.5: want a number above 0 and below 0.5",
        "--output.keep_checkpoints 0": "output.keep_checkpoints = 0",
        "--monitor.window 1": "monitor.window = 1",
        "--monitor.stop everything": "monitor.stop = ['everything']",
        "--data.min_reference_size 0": "data.min_reference_size = 0",
        "--data.reference_count 1000": "data.reference_count = 1000",
        "--data.decode_workers 65": "data.decode_workers = 65: want auto or a whole number from 0 to 64",
        "--collective_timeout 0": "collective_timeout = 0: want a number above 0",
    }  # fmt: skip
    return [flagged("settings", flags, expected) for flags, expected in values.items()]


METRICS = [
    flagged("metrics", "--evaluation.metrics fid", "evaluation.metrics: unknown metric 'fid'"),
    flagged("metrics", "--evaluation.metrics dino_similarty", "did you mean 'dino_similarity'?"),
    flagged("metrics", ["--evaluation.metrics", "saturation,edge_density"], "unknown metric 'saturation,edge_density'"),
    flagged("metrics", "--evaluation.metrics rule rule", "evaluation.metrics names rule 2 times"),
    flagged("metrics", "--evaluation.metrics aesthetic", "rewards.aesthetic.head is empty, but evaluation.metrics"),
    flagged("metrics", "--evaluation.metrics remote", "rewards.remote.url is empty, but evaluation.metrics"),
    flagged("metrics", "--evaluation.metrics ocr", "no text in double quotes"),
    flagged("metrics", "--evaluation.metrics fid --data.held_out_prompts=", "unknown metric 'fid'"),
    changed("metrics", {"evaluation": {"metrics": "rule"}}, "evaluation.metrics = 'rule': want any number of values"),
    changed(
        "metrics",
        {
            "evaluation": {"metrics": ["dino_similarity"]},
            "adversary": {"kind": "none"},
            "rewards": {"rule": {"weight": 1}},
        },
        "dino_similarity needs a DINO; set evaluation.backbone",
    ),
    flagged("metrics", "--evaluation.metrics adversary", "unknown metric 'adversary'"),
    flagged(
        "metrics",
        "--evaluation.every 1 --evaluation.metrics dino_similarity --evaluation.keep_best dino_similarty",
        "evaluation.keep_best = 'dino_similarty' is not evaluated: evaluation.metrics has",
        "did you mean 'dino_similarity'?",
    ),
    flagged(
        "metrics", "--evaluation.stop_after 3", "evaluation.stop_after = 3 needs a metric: pass --evaluation.keep-best"
    ),
    flagged(
        "metrics",
        "--evaluation.every 1 --evaluation.metrics saturation --evaluation.keep_best saturation",
        "evaluation.keep_best = 'saturation': neither more nor less of it is better",
    ),
    flagged(
        "metrics",
        "--evaluation.every 1 --evaluation.metrics dino_similarity --evaluation.keep_best dino_similarity --data.held_out_prompts=",
        "evaluation.keep_best = 'dino_similarity', but nothing is evaluated: pass --data.held-out-prompts",
    ),
    flagged(
        "metrics",
        "--evaluation.every 0 --evaluation.metrics dino_similarity --evaluation.keep_best dino_similarity",
        "evaluation.every = 0 evaluates at the end alone; pass --evaluation.every N",
    ),
    flagged(
        "metrics",
        "--evaluation.every 1 --evaluation.metrics dino_similarity --evaluation.keep_best dino_similarity --model.train full",
        "keeps a LoRA, but model.train = full; leave evaluation.keep_best empty",
    ),
]

_DEEP = "a: " + "[" * 3000
CONFIG_FILES = [
    Case("config files", "missing", ("nowhere.yaml: No such file",), lambda bench: ["--config", "nowhere.yaml"]),
    Case("config files", "folder", ("is not a regular file",), lambda bench: ["--config", str(bench.folder)]),
    Case("config files", "empty path", ("--config ''", "it is empty"), lambda bench: ["--config="]),
    written("config files", "empty.yaml", "", "got nothing"),
    written("config files", "list.yaml", "- 1\n- 2", "want a mapping of settings", "got a list"),
    written("config files", "scalar.yaml", "just text", "got a str"),
    written("config files", "binary.yaml", b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "is not UTF-8 text"),
    written("config files", "nul.yaml", b"seed: 1\n\x00", "is not valid YAML"),
    written("config files", "open.yaml", "update: {eps: 1", "is not valid YAML", "line"),
    written("config files", "tabs.yaml", "update:\n\teps: 1", "is not valid YAML"),
    written("config files", "twice.yaml", "seed: 1\nseed: 2", "the key 'seed' stands twice", "line 2"),
    written("config files", "twice-inside.yaml", "update: {eps: 1.0, eps: 2.0}", "the key 'eps' stands twice"),
    written("config files", "tag.yaml", "seed: !!python/object/apply:os.getpid []", "is not valid YAML"),
    written("config files", "deep.yaml", _DEEP, "nested too deeply"),
    written("config files", "digits.yaml", "seed: " + "7" * 5000, "Exceeds the limit"),
    written("config files", "unknown.yaml", "itterations: 3", "unknown key 'itterations'; did you mean 'iterations'?"),
    written("config files", "unknown-inside.yaml", "rollout: {grup_size: 4}", "did you mean 'rollout.group_size'?"),
    written(
        "config files", "elsewhere.yaml", "learning_rate: 1.0", "'update.learning_rate' or 'adversary.learning_rate'"
    ),
    written("config files", "section.yaml", "update: 3", "update = 3: want a mapping of settings"),
    written("config files", "none.yaml", "update:", "update = None: want a mapping of settings"),
    written("config files", "preset.yaml", "preset: tinny", "unknown preset 'tinny'; did you mean 'tiny'?"),
    written("config files", "preset-list.yaml", "preset: [tiny]", "unknown preset ['tiny']"),
    written("config files", "true.yaml", "iterations: true", "true and false are no values for it"),
    written("config files", "alias.yaml", "a: *nothing", "is not valid YAML"),
]

FLAGS = [
    flagged("flags", "--iteration 3", "unknown flag --iteration; did you mean --iterations?"),
    flagged("flags", "--learning-rate 3", "did you mean --update.learning-rate or --adversary.learning-rate?"),
    flagged("flags", "--rollout.grup-size 4", "did you mean --rollout.group-size?"),
    flagged("flags", "--update 3", "--update is a group of settings"),
    flagged("flags", "--fast true", "--fast takes no value: write --fast or --no-fast"),
    flagged("flags", "--seed", "--seed: the value is missing; want a whole number"),
    flagged("flags", "iterations=3", "did you mean --iterations=3?"),
    flagged("flags", "--seed 3 5", "unexpected argument '5'"),
    flagged("flags", "-i 3", "unknown flag -i"),
    flagged("flags", "--preset tinny", "unknown preset 'tinny'; did you mean 'tiny'?"),
    flagged("flags", "--preset tiny-emoji", "the preset 'tiny-emoji' is called 'tiny' now"),
    flagged("flags", "--data.prompts tiny:emoji", "data.prompts = 'tiny:emoji': it is called 'tiny' now"),
    flagged("flags", "--output.tensorboard=maybe", "output.tensorboard = 'maybe': want true or false"),
    flagged("flags", "--xyzzy.plugh 1", "unknown flag --xyzzy.plugh; --help lists the flags"),
]

CONFLICTS = [
    *(
        flagged("conflicts", f"--model.shard_base blocks {flags}", f"{named}", "but model.shard_base = 'blocks'; set")
        for flags, named in {
            "--model.train full --model.dtype float32 --update.optimizer fused": "update.optimizer = 'fused' clips by",
            "--model.attention math": "model.attention = 'math' is the fused transformer's",
            "--rollout.window_forward merged --update.old_log_prob recompute": "rollout.window_forward = 'merged' is",
            "--update.graphs true": "update.graphs = True captures the fused transformer",
            "--update.skip_dead_groups": "update.skip_dead_groups = True leaves out forwards",
            "--rollout.window.branching --rollout.initial_noise shared --rollout.tail_steps 1": "rollout.tail_steps = 1",
        }.items()
    ),
    *(
        flagged("conflicts", f"--fast --model.sequence_parallel 2 {flags}", *named)
        for flags, named in {
            "": (
                "model.sequence_parallel = 2 puts processes into sequence groups of 2, but there is 1; take a multiple of 2",
                "or model.sequence_parallel = 1",
            ),
            "--no-fast": ("fast = False has diffusers' forward", "but model.sequence_parallel = 2; set fast = True"),
            "--model.train full --model.dtype float32": ("model.train = 'full' trains diffusers' modules",),
            "--model.shard_base blocks --model.base_precision fp8": (
                "model.base_precision = 'fp8' of a base in parts is of diffusers' blocks, which compute all tokens",
                "but model.sequence_parallel = 2; set model.base_precision = 'model'",
            ),
            "--model.shard_base blocks --rollout.precision fp8": (
                "rollout.precision = 'fp8' of a base in parts samples from a whole copy, which computes all tokens",
            ),
            "--update.graphs true": ("update.graphs = True captures a forward in whose middle", "or model.sequence_"),
        }.items()
    ),
    flagged("conflicts", "--no-fast --rollout.precision fp8", "rollout.precision = 'fp8' needs --fast"),
    flagged(
        "conflicts",
        "--model.shard_base blocks --rollout.precision fp8 --model.train full --model.dtype float32",
        "rollout.precision = 'fp8' needs --fast and model.train = lora",
    ),
    flagged("conflicts", "--no-fast --model.base_precision fp8", "model.base_precision = 'fp8' needs --fast"),
    flagged(
        "conflicts",
        "--model.shard_base blocks --model.base_precision fp8 --model.train full --model.dtype float32",
        "model.base_precision = 'fp8' needs --fast or model.shard_base = blocks, and model.train = lora",
    ),
    flagged(
        "conflicts",
        "--update.objective sft --update.trust_region divergence",
        "update.trust_region = 'divergence' is the policy gradient's",
    ),
    flagged("conflicts", "--update.kl_to ema", "update.kl_to = 'ema' pulls nowhere with update.kl_weight = 0"),
    flagged("conflicts", "--update.teacher lora", "update.teacher = 'lora' with update.kl_to = 'base'"),
    flagged("conflicts", "--update.policy_weight 0", "update.policy_weight = 0 and update.kl_weight = 0"),
    flagged(
        "conflicts",
        "--update.kl_to teacher --update.kl_weight 1 --update.teacher nowhere",
        "update.teacher = 'nowhere' does not exist; pass a folder",
    ),
    flagged(
        "conflicts",
        "--update.kl_space velocity --update.kl_variance unit_time",
        "update.kl_variance = 'unit_time' would not be looked at",
    ),
    flagged("conflicts", "--rollout.window_forward merged", "set update.old_log_prob to recompute"),
    flagged("conflicts", "--data.style tiny:outline", "data.references and data.style are both set"),
    flagged("conflicts", "--model.train full --model.lora.start_from lora", "needs model.train = lora"),
    flagged("conflicts", "--no-fast --model.attention math", "is the fused transformer's"),
    flagged("conflicts", "--no-fast --update.graphs true", "update.graphs = True needs --fast and model.train = lora"),
    flagged(
        "conflicts",
        "--update.objective sft --update.graphs true",
        "update.graphs = True captures the policy gradient's update, but update.objective = sft; set update.graphs = auto",
    ),
    flagged("conflicts", "--rollout.dynamics ddim", "rollout.dynamics = 'ddim' needs a model that predicts noise"),
    flagged(
        "conflicts", "--update.objective sft --update.kl_weight 0.1", "update.kl_weight = 0.1 is the policy gradient's"
    ),
    flagged(
        "conflicts", "--update.objective sft --rewards.rule.weight 1", "rewards.rule.weight = 1 would not be looked at"
    ),
    flagged(
        "conflicts",
        "--rewards.adversary.weight 0 --rewards.adversary.gate 0.5",
        "rewards.adversary.gate = 0.5",
        "every total would be 0",
    ),
    flagged(
        "conflicts",
        "--update.objective nft --rollout.initial_noise shared",
        "rollout.initial_noise = 'shared'",
        "the images of a prompt would all be the same; set rollout.initial_noise = per_image",
    ),
    flagged(
        "conflicts",
        "--update.objective nft --rollout.initial_noise per_image --nft.step_share 0.01",
        "nft.step_share = 0.01 of rollout.num_steps",
        "want at least",
    ),
    flagged("conflicts", "--rollout.tail_steps 9", "rollout.tail_steps = 9 shortens nothing: at most"),
    flagged(
        "conflicts",
        "--rollout.tail_solver dpm2",
        "rollout.tail_solver = dpm2 would not be looked at: with rollout.tail_steps = 0",
    ),
    flagged(
        "conflicts",
        "--rollout.tail_solver dpm2 --rollout.tail_steps 1",
        "rollout.scout_tail_steps = 0 one step to the image is of first order; set one of them to 2 or more",
    ),
    flagged(
        "conflicts",
        "--update.objective nft --rollout.initial_noise per_image --rollout.tail_solver dpm2",
        "rollout.tail_solver = dpm2 is of the policy gradient's window",
    ),
    flagged(
        "conflicts",
        "--rollout.window.branching --rollout.initial_noise per_image",
        "rollout.window.branching = True leaves one trajectory of a prompt",
    ),
    flagged(
        "conflicts",
        "--rollout.window.branching --rollout.initial_noise shared --rollout.window.train_share 0.9",
        "rollout.window.train_share = 0.9 would not be looked at",
    ),
    flagged(
        "conflicts",
        "--update.objective nft --rollout.initial_noise per_image --rollout.window.branching",
        "rollout.window.branching = True is of the policy gradient's window",
    ),
    flagged(
        "conflicts",
        "--rollout.scout_tail_steps 1",
        "rollout.scout_tail_steps = 1 would not be looked at",
        "set rollout.scouts = 2",
    ),
    flagged(
        "conflicts",
        "--update.objective nft --rollout.initial_noise per_image --rollout.scouts 2",
        "rollout.scouts = 2 is of the policy gradient's window",
    ),
    flagged(
        "conflicts",
        "--update.objective awm --rollout.initial_noise per_image --rollout.scouts 2",
        "rollout.scouts = 2 is of the policy gradient's window",
    ),
    flagged(
        "conflicts",
        "--update.informative_share 0.3",
        "update.informative_share = 0.3 of rollout.group_size",
        "whose shape the update must keep",
    ),
    flagged(
        "conflicts",
        "--update.skip_dead_groups --update.kl_weight 0.1",
        "update.skip_dead_groups = True would leave images out of the KL",
    ),
    flagged("conflicts", "--adversary.kind none", "adversary.kind = none and no fixed reward"),
    flagged("conflicts", "--rewards.adversary.weight 0", "the adversary dino would learn for nothing"),
    flagged("conflicts", "--data.references=", "data.references is empty, but adversary.kind needs references"),
    flagged("conflicts", "--update.optimizer apex", "update.optimizer = apex needs NVIDIA Apex", "not installed"),
    flagged("conflicts", "--data.prompts=", "data.prompts is empty"),
    flagged(
        "conflicts",
        "--rollout.window.order sliding --rollout.window.steps 0 1",
        "rollout.window.steps = [0, 1] would not be looked at",
    ),
    Case(
        "conflicts",
        "resume with a preset",
        ("leave out --preset and --config",),
        lambda bench: ["--resume", str(bench.world.run), "--preset", "tiny"],
    ),
]


def _absent() -> list[Case]:
    """Trackers, which no extra of ours for tests installs."""
    return [
        flagged("conflicts", f"--output.{name}_project p",
                f"output.{name}_project = 'p' needs {name}, which is not installed: pip install {name}")
        for name in ("wandb", "trackio")
    ]  # fmt: skip


CASES = [*_infinite(), *_out_of_range(), *METRICS, *CONFIG_FILES, *FLAGS, *CONFLICTS, *_absent()]
