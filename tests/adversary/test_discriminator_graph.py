"""The discriminator update as a captured graph equals the eager one to the bit, on the emulator of `graph_emulator.py`.

Bugs planted in a copy, each seen red: static buffers holding an update's rows instead of copying them; the
loss returned without a copy; graphs kept when a checkpoint is loaded; graphs captured although two processes share the
work; the step's settings taken from the checkpoint.
"""

import copy

import pytest
import torch

from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.discriminator_adam import DiscriminatorAdam
from advgrpo.adversary.pickscore import PickScoreAdversary
from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer
from advgrpo.config import AdversarySection
from advgrpo.runtime import rng
from advgrpo.runtime.graphs import CaptureError
from advgrpo.types import Features
from tests.graph_emulator import EmulatedGraphs
from tests.vision_models import PROMPTS, random_images, write_clip

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")

TOTAL = 8


def make_trainer(unit_backbone: str, graphs=None, world_size: int = 1, **changes) -> DiscriminatorTrainer:
    settings = {"image_size": 32, "dtype": "float32", "hidden_size": 16, "num_patches": 8, "batch_size": 6}
    section = AdversarySection(backbone=unit_backbone, replay_capacity=12, **settings, **changes)
    adversary = build_adversary(section, device=torch.device("cpu"), seed=0)
    # as on a GPU, where the step's count lives in device memory
    adversary.optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-2, betas=(0.5, 0.999), fused=True)
    return DiscriminatorTrainer(adversary, reduce=lambda t: None, rank=0, world_size=world_size, graphs=graphs)


def make_batch(iteration: int) -> DiscriminatorBatch:
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.randn(2, TOTAL, 65, 64, generator=generator)
    sides = [Features({"cls": side[:, 0], "patches": side[:, 1:]}) for side in (tokens[0], tokens[1] + 0.1)]
    return DiscriminatorBatch(torch.randperm(TOTAL, generator=generator), *sides, total=TOTAL)


def run(trainer: DiscriminatorTrainer, iterations: range, updates: int = 4) -> torch.Tensor:
    losses = []
    for iteration in iterations:
        batch = make_batch(iteration)
        losses.append(trainer.train(batch, iteration, updates))
        trainer.add_to_replay(batch, iteration, lambda t: t)
    return torch.cat(losses)


def assert_same(a: DiscriminatorTrainer, b: DiscriminatorTrainer) -> None:
    for name, tensor in a.adversary.state_dict().items():
        assert torch.equal(tensor, b.adversary.state_dict()[name]), name
    for name, tensor in a.replay.tensors.items():
        assert torch.equal(tensor, b.replay.tensors[name]), name
    assert (a.replay.size, a.replay.cursor) == (b.replay.size, b.replay.cursor)
    for p, q in zip(a.adversary.parameters(), b.adversary.parameters()):
        for name, value in a.adversary.optimizer.state[p].items():
            assert torch.equal(value, b.adversary.optimizer.state[q][name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize": "always"},
        {"patch_sampling": "with_replacement"},
        {"reward_ema": 0.9, "gradient_penalty": 0.1, "heads": 2},
        {"reward_ema": 0.9, "spectral_norm": True},
    ],
)
def test_captured_updates_equal_eager_ones_while_the_replay_buffer_fills_and_wraps(unit_backbone, changes, monkeypatch):
    # given indices are looked at on a CPU, where that is free; a captured step on a GPU does not
    monkeypatch.setattr("advgrpo_kernels.ops.patches.can_look_at", lambda tensor: False)
    backend = EmulatedGraphs()
    eager = make_trainer(unit_backbone, **changes)
    captured = make_trainer(unit_backbone, backend, **changes)
    iterations = range(8)  # 2 images each: 12 slots are full after the sixth
    assert torch.equal(run(eager, iterations), run(captured, iterations))
    assert_same(eager, captured)
    assert len(captured.replay) == 12
    assert captured.captured_update.captures == 1  # replayed negatives take the place of fresh ones
    assert backend.replays == 4 * 8 - 2  # all but the warm-up calls


def test_captured_updates_of_trainable_vision_layers_equal_eager_ones(tmp_path):
    """PickScore's adversary: attention, layer norms and text embeddings inside the graph."""
    folder, trainers = write_clip(tmp_path / "clip"), []
    for graphs in (None, EmulatedGraphs()):
        adversary = PickScoreAdversary(AdversarySection(replay_capacity=8, batch_size=6), seed=0, path=folder)
        adversary.optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-3, fused=True)
        trainers.append(DiscriminatorTrainer(adversary, reduce=lambda t: None, rank=0, world_size=1, graphs=graphs))
    losses = [[], []]
    for iteration in range(3):
        sides = [trainers[0].adversary.features(random_images(n)[-8:], PROMPTS[:2] * 4) for n in (8, 16)]
        batch = DiscriminatorBatch(torch.arange(8), *sides, total=8)
        for trainer, seen in zip(trainers, losses):
            trainer.adversary.centre(0.1 * iteration, 0.2)  # a graph captured before reads it
            seen.append(trainer.train(batch, iteration, 3))
            trainer.add_to_replay(batch, iteration, lambda t: t)
    assert torch.equal(*(torch.cat(seen) for seen in losses))
    assert_same(*trainers)
    assert trainers[1].captured_update.captures == 1


