"""Captured functions: what a replay sees, what it does not, and what a capture refuses.

Everything runs on the emulator of `graph_emulator.py`, and on CUDA graphs as well where there is a GPU.

Bugs planted in a copy, each seen red: a new key replays the old graph; warm-up calls run twice; static buffers rebound
instead of filled; one static buffer per name whatever the shape; the emulator leaving a capture's effects in place; a
replay that does not poison the other graphs of the pool; `clear` keeping the graphs.
"""

import pytest
import torch

from advgrpo.errors import RunFailure
from advgrpo.runtime.graphs import CapturedFunction, CaptureError, CudaGraphs, StaticBuffers
from advgrpo_kernels import philox_normal
from tests.graph_emulator import EmulatedGraphs


@pytest.fixture(
    params=["emulator", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def backend(request):
    return EmulatedGraphs() if request.param == "emulator" else CudaGraphs(torch.device("cuda"))


@pytest.fixture
def where(backend) -> torch.device:
    return getattr(backend, "device", torch.device("cpu"))


class Step:
    """A sampler's step in miniature: weights, input, seed and step counter in device memory, two layers of autograd."""

    def __init__(self, device: torch.device):
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(6, 6, generator=generator).to(device)
        self.x = torch.randn(4, 6, generator=generator).to(device)
        self.seed = torch.tensor([11], device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.table = torch.linspace(0.1, 1.0, 10, device=device)
        self.ids = torch.arange(4, device=device)
        self.out = torch.zeros(4, 6, device=device)
        self.scale = 2.0

    def __call__(self) -> None:
        noise = philox_normal((4, 6), seed=self.seed, sample_ids=self.ids, step=self.counter)
        level = self.table.index_select(0, self.counter.reshape(1))
        self.out.copy_(torch.tanh(self.x @ self.weight) * self.scale + level * noise)
        self.counter += 1

    def change(self, call: int) -> None:
        """In place, as optimizer steps and new prompts do."""
        self.weight.mul_(0.9)
        self.x.add_(0.1 * call)
        if call % 3 == 2:
            self.seed.add_(1)
            self.counter.zero_()


def outcomes(step: Step, call, calls: int = 9) -> list[torch.Tensor]:
    results = []
    for number in range(calls):
        call()
        results.append(step.out.clone())
        step.change(number)
    return results


def test_replays_see_weights_inputs_seeds_and_counters_change_in_place(backend, where):
    eager, captured = Step(where), Step(where)
    function = CapturedFunction(captured, name="step", backend=backend)
    for expected, got in zip(outcomes(eager, eager), outcomes(captured, function)):
        assert torch.equal(expected, got)
    assert function.captures == 1


def test_a_python_number_is_frozen_and_a_rebound_tensor_is_not_seen(backend, where):
    for stale in ("scale", "x"):
        eager, captured = Step(where), Step(where)
        function = CapturedFunction(captured, name="step", backend=backend)
        for _ in range(3):
            eager(), function()
        for step in (eager, captured):
            setattr(step, stale, getattr(step, stale) * 1.5)
        eager(), function()
        assert not torch.equal(eager.out, captured.out)
        function(key="another")  # a number that selects something belongs in the key
        function(key="another")
        function(key="another")
        for _ in range(3):
            eager()
        assert torch.equal(eager.out, captured.out)


def test_a_capture_executes_nothing_and_warm_up_calls_are_real(backend, where):
    seen = []
    total = torch.zeros(3, device=where)

    def add():
        total.add_(1)
        seen.append(torch.zeros(3, device=where))

    function = CapturedFunction(add, name="add", backend=backend, warm_up_calls=2)
    for call in range(1, 6):
        function()
        assert total.tolist() == [call] * 3
    assert len(seen) == 3  # the function itself ran in two warm-up calls and one capture


def test_new_shapes_capture_once_and_old_graphs_stay_valid(backend, where):
    buffers = StaticBuffers(where, static=True)
    out = {}

    def double():
        x = buffers["x"]
        out.setdefault(x.shape, torch.zeros(x.shape, device=where)).copy_(x * 2)

    function = CapturedFunction(double, name="double", backend=backend, warm_up_calls=1)
    expected_captures = {1: 0, 2: 1}
    visits = {}
    for number, rows in enumerate([2, 2, 2, 5, 5, 2, 5, 3, 2, 5]):
        value = torch.full((rows, 3), float(number))
        buffers.fill("x", value)
        function(buffers.key())
        assert torch.equal(out[value.shape].cpu(), value * 2)
        visits[rows] = visits.get(rows, 0) + 1
        assert function.captures == sum(expected_captures.get(n, 1) for n in visits.values())


def test_clear_captures_again_after_storage_was_replaced(backend, where):
    step = Step(where)
    function = CapturedFunction(step, name="step", backend=backend)
    for _ in range(3):
        function()
    reference = Step(where)
    step.weight, reference.weight = (torch.eye(6, device=where) for _ in range(2))
    step.counter.zero_()
    step.x.copy_(reference.x)
    function.clear()
    for expected, got in zip(outcomes(reference, reference, 4), outcomes(step, function, 4)):
        assert torch.equal(expected, got)
    assert function.captures == 1


class Training:
    """Autograd and an optimizer inside one captured function."""

    def __init__(self, device: torch.device, **optimizer):
        generator = torch.Generator().manual_seed(9)
        made = (torch.randn(6, 4, generator=generator), torch.zeros(4))
        self.parameters = [torch.nn.Parameter(t.to(device)) for t in made]
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.05, **optimizer)
        self.x = torch.zeros(8, 6, device=device)
        self.losses = torch.zeros(12, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        weight, bias = self.parameters
        loss = torch.relu(1 - self.x @ weight - bias).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.index_copy_(0, self.number, loss.detach().reshape(1))
        self.number += 1


def test_gradients_and_adam_inside_a_graph_equal_eager_to_the_bit(backend, where):
    flags = {"fused": True, "capturable": where.type == "cuda"}
    runs = Training(where, **flags), Training(where, **flags)
    calls = runs[0], CapturedFunction(runs[1], name="training", backend=backend)
    for number in range(12):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        for run, call in zip(runs, calls):
            run.x.copy_(batch)
            call()
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert runs[0].losses[-1] < runs[0].losses[0]
    for eager, captured in zip(runs[0].parameters, runs[1].parameters):
        assert torch.equal(eager, captured)
        assert torch.equal(eager.grad, captured.grad)


def test_adam_that_reads_its_step_on_the_host_is_refused():
    run = Training(torch.device("cpu"))
    function = CapturedFunction(run, name="discriminator update", backend=EmulatedGraphs())
    function()
    function()
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(CaptureError, match="discriminator update cannot be captured as a CUDA graph: HostReadError"):
        function()
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters))


VALUES = torch.tensor([1.0, 0.0, 2.0])
READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "mask assignment": lambda x: x.__setitem__(x > 0, 1.0),
    "unique": lambda x: x.unique(),
    "constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "stateful draw": lambda x: x + torch.randn(3),
}


