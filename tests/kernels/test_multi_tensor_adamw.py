"""AdamW with clipping and EMA over a list: PyTorch, and the CUDA source run on the CPU and on a GPU.

Planted bugs that turned this file red: no clipping; gradients clipped in place; v of the gradient, not its square;
second bias correction missing; step count stuck; step counted, or update made, on a bad gradient, also by the
reference; reference one step behind; ragged end left out of the norm; average and parameter swapped; no weight decay;
128-bit accesses past the end (crash).
"""

import math

import pytest
import torch

from advgrpo_kernels import multi_tensor_adamw, multi_tensor_adamw_ref
from advgrpo_kernels.ops import _csrc
from advgrpo_kernels.ops.multi_tensor_adamw import _multi_tensor_adamw_op
from tests.graph_emulator import EmulatedGraphs
from tests.kernels.csrc_builds import cpu_build

SHAPES = [(3, 5), (8192,), (1,), (2, 8195), (64, 32)]  # one whole block, several with a ragged end, odd sizes
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
EMA_DECAY = 0.95


@pytest.fixture
def library(monkeypatch, device):
    """The compiled library for the tensors at hand."""
    if device == "cpu":
        monkeypatch.setenv("ADVGRPO_KERNELS_LIBRARY", str(cpu_build()))
    _csrc.library.cache_clear()
    if _csrc.library() is None:
        pytest.skip("built without ADVGRPO_BUILD_CUDA=1")
    yield
    _csrc.library.cache_clear()


class State:
    """Parameters, moments, averages and step; the same from the same seed."""

    def __init__(self, device, dtype=torch.float32, shapes=SHAPES):
        generator = torch.Generator().manual_seed(3)
        self.parameters = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.emas = [p.clone() for p in self.parameters]
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def grads(self, i):
        """Norms below and above the largest allowed, in turn."""
        generator = torch.Generator().manual_seed(100 + i)
        size = 1e-3 if i % 2 else 0.1
        return [(torch.randn(p.shape, generator=generator) * size).to(p) for p in self.parameters]

    def groups(self, grads):
        return self.parameters, grads, self.exp_avgs, self.exp_avg_sqs

    def tensors(self):
        return [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.emas, self.step]

    def library_step(self, grads, settings=SETTINGS):
        numbers = [settings["lr"], *settings["betas"], *list(settings.values())[2:], EMA_DECAY]
        return _multi_tensor_adamw_op(*self.groups(grads), self.emas, self.step, numbers, True)

    def reference_step(self, grads):
        return multi_tensor_adamw_ref(*self.groups(grads), self.step, **SETTINGS, emas=self.emas, ema_decay=EMA_DECAY)


def test_reference_has_the_bits_of_torch():
    """clip_grad_norm_, torch.optim.AdamW and torch._foreach_lerp_, ten steps."""
    state, other = State("cpu"), State("cpu")
    parameters = [p.clone().requires_grad_() for p in other.parameters]
    adamw = {key: SETTINGS[key] for key in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, **adamw)
    for i in range(10):
        grads = state.grads(i)
        norm = multi_tensor_adamw(*state.groups(grads), state.step, **SETTINGS, emas=state.emas, ema_decay=EMA_DECAY)
        assert all(torch.equal(g, again) for g, again in zip(grads, state.grads(i)))  # left unclipped
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad
        assert norm == torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["max_grad_norm"])
        optimizer.step()
        torch._foreach_lerp_(other.emas, [p.detach() for p in parameters], 1 - EMA_DECAY)
    assert state.step == 10
    assert all(torch.equal(p, q) for p, q in zip(state.parameters, parameters))
    assert all(torch.equal(p, q) for p, q in zip(state.emas, other.emas))
    for parameter, m, v in zip(parameters, state.exp_avgs, state.exp_avg_sqs):
        assert torch.equal(m, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(v, optimizer.state[parameter]["exp_avg_sq"])


def test_pytorchs_step_reads_nothing_on_the_host_and_can_be_captured():
    """What runs on a GPU without csrc/: the emulator of CUDA graphs raises for whatever needs the host."""
    state, other = State("cpu"), State("cpu")
    grads, norms = state.grads(0), []
    replay = EmulatedGraphs().capture(lambda: state.reference_step(grads))  # as in the op, which hides what it calls
    for i in range(5):
        for grad, new in zip(grads, state.grads(i)):
            grad.copy_(new * (math.nan if i == 2 else 1.0))  # decided on the device, in the graph that there is
        norms.append((replay().clone(), other.reference_step(grads)))
    assert all(torch.equal(own, theirs) for own, theirs in norms if theirs.isfinite())
    assert norms[2][0].isnan()
    assert state.step == 4
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), other.tensors()))


