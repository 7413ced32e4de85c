"""Memory planner: what is held when, what is chosen, and the command line.

Bugs planted in a copy, each seen red: the smallest of equally fast knobs; checkpointing that saves nothing; processes
ignored; a knob that training lacks; twice the card's size accepted; an adversary counted for supervised fine-tuning;
eight images decoded at once at every resolution; the gate of the first images forgotten; a stock decoder counted as
ours; exit code always 0.
"""

import re

import pytest
import torch

from advgrpo import config as configuration
from advgrpo import tiny
from advgrpo.errors import UserError
from advgrpo.plan import __main__ as command
from advgrpo.plan import known_models
from advgrpo.plan.activations import decode_bytes
from advgrpo.plan.estimate import PHASES, Estimate, Knobs
from advgrpo.plan.memory import plan, plan_as_configured, table
from advgrpo.plan.work import drawn_steps, micro_batches
from advgrpo.policy.fused.decoder import SD3_DECODER, decoded_at_once


def test_a_float32_decoder_is_counted_as_one(paper):
    counted = {}
    for dtype in ("auto", "bfloat16", "float32"):
        paper.model.decoder_dtype = dtype
        parts = plan(paper, 80).components
        counted[dtype] = {c.name: c.bytes for c in parts if c.name in ("image decoder", "decoding")}
    assert counted["auto"] == counted["bfloat16"]
    assert all(counted["float32"][name] > 1.5 * size for name, size in counted["bfloat16"].items())


def test_more_costs_more(paper):
    estimate = Estimate(paper, 8)

    def peak(micro, checkpointing, phase):
        held = estimate.components(Knobs(micro, checkpointing))
        return sum(c.bytes for c in held if phase in c.phases)

    for small, large in ((1, 2), (2, 4), (4, 8)):
        assert all(peak(small, False, p) <= peak(large, False, p) for p in PHASES)
        assert peak(small, False, "update") < peak(large, False, "update")
    assert peak(8, True, "update") < 0.55 * peak(8, False, "update")
    times = [estimate.relative_time(Knobs(m, c)) for m, c in ((8, False), (8, True), (1, False))]
    assert times[0] < times[1]
    assert times[0] < times[2]
    last = paper.model_copy(deep=True)
    last.model.lora.blocks = 2
    shape, every = Estimate(last, 8).shape, estimate.shape
    assert shape.saved_bytes(checkpointing=False) < every.saved_bytes(checkpointing=False) / 10
    last.rollout.precision = "fp8"
    assert Estimate(last, 8)._merged_bytes() > Estimate(paper, 8)._merged_bytes()  # every inner linear, not q, k, v


def test_the_settings_as_they_are_are_planned_as_well(paper):
    """Chosen or not: what a run that has begun is compared with."""
    as_set = plan_as_configured(paper, 24.0)
    assert as_set.knobs == Knobs(paper.rollout.micro_batch, paper.model.gradient_checkpointing)
    assert as_set.peak_gb == as_set.configured_gb
    assert not as_set.fits


def test_smaller_gpus_get_smaller_knobs(paper):
    plans = {size: plan(paper, size, processes=8) for size in (24, 40, 80, 141)}
    assert all(p.fits for p in plans.values())
    assert plans[80].knobs == plans[141].knobs == Knobs(8, False)
    assert plans[24].knobs.micro_batch < 8 or plans[24].knobs.gradient_checkpointing
    assert plans[24].peak_gb <= 24 < plans[24].configured_gb == plans[80].peak_gb
    for size in (80, 141):  # the same advice for both, and why
        assert plans[size].line().endswith("; rollout.micro_batch = 8, as set, is the largest tried")
    paper.rollout.micro_batch = 1
    assert plan(paper, 141, processes=8).knobs.micro_batch == 1  # never above what the user set


def test_what_lies_beside_the_weights_is_counted(paper):
    """The paper's preset on 8 GPUs by hand: 33.6 GB, with the table of positions and the stock VAE that stay loaded and
    reference features in bfloat16 (35.8 GB in float32)."""
    found = plan(paper, 80, processes=8)
    sizes = {c.name: c.bytes for c in found.components}
    assert sizes["table of positions"] == 384**2 * 1536 * 2
    assert sizes["stock VAE, float32"] == 83_819_683 * 4
    assert found.peak_gb == pytest.approx(33.6, rel=0.02)
    assert sizes["rows of a discriminator update"] == paper.adversary.batch_size * 4 * 1370 * 1024


