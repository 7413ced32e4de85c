"""The back ends of the extra `gpu`, without a GPU: what is handed to the packages is what their functions take.

Stand-ins have the packages' signatures (flash-attn 2.8 and its hopper/ interface, NVIDIA Apex's FusedAdam as of 2026)
and compute the same on the CPU. nvtx is the package itself, whose ranges go nowhere without a profiler.

Bugs planted in a copy, each seen red: q, k and v in torch's order of dimensions; a deterministic backward not asked
for; the log-sum-exp of older builds taken for the output; flash2 before flash3; `weight_decay` left to Apex's default;
L2 regularisation in place of AdamW; the step that Apex counts in its group lost in a checkpoint; any package called
apex taken for NVIDIA's; ranges in nvtx's own domain; `apex` of PyPI in the extra.
"""

import importlib.machinery
import importlib.util
import inspect
import json
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from advgrpo.config import Config, UpdateSection
from advgrpo.errors import UserError
from advgrpo.policy.fused.attention import choose_attention
from advgrpo.policy.fused.linear import as_written
from advgrpo.runtime import phases
from advgrpo.runtime.checkpoint import pack_optimizer, unpack_optimizer
from advgrpo.training.ema import Ema
from advgrpo.training.optimizer import APEX, build_optimizer
from advgrpo.training.preflight import _check_installed
from tests.projects import PROJECT, ROOT, all_requirements, requirements


def install(monkeypatch, name: str, **content) -> types.ModuleType:
    """A module `name` with this content, found by import and by find_spec."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes choosing think of a GPU of this capability; no product is tried on it."""
    monkeypatch.setattr("advgrpo.policy.fused.attention._try", lambda *_: None)

    def of(*capability: int) -> tuple[torch.device, torch.dtype]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda"), torch.bfloat16

    return of


def product(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def flash_attn_2(calls: list):
    """flash_attn.flash_attn_func: q, k, v [B, S, H, D] -> [B, S, H, D]."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append({n: value for n, value in locals().items() if n not in ("q", "k", "v", "calls")})
        return product(q, k, v)

    return flash_attn_func


def flash_attn_3(calls: list, with_sums: bool = False):
    """flash_attn_interface.flash_attn_func of hopper/; builds before 2025 return the log-sum-exp as well."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.append({n: value for n, value in locals().items() if n not in ("q", "k", "v", "calls", "with_sums")})
        out = product(q, k, v)
        return (out, torch.zeros(out.shape[:3])) if with_sums else out

    return flash_attn_func


FLASH = {
    "flash2": ("flash_attn", flash_attn_2),
    "flash3": ("flash_attn_interface", flash_attn_3),
    "flash3 of old": ("flash_attn_interface", lambda calls: flash_attn_3(calls, with_sums=True)),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_gets_its_own_layout_and_a_deterministic_backward(name, gpu, monkeypatch):
    package, make = FLASH[name]
    calls: list[dict] = []
    install(monkeypatch, package, flash_attn_func=make(calls))
    chosen, attend = choose_attention(name.split()[0], *gpu(9, 0))
    assert chosen == name.split()[0]
    q, k, v = (torch.randn(2, 3, tokens, 16, requires_grad=True) for tokens in (5, 7, 7))
    out, plain = attend(q, k, v), F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, plain)
    along = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), along), torch.autograd.grad(plain, (q, k, v), along)):
        torch.testing.assert_close(ours, theirs)
    defaults = {p.name: p.default for p in inspect.signature(make([])).parameters.values() if p.name not in "qkv"}
    assert calls == [{**defaults, "deterministic": True}]


def test_auto_takes_the_newest_flash_attention_that_the_gpu_can_run(gpu, monkeypatch):
    for package, make in list(FLASH.values())[:2]:
        install(monkeypatch, package, flash_attn_func=make([]))
    assert choose_attention("auto", *gpu(9, 0))[0] == "flash3"
    assert choose_attention("auto", *gpu(8, 0))[0] == "flash2"
    with pytest.raises(UserError, match=r"needs compute capability 9\.0"):
        choose_attention("flash3", *gpu(8, 0))


class FusedAdam(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam's arguments, state, where it counts steps, and that autograd does not see it write; the
    arithmetic is Adam's formula."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert not any((amsgrad, capturable, master_weights))
        settings = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay})
        self.decoupled = adam_w_mode

    def zero_grad(self):  # takes no set_to_none
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # one for the group, as a number
            (first, second), t = group["betas"], group["step"]
            for p in group["params"]:
                state, grad = self.state[p], p.grad.clone()
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p).float() for _ in range(2))
                if not self.decoupled:
                    grad += group["weight_decay"] * p
                state["exp_avg"].lerp_(grad, 1 - first)
                state["exp_avg_sq"].lerp_(grad * grad, 1 - second)
                root = (state["exp_avg_sq"] / (1 - second**t)).sqrt() + group["eps"]
                if self.decoupled:
                    p.data -= group["lr"] * group["weight_decay"] * p
                p.data -= group["lr"] / (1 - first**t) * state["exp_avg"] / root


