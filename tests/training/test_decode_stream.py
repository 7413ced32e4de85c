"""Images decoded on a side stream while the next ones are sampled (`rollout.decode_stream`), on emulated streams.

Planted bugs that turned this file red: decoding that does not wait for the sampler; scores that do not wait for the
decoding; latents or images that are not recorded; rewards begun on the main stream; a trajectory whose latents are
handed out in the graph's own memory; decoding that is joined after every micro-batch.
"""

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.runtime import streams
from advgrpo.runtime.streams import CurrentStream, stream_of
from bench import contenders
from bench.random_policy import SMALL
from tests.graph_emulator import EmulatedGraphs
from tests.stream_emulator import Race, Streams

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")
CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch):
    """A CPU that has streams."""
    monkeypatch.setattr(streams, "HAVE_STREAMS", ("cpu",))
    for module in ("gaussian_step", "_gaussian", "patches"):  # as on a GPU
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)
    return Streams()


def trainer_with(folder, stream: str, *, graphs: bool = True, **changes):
    rollout = {"decode_stream": stream, "prompts_per_iteration": 4, "num_steps": 3}
    settings = configuration.merge(configuration.merge(contenders.SMALL_SETTINGS, {"rollout": rollout}), changes)
    backend = EmulatedGraphs() if graphs else None
    trainer = contenders.random(folder, "cpu", SMALL, graphs=backend, **settings).trainer
    for group in trainer.objective.scorer.adversary.optimizer.param_groups:
        group["fused"] = True  # as on a GPU: the plain one reads its step count on the host
    return trainer


def numbers(row: dict) -> dict:
    return {name: value for name, value in row.items() if "second" not in name}


@pytest.mark.parametrize("graphs", [True, pytest.param(False, marks=pytest.mark.weekly)])
def test_a_run_has_the_numbers_of_one_stream_and_no_race(emulated, graphs, tmp_path):
    changes = {"update": {"learning_rate": 1e-3}}
    plain = trainer_with(tmp_path / "main", "main", graphs=graphs, **changes)
    assert isinstance(plain.objective.decode_stream, CurrentStream)
    with emulated:
        beside = trainer_with(tmp_path / "side", "side", graphs=graphs, **changes)
        found = beside.iterate()  # two micro-batches eager, the third captured, the fourth replayed
    assert emulated.operators["side 1"] > 0
    assert beside.objective.sampler.captures == graphs
    assert numbers(found) == numbers(plain.iterate())


def test_the_sampler_waits_for_no_decoding(emulated, tmp_path, monkeypatch):
    """The main stream knows nothing of the side stream's work from a rollout's first to its last micro-batch."""
    with emulated:
        objective = trainer_with(tmp_path, "side").objective
    side, known = objective.decode_stream._stream, []

    def begin(drawn):
        assert emulated.current is side
        drawn.images.sum()  # as workers read them
        known.append((emulated.main.known[side], side.known[side]))

    monkeypatch.setattr(objective.scorer, "begin", begin)
    with emulated:
        rollout = objective.rollout(objective.table(0), 0)
    assert len(known) == len(rollout.micro_batches) > 2
    assert {waited for waited, _ in known} == {0}
    assert emulated.main.known[side] == side.known[side] > 0


def test_the_emulator_sees_who_has_not_waited():
    a, b = torch.ones(2), torch.ones(2)
    with Streams() as found:
        with torch.cuda.stream(torch.cuda.Stream()):
            b.mul_(a)
        with pytest.raises(Race, match="mul reads on main what was written on side 1, without waiting"):
            _ = b * 2
        with pytest.raises(Race, match="add_ writes on main what was read on side 1"):
            a.add_(1)
    assert found.operators == {"side 1": 1, "main": 2}


def test_the_emulator_sees_what_was_not_recorded():
    def run() -> None:
        with Streams() as found:
            made, side = torch.ones(2) + 1, torch.cuda.Stream()
            side.wait_stream(found.main)
            with torch.cuda.stream(side):
                made.mul_(2)
            del made

    with pytest.raises(Race, match="mul_ on side 1 used a tensor of main that was not recorded"):
        run()


def test_a_device_without_streams_decodes_in_place():
    assert isinstance(stream_of("side", CPU), CurrentStream)
    assert isinstance(stream_of("main", CPU), CurrentStream)