@pytest.mark.parametrize(("processes", "images"), [(8, 96), (1, 768)])
def test_the_peak_is_within_5_percent_of_a_count_by_hand(paper, processes, images):
    """From shapes alone, in bytes: 1,369 patches and a class token of ViT-L, 1,024 + 205 tokens, 2 window steps."""
    weights = 2 * (2_243_171_520 + 191 * 1536**2 + 147_456 * 1536 + 304_368_640 + 49_545_475)  # bfloat16, with merged
    weights += 4 * (83_819_683 + 18_776_064 * (1 + 1 + 2 + 1 + 4))  # VAE; LoRA, gradient, moments, average, their copy
    references = 512 * 8 * 257 * 1024 * 2 + images * 257 * 1024 * 4  # bfloat16 in the cache, float32 beside the images
    of_images = images * 4 * (1370 * 1024 + 3 * 512**2 + 2 * 2 * 16 * 64**2)  # features, pixels, window latents
    of_a_block = 1229 * 1536 * 2 * (2 + 1 + 3 + 1 + 4)  # inputs of q k v, norm, q k v, attention, GELU's two of 4 D
    dual = 1024 * 1536 * 2 * 4
    activations = 16 * (24 * of_a_block + 13 * dual)  # 8 images and their unconditional halves
    alive = 16 * 1229 * 1536 * 2 * (7 + 13.3) + 10 * 16 * 499_200 * 2  # of a backward, of the sampler's pool
    total = 1.2e9 + 1.05 * (weights + references + of_images + activations + alive)
    assert plan(paper, 80, processes=processes).peak_gb == pytest.approx(total / 1e9, rel=0.05)


def test_a_side_stream_keeps_what_decoding_allocates(paper):
    """Images are decoded while the last ones are sampled, and the allocator gives the stream's memory to no other."""
    before = plan_as_configured(paper, 141)
    paper.rollout.decode_stream = "side"
    after = plan_as_configured(paper, 141)
    decoding = next(c.bytes for c in before.components if c.name == "decoding") / 1e9
    assert after.phase_gb("sample") > before.phase_gb("sample") + decoding
    assert after.phase_gb("update") == pytest.approx(before.phase_gb("update") + 1.05 * decoding)
    assert after.phase_gb("decode") == before.phase_gb("decode")


def test_kept_means_and_a_teacher_are_counted(paper):
    """Two steps of 96 images with 16·64·64 float32 each, and a third copy of the adapters."""
    plain = {c.name: c.bytes for c in plan(paper, 80, processes=8).components}
    paper.update.trust_region = "divergence"
    paper.update.kl_to, paper.update.teacher, paper.update.kl_weight = "teacher", "lora", 0.1
    sizes = {c.name: c.bytes for c in plan(paper, 80, processes=8).components}
    window = "images and window latents"
    assert sizes[window] - plain[window] == 96 * 2 * 4 * 16 * 64 * 64
    assert sizes["LoRA of the teacher, float32"] == 4 * 18_776_064
    assert set(sizes) - set(plain) == {"LoRA of the teacher, float32"}


def test_what_the_adversarys_head_looks_at_is_counted(paper):
    def sizes(**changes) -> dict[str, int]:
        config = paper.model_copy(deep=True)
        for name, value in {"replay_capacity": 16, **changes}.items():
            setattr(config.adversary, name, value)
        return {component.name: component.bytes for component in plan(config, 80, processes=8).components}

    plain, images, cached = sizes(), "features of an iteration's images", "reference features in memory, at most"
    assert plain["replay buffer"] == 16 * 4 * 1024 * (64 + 1)
    assert sizes(heads=3)["replay buffer"] == 16 * 4 * 1024 * (3 * 64 + 1)
    assert sizes(feature_layers=(12, 24))[images] == 2 * plain[images]
    assert sizes(augment="crop")[cached] == 4 * plain[cached]