def test_a_loaded_checkpoint_continues_under_new_graphs(unit_backbone):
    eager, captured = make_trainer(unit_backbone), make_trainer(unit_backbone, EmulatedGraphs())
    for trainer in (eager, captured):
        run(trainer, range(3))
        head = {name: t.clone() for name, t in trainer.adversary.state_dict().items()}
        optimizer = copy.deepcopy(trainer.adversary.optimizer.state_dict())
        tensors, counters = trainer.replay.state()
        tensors = {name: t.clone() for name, t in tensors.items()}
        run(trainer, range(3, 5))
        trainer.adversary.load_state_dict(head)
        trainer.adversary.optimizer.load_state_dict(optimizer)
        trainer.load(tensors, counters)
    assert torch.equal(run(eager, range(3, 6)), run(captured, range(3, 6)))
    assert_same(eager, captured)


def test_a_head_that_begins_anew_goes_on_in_the_graphs_that_there_are(unit_backbone):
    eager, captured = (make_trainer(unit_backbone, graphs, reward_ema=0.9) for graphs in (None, EmulatedGraphs()))
    losses = [[], []]
    for trainer, seen in zip((eager, captured), losses):
        seen.append(run(trainer, range(3)))
        trainer.adversary.restart(1)
        seen.append(run(trainer, range(3, 5)))
    assert torch.equal(*(torch.cat(seen) for seen in losses))
    assert_same(eager, captured)
    assert captured.captured_update.captures == 1


@pytest.mark.parametrize("changes", [{}, {"gradient_penalty": 0.1, "heads": 2}])
def test_several_processes_capture_gradients_and_step_and_sum_between(unit_backbone, changes, monkeypatch):
    """Shares of a draw differ from update to update, yet one graph of each half serves all of them."""
    monkeypatch.setattr("advgrpo_kernels.ops.patches.can_look_at", lambda tensor: False)
    backend, sums = EmulatedGraphs(), []
    eager, captured = (make_trainer(unit_backbone, graphs, world_size=2, **changes) for graphs in (None, backend))
    captured.reduce = lambda tensors: sums.append(len(tensors))
    runs = []
    for trainer in (eager, captured):
        batches = [make_batch(iteration) for iteration in range(6)]
        for batch in batches:  # of rank 0, which holds the first half
            batch.image_ids = torch.arange(TOTAL // 2)
            batch.reference, batch.generated = (
                side.rows(torch.arange(TOTAL // 2)) for side in (batch.reference, batch.generated)
            )
        losses = []
        for iteration, batch in enumerate(batches):
            losses.append(trainer.train(batch, iteration, 3))
            trainer.add_to_replay(batch, iteration, lambda t: t)
        runs.append(torch.cat(losses))
    assert torch.equal(*runs)
    assert_same(eager, captured)
    assert sums == [len(captured.adversary.parameters()) + 1] * 6 * 3
    assert (captured.captures, captured.captured_update.captures) == (3, 0)  # with and without replay; the step
    assert backend.replays == 2 * 6 * 3 - 6


@pytest.mark.parametrize("processes", [2, 8, 64])
def test_every_process_has_the_same_shapes_in_every_update(unit_backbone, processes, monkeypatch):
    """So the Triton kernels are compiled once, whatever the number of processes (58 variants without)."""
    trainer, counts = make_trainer(unit_backbone, world_size=processes, replay_share=0.25), set()
    trainer.config.batch_size = 256
    monkeypatch.setattr(trainer.replay, "size", 12)
    sides = Features({"cls": torch.zeros(768, 1)}), Features({"cls": torch.zeros(768, 1)})
    for rank in range(processes):
        trainer.rank, own = rank, 768 // processes
        batch = DiscriminatorBatch(torch.arange(rank * own, (rank + 1) * own), *sides, total=768)
        for iteration in range(640 // processes):
            draw = trainer._draw(batch, iteration, 0)
            counts.add(draw.counts)
            counted = draw.counted.split(draw.counts)
            assert [int(one.sum()) for one in counted] == [
                int(torch.isin(batch.image_ids, order).sum())
                for order in (drawn_of(trainer, iteration), drawn_of(trainer, iteration)[64:])
            ] + [len(range(rank, 64, processes))]
    assert len(counts) == 1


def drawn_of(trainer: DiscriminatorTrainer, iteration: int) -> torch.Tensor:
    generator = rng.generator(trainer.seed, "head_batch", iteration, 0)
    return torch.randperm(768, generator=generator)[:256]


def test_an_optimizer_that_waits_for_the_device_is_named(unit_backbone):
    trainer = make_trainer(unit_backbone, EmulatedGraphs())
    trainer.adversary.optimizer = torch.optim.Adam(trainer.adversary.parameters())
    with pytest.raises(
        CaptureError, match=r"discriminator update cannot be captured as a CUDA graph: .* Turn graphs off with"
    ):
        run(trainer, range(1))


def test_head_adam_keeps_this_machines_way_of_stepping():
    def optimizer(kind=DiscriminatorAdam, **flags):
        parameter = torch.nn.Parameter(torch.ones(3))
        made = kind([parameter], lr=0.1, betas=(0.5, 0.9), **flags)
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        made.step()
        return made

    stored, mine = optimizer(torch.optim.Adam, fused=True), optimizer()
    stored.param_groups[0].update(capturable=True, lr=0.2)  # as a checkpoint of a GPU has it
    mine.load_state_dict(stored.state_dict())
    group = mine.param_groups[0]
    assert (group["fused"], group["capturable"], group["lr"]) == (None, False, 0.2)
    mine.step()
    assert mine.state[group["params"][0]]["step"] == 2
