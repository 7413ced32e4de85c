"""What our forward and training step of SD3.5-medium ask of a GPU, counted on the exact configuration without one.

16 rows of 1024 image and 205 text tokens, bfloat16, LoRA of rank 32 on the 191 modules of the released configuration.
The numbers are in golden/structure.json: FLOPs must be equal; launches, elementwise bytes and saved bytes are limits.

A goal that is not met: at most 20 GB of elementwise traffic. 12.8 GB read each stream and its
update and write the stream and its norm, 8.4 GB read and write q and k around their norm; with library matrix products
neither can be fused further, so the limit here is 21.7 GB.

Each gate is shown to fail, in this file, on a planted regression: a copy, adapters left unmerged, GELU out of the
epilogue, a read on the host, q and k kept for the backward, a step number that reached Python.
"""

import json
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils._device

from advgrpo.plan.activations import AliveBytes
from advgrpo.policy.fused import linear, transformer
from advgrpo.policy.fused.decoder import SD3_DECODER, Decoder, _Norm
from advgrpo.policy.fused.transformer import FusedTransformer, Prepared, TransformerConfig
from advgrpo_kernels._runtime import reference_only
from bench.counters import ElementwiseBytes, HostSyncError, HostSyncs, Launches, Recorder, Trace, flops, on_gpu
from bench.stock_model import LORA_TARGETS, SD35_MEDIUM, StockTransformer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "structure.json").read_text())
ROWS, TEXT, IMAGE, WIDTH, MODULATION = 16, 205, 1024, 1536, 325 * 1536
# Not in a step of ours: embedding the text, the modulation of all norms and the embeddings of time and pooled text are
# computed once per prompt; the last block's text queries, which nothing reads, do not attend.
PER_PROMPT = 2 * ROWS * (TEXT * 4096 * WIDTH + WIDTH * MODULATION + (256 + 2048 + 2 * WIDTH) * WIDTH)
LAST_TEXT_QUERIES = 4 * ROWS * TEXT * (IMAGE + TEXT) * WIDTH
STOCK_FORWARD, STOCK_WITH_LORA = 35_579_400_290_304, 35_949_900_988_416  # test_stock_model.py


@pytest.fixture(autouse=True)
def _poison_empty():
    """The root conftest's is off here: it would write to 32 GB that are not there."""


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Medium:
    """Our SD3.5-medium on meta and what a step of it reads."""

    def __init__(self):
        with torch.device("meta"):
            stock = StockTransformer(SD35_MEDIUM).to(torch.bfloat16).requires_grad_(False)
        tensors = {name: t.detach() for name, t in [*stock.named_parameters(), *stock.named_buffers()]}
        config = TransformerConfig.from_stock(asdict(SD35_MEDIUM))
        self.model = FusedTransformer(config, tensors, stock=stock, attention="math")
        self.model._attend = attend
        targets = tuple(f".attn.{target}" for target in LORA_TARGETS)
        self.model.adapt(lambda name: name.endswith(targets), rank=32, alpha=64, init="gaussian", seed=0)
        self.model.prepare_merged(fp8=False)
        half = {"device": "meta", "dtype": torch.bfloat16}
        self.latents = torch.empty(ROWS, 16, 64, 64, device="meta")
        prompts = torch.empty(2, TEXT, 4096, **half), torch.empty(2, 2048, **half)
        prepared = self.model.prepare(*prompts, torch.empty(10, device="meta"))
        self.prepared = prepared.rows(torch.zeros(ROWS, dtype=torch.int64, device="meta"))
        self.step = torch.zeros(1, dtype=torch.int64, device="meta")

    @torch.no_grad()
    def merged(self):
        return self.model.predict(self.latents, self.step, self.prepared, "merged")

    @torch.no_grad()
    def adapted(self):
        return self.model.predict(self.latents, self.step, self.prepared, "adapted")

    def train(self):
        velocity = self.model.predict(self.latents, self.step, self.prepared, "adapted")
        velocity.backward(torch.empty_like(velocity))
        self.model.lora.master.grad = None

    def saved_bytes(self) -> int:
        """Alive after a forward with gradients: what its graph keeps, whoever packs it."""
        with AliveBytes() as alive:
            _kept = self.model.predict(self.latents, self.step, self.prepared, "adapted")
            return alive.alive


@pytest.fixture(scope="module")
def medium():
    with on_gpu():
        yield Medium()


@pytest.fixture(scope="module")
def decoder():
    """SD3.5's in bfloat16, on latents of eight images of 512 px."""
    with on_gpu():
        made = Decoder(SD3_DECODER, dtype=torch.bfloat16, device="meta")
        yield partial(made, torch.empty(8, 16, 64, 64, device="meta"))


def launches(run) -> int:
    with Launches() as counted:
        run()
    return counted.count


def elementwise_bytes(run) -> int:
    with ElementwiseBytes() as counted:
        run()
    return counted.total


def trace(run) -> list[str]:
    with Trace() as traced:
        run()
    return traced.lines


@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_flops_to_the_last_digit(name, medium):
    assert flops(getattr(medium, name)) == GOLDEN[name]["flops"]


def test_forwards_leave_out_only_what_a_step_need_not_compute():
    left_out = PER_PROMPT + LAST_TEXT_QUERIES
    assert GOLDEN["merged"]["flops"] == STOCK_FORWARD - left_out
    assert GOLDEN["adapted"]["flops"] == STOCK_WITH_LORA - left_out