def test_text_encoders_are_on_the_gpu_while_they_encode(paper):
    """Or one of their layers at a time, the table of T5's words at most, with their weights and the VAE's on the host.

    A card that cannot hold them all is told so.
    """
    paper.adversary.kind, paper.rewards.rule.weight, paper.model.resolution = "none", 1.0, 256
    needed = plan(paper, 12, processes=8)
    assert not needed.fits
    assert needed.peak_phase == "encode"
    assert "text encoders, until cached" in {c.name for c in needed.components}
    assert "set model.offload = text_vae" in needed.remedies
    every = 2 * (123_650_304 + 694_659_840 + 4_762_310_656)

    def placed(offload):
        paper.model.offload = offload
        return plan_as_configured(paper, 12, processes=8)

    paper.rollout.micro_batch = 1
    before, after, both = map(placed, ("none", "text", "text_vae"))
    assert not before.fits
    assert after.fits
    table_of_words = 2 * 32_128 * 4_096
    assert before.phase_gb("encode") - after.phase_gb("encode") == pytest.approx(1.05 * (every - table_of_words) / 1e9)
    mib = 2**20  # a power of two for each tensor: 128 for the three of T5's layers that are 80
    t5 = (24 * (4 * 32 + 3 * 128) + 256) * mib
    assert t5 < 1e9 * after.host_gb < t5 + 2 * 2 * (123_650_304 + 694_659_840)
    assert after.host_gb > 1.3 * every / 1e9
    assert "15.3 GB of pinned host memory for each process" in after.line()
    decoder, vae = 2 * 49_545_475, 4 * 83_819_683  # ours in bfloat16, and the stock one that nothing here encodes with
    assert (decoder + vae) / 1e9 < both.host_gb - after.host_gb < 2 * (decoder + vae) / 1e9
    assert after.phase_gb("update") - both.phase_gb("update") == pytest.approx(1.05 * (decoder + vae) / 1e9)
    assert after.phase_gb("decode") - both.phase_gb("decode") == pytest.approx(1.05 * vae / 1e9)


def test_every_knob_is_a_setting_of_training(paper):
    for each in re.findall(r"([\w.]+) = ", str(plan(paper, 80).knobs)):
        value = paper
        for name in each.split("."):
            assert name in type(value).model_fields, each
            value = getattr(value, name)


