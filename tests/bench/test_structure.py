"""What our forward and training step ask of a GPU, counted on the exact public configurations without one.

1024 image tokens, bfloat16, LoRA of rank 32 on the default targets. SD3.5-medium: 16 rows of two prompts with 205 text
tokens, 191 modules, attention by PyTorch's flash kernel. SD3.5-large: as many rows and tokens, 303 modules. FLUX.1-dev:
8 rows of one prompt, since guidance is an input, with the presets' 128 text tokens, 266 modules. Qwen-Image: 16 rows
with 128, 480 modules, by cuDNN's attention, which `auto` takes first of those with a mask. These three are weekly.
The numbers are in golden/structure.json: FLOPs must be equal; launches, elementwise bytes and saved bytes are limits.

A goal of SD3.5-medium's that is not met: at most 20 GB of elementwise traffic. 12.8 GB read each stream and its
update and write the stream and its norm, 8.4 GB read and write q and k around their norm; with library matrix products
neither can be fused further, so the limit here is 21.7 GB.

Each gate is shown to fail, in this file, on a planted regression: a copy, adapters left unmerged, GELU out of the
epilogue, a read on the host, q and k kept for the backward, a step number that reached Python; of the other families a
copy and q and k that are kept.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils._device

from advgrpo.plan import known_models
from advgrpo.plan.activations import AliveBytes
from advgrpo.policy.fused import attention, linear, transformer
from advgrpo.policy.fused.decoder import SD3_DECODER, Decoder, _Norm
from advgrpo.policy.fused.transformer import FusedTransformer, Prepared, TransformerConfig
from advgrpo_kernels._runtime import reference_only
from bench.counters import ElementwiseBytes, HostSyncError, HostSyncs, Launches, Recorder, Trace, flops, on_gpu
from bench.scaling import _forward_flops
from bench.stock_model import LORA_TARGETS, SD35_LARGE, SD35_MEDIUM, StockConfig, StockTransformer
from tests.parts import some_weekly

EVERY = json.loads((Path(__file__).parents[1] / "golden" / "structure.json").read_text())
GOLDEN = EVERY["sd35-medium"]
OTHERS = {"sd35-medium-fp8", "sd35-large", "flux1-dev", "qwen-image"}
FLUX1_DEV, QWEN_IMAGE = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
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


def by_ourselves(config: StockConfig):
    with torch.device("meta"):
        return StockTransformer(config).to(torch.bfloat16).requires_grad_(False), asdict(config)


def by_diffusers(path: str):
    """(network, configuration) of a hub id; the network that others on the meta device share stays as it is."""
    shared = known_models.meta_transformer(known_models.known_pipeline(path).transformer)
    network = torch.nn.Module.to(copy.deepcopy(shared), torch.bfloat16)
    return network, network.config


@dataclass(frozen=True)
class Case:
    """A network, and so many rows of what a step of it reads."""

    network: Callable[[], tuple[torch.nn.Module, Mapping]]
    rows: int
    prompts: int
    text: tuple[int, int]  # tokens and width
    pooled: int  # its width
    guidance: float | None = None
    masked: bool = False
    fp8: bool = False  # merged weights, and the frozen base, as e4m3


CASES = {
    "sd35-medium": Case(partial(by_ourselves, SD35_MEDIUM), 16, 2, (TEXT, 4096), 2048),
    "sd35-medium-fp8": Case(partial(by_ourselves, SD35_MEDIUM), 16, 2, (TEXT, 4096), 2048, fp8=True),
    "sd35-large": Case(partial(by_ourselves, SD35_LARGE), 16, 2, (TEXT, 4096), 2048),
    "flux1-dev": Case(partial(by_diffusers, FLUX1_DEV), 8, 1, (128, 4096), 768, guidance=3.5),
    "qwen-image": Case(partial(by_diffusers, QWEN_IMAGE), 16, 2, (128, 3584), 0, masked=True),
}


class Counted:
    """Our forward of a family on meta and what a step of it reads."""

    def __init__(self, case: Case):
        stock, config = case.network()
        tensors = {name: t.detach() for name, t in [*stock.named_parameters(), *stock.named_buffers()]}
        config = TransformerConfig.from_stock(config)
        self.model = FusedTransformer(config, tensors, stock=stock, attention="math")
        self.model._attend = attention._cudnn if case.masked else attend
        targets = tuple(f".attn.{target}" for target in LORA_TARGETS)
        self.model.adapt(lambda name: name.endswith(targets), rank=32, alpha=64, init="gaussian", seed=0)
        self.model.prepare_merged(fp8=case.fp8)
        if case.fp8:
            self.model.prepare_fp8_base()
        half = {"device": "meta", "dtype": torch.bfloat16}
        self.latents = torch.empty(case.rows, 16, 64, 64, device="meta")
        prompts = torch.empty(case.prompts, *case.text, **half), torch.empty(case.prompts, case.pooled, **half)
        mask = torch.empty(case.prompts, case.text[0], dtype=torch.bool, device="meta") if case.masked else None
        prepared = self.model.prepare(*prompts, torch.empty(10, device="meta"), case.guidance, mask)
        self.prepared = prepared.rows(torch.zeros(case.rows, dtype=torch.int64, device="meta"))
        self.step = torch.zeros(1, dtype=torch.int64, device="meta")
        self.merged()  # makes the table of rotations or positions, which is kept

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
        yield Counted(CASES["sd35-medium"])


@pytest.fixture(scope="module")
def family(request):
    """(its name, it) of `CASES`."""
    with on_gpu():
        made = request.getfixturevalue("medium") if request.param == "sd35-medium" else Counted(CASES[request.param])
        yield request.param, made


every_family = pytest.mark.parametrize("family", some_weekly(CASES, OTHERS), indirect=True, scope="module")


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


@every_family
@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_flops_to_the_last_digit(name, family):
    kind, counted = family
    assert flops(getattr(counted, name)) == EVERY[kind][name]["flops"]


def test_forwards_leave_out_only_what_a_step_need_not_compute():
    left_out = PER_PROMPT + LAST_TEXT_QUERIES
    assert GOLDEN["merged"]["flops"] == STOCK_FORWARD - left_out
    assert GOLDEN["adapted"]["flops"] == STOCK_WITH_LORA - left_out


@pytest.mark.weekly
def test_forwards_of_other_models_leave_out_only_what_a_step_need_not_compute():
    """By diffusers' forwards, or its twin's, counted: what is of a prompt, and the last block's text, which nothing
    reads."""
    width, kept = 2432, (38 * 12 - 4 + 2) * 2432  # of SD3.5-large, whose last text block has two vectors of six
    of_prompt = TEXT * 4096 * width + width * kept + (256 + 2048 + 2 * width) * width
    assert large_forward_flops() - EVERY["sd35-large"]["merged"]["flops"] == 2 * 16 * (
        of_prompt + 2 * TEXT * (IMAGE + TEXT) * width
    )
    image, text, width = IMAGE, 128, 3072
    tokens = text * (image + text)
    kept = (12 * 19 + 3 * 38 + 2) * width, (12 * 60 + 2) * width  # modulation
    of_prompt = text * 4096 * width + width * kept[0] + (2 * 256 + 768 + 3 * width) * width
    last = 2 * tokens * width + text * (4 + 5) * width**2  # queries, feed-forward and, with attention's, its second
    assert left_out("flux1-dev", FLUX1_DEV) == 2 * 8 * (of_prompt + last)
    of_prompt = text * 3584 * width + width * kept[1] + (256 + width) * width
    last = 2 * tokens * width + text * (1 + 4 + 4) * width**2
    assert left_out("qwen-image", QWEN_IMAGE) == 2 * 16 * (of_prompt + last)


def large_forward_flops() -> int:
    """Of the stock network, with 16 rows."""
    network, _ = by_ourselves(SD35_LARGE)
    shapes = (ROWS, 16, 64, 64), (ROWS, TEXT, 4096), (ROWS, 2048), (ROWS,)
    given = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with on_gpu(), torch.no_grad():
        return flops(lambda: network(*given))


def left_out(kind: str, path: str) -> int:
    """FLOPs of the stock network's forward that the merged one has not."""
    stock = known_models.meta_transformer(known_models.known_pipeline(path).transformer)
    whole, _ = _forward_flops(stock, IMAGE, CASES[kind].text[0])
    return CASES[kind].rows * whole - EVERY[kind]["merged"]["flops"]


