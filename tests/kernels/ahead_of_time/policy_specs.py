"""The ops of sampler, policy loss, advantages and reward at SD3.5-medium's and DINOv2's shapes.

Block sizes and warps are the launchers' own, imported, so that a change there is compiled here.
"""

from spec import Spec

from advgrpo_kernels.ops import _head, group_advantages, patches
from advgrpo_kernels.ops._gaussian import tiling

OPS = "advgrpo_kernels.ops."
STEP = {"latents_ptr": "*fp32", "velocity_ptr": "*bf16", "uncond_ptr": "*bf16", "coefficients_ptr": "*fp32"}
SCALARS = {"N": "i32:16", "coefficients_stride": "i32", "guidance_scale": "fp32", "uncond_scale": "fp32"}
LANES, TILES, WARPS = tiling(16 * 64 * 64)
OF_A_TILE = LANES // (32 * WARPS)
TILE = {"LANES": LANES, "GUIDED": True}


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def gaussian_step(name: str, velocity: str, constants: dict, **more: str) -> Spec:
    types = STEP | SCALARS | {"velocity_ptr": velocity, "next_ptr": "*fp32", "log_prob_ptr": "*fp32"}
    types |= {"seed": "i32", "step": "i32"} | more
    if not constants["GUIDED"]:
        del types["uncond_ptr"]
    absent = {key: None for key in ("noise_ptr", "mean_ptr", "sample_ids_ptr", "uncond_ptr") if key not in types}
    in_memory = {f"{key.upper()}_IN_MEMORY": types[key].startswith("*") for key in ("seed", "step")}
    return Spec(
        name=name,
        kernel=OPS + "gaussian_step:_gaussian_step_kernel",
        types=types,
        constants=constants | in_memory | absent,
        warps=WARPS,
        vector_loads=sum(key in types for key in ("latents_ptr", "velocity_ptr", "uncond_ptr", "noise_ptr")),
        vector_stores=1 + constants["STORE_MEAN"],
        elements=OF_A_TILE,
    )


GRAPH = {"seed": "*i64", "step": "*i64", "sample_ids_ptr": "*i64"}
HEAD = pointers("w1_ptr b1_ptr w2_ptr b2_ptr", "*fp32")
FEATURES = {"B": "i32", "B2": "i32", "n": "i32:16", "P": "i32", "D": "i32:16", "H": "i32:16"}
ROWS = pointers("hidden_ptr inverse_norm_ptr", "*fp32") | FEATURES