@pytest.mark.parametrize(
    ("changes", "fast", "images", "dtype"),
    [
        ({}, True, 8, torch.bfloat16),
        ({"resolution": 256}, True, 16, torch.bfloat16),  # 32 would be decoded at once, but a micro-batch has no more
        ({"resolution": 512, "decoder_dtype": "float32"}, True, 8, torch.float32),
        ({"resolution": 1024, "decoder_dtype": "float32"}, True, 2, torch.float32),
        ({"dtype": "float32"}, True, 8, torch.float32),
        ({}, False, 16, torch.float32),  # diffusers' decoder takes the whole micro-batch
        ({"train": "full"}, True, 16, torch.float32),
    ],
)
def test_decoding_is_counted_as_training_decodes(changes, fast, images, dtype, paper):
    paper.rollout.micro_batch, paper.fast = 16, fast
    for name, value in changes.items():
        setattr(paper.model, name, value)
    sizes = {c.name: c.bytes for c in Estimate(paper, 1).components(Knobs(16, False))}
    assert sizes["decoding"] == images * decode_bytes(SD3_DECODER, dtype, paper.model.resolution // 8)


def test_the_gate_of_a_runs_first_images_is_counted(paper):
    """At 1024 pixels two images are decoded at once in bfloat16, and the first two in float32 as well."""
    paper.model.resolution = 1024
    sizes = {c.name: c.bytes for c in Estimate(paper, 1).components(Knobs(8, False))}
    weights = 4 * known_models.count_decoder(SD3_DECODER)
    assert sizes["decoding"] == 2 * decode_bytes(SD3_DECODER, torch.float32, 128) + weights


def test_as_many_pixels_are_decoded_at_once_at_every_resolution():
    assert [decoded_at_once(side) for side in (256, 512, 640, 768, 1024, 2048)] == [32, 8, 5, 3, 2, 1]


def test_large_model_on_40_gb_checkpoints(paper):
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    chosen = plan(paper, 40, processes=8)
    assert chosen.fits
    assert chosen.knobs.gradient_checkpointing or chosen.knobs.micro_batch < 8
    assert "MemoryPlan" not in chosen.line()
    assert "peak" in chosen.line()
    assert "estimated" in chosen.line()


def test_micro_batches_are_those_the_config_check_accepts(paper):
    paper.data.prompts = paper.data.references = "somewhere"
    for prompts, group, micro in ((48, 16, 8), (48, 12, 24), (48, 16, 32), (4, 16, 16), (3, 16, 16)):
        paper.rollout.prompts_per_iteration = prompts
        paper.rollout.group_size, paper.rollout.micro_batch = group, micro
        accepted = []
        for value in range(1, micro + 1):
            changed = paper.model_copy(deep=True)
            changed.rollout.micro_batch = value
            try:
                configuration.check(changed)
                accepted.append(value)
            except UserError:
                pass
        assert micro_batches(paper.rollout, paper.update.minibatches) == accepted


def test_local_folders_are_read_and_unknown_names_refused(paper):
    settings = configuration.load("tiny")
    named = plan(settings, 24)
    settings.model.path, settings.adversary.backbone = str(tiny.pipeline_dir()), str(tiny.backbone_dir())
    assert {c.name: c.bytes for c in plan(settings, 24).components} == {c.name: c.bytes for c in named.components}
    assert named.peak_gb < 3
    for name in ("model.path", "adversary.backbone"):
        changed = paper.model_copy(deep=True)
        section, field = name.split(".")
        setattr(getattr(changed, section), field, "someone/unknown")
        with pytest.raises(UserError, match=rf"{name} = 'someone/unknown' is not known without a network"):
            plan(changed, 24)
    with pytest.raises(UserError, match="want positive numbers"):
        plan(paper, 0)


def test_the_forward_process_keeps_an_old_policy_and_no_window(paper):
    before = {c.name: c.bytes for c in plan(paper, 80).components}
    paper.update.objective = "nft"
    after = {c.name: c.bytes for c in plan(paper, 80).components}
    lora = after["LoRA, float32"]
    assert after["old policy, and the weights that it stands in for"] == 2 * lora
    assert after["copy of the iteration's start"] - before["copy of the iteration's start"] == lora
    latents = 4 * 16 * 64**2
    images, name = paper.images_per_iteration, "images and window latents"
    assert before[name] - after[name] == images * 3 * latents  # two ends of two steps, against the clean ones
    assert after["noise levels of a micro-batch"] == 4 * 9 * 8 * latents


def test_command_line(capsys):
    assert command.main(["--preset", "sd35m-dino-paper", "--gpu", "24,80", "--processes", "8"]) == 0
    output = capsys.readouterr().out
    assert "80 GB: rollout.micro_batch = 8, model.gradient_checkpointing = false" in output
    assert "estimated" in output
    assert "merged weights" in output
    assert command.main(["--preset", "sd35m-dino-paper", "--gpu", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out
    for arguments, message in (
        (["--gpu", "big"], "--gpu big: want sizes in GB"),
        (["--gpu", "24", "--preset", "nope"], "unknown preset 'nope'"),
        (["--gpu", "24", "--processes", "0"], "--processes 0: want a whole number from 1"),
        (["--gpu", "inf"], "--gpu inf: want sizes above 0"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--gpu", "auto"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_table_shows_every_component(paper):
    plans = [plan(paper, size, processes=8) for size in (24, 80)]
    shown = table(plans)
    names = list(shown.columns[0].cells)
    assert {c.name for p in plans for c in p.components} <= set(names)
    peak = [column._cells[names.index("peak")] for column in shown.columns[1:3]]
    assert peak == [f"{p.peak_gb:.2f}" for p in plans]


def test_cheaper_rollouts_are_planned_as_they_run(paper):
    """Fewer steps and rows, a copy of what is trained on, and only micro-batches that training takes."""
    paper.rollout.window.steps, paper.rollout.window.order = (0, 1), "fixed"
    assert drawn_steps(paper) == 10
    paper.rollout.tail_steps = 4
    assert drawn_steps(paper) == 6
    paper.rollout.scouts, paper.rollout.scout_tail_steps = 2, 1
    assert drawn_steps(paper) == 6 + 2 * 3
    paper.update.informative_share = 0.25
    estimate = Estimate(paper, 8)
    assert {knobs.micro_batch for knobs in estimate._knobs()} == {1, 2, 4}
    by_name = {c.name: c.bytes for c in estimate.components(Knobs(4, False))}
    latents = 4 * 16 * 64 * 64
    assert by_name["window latents that are trained on"] == 96 // 4 * 2 * 2 * latents
