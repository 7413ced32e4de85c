"""The layer ops at SD3.5-medium's shapes: C = 1536, 24 heads of 64, feed-forward width 6144, bf16; 512 px in its VAE.

Block sizes are the launchers' own, imported, so that a change there is compiled here.
"""

from types import ModuleType

from spec import Spec

from advgrpo_kernels.ops import _residual_norm, fp8, gelu, group_norm, qk_rms_norm, swiglu
from advgrpo_kernels.ops._layers import parts_of_row

OPS = "advgrpo_kernels.ops."
MODULATED = {"ROWS": _residual_norm.ROWS, "BLOCK_C": 2048}
NORM_SCALARS = {"T": "i32:16", "C": "i32:16", "gate_stride": "i32:16", "modulation_stride": "i32:16", "eps": "fp32"}
NORM_SCALARS |= {"row_stride_b": "i32", "row_stride_t": "i32"}
FP8 = "*fp8e4nv"


def pointers(names: str, kind: str = "*bf16") -> dict[str, str]:
    return dict.fromkeys((f"{name}_ptr" for name in names.split()), kind)


def absent(names: str, present: dict[str, str]) -> dict[str, None]:
    return {key: None for key in pointers(names) if key not in present}


NORM_FWD = "x out gate out2 gate2 shift scale shift2 scale2 hidden y y2 fp8_scale"
NORM_BWD = "hidden hidden_grad y_grad y2_grad scale scale2 gate gate2 x_grad out_grad out2_grad"


def norm(name: str, given: dict[str, str], loads: int, stores: int, *, backward: bool = False) -> Spec:
    return Spec(
        name=name,
        kernel=OPS + f"_residual_norm:_residual_norm_{'bwd' if backward else 'fwd'}_kernel",
        types=given | NORM_SCALARS,
        constants=MODULATED | absent(NORM_BWD if backward else NORM_FWD, given),
        warps=_residual_norm.WARPS,
        vector_loads=loads,
        vector_stores=stores,
        elements=_residual_norm.ROWS * MODULATED["BLOCK_C"] // (32 * _residual_norm.WARPS),
    )


QK_SCALARS = dict.fromkeys(["D", "stride_b", "stride_t", "txt_stride_b", "txt_stride_t"], "i32:16")
QK_SCALARS |= {"T": "i32:16", "S": "i32", "H": "i32", "eps": "fp32"}
QK_FWD = "q k v txt_q txt_k txt_v q_weight k_weight txt_q_weight txt_k_weight cos sin query key value"
QK_BWD = (
    "q k txt_q txt_k q_weight k_weight txt_q_weight txt_k_weight cos sin query_grad key_grad value_grad "
    "q_grad k_grad v_grad txt_q_grad txt_k_grad txt_v_grad"
)


def plain(names: str) -> str:
    """Without rotary embedding."""
    return names.replace(" cos sin", "")


def with_turns(given: dict[str, str]) -> dict[str, str]:
    return given | pointers("cos sin", "*fp32")


def image_only(names: str) -> dict[str, str]:
    return pointers(" ".join(name for name in names.split() if not name.startswith("txt_")))


def qk(
    name: str,
    given: dict[str, str],
    loads: int,
    stores: int = 3,
    *,
    backward: bool = False,
    dim: int = 64,
    halves: bool = False,
    by_head: bool = False,
) -> Spec:
    strides = "grad_stride_b grad_stride_h grad_stride_t x_grad_stride_b x_grad_stride_t"
    strides += " txt_x_grad_stride_b txt_x_grad_stride_t"
    strides = dict.fromkeys((strides if backward else "out_stride_b out_stride_t").split(), "i32:16")
    return Spec(
        name=name,
        kernel=OPS + f"qk_rms_norm:_qk_rms_norm_{'bwd' if backward else 'fwd'}_kernel",
        types=given | QK_SCALARS | strides,
        constants={"BLOCK_R": qk_rms_norm.tile_rows(dim), "BLOCK_D": dim, "HALVES": halves, "BY_HEAD": by_head}
        | absent(QK_BWD if backward else QK_FWD, given),
        vector_loads=loads,
        vector_stores=stores,
        elements=2 * qk_rms_norm.tile_rows(dim) * dim // (32 * qk_rms_norm.WARPS),  # of q and of k
    )


TURNED_FWD, TURNED_BWD = with_turns(pointers(QK_FWD.replace(" value", ""))), with_turns(pointers(QK_BWD))
HALVES = {"dim": 128, "halves": True}  # every row of q, k and v, and both weights, are two accesses each

SWIGLU_STRIDE = {"x_stride": "i32:16"}