@every_family
@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_launches(name, family):
    kind, counted = family
    assert launches(getattr(counted, name)) <= EVERY[kind][name]["launches"]


def test_goals_of_the_merged_forward_and_of_saved_memory():
    """The recorded numbers may only fall; these are what they may never exceed."""
    assert GOLDEN["merged"]["launches"] <= 430
    assert GOLDEN["merged"]["elementwise_bytes"] <= 21.7e9
    assert GOLDEN["train"]["saved_bytes"] <= 22e9


@every_family
@pytest.mark.parametrize("name", ["merged", "adapted", "train"])
def test_elementwise_bytes(name, family):
    kind, counted = family
    assert elementwise_bytes(getattr(counted, name)) <= EVERY[kind][name]["elementwise_bytes"]


@every_family
def test_saved_bytes(family):
    kind, counted = family
    assert counted.saved_bytes() <= EVERY[kind]["train"]["saved_bytes"]


def test_decoding_eight_images(decoder):
    """GroupNorm and SiLU are three launches of ours instead of some seventeen."""
    golden = EVERY["decode"]
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


@every_family
def test_no_step_waits_for_the_device(family):
    _, counted = family
    with HostSyncs():
        counted.merged()
        counted.train()


@every_family
def test_every_step_is_the_same_graph(family, monkeypatch):
    _, counted = family
    first = trace(counted.merged)
    monkeypatch.setattr(counted, "step", torch.full((1,), 7, device="meta"))
    assert trace(counted.merged) == first


@every_family
def test_a_copy_between_blocks_is_seen(family, monkeypatch):
    kind, counted = family
    own = counted.model._attend
    monkeypatch.setattr(counted.model, "_attend", lambda *inputs: own(*inputs).clone())
    assert launches(counted.merged) > EVERY[kind]["merged"]["launches"]
    assert elementwise_bytes(counted.merged) > EVERY[kind]["merged"]["elementwise_bytes"]


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


@every_family
def test_keeping_normalised_q_and_k_is_seen(family, monkeypatch):
    kind, counted = family
    monkeypatch.setattr(transformer, "Recomputed", lambda tensors, compute: transformer.nullcontext())
    assert counted.saved_bytes() > EVERY[kind]["train"]["saved_bytes"]


def test_a_step_number_read_on_the_host_is_seen(medium, monkeypatch):
    monkeypatch.setattr(Prepared, "at", lambda self, step: self.modulation[step.item()])
    with pytest.raises(HostSyncError), HostSyncs():
        medium.merged()


def test_a_step_number_that_reached_python_is_seen(medium, monkeypatch):
    own, numbers = Prepared.at, iter([1, 2])
    monkeypatch.setattr(Prepared, "at", lambda self, step: own(self, step) * next(numbers))
    assert trace(medium.merged) != trace(medium.merged)
