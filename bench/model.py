"""What every figure should be: counted work over what a machine reaches. `python -m bench.model`.

A prediction is no target: it says what is understood. `bench/predictions.json` is committed (`--write`), a session's
table has predicted, measured and their ratio, and a ratio further from 1 than `TOLERANCE` is a finding to explain.

Work is counted on SD3.5-medium's exact configuration on meta tensors (16 rows of 1024 image and 205 text tokens, which
are 8 guided images); tests/bench/test_model.py counts it again. `Machine` holds what one H200 has been seen to reach;
the shares below, of those two rates, are assumptions, each with its source or its reason. Figures are those of the
reports of bench.step, .kernels, .profile and .train, by their path there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .step_report import IN_FP8, SHARED, Precision, in_precision

# Figures of a session that nothing is predicted of, and why.
UNPREDICTED = {
    "check": "an op agrees or is refused",
    "step.on_policy": "0 is demanded",
    "step.peak_memory_gb": "the weights of all contenders are in it; bench.train puts the plan of ours beside its own",
    "step.waterfall.merge": "stock operators one by one: bound by the host's launches, which differ between machines",
    "step.waterfall.fuse": "as merge",
    "step.waterfall.attention": "as merge",
    "train.world": "a tiny model: bound by the host",
    "train.random.allocated_gb": "beside it stands what python -m advgrpo.plan says",
    "kernels.over_compiled": "what inductor fuses is not counted",
    "kernels.group_advantages": "a few hundred numbers: a launch, and its baseline waits for the host three times",
    "tune": "it asks which launch is faster",
}

FILE = Path(__file__).with_name("predictions.json")
TOLERANCE = 0.25


@dataclass(frozen=True)
class Machine:
    """Copy bandwidth (bytes read and written) and bf16 8192³ product on random data."""

    copy_gb_s: float
    matmul_tflop_s: float


H200 = Machine(4300, 788)  # read on two H200s, October 2026

# Shares of the bf16 8192³ product.
GEMM = 0.79  # K = 1536: 620 TFLOP/s, short reductions and the last wave of tiles
FP8_GEMM = 1.27  # e4m3 with row scales at the same shapes: 1000 TFLOP/s
ATTENTION, ATTENTION_BACKWARD = 0.53, 0.40  # head dimension 64: 420 and 315 TFLOP/s, cuDNN's and FlashAttention-3's
ADAPTERS = 0.13  # products of rank 32 are bound by their traffic
CONVOLUTION, CONVOLUTION_TF32 = 0.41, 0.15  # the VAE's, bf16 channels_last and float32
BACKBONE = 0.38  # ViT-B at 518 px
HEAD = 0.06  # float32 products in three tf32 parts, small
# Of the stock model's elementwise bytes.
COMPILED = 0.20  # what inductor leaves of them: 28 of 139 GB, estimated from which operators it fuses
# Shares of the copy.
STREAM = 0.93  # PyTorch's elementwise operators on tensors of tens of MB
FUSED = 0.85  # our streaming kernels
FUSED_FP8 = 0.80  # those that write e4m3 behind a norm or GELU: what their instructions leave of it (`STREAMING`)
# Microseconds.
EAGER, CUSTOM = 5.0, 40.0  # host time of an ATen operator, of a custom op with its autograd function
NODE = 2.5  # a kernel too small to fill the chip, of a captured graph or behind others in a stream
WAITS = 50_000.0  # an iteration's, at the ends of phases: with a noise per image the host is ahead elsewhere; a guess
QUEUE = 1024  # launches that a stream holds before the host waits
LAUNCH = 3.0  # what events enclose around one kernel besides the kernel
GAP = 1.0  # between kernels of a graph: one drains and the next fills the chip
HOLES = 0.5  # of what a forward leaves idle that a second stream gets: its tiles end behind the hole they began in

FP8_PART = 0.92  # of the products: inner blocks without AdaLN
ROWS, IMAGE, TEXT, WIDTH, LAYERS, DUAL = 16, 1024, 205, 1536, 24, 13
JOINT = IMAGE + TEXT
STOCK_ATTENTION = 4 * ROWS * WIDTH * (LAYERS * JOINT**2 + DUAL * IMAGE**2)
OWN_ATTENTION = STOCK_ATTENTION - 4 * ROWS * WIDTH * TEXT * JOINT  # the last block's text queries do not attend
# Of a merged forward's elementwise bytes the residual streams': both residuals of a block read stream and update, and
# write stream and norm; dual attention adds an update to one and a norm to the other. Text's last block has neither.
RESIDUAL = 2 * ROWS * WIDTH * (IMAGE * (8 * LAYERS + 2 * DUAL) + TEXT * 8 * (LAYERS - 1))
RESIDUAL_FP8 = RESIDUAL - ROWS * WIDTH * (IMAGE * (2 * LAYERS + DUAL) + TEXT * 2 * (LAYERS - 1))  # norms of one byte
GELU_FP8 = 3 * ROWS * 4 * WIDTH * (LAYERS - 2) * JOINT  # inner blocks' GELU in FP8: a product read, e4m3 written
SMS, REGISTERS, WARPS = 132, 65536, 64  # multiprocessors, and what each has room for
ISSUE = 2.5 * 1.93e9  # instructions of a warp that a multiprocessor issues in a second: 2.5 a cycle
TILES = ((128, 256), (256, 128), (128, 128))  # rows and columns that one of them computes of a product
QUERIES = 128  # of a head that one of them attends to
HEADS = 24
# The merged forward's products as (rows, columns, reduction, how many): q, k and v, output, and both linears of the
# feed-forward, of image and text; and the dual attention's. Of text the last block has k and v alone.
PRODUCTS = (
    *((ROWS * IMAGE, n * WIDTH, k * WIDTH, LAYERS) for n, k in ((3, 1), (1, 1), (4, 1), (1, 4))),
    *((ROWS * IMAGE, n * WIDTH, WIDTH, DUAL) for n in (3, 1)),
    *((ROWS * TEXT, n * WIDTH, k * WIDTH, LAYERS - 1) for n, k in ((3, 1), (1, 1), (4, 1), (1, 4))),
    (ROWS * TEXT, 2 * WIDTH, WIDTH, 1),
)


@dataclass(frozen=True)
class Work:
    """Counted: FLOPs (of which attention's forward), elementwise bytes and launches of one pass over 16 rows."""

    flops: int
    attention: int
    bytes: int
    launches: int


MERGED = Work(35_488_560_218_112, OWN_ATTENTION, 21_554_097_544, 394)
ADAPTED = Work(35_859_060_916_224, OWN_ATTENTION, 33_184_443_784, 632)
TRAINED = Work(78_373_116_100_608, OWN_ATTENTION, 96_094_823_816, 1500)  # forward and backward
# The same with e4m3: merged weights, or the frozen base of what is trained.
MERGED_FP8 = replace(MERGED, bytes=30_804_888_456, launches=494)
ADAPTED_FP8 = replace(ADAPTED, bytes=48_959_081_352, launches=832)
TRAINED_FP8 = replace(TRAINED, bytes=133_436_662_152, launches=1900)
STOCK = Work(35_579_400_290_304, STOCK_ATTENTION, 139_382_903_680, 2348)
STOCK_ADAPTED = Work(35_949_900_988_416, STOCK_ATTENTION, 168_328_270_720, 3112)
STOCK_BACKWARD = Work(42_755_424_387_072, STOCK_ATTENTION, 277_352_212_228, 4090)
DECODED = 2_514_971_787_264  # of one image of 512 px
# Elementwise, GroupNorm's second read of its input among them: ours in bfloat16, diffusers' in float32.
DECODED_BYTES, STOCK_DECODED_BYTES = 5_276_848_512, 12_029_292_800
FEATURES = 303_147_436_032  # DINOv2 ViT-B/14 of one image of 518 px

STEPS, IMAGES, MICRO = 10, 32, 8  # bench.step --size full: 2 prompts of 16, window {0, 1}
REFERENCES = 16  # of an iteration's two prompts, which no iteration before it has met
HEAD_UPDATES = 10


COMPILED_MERGED, COMPILED_ADAPTED, COMPILED_BACKWARD = (
    replace(work, bytes=round(COMPILED * work.bytes), launches=MERGED.launches)
    for work in (STOCK, STOCK_ADAPTED, STOCK_BACKWARD)
)


def idle_share(tiles: int) -> float:
    """Of the multiprocessors' time over so many equal tiles, each of them one at a time: that of the last wave."""
    return 1 - tiles / (-(-tiles // SMS) * SMS)


def idle_of_products() -> float:
    """The same over `PRODUCTS`, each by the tile that takes the least time for it; what a tile computes beyond a
    product's edge is no hole."""
    held = idle = 0.0
    for rows, columns, reduction, count in PRODUCTS:
        found = []
        for height, width in TILES:
            tiles = -(-rows // height) * -(-columns // width)
            found.append((-(-tiles // SMS) * SMS * height * width * reduction * count, idle_share(tiles)))
        time, share = min(found)
        held, idle = held + time, idle + time * share
    return idle / held


@dataclass(frozen=True)
class Kernel:
    """A case of bench.kernels at full size: what must be moved and computed, and what the eager baseline does instead.

    issue_us: where instructions and not bytes bound it: counted in the machine code, at 2.5 a cycle.
    share, eager_share: of the bf16 8192³ product, that its products and the baseline's reach.
    """

    bytes: int
    flops: int
    eager_launches: int
    eager_bytes: int
    issue_us: float = 0.0
    share: float = HEAD
    eager_share: float = 2 * HEAD


KERNELS = {
    "gaussian_step": Kernel(100_663_296, 0, 43, 1_107_296_780, 19.2),
    "gaussian_step_ode": Kernel(100_663_296, 0, 8, 570_425_352),
    "gaussian_log_prob": Kernel(14_680_064, 0, 77, 103_285_196),
    "clipped_policy_loss": Kernel(14_680_064, 0, 129, 103_288_124),
    "sample_patches": Kernel(18_923_520, 0, 8, 134_896_512, 28.8),
    "score_features": Kernel(11_210_756, 4_907_335_680, 11, 111_602_688),
    "hinge_head_loss": Kernel(22_323_208, 9_814_671_360, 81, 149_056_032),
    "qk_rms_norm": Kernel(362_446_848, 0, 35, 2_438_965_760, 33.1),
    "ada_layer_norm": Kernel(150_994_944, 0, 7, 503_840_768, 34.3),
    "ada_layer_norm_backward": Kernel(352_321_536, 0, 11, 1_007_386_624),
    "gated_residual": Kernel(201_326_592, 0, 6, 554_024_960, 40.0),
    "gelu": Kernel(402_653_184, 0, 2, 805_318_656, 67.7),
    "swiglu": Kernel(603_979_776, 0, 2, 1_006_632_960, 64.7),
    "group_norm": Kernel(1_610_612_736, 0, 3, 3_221_227_008),
    "fp8_quantize": Kernel(75_563_008, 0, 10, 982_122_496),
    "qk_rms_norm_rotary": Kernel(241_945_856, 0, 32, 5_581_430_016),
    "qk_rms_norm_rotary_half": Kernel(249_182_208, 0, 34, 6_093_637_888),
    "fp8_linear": Kernel(235_929_600, 309_237_645_312, 1, 0, share=FP8_GEMM, eager_share=GEMM),
    "merge_lora": Kernel(1_877_606_400, 0, 573, 5_407_506_432, 900.0),
    "multi_tensor_adamw": Kernel(751_042_560, 0, 2310, 2_328_245_728),
}


@dataclass(frozen=True)
class Streaming:
    """A kernel that reads and writes tensors of tokens or images once, as it is launched at full size.

    Args:
        elements: of a row: a guided image's tokens and channels; of an image's latents.
        bytes: moved for each.
        program: elements of one program, of `warps` warps.
        lanes: share of its threads' work that is inside of the tensor.
    """

    elements: int
    bytes: int
    program: int
    warps: int
    lanes: float = 1.0

    def by_instructions(self, machine: Machine, instructions: float) -> float:
        """Share of the copy bandwidth that is left where a thread issues so many instructions for an element."""
        issued = instructions / (32 * self.lanes * SMS * ISSUE)
        return min(1.0, self.bytes / (machine.copy_gb_s * 1e9) / issued)

    def by_waves(self, rows: int, registers: int) -> float:
        """Share of the multiprocessors' places that programs fill until the last one ends, if all take as long."""
        places = SMS * min(REGISTERS // (32 * self.warps * registers), WARPS // self.warps)
        waves = self.elements * rows / self.program / places
        return waves / math.ceil(waves)


NORM = {"elements": IMAGE * WIDTH, "program": 4 * WIDTH, "warps": 8, "lanes": 0.75}  # 1,536 of 2,048 lanes
GELU = {"elements": IMAGE * 4 * WIDTH, "program": 4096, "warps": 4}
SWIGLU = GELU | {"program": 2048}  # of what it gives
QK = {"elements": 2 * JOINT * WIDTH, "program": 2 * 4096, "warps": 4}  # q's and k's; the backward copies v's gradient
ROTARY = QK | {"elements": 2 * (IMAGE + 128) * 2 * WIDTH}  # FLUX.1's and Qwen-Image's; tables are read from L2
DECODER = {"elements": 128 * 512 * 512, "warps": 8}  # the widest image that the decoder norms, of 512 px
LATENTS = {"elements": 16 * 64 * 64, "program": 16 * 64 * 64, "warps": 16}  # a program for each image
TILE = LATENTS | {"program": 4096}
WIDE = {"elements": IMAGE * 4 * WIDTH, "program": 8192, "warps": 8}
# By the names of tests/kernels/ahead_of_time/budgets.json, which has their instructions and registers.
STREAMING = {
    "ada_layer_norm/one": Streaming(bytes=4, **NORM),
    "ada_layer_norm/two": Streaming(bytes=6, **NORM),
    "ada_layer_norm/backward": Streaming(bytes=8, **NORM),
    "ada_layer_norm/fp8": Streaming(bytes=3, **NORM),
    "gated_residual/plain": Streaming(bytes=6, **NORM),
    "gated_residual/norm": Streaming(bytes=8, **NORM),
    "gated_residual/dual": Streaming(bytes=12, **NORM),
    "gated_residual/dual_fp32": Streaming(bytes=24, **NORM),
    "gated_residual/dual_fp8": Streaming(bytes=10, **NORM),
    "gated_residual/backward_plain": Streaming(bytes=4, **NORM),
    "gated_residual/backward_dual": Streaming(bytes=14, **NORM),
    "gelu/forward": Streaming(bytes=4, **GELU),
    "gelu/backward": Streaming(bytes=6, **GELU),
    "gelu/fp8": Streaming(bytes=3, elements=IMAGE * 4 * WIDTH, program=4 * WIDTH, warps=2),
    "swiglu/forward": Streaming(bytes=6, **SWIGLU),
    "swiglu/backward": Streaming(bytes=10, **SWIGLU),
    "swiglu/fp8": Streaming(bytes=5, elements=IMAGE * 9216, program=9216, warps=4),
    "qk_rms_norm/joint": Streaming(bytes=4, **QK),
    "qk_rms_norm/backward_joint": Streaming(bytes=8, **QK),
    "qk_rms_norm/rotary_joint": Streaming(bytes=4, **ROTARY),
    "qk_rms_norm/rotary_by_head_joint": Streaming(bytes=4, **ROTARY),
    "qk_rms_norm/rotary_backward_joint": Streaming(bytes=8, **ROTARY),
    "qk_rms_norm/rotary_half_joint": Streaming(bytes=4, **ROTARY),
    "qk_rms_norm/rotary_half_by_head_joint": Streaming(bytes=4, **ROTARY),
    "qk_rms_norm/rotary_half_backward_joint": Streaming(bytes=8, **ROTARY),
    "qk_rms_norm/rotary_half_by_head_backward_joint": Streaming(bytes=8, **ROTARY),
    "fp8_quantize/rows": Streaming(bytes=3, elements=IMAGE * WIDTH, program=2 * WIDTH, warps=4, lanes=0.75),
    "fp8_quantize/given_scale": Streaming(bytes=3, **WIDE),
    "fp8_quantize/tensor": Streaming(bytes=3, **WIDE),
    "fp8_quantize/amax": Streaming(bytes=2, **(WIDE | {"program": 12 * 8192})),
    "group_norm/moments": Streaming(bytes=2, program=16 * 4096, **DECODER),
    "group_norm/forward": Streaming(bytes=4, program=4096, **DECODER),
    "gaussian_step/ode": Streaming(bytes=12, **TILE),
    "gaussian_step/philox_host_seed": Streaming(bytes=12, **TILE),
    "gaussian_step/philox": Streaming(bytes=12, **LATENTS),
    "gaussian_log_prob/forward": Streaming(bytes=12, **LATENTS),
    "gaussian_log_prob/forward_kl": Streaming(bytes=16, **LATENTS),
    "gaussian_log_prob/backward": Streaming(bytes=16, **TILE),
    "clipped_policy_loss": Streaming(bytes=20, **TILE),
}


class Model:
    """Times on one machine, in seconds unless named otherwise."""

    def __init__(self, machine: Machine) -> None:
        self.flops = machine.matmul_tflop_s * 1e12
        self.bytes = machine.copy_gb_s * 1e9

    def products(self, flops: float, share: float) -> float:
        return flops / (share * self.flops)

    def dense(self, flops: float, *, fp8: bool) -> float:
        """Products with frozen weights."""
        part = FP8_PART if fp8 else 0.0
        return self.products(part * flops, FP8_GEMM) + self.products((1 - part) * flops, GEMM)

    def forward(self, work: Work, *, adapters: int = 0, fp8: bool = False, e4m3: int = 0) -> float:
        """A pass without gradients.

        Args:
            adapters: FLOPs of LoRA's products among `work`'s.
            fp8: whether frozen weights are e4m3.
            e4m3: bytes among `work`'s of kernels that write it behind a norm or GELU.
        """
        dense = self.dense(work.flops - work.attention - adapters, fp8=fp8)
        moved = (work.bytes - e4m3) / STREAM + e4m3 / FUSED_FP8
        small = self.products(adapters, ADAPTERS) + moved / self.bytes
        return max(dense + self.products(work.attention, ATTENTION) + small, work.launches * NODE * 1e-6)

    def backward(self, flops: int, attention: int, moved: int, *, in_fp8: int = 0) -> float:
        """Attention's backward is 2.5 of its forwards; `in_fp8` are FLOPs of products with frozen weights in e4m3."""
        gemm = self.products(flops - 2.5 * attention - in_fp8, GEMM) + self.dense(in_fp8, fp8=True)
        return gemm + self.products(2.5 * attention, ATTENTION_BACKWARD) + moved / (STREAM * self.bytes)

    @property
    def lora(self) -> int:
        return ADAPTED.flops - MERGED.flops

    @property
    def merged(self) -> float:
        return self.forward(MERGED)

    @property
    def merged_fp8(self) -> float:
        return self.forward(MERGED_FP8, fp8=True, e4m3=RESIDUAL_FP8 + GELU_FP8)

    @property
    def adapted(self) -> float:
        return self.forward(ADAPTED, adapters=self.lora)

    @property
    def trained(self) -> float:
        return self.adapted + self.backward(TRAINED.flops - ADAPTED.flops, OWN_ATTENTION, TRAINED.bytes - ADAPTED.bytes)

    @property
    def adapted_fp8(self) -> float:
        return self.forward(ADAPTED_FP8, adapters=self.lora, fp8=True)

    @property
    def trained_fp8(self) -> float:
        """The gradient of every linear's input is one more product with the same weights."""
        flops, moved = TRAINED_FP8.flops - ADAPTED_FP8.flops, TRAINED_FP8.bytes - ADAPTED_FP8.bytes
        frozen = MERGED.flops - MERGED.attention
        return self.adapted_fp8 + self.backward(flops, OWN_ATTENTION, moved, in_fp8=frozen)

    @property
    def stock_adapted(self) -> float:
        return self.forward(STOCK_ADAPTED, adapters=self.lora)

    @property
    def stock_trained(self) -> float:
        return self.stock_adapted + self.backward(STOCK_BACKWARD.flops, STOCK_ATTENTION, STOCK_BACKWARD.bytes)

    @property
    def compiled_merged(self) -> float:
        return self.forward(COMPILED_MERGED)

    @property
    def compiled_adapted(self) -> float:
        return self.forward(COMPILED_ADAPTED, adapters=self.lora)

    @property
    def compiled_trained(self) -> float:
        work = COMPILED_BACKWARD
        return self.compiled_adapted + self.backward(work.flops, STOCK_ATTENTION, work.bytes)

    def window(self, precision: Precision) -> tuple[float, Work]:
        """A step of the window, and its work."""
        return (self.adapted_fp8, ADAPTED_FP8) if precision == "everywhere" else (self.adapted, ADAPTED)

    def branching(self, precision: Precision = "model") -> float:
        """A step on one prompt's two guided rows, replayed: bound by its nodes."""
        step, work = self.window(precision)
        return max(step * 2 / ROWS, work.launches * NODE * 1e-6)

    def decode(self, share: float, moved: int) -> float:
        """One image."""
        return self.products(DECODED, share) + moved / (STREAM * self.bytes)

    @property
    def idle(self) -> float:
        """Of a merged forward, in seconds of the whole chip: last waves of products and of attention, and gaps."""
        joint, dual = (ROWS * HEADS * -(-tokens // QUERIES) for tokens in (JOINT, IMAGE))
        attention = (LAYERS * joint * idle_share(joint) + DUAL * dual * idle_share(dual)) / (
            LAYERS * joint + DUAL * dual
        )
        dense = self.products(MERGED.flops - MERGED.attention, GEMM)
        waves = dense * idle_of_products() + self.products(MERGED.attention, ATTENTION) * attention
        return waves + MERGED.launches * GAP * 1e-6

    def hidden(self, share: float = HOLES) -> float:
        """Of an iteration's decoding, which a side stream does while the next micro-batch is sampled: in `share` of the
        time that the sampler leaves idle. The last micro-batch has nothing beside it."""
        micro_batches = IMAGES // MICRO - 1
        decoded = MICRO * self.decode(CONVOLUTION, DECODED_BYTES)
        return micro_batches * min(decoded, share * STEPS * self.idle)

    def sampler(self, precision: Precision = "model", *, shared: bool = False) -> float:
        """An iteration's images of ours: two window steps, the rest merged; and the decoder.

        With shared noise the first of them is the branching step; before the window {0, 1} there is no prefix.
        """
        step, ode = self.window(precision)[0], self.merged if precision == "model" else self.merged_fp8
        micro_batch = (self.branching(precision) if shared else step) + step + (STEPS - 2) * ode
        return IMAGES / MICRO * micro_batch + IMAGES * self.decode(CONVOLUTION, DECODED_BYTES)

    @property
    def b1_sampler(self) -> float:
        """With either noise. B1 decodes as we do."""
        micro_batch = 2 * self.compiled_adapted + (STEPS - 2) * self.compiled_merged
        return IMAGES / MICRO * micro_batch + IMAGES * self.decode(CONVOLUTION, DECODED_BYTES)

    @property
    def stock_sampler(self) -> float:
        return IMAGES / MICRO * STEPS * self.stock_adapted + IMAGES * self.decode(CONVOLUTION_TF32, STOCK_DECODED_BYTES)

    def update(self, precision: Precision = "model", *, shared: bool = False, captured: bool = True) -> float:
        """Both of the window's steps; with shared noise the first on one prompt's rows, which the host is slower than
        where the step is not captured."""
        fp8 = precision == "everywhere"
        step, work = (self.trained_fp8, TRAINED_FP8) if fp8 else (self.trained, TRAINED)
        launched = work.launches * (NODE if captured else CUSTOM) * 1e-6
        first = max(step * 2 / ROWS, launched) if shared else step
        return IMAGES / MICRO * (step + first)

    @property
    def b1_update(self) -> float:
        return IMAGES / MICRO * 2 * self.compiled_trained

    @property
    def stock_update(self) -> float:
        return IMAGES / MICRO * 2 * self.stock_trained

    @property
    def features(self) -> float:
        """DINO's, of an iteration's images."""
        return IMAGES * self.products(FEATURES, BACKBONE)

    @property
    def adversary(self) -> float:
        return self.features + HEAD_UPDATES * 0.5e-3

    @property
    def b1_adversary(self) -> float:
        """A head update is 137 launches."""
        return self.features + HEAD_UPDATES * 137 * EAGER * 1e-6

    @property
    def stock_adversary(self) -> float:
        """References have no cache either."""
        return 2 * self.features + HEAD_UPDATES * 137 * EAGER * 1e-6

    @property
    def first_visits(self) -> float:
        """DINO's features of an iteration's references; other processes decode them while images are sampled."""
        return REFERENCES * self.products(FEATURES, BACKBONE)

    def iteration(self, precision: Precision = "model", *, shared: bool = False) -> float:
        drawn, trained = self.sampler(precision, shared=shared), self.update(precision, shared=shared)
        return drawn + self.first_visits + self.adversary + trained

    @property
    def b1_iteration(self) -> float:
        return self.b1_sampler + self.b1_adversary + self.b1_update

    @property
    def stock_iteration(self) -> float:
        return self.stock_sampler + self.stock_adversary + self.stock_update

    def kernel_us(self, kernel: Kernel) -> float:
        moved = kernel.bytes / (FUSED * self.bytes) * 1e6
        return max(moved, self.products(kernel.flops, kernel.share) * 1e6, kernel.issue_us) + LAUNCH

    def eager_us(self, kernel: Kernel) -> float:
        moved = kernel.eager_bytes / (STREAM * self.bytes) * 1e6
        moved += self.products(kernel.flops, kernel.eager_share) * 1e6
        beyond = max(0, kernel.eager_launches - QUEUE)  # the host is no further ahead than that
        return max(moved, kernel.eager_launches * NODE, beyond * EAGER)


def _unit(name: str, amount: float, ours: float, b1: float, b0: float | None = None) -> dict[str, float]:
    """Figures of a unit of bench.step: rates of all sides, ours over the others'; times in seconds of `amount`."""
    sides = {"b1": b1} if b0 is None else {"b1": b1, "b0": b0}
    ratios = {f"step.{name}.over_{side}.ratio": time / ours for side, time in sides.items()}
    return ratios | {f"step.{name}.{side}": amount / time for side, time in {"ours": ours, **sides}.items()}


def _whole_steps(m: Model) -> dict[str, float]:
    """Of bench.step, with the same algorithm on all sides."""
    found: dict[str, float] = {}
    units: dict[str, tuple[float, Callable[..., float], float, float]] = {
        "sampler": (IMAGES, m.sampler, m.b1_sampler, m.stock_sampler),
        "update": (IMAGES, m.update, m.b1_update, m.stock_update),
        "iteration": (1, m.iteration, m.b1_iteration, m.stock_iteration),
    }
    for unit, (amount, ours, b1, b0) in units.items():
        for precision in ("model", *(each for each, has in IN_FP8.items() if unit in has)):
            name = in_precision(unit, precision)
            found |= _unit(name, amount, ours(precision), b1, b0)
            found |= _unit(f"{name}{SHARED}", amount, ours(precision, shared=True), b1)
    found |= _unit("update_shared_eager", IMAGES, m.update(shared=True, captured=False), m.b1_update)
    return found | _unit("adversary", IMAGES, m.adversary, m.b1_adversary, m.stock_adversary)


def predict(machine: Machine = H200) -> dict[str, float]:
    """Every figure by its path: PART.KEY.KEY..., and kernels.CASE.KEY for a case of bench.kernels."""
    m = Model(machine)
    own, iteration = m.sampler(), m.iteration()
    found = {
        "step.calibration.copy_gb_s": machine.copy_gb_s,
        "step.calibration.matmul_tflop_s": machine.matmul_tflop_s,
        **_whole_steps(m),
        "step.waterfall.B0": IMAGES / m.stock_sampler,
        "step.waterfall.graph": IMAGES / own,
        "step.waterfall.side stream": IMAGES / (own - m.hidden()),
        "step.waterfall.FP8": IMAGES / m.sampler("sampling"),
        "step.fp8_forward_over_roofline": m.merged_fp8 / m.products(STOCK.flops, 1.0),
        "step.sampler_mfu": IMAGES / own * STEPS * STOCK.flops / 8 / 989e12,
        "profile.iterations_per_second": 1 / iteration,
        "profile.phase_shares.sample": own / iteration,
        "profile.images_per_second": IMAGES / iteration,
        "profile.phase_shares.update": m.update() / iteration,
        "profile.phase_shares.score": (m.features + m.first_visits) / iteration,
        "profile.phase_shares.discriminator": (m.adversary - m.features) / iteration,
        "profile.trajectory.kernels": 2 * ADAPTED.launches + (STEPS - 2) * MERGED.launches + 3 * STEPS,
        "profile.trajectory.host_syncs": 0,
        "profile.idle_share": WAITS * 1e-6 / iteration,
        "train.random.seconds": iteration,
    }
    for name, kernel in KERNELS.items():
        found[f"kernels.{name}.ours_us"] = m.kernel_us(kernel)
        found[f"kernels.{name}.over_eager"] = m.eager_us(kernel) / m.kernel_us(kernel)
        if not kernel.flops:  # else products may bound it
            found[f"kernels.{name}.share_of_limit"] = kernel.bytes / (machine.copy_gb_s * 1e3) / m.kernel_us(kernel)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


@dataclass(frozen=True)
class Row:
    """A figure: what was predicted, what was measured (None: this session has not)."""

    name: str
    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; 1 where both are 0, infinite where only the prediction is."""
        if self.measured is None:
            return None
        if self.predicted == 0:
            return 1.0 if self.measured == 0 else float("inf")
        return self.measured / self.predicted

    @property
    def finding(self) -> bool:
        """Off by more than a quarter: to be explained."""
        return self.ratio is not None and not 1 - TOLERANCE <= self.ratio <= 1 + TOLERANCE


def compare(predicted: Mapping[str, float], reports: Mapping[str, dict]) -> list[Row]:
    """A row per prediction; `reports` are the JSON of the parts by their name."""
    return [Row(name, value, measured(name, reports)) for name, value in predicted.items()]


def measured(name: str, reports: Mapping[str, dict]) -> float | None:
    """The figure `name` of a report, None where there is none."""
    part, *path = name.split(".")
    report = reports.get(part)
    if report is None:
        return None
    if part == "kernels":
        entry = next((e for e in report.get("entries", []) if e["case"] == path[0]), None)
        if entry is None:
            return None
        if path[1] == "share_of_limit":
            return entry["share_of_limit"]
        return entry[path[1]]["median" if path[1] == "ours_us" else "ratio"]
    if name == "train.random.seconds":  # the first iterations capture and compile
        rows = [row["seconds"] for row in report.get("random", {}).get("rows", [])[3:]]
        return sorted(rows)[len(rows) // 2] if rows else None
    value: object = report
    for key in path:
        if isinstance(value, list):  # the waterfall's rows
            value = next((row["images_per_second"] for row in value if row["step"] == key), None)
            break
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table as Markdown."""
    yield "| figure | predicted | measured | ratio | |"
    yield "|---|---|---|---|---|"
    for row in rows:
        found, ratio = ("unmeasured", "") if row.measured is None else (f"{row.measured:.4g}", f"{row.ratio:.2f}")
        yield f"| {row.name} | {row.predicted:.4g} | {found} | {ratio} | {'**explain**' if row.finding else ''} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    args = parser.parse_args(argv)
    predicted = predict()
    if args.write:
        FILE.write_text(json.dumps(predicted, indent=1) + "\n")
    for line in lines(compare(predicted, {})):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