def elementwise(name: str, op: ModuleType, given: dict[str, str], loads: int, stores: int) -> Spec:
    """A kernel of `gelu` or `swiglu`: a tile of rows."""
    kernel = "bwd" if name.endswith("/backward") else "fwd"
    return Spec(
        name=name,
        kernel=f"{op.__name__}:_{name.split('/')[0]}_{kernel}_kernel",
        types=given | {"M": "i32:16", "F": "i32:16"},
        constants={"ROWS": op.ROWS, "BLOCK_F": op.BLOCK_F},
        warps=op.WARPS,
        vector_loads=loads,
        vector_stores=stores,
        elements=op.ROWS * op.BLOCK_F // (32 * op.WARPS),
    )


def quantized(name: str, op: ModuleType, given: dict[str, str], loads: int, width: int) -> Spec:
    """One whole row."""
    block, rest, warps = parts_of_row(width)
    return Spec(
        name=name,
        kernel=f"{op.__name__}:_{name.split('/')[0]}_fp8_kernel",
        types=given | pointers("y", FP8) | pointers("fp8_scale", "*fp32") | {"F": "i32:16"},
        constants={"BLOCK_F": block, "REST_F": rest},
        warps=warps,
        vector_loads=2 * loads,  # of two parts
        vector_stores=2,
        elements=(block + rest) // (32 * warps),
    )


FP8_TENSOR = {"data_ptr": FP8, "scale_ptr": "*fp32", "x_ptr": "*bf16", "N": "i32:16"}

GROUP_NORM_SCALARS = {"C": "i32:16", "N": "i32:16"}


def group_norm_moments(name: str, channels_last: bool) -> Spec:
    pixels, channels = group_norm.TILES[channels_last]
    tile = {"CHANNELS_LAST": channels_last, "PIXELS": pixels, "CHANNELS": channels}
    return Spec(
        name=name,
        kernel=OPS + "group_norm:_group_norm_moments_kernel",
        types=pointers("x") | pointers("moments", "*fp32") | GROUP_NORM_SCALARS | {"stretches": "i32"},
        constants=tile | {"TILES": group_norm.TILES_PER_STRETCH},
        warps=group_norm.WARPS,
        vector_loads=1,
        elements=pixels * channels // (32 * group_norm.WARPS),
    )


def group_norm_forward(name: str, channels_last: bool, kind: str = "*bf16") -> Spec:
    pixels, channels = group_norm.TILES[channels_last]
    return Spec(
        name=name,
        kernel=OPS + "group_norm:_group_norm_fwd_kernel",
        types=pointers("x y", kind) | pointers("scales", "*fp32") | GROUP_NORM_SCALARS,
        constants={"SILU": True, "CHANNELS_LAST": channels_last, "PIXELS": pixels, "CHANNELS": channels},
        warps=group_norm.WARPS,
        vector_loads=3 if channels_last else 1,  # scale and shift side by side as well
        vector_stores=1,
        elements=pixels * channels // (32 * group_norm.WARPS),
    )