def test_library_is_within_the_error_budget(device, library):
    """Five steps against float64. Adam's first steps are lr·sign(g): only v and the later steps see magnitudes."""
    got, eager, gold = State(device), State(device), State(device, torch.float64)
    for i in range(5):
        grads = got.grads(i)
        norm, eager_norm = got.library_step(grads), eager.reference_step(grads)
        gold_norm = gold.reference_step([g.double() for g in grads])
        assert abs(norm.double() - gold_norm) <= 2 * abs(eager_norm.double() - gold_norm) + 1e-7 * gold_norm
    assert got.step == 5
    for value, reference, true in zip(got.tensors()[:-1], eager.tensors(), gold.tensors()):
        budget = 2 * (reference.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (value.double() - true).abs().max() <= budget


def test_library_is_deterministic_and_sees_new_gradients_in_the_same_storage(device, library):
    one, two = State(device), State(device)
    grads = one.grads(0)
    for i in range(3):
        for grad, new in zip(grads, one.grads(i)):
            grad.copy_(new)
        one.library_step(grads)
        two.library_step(two.grads(i))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors()))


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.3, 0.4), (0.0, 0.0)])
def test_weights_of_any_size_have_the_bits_of_torch(betas):
    """torch.lerp has two forms, one for weights from a half on."""
    state, other = State("cpu"), State("cpu")
    parameters = [p.clone().requires_grad_() for p in other.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=betas, eps=1e-6, weight_decay=0.0)
    for i in range(3):
        grads = state.grads(i)
        multi_tensor_adamw(*state.groups(grads), state.step, lr=1e-2, betas=betas, eps=1e-6, weight_decay=0.0)
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(state.parameters, parameters))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, compiled, device, request):
    if compiled:
        request.getfixturevalue("library")
    state, before = State(device), State(device)
    grads = state.grads(0)
    grads[3].view(-1)[-1] = bad
    norm = state.library_step(grads) if compiled else state.reference_step(grads)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))


def test_library_without_averages_and_without_clipping(device, library):
    state, reference = State(device), State(device)
    settings = {**SETTINGS, "max_grad_norm": math.inf}
    state.emas = []
    state.library_step(state.grads(0), settings)
    multi_tensor_adamw_ref(*reference.groups(reference.grads(0)), reference.step, **settings)
    for got, expected in zip(state.parameters, reference.parameters):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_library_takes_tensors_that_are_not_16_byte_aligned(device, library):
    shapes = [(4099,)]
    state, reference = State(device, shapes=shapes), State(device, shapes=shapes)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "emas"):
        (tensor,) = getattr(state, name)
        shifted = torch.empty(4100, device=device)[1:]
        setattr(state, name, [shifted.copy_(tensor)])
    state.library_step(state.grads(0))
    reference.reference_step(reference.grads(0))
    for got, expected in zip(state.tensors(), reference.tensors()):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_opcheck_and_compile(device):
    state = State(device, shapes=[(4,), (2, 3)])
    numbers = [1e-3, 0.9, 0.99, 1e-8, 0.01, 1.0, 0.9]
    args = (*state.groups(state.grads(0)), state.emas, state.step, numbers, False)
    torch.library.opcheck(_multi_tensor_adamw_op, args)

    def step(*grads):
        return multi_tensor_adamw(*state.groups(grads), state.step, lr=1e-3, backend="torch") * 2

    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*state.grads(0))
    torch.testing.assert_close(norm, step(*state.grads(0)))


@pytest.mark.gpu
def test_captured_graph_counts_steps_on_the_device():
    state, eager = State("cuda"), State("cuda")
    grads = state.grads(0)
    settings = {**SETTINGS, "emas": state.emas, "ema_decay": EMA_DECAY, "backend": "cuda"}
    multi_tensor_adamw(*state.groups(grads), state.step, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multi_tensor_adamw(*state.groups(grads), state.step, **settings)
    graph.replay()
    for _ in range(2):
        multi_tensor_adamw(*eager.groups(grads), eager.step, **{**settings, "emas": eager.emas})
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), eager.tensors()))


def test_parameters_that_require_gradients_are_stepped_in_place(device):
    state = State(device, shapes=[(3,)])
    parameter = state.parameters[0].requires_grad_()
    before = parameter.detach().clone()
    multi_tensor_adamw(*state.groups(state.grads(0)), state.step, lr=0.1)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not torch.equal(parameter, before)


def test_bad_arguments_raise(device):
    state = State(device, shapes=[(4,), (2, 3)])
    grads, step = state.grads(0), state.step
    with pytest.raises(ValueError, match="want lists of one length"):
        multi_tensor_adamw(state.parameters, grads[:1], state.exp_avgs, state.exp_avg_sqs, step, lr=0.1)
    with pytest.raises(ValueError, match=r"grads\[1\] must be contiguous float32 \[2, 3\]"):
        multi_tensor_adamw(*state.groups([grads[0], grads[1].half()]), step, lr=0.1)
    with pytest.raises(ValueError, match="step must be an int64 scalar"):
        multi_tensor_adamw(*state.groups(grads), step.float(), lr=0.1)
    with pytest.raises(ValueError, match="out of range"):
        multi_tensor_adamw(*state.groups(grads), step, lr=0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="ema_decay must be in"):
        multi_tensor_adamw(*state.groups(grads), step, lr=0.1, emas=state.emas, ema_decay=1.0)
    cpu = State("cpu", shapes=[(4,)])
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        multi_tensor_adamw(*cpu.groups(cpu.grads(0)), cpu.step, lr=0.1, backend="cuda")