@pytest.mark.parametrize("read", READS)
def test_what_needs_the_host_is_refused_and_nothing_has_happened(read):
    state = VALUES.clone()

    def function():
        state.mul_(2)
        READS[read](state)

    captured = CapturedFunction(
        function, name="sampler", backend=EmulatedGraphs(), switch="fast.cuda_graphs = false", warm_up_calls=0
    )
    with pytest.raises(CaptureError) as error:
        captured()
    assert torch.equal(state, VALUES)
    assert str(error.value).startswith("sampler cannot be captured as a CUDA graph: HostReadError: ")
    assert "Turn graphs off with fast.cuda_graphs = false" in str(error.value)


def test_a_gpu_that_is_full_while_capturing_is_said_to_be_full():
    """Whoever catches it advises what to change; ending the capture fails as well, with an error that says less."""

    class Full(EmulatedGraphs):
        def capture(self, function):
            try:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            finally:
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        CapturedFunction(lambda: None, name="update step", backend=Full(), warm_up_calls=0)()
    assert issubclass(CaptureError, RunFailure)  # one line, no traceback


def test_results_last_until_another_graph_of_the_pool_runs():
    backend, x = EmulatedGraphs(), torch.ones(3)
    first = CapturedFunction(lambda: x * 2, name="first", backend=backend, warm_up_calls=0)
    second = CapturedFunction(lambda: x * 3, name="second", backend=backend, warm_up_calls=0)
    doubled = first()
    assert doubled.tolist() == [2.0] * 3
    assert second().tolist() == [3.0] * 3
    assert doubled.isnan().all()
    assert first() is doubled
    assert doubled.tolist() == [2.0] * 3


def test_without_a_backend_the_function_just_runs():
    calls = []
    function = CapturedFunction(lambda: calls.append(1) or len(calls), name="plain", backend=None)
    assert [function(key) for key in ("a", "a", "b", "a")] == [1, 2, 3, 4]
    assert function.captures == 0


def test_buffers_hold_the_tensor_itself_where_nothing_is_captured():
    x = torch.ones(3)
    held, copied = (StaticBuffers(torch.device("cpu"), static=static) for static in (False, True))
    for buffers in (held, copied):
        buffers.fill("x", x)
    assert held["x"] is x
    assert copied["x"] is not x
    first = copied["x"]
    copied.fill("x", x + 1)
    assert copied["x"] is first
    assert first.tolist() == [2.0] * 3
    assert held.key() == copied.key() == (("x", torch.Size([3]), torch.float32),)
