"""Weights in parts and tokens shared out, as they are planned."""

import contextlib
import copy
import itertools
import json

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.errors import UserError
from advgrpo.plan import known_models
from advgrpo.plan.estimate import PHASES, Estimate, Knobs
from advgrpo.plan.memory import plan
from advgrpo.policy.adapters import LoraAdapters
from advgrpo.policy.merged_copy import MergedCopy
from advgrpo.policy.sharding import BlockSharding
from advgrpo.policy.weights_in_parts import WeightsInParts


def test_a_sharded_base_is_planned(paper):
    """By diffusers' forward, whose activations are larger, and with nothing merged."""
    paper.model.path, paper.fast = "stabilityai/stable-diffusion-3.5-large", False
    knobs = Knobs(2, True)
    whole = {c.name: c.bytes for c in Estimate(paper, 8).components(knobs)}
    paper.fast, paper.model.shard_base = True, "blocks"
    parts = {c.name: c for c in Estimate(paper, 8).components(knobs)}
    share = parts.pop("share of the transformer").bytes
    gathered, training = parts.pop("gathered blocks, sampling"), parts.pop("gathered blocks, training")
    total = whole.pop("transformer")
    assert total / 8 <= share < 1.001 * total / 8
    assert gathered.bytes == pytest.approx(3 / 38 * total, rel=0.1)  # three blocks, and what is outside of them
    assert training.bytes == pytest.approx(2 / 38 * total, rel=0.2)
    assert (gathered.phases, training.phases) == (("sample",), ("update",))
    assert {name: c.bytes for name, c in parts.items()} == whole
    assert "transformer" in {c.name for c in Estimate(paper, 1).components(knobs)}  # one process has all of it


@pytest.mark.weekly
def test_a_base_in_parts_in_fp8_is_planned(paper):
    """Quantised layers take a byte, whole or in parts, and no second form of them is kept."""
    paper.model.shard_base = "blocks"
    name = "share of the transformer"
    plain = {c.name: c.bytes for c in Estimate(paper, 8).components(Knobs(2, True))}
    paper.model.base_precision = "fp8"
    quantised = {c.name: c.bytes for c in Estimate(paper, 8).components(Knobs(2, True))}
    inner = Estimate(paper, 8).weights.inner
    assert plain[name] - quantised[name] == pytest.approx(inner / 8, rel=0.01)
    assert quantised["gathered blocks, sampling"] < 0.9 * plain["gathered blocks, sampling"], "the first block stays"
    assert quantised.keys() - plain.keys() == {"an FP8 weight in the model's dtype"}
    alone = {c.name: c.bytes for c in Estimate(paper, 1).components(Knobs(2, True))}
    assert alone["transformer"] == pytest.approx(8 * quantised[name], rel=0.01)
    name = "an FP8 weight in the model's dtype"
    assert alone[name] == quantised[name]


def test_weights_trained_in_parts_are_planned_as_they_lie(paper, first_of_eight):
    """Beside the optimizer's, which has as many elements for each: weights, gradient, base."""
    paper.model.train, paper.model.dtype, paper.model.shard_base = "full", "float32", "blocks"
    planned = {c.name: c.bytes for c in Estimate(paper, 8).components(Knobs(2, True))}
    config = known_models.known_pipeline(paper.model.path).transformer
    made = WeightsInParts(
        copy.deepcopy(known_models._meta_transformer(json.dumps(config, sort_keys=True))), BlockSharding(first_of_eight)
    )
    trained = dict(made.parameters())
    held = sum(p.nbytes for p in trained.values())
    assert planned["share of the transformer"] == held == sum(p.grad.nbytes for p in trained.values())
    assert planned["frozen base beside the trained weights"] == sum(t.nbytes for t in made._base.values()) == held
    assert planned["gradient, Adam's moments, average, float32"] == 4 * held
    total = known_models.count_transformer(config, paper.model.lora).total
    assert made.parts.elements == total
    gathered = planned["gathered blocks, training"]  # of 24 blocks two with their gradients, and what is outside
    assert 4 * total * 4 / 24 < gathered < 4 * total * 6 / 24