@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_launches(name, medium):
    assert launches(getattr(medium, name)) <= GOLDEN[name]["launches"]


def test_goals_of_the_merged_forward_and_of_saved_memory():
    """The recorded numbers may only fall; these are what they may never exceed."""
    assert GOLDEN["merged"]["launches"] <= 430
    assert GOLDEN["merged"]["elementwise_bytes"] <= 21.7e9
    assert GOLDEN["train"]["saved_bytes"] <= 22e9


@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_elementwise_bytes(name, medium):
    assert elementwise_bytes(getattr(medium, name)) <= GOLDEN[name]["elementwise_bytes"]


def test_saved_bytes(medium):
    assert medium.saved_bytes() <= GOLDEN["train"]["saved_bytes"]


def test_decoding_eight_images(decoder):
    """GroupNorm and SiLU are three launches of ours instead of some seventeen."""
    golden = GOLDEN["decode"]
    assert launches(decoder) == golden["launches"]
    assert elementwise_bytes(decoder) == golden["elementwise_bytes"]
    read: list[int] = []
    inputs = [m.register_forward_pre_hook(lambda _m, given: read.append(given[0].nbytes)) for m in norms(decoder)]
    with HostSyncs():
        decoder()
    for hook in inputs:
        hook.remove()
    assert sum(read) == golden["norm_inputs_bytes"]  # read twice, the second time inside the op, which no counter sees
    with reference_only():
        assert launches(decoder) == golden["launches_without_kernels"]
        assert elementwise_bytes(decoder) > 1.8 * golden["elementwise_bytes"]


def norms(decoder):
    return [module for module in decoder.func.modules() if isinstance(module, _Norm)]


def test_no_step_waits_for_the_device(medium):
    with HostSyncs():
        medium.merged()
        medium.train()


def test_every_step_is_the_same_graph(medium, monkeypatch):
    first = trace(medium.merged)
    monkeypatch.setattr(medium, "step", torch.full((1,), 7, device="meta"))
    assert trace(medium.merged) == first


def test_a_copy_between_blocks_is_seen(medium, monkeypatch):
    own = medium.model._attend
    monkeypatch.setattr(medium.model, "_attend", lambda q, k, v: own(q, k, v).clone())
    assert launches(medium.merged) > GOLDEN["merged"]["launches"]
    assert elementwise_bytes(medium.merged) > GOLDEN["merged"]["elementwise_bytes"]


def test_images_first_in_memory_is_seen(medium, monkeypatch):
    """Attention of another layout: to_out copies its input."""
    own = medium.model._attend
    monkeypatch.setattr(medium.model, "_attend", lambda q, k, v: own(*(t.contiguous() for t in (q, k, v))))
    assert launches(medium.adapted) > GOLDEN["adapted"]["launches"]


def test_adapters_left_unmerged_are_seen(medium):
    golden = GOLDEN["merged"]
    assert GOLDEN["adapted"]["launches"] > golden["launches"]
    assert GOLDEN["adapted"]["elementwise_bytes"] > golden["elementwise_bytes"]
    assert flops(medium.adapted) != golden["flops"]


class LowRankBytes(Recorder):
    """Of a pass's low-rank products: bytes of x that A reads, and of y that B's product reads and writes again."""

    def __init__(self):
        super().__init__()
        self.read, self.added = 0, 0

    def see(self, name, func, args, kwargs, result):
        if name == "mm":
            self.read += args[0].nbytes
        elif name == "baddbmm":
            self.added += 2 * result.nbytes


def test_what_adapters_add_to_a_forward(medium):
    """What one product of [x | x·Aᵀ] and [W | scale·B] could save of it, and what not (docs/performance.md)."""
    counts = {name: Launches() for name in ("merged", "adapted")}
    for name, counted in counts.items():
        with counted:
            getattr(medium, name)()
    more = counts["adapted"].by_name() - counts["merged"].by_name()
    # A's product, B's, GELU out of an epilogue whose input the backward needs, and the cast of the adapters
    assert more == Counter({"mm": 95, "baddbmm": 95, "addmm": 47, "_gelu_fwd_kernel": 47, "_to_copy": 1})
    assert len([layer for layer in medium.model.linears() if layer.adapted]) == 95
    with LowRankBytes() as low_rank:
        medium.adapted()
    assert (low_rank.read, low_rank.added) == (2_889_498_624, 11_578_146_816)


def test_gelu_out_of_the_epilogue_is_seen(medium, monkeypatch):
    monkeypatch.setattr(linear.StackedLinear, "run_merged_gelu", lambda self, x: transformer.gelu(self.run_merged(x)))
    assert elementwise_bytes(medium.merged) > GOLDEN["merged"]["elementwise_bytes"]


def test_keeping_normalised_q_and_k_is_seen(medium, monkeypatch):
    monkeypatch.setattr(transformer, "Recomputed", lambda tensors, compute: transformer.nullcontext())
    assert medium.saved_bytes() > GOLDEN["train"]["saved_bytes"]


def test_a_step_number_read_on_the_host_is_seen(medium, monkeypatch):
    monkeypatch.setattr(Prepared, "at", lambda self, step: self.modulation[step.item()])
    with pytest.raises(HostSyncError), HostSyncs():
        medium.merged()


def test_a_step_number_that_reached_python_is_seen(medium, monkeypatch):
    own, numbers = Prepared.at, iter([1, 2])
    monkeypatch.setattr(Prepared, "at", lambda self, step: own(self, step) * next(numbers))
    assert trace(medium.merged) != trace(medium.merged)
