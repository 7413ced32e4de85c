"""What is said where nothing fits, or where memory has run out.

Bugs planted in a copy, each seen red: remedies not tried; an adversary counted for supervised fine-tuning; order
changed; the smallest micro-batch instead of the next; GiB read as GB; the ceiling not named.
"""

import pytest
import torch

from advgrpo.config import LORA_TARGETS
from advgrpo.errors import UserError
from advgrpo.plan.advice import advice
from advgrpo.plan.memory import plan, plan_as_configured


def test_what_does_not_fit_says_which_setting_would(paper):
    refused = plan(paper, 24)
    assert not refused.fits
    assert "24 GB: does not fit" in refused.line()
    assert "set adversary.cached_patches = 64" in refused.remedies
    paper.adversary.cached_patches = 64
    assert plan(paper, 24).fits
    hopeless = plan(paper, 4)
    assert len(hopeless.remedies) == 1
    assert "no setting makes it fit" in hopeless.remedies[0]
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    together = plan(paper, 24)
    assert not together.fits
    assert together.remedies


def test_advice_names_the_knobs_in_order_with_this_runs_values(paper):
    error = torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total capacity of 22.03 GiB of which 1 GiB is left"
    )
    text = advice(error, paper, processes=8)
    order = ["1. rollout.micro_batch = 4 instead of 8", "2. model.gradient_checkpointing = true instead of false"]
    order += ["3. model.offload = text_vae instead of none", "4. adversary.cached_patches = 64 instead of 256"]
    order += ["5. rollout.prompts_per_iteration = 12 instead of 48"]
    order += ["model.lora.blocks = 2 instead of all"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "Tried to allocate 1.20 GiB" in text
    assert plan(paper, 22.03 * 2**30 / 1e9, processes=8).line() in text
    paper.rollout.micro_batch, paper.model.gradient_checkpointing = 1, True
    text = advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)
    assert "micro_batch" not in text
    assert "gradient_checkpointing" not in text
    assert "1. model.offload = text_vae instead of none" in text
    assert "python -m advgrpo.plan" in text


def test_models_that_are_not_counted_are_named(paper):
    assert plan(paper, 80).uncounted == ()
    paper.adversary.kind, paper.adversary.backbone = "siglip", "someone/siglip"
    paper.rewards.pickscore.weight, paper.rewards.pickscore.path = 1.0, "someone/clip"
    chosen = plan(paper, 80)
    named = "adversary.backbone = someone/siglip, rewards.pickscore.path = someone/clip"
    assert f"not counted: {named}" in chosen.line()
    assert not any("DINO" in c.name for c in chosen.components)
    assert "cached_patches" not in advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)


def test_supervised_fine_tuning_loads_no_adversary(paper):
    paper.update.objective = "sft"
    chosen = plan(paper, 80)
    assert chosen.uncounted == ()
    assert not any("DINO" in c.name for c in chosen.components)
    assert "dinov2" not in advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)


@pytest.mark.weekly
def test_sharding_is_proposed_where_it_can_be_done(paper):
    """By several processes, and not beside what it refuses."""
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    remedy = "set model.shard_base = blocks"
    assert remedy in plan(paper, 24, processes=8).remedies
    assert not any("shard_base" in each for each in plan(paper, 24).remedies)
    paper.model.sequence_parallel = 2
    assert remedy in plan(paper, 24, processes=8).remedies
    paper.model.base_precision = "fp8"
    assert remedy not in plan(paper, 24, processes=8).remedies
    paper.model.sequence_parallel = 1
    assert remedy in plan(paper, 24, processes=8).remedies
    paper.rollout.precision = "fp8"  # of which each process would have a copy
    assert remedy not in plan(paper, 24, processes=8).remedies
    paper.model.shard_base = "blocks"
    assert "set rollout.precision = model" in plan(paper, 24, processes=8).remedies


def test_a_whole_copy_is_proposed_where_it_fits(paper):
    """Beside a base in parts that is not sampled from one already, and that our forward can run."""
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    said = "rollout.precision = fp8 fits as well, peak"
    assert said not in plan(paper, 80, processes=8).line()
    paper.model.shard_base = "blocks"
    assert said in plan(paper, 80, processes=8).line()
    assert said not in plan(paper, 24, processes=8).line()
    assert said not in plan(paper, 80).line(), "one process gathers nothing"
    paper.model.lora.targets = ("norm1.linear",)
    assert said not in plan(paper, 80, processes=8).line()
    paper.model.lora.targets, paper.model.sequence_parallel = LORA_TARGETS, 2
    assert said not in plan(paper, 80, processes=8).line(), "a copy computes all tokens"
    paper.model.sequence_parallel, paper.rollout.precision = 1, "fp8"
    assert said not in plan(paper, 80, processes=8).line()


def test_sequence_groups_are_proposed_where_nothing_less_fits(large_images):
    """Parts alone where they do, both where only both do, and then the fewest processes to an image."""
    config = large_images
    assert plan(config, 24, processes=8).remedies == ("set model.shard_base = blocks",)
    assert plan(config, 21, processes=8).remedies == ("set model.sequence_parallel = 2, model.shard_base = blocks",)
    config.model.shard_base = "blocks"
    remedies = plan(config, 21, processes=8).remedies
    assert "set model.sequence_parallel = 2" in remedies
    assert not any("sequence_parallel = 4" in each for each in remedies), "fewer do"
    config.model.sequence_parallel = 2
    assert plan(config, 21, processes=8).fits
    config.model.sequence_parallel, config.fast = 1, False
    assert not any("sequence_parallel" in each for each in plan(config, 21, processes=8).remedies)


def test_what_is_advised_to_processes_of_a_base_in_parts_is_accepted(paper):
    paper.model.shard_base, paper.update.minibatches, paper.fast = "blocks", 1, False
    rollout = paper.rollout
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 16, 3, 3  # 16 micro-batches
    assert not any("prompts_per_iteration" in remedy for remedy in plan(paper, 8, processes=16).remedies)
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 1, 12, 6
    said = advice(RuntimeError("out of memory"), paper, processes=2)
    assert "rollout.micro_batch = 3 instead of 6" in said  # 4 would be three pieces
    assert "fast = true" not in said  # diffusers' forward it is
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 3, 3, 4
    with pytest.raises(UserError, match="2 processes run every forward together"):
        plan(paper, 80, processes=2)
    rollout.micro_batch = 3
    with pytest.raises(UserError, match="5 processes run every forward together"):
        plan_as_configured(paper, 80, processes=5)