SPECS = [
    norm("ada_layer_norm/one", pointers("x shift scale y"), 3, 1),
    norm("ada_layer_norm/two", pointers("x shift scale shift2 scale2 y y2"), 5, 2),
    norm("ada_layer_norm/backward", pointers("hidden y_grad y2_grad scale scale2 x_grad"), 5, 1, backward=True),
    norm("ada_layer_norm/fp8", pointers("x shift scale") | pointers("y", FP8) | pointers("fp8_scale", "*fp32"), 3, 1),
    norm("gated_residual/plain", pointers("x out gate hidden"), 3, 1),
    norm("gated_residual/norm", pointers("x out gate shift scale hidden y"), 5, 2),
    norm("gated_residual/dual", pointers("x out gate out2 gate2 shift scale shift2 scale2 hidden y y2"), 9, 3),
    norm("gated_residual/dual_fp32", pointers(NORM_FWD.replace(" fp8_scale", ""), "*fp32"), 9, 3),
    norm(
        "gated_residual/dual_fp8",
        pointers("x out gate out2 gate2 shift scale shift2 scale2 hidden")
        | pointers("y y2", FP8)
        | pointers("fp8_scale", "*fp32"),
        9,
        3,
    ),
    norm("gated_residual/backward_plain", pointers("hidden_grad gate out_grad"), 2, 1, backward=True),
    norm("gated_residual/backward_dual", pointers(NORM_BWD), 8, 3, backward=True),
    qk("qk_rms_norm/two_tensors", pointers(plain(QK_FWD)), 5),
    qk("qk_rms_norm/joint", pointers(plain(QK_FWD).replace(" value", "")), 4, 2),
    qk("qk_rms_norm/image", image_only(plain(QK_FWD).replace(" value", "")), 4, 2),
    qk("qk_rms_norm/backward_joint", pointers(plain(QK_BWD)), 7, backward=True),
    qk("qk_rms_norm/backward_image", image_only(plain(QK_BWD)), 7, backward=True),
    qk("qk_rms_norm/rotary_joint", TURNED_FWD, 6, 2, dim=128),
    qk("qk_rms_norm/rotary_image", with_turns(image_only(QK_FWD.replace(" value", ""))), 6, 2, dim=128),
    qk("qk_rms_norm/rotary_backward_joint", TURNED_BWD, 9, backward=True, dim=128),
    qk("qk_rms_norm/rotary_half_joint", TURNED_FWD, 10, 4, **HALVES),
    qk("qk_rms_norm/rotary_half_by_head_joint", TURNED_FWD, 10, 4, **HALVES, by_head=True),
    qk("qk_rms_norm/rotary_half_two_tensors", with_turns(pointers(QK_FWD)), 12, 6, **HALVES),
    qk("qk_rms_norm/rotary_by_head_joint", TURNED_FWD, 6, 2, dim=128, by_head=True),
    qk("qk_rms_norm/rotary_half_backward_joint", TURNED_BWD, 16, 6, backward=True, **HALVES),
    qk("qk_rms_norm/rotary_half_by_head_backward_joint", TURNED_BWD, 16, 6, backward=True, by_head=True, **HALVES),
    elementwise("gelu/forward", gelu, pointers("x bias y"), 2, 1),
    quantized("gelu/fp8", gelu, pointers("x bias"), 2, 6144),
    elementwise("gelu/backward", gelu, pointers("x bias y_grad x_grad"), 3, 1),
    elementwise("swiglu/forward", swiglu, pointers("x y") | SWIGLU_STRIDE, 2, 1),
    quantized("swiglu/fp8", swiglu, pointers("x") | SWIGLU_STRIDE, 2, 9216),  # FLUX.2 klein's
    elementwise(
        "swiglu/backward", swiglu, pointers("x y_grad x_grad") | SWIGLU_STRIDE | {"y_grad_stride": "i32:16"}, 3, 2
    ),
    Spec(
        name="fp8_quantize/rows",
        kernel=OPS + "fp8:_fp8_rows_kernel",
        types={"x_ptr": "*bf16", "data_ptr": FP8, "scale_ptr": "*fp32", "M": "i32:16", "K": "i32:16"},
        constants={"ROWS": 2, "BLOCK_K": 2048},
        vector_loads=1,
        vector_stores=1,
        elements=2 * 2048 // (32 * 4),
    ),
    Spec(
        name="fp8_quantize/amax",
        kernel=OPS + "fp8:_fp8_amax_kernel",
        types={"x_ptr": "*bf16", "partial_ptr": "*fp32", "N": "i32:16"},
        constants={"TILES": 12, "LANES": fp8.LANES},  # [16, 1024, 6144]
        warps=8,
        vector_loads=1,
        elements=fp8.LANES // (32 * 8),
    ),
    Spec(
        name="fp8_quantize/tensor",
        kernel=OPS + "fp8:_fp8_tensor_kernel",
        types=FP8_TENSOR | {"partial_ptr": "*fp32", "partials": "i32"},
        constants={"given_scale_ptr": None, "LANES": fp8.LANES, "PARTIALS": fp8.PARTIALS},
        warps=8,
        vector_loads=1,
        vector_stores=1,
        elements=fp8.LANES // (32 * 8),
    ),
    Spec(
        name="fp8_quantize/given_scale",
        kernel=OPS + "fp8:_fp8_tensor_kernel",
        types=FP8_TENSOR | {"given_scale_ptr": "*fp32", "partials": "i32"},
        constants={"partial_ptr": None, "LANES": fp8.LANES, "PARTIALS": fp8.PARTIALS},
        warps=8,
        vector_loads=1,
        vector_stores=1,
        elements=fp8.LANES // (32 * 8),
    ),
    group_norm_moments("group_norm/moments", True),
    group_norm_moments("group_norm/moments_contiguous", False),
    Spec(
        name="group_norm/scales",
        kernel=OPS + "group_norm:_group_norm_scales_kernel",
        types=pointers("moments weight bias scales", "*fp32")
        | GROUP_NORM_SCALARS
        | {"stretches": "i32", "pixels": "i32:16"}
        | {"eps": "fp32"},
        constants={"WIDTH": 4, "CHANNELS": 4, "STRETCHES": group_norm.STRETCHES, "STEPS": 2},
    ),
    group_norm_forward("group_norm/forward", True),
    group_norm_forward("group_norm/forward_fp32", True, "*fp32"),
    group_norm_forward("group_norm/forward_contiguous", False),
]