def head_rows(name: str, kind: str, *, sides: int, train: bool) -> Spec:
    second = dict.fromkeys(("cls2_ptr", "patches2_ptr"), kind) if sides == 2 else {}
    indices = {"indices_ptr": "*i64"} if sides == 1 else {}
    absent = {key: None for key in ("cls2_ptr", "patches2_ptr", "indices_ptr") if key not in second | indices}
    tiles = {"D_TILES": 768 // _head.BLOCK_D, "H_TILES": 512 // _head.BLOCK_H}
    tiles |= {"BLOCK_R": _head.BLOCK_R, "BLOCK_H": _head.BLOCK_H, "BLOCK_D": _head.BLOCK_D}
    return Spec(
        name=name,
        kernel=OPS + "_head:_head_rows_kernel",
        types=HEAD | ROWS | {"cls_ptr": kind, "patches_ptr": kind, "scores_ptr": "*fp32"} | second | indices,
        constants=tiles | {"NORMALIZE": True, "STORE_HIDDEN": train} | absent,
        warps=_head.WARPS,
        vector_loads=2,
        vector_stores=int(train),
        has_dot=True,
    )


def head_bwd(name: str, kind: str) -> Spec:
    grads = pointers("w1_grad_ptr b1_grad_ptr w2_grad_ptr b2_grad_ptr grad_scores_ptr upstream_ptr w2_ptr", "*fp32")
    tiles = {"BLOCK_R": _head.BLOCK_R, "BLOCK_H": _head.GRAD_H, "BLOCK_D": _head.GRAD_D, "R_TILES": _head.coarse(196)}
    return Spec(
        name=name,
        kernel=OPS + "_head:_head_bwd_kernel",
        types=ROWS | grads | dict.fromkeys(("cls_ptr", "patches_ptr", "cls2_ptr", "patches2_ptr"), kind),
        constants=tiles | {"indices_ptr": None},
        warps=_head.WARPS,
        vector_loads=2,
        vector_stores=1,
        has_dot=True,
    )


def sample_patches(name: str, *, seeded: bool, host_seed: bool = False) -> Spec:
    types = {"patches_ptr": "*bf16", "out_ptr": "*bf16", "out_indices_ptr": "*i64"}
    types |= {"P": "i32", "n": "i32:16", "D": "i32:16"}
    drawn = {"sample_ids_ptr": "*i64"} | pointers("seed step", "i32" if host_seed else "*i64")
    given = {"indices_ptr": "*i64", "seed": "i32", "step": "i32"}
    tiles = {"ROWS": patches.ROWS, "KEYS": patches.KEYS, "KEY_TILES": -(-1369 // patches.KEYS)}
    tiles |= {"WIDTH": patches.WIDTH, "WIDTH_TILES": 768 // patches.WIDTH}
    in_memory = dict.fromkeys(("SEED_IN_MEMORY", "STEP_IN_MEMORY"), seeded and not host_seed)
    flags = {"SEEDED": seeded, "NORMALIZE": True} | in_memory
    return Spec(
        name=name,
        kernel=OPS + "patches:_sample_patches_kernel",
        types=types | (drawn if seeded else given),
        constants=tiles | flags | {"indices_ptr" if seeded else "sample_ids_ptr": None},
        vector_loads=2,
        vector_stores=1,
    )


STOCHASTIC = TILE | {"NOISE": 2, "LIKELIHOOD": 2, "STORE_MEAN": False, "TILES": TILES}
GIVEN = TILE | {"NOISE": 1, "LIKELIHOOD": 1, "STORE_MEAN": True, "TILES": TILES}
ODE = TILE | {"NOISE": 0, "LIKELIHOOD": 0, "STORE_MEAN": False, "TILES": 1}
LOSS_ROWS = pointers("log_prob_ptr kl_rows_ptr old_log_prob_ptr advantages_ptr ratio_ptr", "*fp32")
LOSS_SCALARS = pointers("loss_ptr clip_fraction_ptr kl_ptr", "*fp32")
LOSS_SCALARS |= pointers("clip_low clip_high adv_clip kl_weight", "fp32")
GRADS = pointers("velocity_grad_ptr uncond_grad_ptr", "*bf16")
STORED = pointers("latents_ptr next_ptr", "*bf16")  # a trajectory kept in half precision
REFERENCE = {"next_ptr": "*fp32", "reference_mean_ptr": "*fp32", "kl_std_stride": "i32"}
NO_KL_STD = {"kl_std": None, "KL_STD_IN_MEMORY": False}
MOVED = pointers("old_mean_ptr shift_ptr", "*fp32")
NOT_MOVED = dict.fromkeys(MOVED) | {"TRUST_REGION": 0}


def region_constants(trust_region: int) -> dict:
    return {"TRUST_REGION": trust_region} if trust_region else NOT_MOVED


def kl_std_constants(types: dict[str, str]) -> dict:
    return {"KL_STD_IN_MEMORY": types["kl_std"].startswith("*")} if types else NO_KL_STD


def log_prob_kl(name: str, trust_region: int = 0, **kl_std: str) -> Spec:
    moved = MOVED if trust_region else {}
    return Spec(
        name=name,
        kernel=OPS + "gaussian_log_prob:_gaussian_log_prob_kernel",
        types=STEP | SCALARS | REFERENCE | {"log_prob_ptr": "*fp32", "kl_ptr": "*fp32"} | moved | kl_std,
        constants=TILE
        | {"HAS_REFERENCE": True, "LIKELIHOOD": 1, "TILES": TILES}
        | region_constants(trust_region)
        | kl_std_constants(kl_std),
        warps=WARPS,
        vector_loads=6 if trust_region else 5,
        elements=OF_A_TILE,
    )


def policy_loss(name: str, trust_region: int = 0, **kl_std: str) -> Spec:
    moved = MOVED if trust_region else {}
    return Spec(
        name=name,
        kernel=OPS + "clipped_policy_loss:_clipped_policy_loss_kernel",
        types=STEP | SCALARS | REFERENCE | LOSS_ROWS | LOSS_SCALARS | GRADS | {"B": "i32"} | moved | kl_std,
        constants=TILE
        | {"HAS_REFERENCE": True, "LIKELIHOOD": 1, "ROWS": 16}
        | region_constants(trust_region)
        | kl_std_constants(kl_std),
        warps=WARPS,
        vector_loads=6 if trust_region == 1 else 5,  # the divergence's own gradient does not look at μ_old
        vector_stores=2,
        elements=OF_A_TILE,
    )


SPECS = [
    gaussian_step("gaussian_step/philox", "*bf16", STOCHASTIC, **GRAPH),
    gaussian_step("gaussian_step/philox_fp32", "*fp32", STOCHASTIC, uncond_ptr="*fp32", **GRAPH),
    gaussian_step("gaussian_step/philox_host_seed", "*bf16", STOCHASTIC | {"LIKELIHOOD": 0, "TILES": 1}, seed="i64"),
    gaussian_step("gaussian_step/noise_given", "*bf16", GIVEN, noise_ptr="*fp32", mean_ptr="*fp32"),
    gaussian_step("gaussian_step/stored_bf16", "*bf16", STOCHASTIC, **GRAPH, **STORED),
    gaussian_step("gaussian_step/ode", "*bf16", ODE),
    gaussian_step("gaussian_step/ode_unguided", "*bf16", ODE | {"GUIDED": False}),
    Spec(
        name="gaussian_log_prob/forward",
        kernel=OPS + "gaussian_log_prob:_gaussian_log_prob_kernel",
        types=STEP | SCALARS | {"next_ptr": "*fp32", "log_prob_ptr": "*fp32", "kl_std_stride": "i32"},
        constants=TILE
        | {"HAS_REFERENCE": False, "LIKELIHOOD": 1, "TILES": TILES, "reference_mean_ptr": None, "kl_ptr": None}
        | NO_KL_STD
        | NOT_MOVED,
        warps=WARPS,
        vector_loads=4,
        elements=OF_A_TILE,
    ),
    Spec(
        name="gaussian_log_prob/forward_stored_bf16",
        kernel=OPS + "gaussian_log_prob:_gaussian_log_prob_kernel",
        types=STEP | SCALARS | {"log_prob_ptr": "*fp32", "kl_std_stride": "i32"} | STORED,
        constants=TILE
        | {"HAS_REFERENCE": False, "LIKELIHOOD": 1, "TILES": TILES, "reference_mean_ptr": None, "kl_ptr": None}
        | NO_KL_STD
        | NOT_MOVED,
        warps=WARPS,
        vector_loads=4,
        elements=OF_A_TILE,
    ),
    log_prob_kl("gaussian_log_prob/forward_kl"),
    log_prob_kl("gaussian_log_prob/forward_kl_std", kl_std="*fp32"),
    log_prob_kl("gaussian_log_prob/forward_normalized_ratio", 1),
    log_prob_kl("gaussian_log_prob/forward_divergence", 2),
    Spec(
        name="gaussian_log_prob/backward",
        kernel=OPS + "gaussian_log_prob:_gaussian_log_prob_bwd_kernel",
        types=STEP | SCALARS | GRADS | {"next_ptr": "*fp32", "grad_log_prob_ptr": "*fp32"},
        constants=TILE | {"LIKELIHOOD": 1},
        warps=WARPS,
        vector_loads=4,
        vector_stores=2,
        elements=OF_A_TILE,
    ),
    policy_loss("clipped_policy_loss"),
    policy_loss("clipped_policy_loss/kl_std", kl_std="*fp32"),
    policy_loss("clipped_policy_loss/kl_std_value", kl_std="fp32"),
    policy_loss("clipped_policy_loss/normalized_ratio", 1),
    policy_loss("clipped_policy_loss/divergence", 2),
    Spec(
        name="group_advantages",
        kernel=OPS + "group_advantages:_group_advantages_kernel",
        types=pointers("advantages_ptr mean_ptr std_ptr zero_std_fraction_ptr rewards_ptr", "*fp32")
        | {"group_ids_ptr": "*i64", "B": "i32:16", "eps": "fp32", "clip": "fp32"},
        constants={"STD": 1, "TILES": 768 // group_advantages.TILE, "TILE": group_advantages.TILE},
        warps=8,
    ),
    sample_patches("sample_patches/seeded", seeded=True),
    sample_patches("sample_patches/host_seed", seeded=True, host_seed=True),
    sample_patches("sample_patches/indices", seeded=False),
    head_rows("score_features/rows", "*bf16", sides=1, train=False),
    head_rows("score_features/rows_fp32", "*fp32", sides=1, train=True),
    head_rows("hinge_head_loss/rows", "*fp32", sides=2, train=True),
    head_bwd("hinge_head_loss/backward", "*fp32"),
    head_bwd("hinge_head_loss/backward_bf16", "*bf16"),
    Spec(
        name="score_features/mix",
        kernel=OPS + "score_features:_mix_kernel",
        types=pointers("scores_ptr reward_ptr global_ptr local_ptr", "*fp32")
        | {"B": "i32:16", "n": "i32:16", "global_weight": "fp32", "local_weight": "fp32"},
        constants={"BLOCK": 64},
    ),
    Spec(
        name="score_features/mix_backward",
        kernel=OPS + "score_features:_mix_bwd_kernel",
        types=pointers("reward_grad_ptr score_grads_ptr", "*fp32")
        | {"B": "i32:16", "n": "i32:16", "global_weight": "fp32", "local_weight": "fp32"},
        constants={"BLOCK": 1024, "global_grad_ptr": None, "local_grad_ptr": None},
        vector_stores=1,
    ),
    Spec(
        name="hinge_head_loss/hinge",
        kernel=OPS + "hinge_head_loss:_hinge_kernel",
        types=pointers("scores_ptr score_grads_ptr loss_ptr accuracy_ptr image_weights_ptr", "*fp32")
        | pointers("B B2 n count count2", "i32:16")
        | pointers("global_weight local_weight", "fp32"),
        constants={"TILES": 13, "BLOCK": 1024},
        vector_loads=1,
        vector_stores=1,
    ),
]