@pytest.fixture
def apex(monkeypatch):
    install(monkeypatch, "apex")
    return install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)


SECTION = {"learning_rate": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "max_grad_norm": 0.5}


def optimizer_of(kind: str):
    """(clipped optimizer, its parameters), the same parameters every time."""
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.ones(5))]
    ema = Ema(((f"p{i}", p) for i, p in enumerate(parameters)), decay=0.5)
    return build_optimizer(parameters, UpdateSection(optimizer=kind, **SECTION), ema, fused=True), parameters


def steps(optimizer, parameters, first: int, count: int) -> None:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_apex_takes_the_steps_of_torchs_adamw(apex):
    """Also through a checkpoint: Apex counts its steps beside the settings, not beside the moments."""
    (ours, ours_p), (torchs, torchs_p), (resumed, resumed_p) = map(optimizer_of, ("apex", "torch", "apex"))
    assert type(ours.optimizer) is FusedAdam
    steps(ours, ours_p, 0, 4)
    steps(torchs, torchs_p, 0, 4)
    torch.testing.assert_close(ours_p, torchs_p)
    tensors, rest = pack_optimizer(ours.optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(rest))
    unpack_optimizer(resumed.optimizer, *saved)
    for theirs, own in zip(resumed_p, ours_p):
        theirs.data.copy_(own.data)
    steps(ours, ours_p, 4, 2)
    steps(resumed, resumed_p, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours_p, resumed_p))


def test_a_step_of_apex_is_seen_where_weights_are_remembered(apex):
    """A whole copy beside a base in parts is merged again only where adapters have been written to."""
    optimizer, parameters = optimizer_of("apex")
    before = as_written(parameters)
    steps(optimizer, parameters, 0, 1)
    assert as_written(parameters) != before


def test_apex_never_sees_a_gradient_that_is_not_finite(apex):
    optimizer, parameters = optimizer_of("apex")
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    assert not torch.isfinite(optimizer.step())
    assert all(torch.equal(p, b) for p, b in zip(parameters, before))


@pytest.mark.parametrize("there", [False, True], ids=["nothing", "another package called apex"])
def test_without_nvidias_apex_the_error_says_where_it_is_from(there, monkeypatch):
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    if there:
        install(monkeypatch, "apex")
    elif importlib.util.find_spec("apex"):
        pytest.skip("there is an apex")
    config = Config()
    config.update.optimizer = "apex"
    for check in (lambda: _check_installed(config), lambda: optimizer_of("apex")):
        with pytest.raises(UserError, match=re.escape(APEX)):
            check()


def test_phases_are_ranges_of_nvtx(monkeypatch):
    """Of the package, with a name and a domain that its class takes."""
    nvtx = pytest.importorskip("nvtx")
    assert phases._HAS_NVTX
    given, takes = [], inspect.signature(nvtx.annotate.__init__)

    class Annotate(nvtx.annotate):
        def __init__(self, *arguments, **keywords):
            given.append(takes.bind(self, *arguments, **keywords).arguments)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(nvtx, "annotate", Annotate)
    measured = phases.Phases(torch.device("cpu"))
    with measured.measure("rollout"), phases.named_range("step"):
        pass
    assert [(each["message"], each["domain"]) for each in given] == [("rollout", "advgrpo"), ("step", "advgrpo")]
    assert list(measured.seconds()) == ["rollout"]


def test_without_the_package_a_gpus_ranges_are_pytorchs(monkeypatch):
    opened = []
    monkeypatch.setattr(phases, "_HAS_NVTX", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: opened.append(name) or phases.contextlib.nullcontext())
    with phases.named_range("update"):
        assert opened == ["update"]


def test_the_extra_installs_what_the_back_ends_import_and_not_pypis_apex():
    extra = requirements(PROJECT, "gpu")
    assert set(extra) == {"flash-attn", "nvtx"}
    assert "2.8.3" in extra["flash-attn"].specifier
    assert "2.4.0" not in extra["flash-attn"].specifier  # its function knows no deterministic=
    assert "apex" not in all_requirements(PROJECT)
    assert APEX in (ROOT / "README.md").read_text()