def test_tokens_shared_out_are_planned(paper):
    """What is of tokens by their number, what a group draws by its share of the images, and what is judged by turns."""
    knobs = Knobs(8, False)
    alone = {c.name: c for c in Estimate(paper, 2).components(knobs)}
    paper.model.sequence_parallel = 4
    shared = {c.name: c for c in Estimate(paper, 8).components(knobs)}
    name = "activations saved for the backward"
    assert shared[name].bytes == pytest.approx(14 / 13 * alone[name].bytes / 4, rel=0.01)
    assert shared["sampler's forward"].bytes < alone["sampler's forward, in the CUDA graphs' pool"].bytes / 2
    assert shared["sampler's forward"].phases == ("sample",)  # no graph keeps it
    assert shared["transformer"].bytes == alone["transformer"].bytes
    name = "features of an iteration's images"
    assert shared[name].bytes == alone[name].bytes / 4
    with pytest.raises(UserError, match=r"model\.sequence_parallel = 4 puts .* into .* groups of 4, but there are 6"):
        plan(paper, 80, processes=6)


@pytest.mark.weekly
def test_a_whole_copy_beside_a_base_in_parts_is_planned(paper):
    """All of the model once, its inner linears as e4m3, on every process; forwards of ours outside of the window."""
    paper.model.shard_base = "blocks"
    knobs = Knobs(2, True)
    parts = {c.name: c for c in Estimate(paper, 8).components(knobs)}
    paper.rollout.precision = "fp8"
    copied = {c.name: c for c in Estimate(paper, 8).components(knobs)}
    copy_of_all = copied.pop("merged weights, whole")
    config = known_models.known_pipeline(paper.model.path).transformer
    network = copy.deepcopy(known_models.meta_transformer(config)).bfloat16()
    adapters = LoraAdapters(network, paper.model.lora.model_copy(update={"blocks": 2}), 0)  # which takes no room here
    made = MergedCopy(network, adapters, lambda module: contextlib.nullcontext(), "math")
    parts_of_rows = [[rows] if isinstance(rows, torch.Tensor) else rows for rows in made._rows.values()]
    held = [*itertools.chain(*parts_of_rows), *(layer.bias for layer in made.transformer.linears())]
    held += [layer.bias for _, layer in made.transformer._modulation]
    shared = "norm_out.linear.weight", "pos_embed.pos_embed"  # a shape alone, and the network's own table
    outside = [tensor for name, tensor in made.transformer._small.items() if name not in shared]
    assert copy_of_all.bytes == pytest.approx(sum(t.nbytes for t in (*held, *outside)), rel=1e-3)
    assert copy_of_all.phases == PHASES
    name = "sampler's forward"
    assert copied[name].bytes > parts[name].bytes  # the modulation of all steps
    assert {n: c.bytes for n, c in copied.items() if n != name} == {n: c.bytes for n, c in parts.items() if n != name}


def test_sequence_groups_with_blocks_in_parts_are_planned(large_images):
    """By our forward with nothing merged: tokens are divided by a group, weights by all processes."""
    config, knobs = large_images, Knobs(1, False)
    config.model.sequence_parallel = 4
    whole = {c.name: c.bytes for c in Estimate(config, 8).components(knobs)}
    config.model.shard_base = "blocks"
    parts = {c.name: c.bytes for c in Estimate(config, 8).components(knobs)}
    share, total = parts.pop("share of the transformer"), whole.pop("transformer")
    assert total / 8 < share < 1.02 * total / 8  # what is outside of blocks is whole
    gathered = 3 / 60 * total * 2 / 3  # three blocks of 60, without modulation, a third of them
    assert parts.pop("gathered blocks, sampling") == pytest.approx(gathered, rel=0.01)
    assert parts.pop("gathered blocks, training") == pytest.approx(gathered * 2 / 3, rel=0.5)
    assert whole.pop("merged weights") > 0
    assert parts == whole


def test_processes_of_a_base_in_parts_share_evenly_or_are_refused(paper):
    """Every forward is a collective: where one process had a micro-batch more, the others would not be there."""
    paper.model.shard_base = "blocks"
    assert configuration.unevenly_sharded(paper, 1) == ""
    assert configuration.unevenly_sharded(paper, 8) == ""
    refused = configuration.unevenly_sharded(paper, 7)
    assert "7 processes run every forward together" in refused
    assert "multiple of 7, take another number of processes, or model.shard_base = none" in refused
    paper.model.sequence_parallel = 2  # whose sequence groups share them
    assert configuration.unevenly_sharded(paper, 16) == ""
    refused = configuration.unevenly_sharded(paper, 14)
    assert "not shared evenly by their 7 sequence groups" in refused
    assert "multiple of 7, take another" in refused
    paper.model.sequence_parallel = 1
    for processes in (32, 64):
        micro = plan(paper, 141, processes=processes).knobs.micro_batch
        assert configuration.unevenly_sharded(paper, processes, micro_batch=micro) == ""
    with pytest.raises(UserError, match="5 processes run every forward together"):
        plan(paper, 141, processes=5)
    paper.model.shard_base = "none"
    assert configuration.unevenly_sharded(paper, 7) == ""
