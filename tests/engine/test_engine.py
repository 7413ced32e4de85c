"""A rollout engine draws for a run or is refused: against a server that tells the truth, and one for each way to lie.

The server is examples/rollout_engines/sglang_stand_in.py, diffusers' own SD3 pipeline behind SGLang-Diffusion's routes.

Bugs planted, each seen red (tests/mutants, engine-*): the file of a LoRA named by its iteration alone; nobody asked
what the engine draws with after a draw; the tensors that it has compared not counted; the probe drawn with the run's
own adapter at the start; one row in the probe; the initial noise not compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.config.sections import LORA_TARGETS
from advgrpo.engine.engine import RolloutEngine, Rows, _requests, check_reachable, connect
from advgrpo.engine.probe import compare
from advgrpo.engine.sglang import QWEN_JOINED, SERVED, Mismatch, Request, _rows, _trajectory, check_targets
from advgrpo.engine.weights import Adapter, checksum, loud
from advgrpo.errors import RunFailure, UserError
from advgrpo.policy.packing import pack
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.rewards.judge_client import Refused
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.noise import row_seeds, torch_noise
from advgrpo.sampling.sampler import Sampler
from tests.conftest import make_unit_config
from tests.engine import stand_ins
from tests.engine.stand_ins import acting, stand_in
from tests.parts import some_weekly

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top of a white background"]


def asking(base, url, **changes):
    section = {"kind": "sglang", "urls": [url], "retries": 1, "wait": 0, "backoff": 0.01, "timeout": 30}
    rollout = {
        "noise": "torch_float32",
        "engine": {**section, **changes.pop("engine", {})},
        **changes.pop("rollout", {}),
    }
    return configuration.build(configuration.merge(base.model_dump(), {"rollout": rollout, **changes}), "test")


@pytest.fixture(scope="module")
def base(unit_pipeline, unit_backbone, tmp_path_factory):
    return make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def policy(base):
    return SD3Policy(base.model, device=torch.device("cpu"), cache_dir=Path(base.data.cache_dir), seed=0)


@pytest.fixture
def settings(base, url, tmp_path):
    return asking(base, url, output_dir=str(tmp_path / "run"))


@pytest.fixture
def engine(settings, policy, standing):
    standing.forget()
    made = RolloutEngine(settings, policy, PROMPTS, Distributed.start("cpu"))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for _, parameter in policy.trainable_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    yield made
    standing.forget()


def some_rows(engine, prompts=(0, 0, 1, 0), ids=(0, 1, 2, 3, 4, 5)) -> Rows:
    seeds = row_seeds(9, torch.tensor(ids[: len(prompts)]))
    return Rows([PROMPTS[n] for n in prompts], seeds, torch_noise(seeds, engine.drawing.shape, "torch_float32"))


def own_images(policy, rows: Rows, steps: int, guidance: float) -> torch.Tensor:
    sampler = Sampler(policy, guidance, "squared_error", share_prefix=False, merged=False, shared_noise=False)
    conditioning = policy.encode(rows.prompts)
    return sampler.run(step_table(policy, steps), conditioning, rows.initial, torch.arange(len(rows.seeds)))[0]


# The truth


def test_its_images_are_the_policys_own_in_the_order_of_the_rows(engine, policy):
    engine.verify()
    engine.synchronise(0)
    rows = some_rows(engine, ids=(8, 5, 3, 9))
    found = engine.latents(rows, 4)
    torch.testing.assert_close(found, own_images(policy, rows, 4, 1.5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_before_a_step_its_latents_are_the_samplers(engine, policy):
    engine.synchronise(0)
    rows = some_rows(engine)
    sampler = Sampler(policy, 1.5, "squared_error", share_prefix=False, merged=False, shared_noise=False)
    table = replace(step_table(policy, 4), taken=(0, 1))
    own = sampler.run(table, policy.encode(rows.prompts), rows.initial, torch.arange(4))[0]
    torch.testing.assert_close(engine.latents(rows, 2), own, rtol=1e-5, atol=1e-5)


@pytest.mark.weekly
def test_every_iterations_weights_are_drawn_with(engine, policy):
    rows, found = some_rows(engine), []
    for iteration in range(2):
        with torch.no_grad():
            for _, parameter in policy.trainable_parameters():
                parameter.mul_(1.5)
        engine.synchronise(iteration)
        found.append(engine.latents(rows, 4))
        torch.testing.assert_close(found[-1], own_images(policy, rows, 4, 1.5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.weekly
def test_the_probes_adapter_leaves_the_policy_as_it_was(engine, policy):
    before = [parameter.detach().clone() for _, parameter in policy.trainable_parameters()]
    with loud(policy, 3):
        inside = [parameter.detach().clone() for _, parameter in policy.trainable_parameters()]
    engine.verify()
    after = [parameter for _, parameter in policy.trainable_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert any(not torch.equal(a, b) for a, b in zip(before, inside))


def test_an_adapter_of_other_content_never_has_the_same_path(engine, policy):
    """The engine loads nothing from a path that it has loaded: a run that goes on from a checkpoint draws the same
    iteration again."""
    first = Adapter.of(policy, engine.folder, "000003")
    assert Adapter.of(policy, engine.folder, "000003").path == first.path
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(1e-6)
    other = Adapter.of(policy, engine.folder, "000003")
    assert other.path != first.path
    last = replace(other, path=engine.folder.absolute() / "lora-000004-x.safetensors")
    for adapter in (first, other, last):
        adapter.write()
    assert [each.path.exists() for each in (first, other, last)] == [False, True, True], "the newest two"
    assert first.modules == len(first.checksums) // 2 == 15


def test_a_checksum_is_of_dtype_shape_and_bytes():
    tensor = torch.arange(6.0)
    assert checksum(tensor) == stand_in.sha256(tensor)
    same = [tensor.view(2, 3), tensor.double(), tensor + 1e-7, tensor.view(torch.int32)]
    assert len({checksum(each) for each in [tensor, *same]}) == 5


# What is refused when it is brought up to date

BY_VERIFYING = {
    "PartlyBound": "status 400 .*missing 2 tensor\\(s\\): transformer_blocks.1.attn.to_k.lora_A",
    "PartlyComputed": "its images are not this policy's .*step",
    "FewerCounted": r"it has bound 3 modules of version start, the LoRA has 15; serve the same model\.path",
    "NothingCounted": "does not say how many tensors it has verified",
    "BaseWeightsSworn": "its images are not this policy's",
    "AlphaTwice": "its images are not this policy's",
    "SilentlyKept": "it draws with '/elsewhere/lora-000001.safetensors' at 1.0 in transformer, not with version start",
    "TwoAdapters": "it draws with .* and .*, not with version start",
    "Weaker": "at 0.5 in transformer, not with version start",
    "OtherShift": "it drew by noise levels .*, this run by .*; serve the same model.path with its own scheduler",
    "OtherSteps": r"it drew by noise levels \[.*\] \(6\), this run by \[.*\] \(5\)",
    "OtherGuidance": r"its images are not this policy's .* guidance \(1.5 here\)",
    "OwnNegative": "its images are not this policy's",
    "OtherPrompt": "its images are not this policy's",
    "HalfSaid": "runs its transformer in 'bf16', but model.dtype = 'float32'; start it with --dit-precision fp32",
    "HalfComputed": r"its images are not this policy's .* precision \(float32 here\)",
    "RowsTurned": "the image of seed .* has the noise of seed .*: its images are in another order than asked for",
    "ImagesTurned": "its images are not this policy's",
    "OtherNoise": "does not begin with torch's noise of that seed on a CPU",
    "HalfNoise": "as torch_bfloat16; set rollout.noise = torch_bfloat16",
    "Truncated": r"2 images of prompt 'a .*seeds \d+ to \d+\): it gave latents of shape",
    "NotFinite": "its latents are not finite",
    "TooFew": "it gave 1 of them",
    "OtherSeed": "it gave images of prompt .*, seed 7",
    "NoTrajectory": "it gave no trajectory",
    "Unpackable": "its latents cannot be read",
}


@pytest.mark.parametrize("kind", BY_VERIFYING)
def test_who_lies_is_refused_before_anything_is_trained(engine, standing, kind):
    """In each way that there is, all of them in CI: checksums of the weights (PartlyBound; OldWeights below), how many
    modules are bound (FewerCounted, NothingCounted), the probe's picture (PartlyComputed, BaseWeightsSworn and others).
    Its likelihoods nobody asks for: test_engine_runs.py."""
    with acting(standing, getattr(stand_ins, kind)), pytest.raises(UserError, match=BY_VERIFYING[kind]) as error:
        engine.verify()
    assert str(error.value).startswith("rollout engine sglang at http://127.0.0.1")


@pytest.mark.weekly
def test_the_probe_sees_every_single_module_that_is_not_computed(engine, standing, policy):
    """But one that no image depends on: the last block throws away what the text's queries attend to."""
    unseen = []
    for module in sorted({name.rsplit(".", 1)[0] for name in Adapter.of(policy, engine.folder, "x").tensors}):
        kind = type("Leaves", (stand_ins.PartlyComputed,), {"left_out": module})
        with acting(standing, kind), contextlib.suppress(UserError):
            engine.verify()
            unseen.append(module)
    assert unseen == ["transformer_blocks.1.attn.add_q_proj"]


def test_an_adapter_of_zeros_hides_nothing(engine, standing, policy):
    """As every run's is when it begins."""
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            parameter.mul_(float("lora_B" not in name))
    with (
        acting(standing, stand_ins.BaseWeightsSworn),
        pytest.raises(UserError, match="its images are not this policy's"),
    ):
        engine.verify()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OldWeights", "checksum mismatch for 30 tensor"),
        ("OldWeightsSworn", "its images are not this policy's .version 000001"),
    ],
)
def test_old_weights_are_refused(engine, standing, policy, kind, message):
    with acting(standing, getattr(stand_ins, kind)):
        engine.synchronise(0)
        with torch.no_grad():
            for _, parameter in policy.trainable_parameters():
                parameter.mul_(1.1)
        with pytest.raises(RunFailure, match=message):
            engine.synchronise(1)


# What is refused when images are drawn

BY_DRAWING = ("RowsTurned", "OtherNoise", "Truncated", "NotFinite", "TooFew", "OtherSteps")


@pytest.mark.parametrize("kind", some_weekly(BY_DRAWING, BY_DRAWING[:2] + BY_DRAWING[3:]))
def test_who_begins_to_lie_later_is_refused_then(engine, standing, kind):
    engine.synchronise(0)
    with acting(standing, getattr(stand_ins, kind), forget=False), pytest.raises(RunFailure, match=BY_VERIFYING[kind]):
        engine.latents(some_rows(engine), 4)


@pytest.mark.weekly
@pytest.mark.parametrize("kind", ["ForgetsOnce", "DiesOnce"])
def test_one_that_was_restarted_gets_its_weights_and_draws_again(engine, standing, caplog, kind):
    engine.synchronise(0)
    rows = some_rows(engine)
    wanted = engine.latents(rows, 4)
    with acting(standing, getattr(stand_ins, kind), forget=False), caplog.at_level(logging.WARNING):
        assert torch.equal(engine.latents(rows, 4), wanted)
    assert "it draws with no LoRA, not with version 000000; it gets its weights again" in caplog.text


@pytest.mark.weekly
def test_one_that_is_restarted_again_and_again_ends_the_run(engine, standing):
    engine.synchronise(0)
    with (
        acting(standing, stand_ins.Forgets, forget=False),
        pytest.raises(RunFailure, match="again, after version 000000"),
    ):
        engine.latents(some_rows(engine), 4)


def test_one_that_processes_share_gets_no_weights_in_the_midst_of_an_iteration(engine, settings, policy, standing):
    """Or the process that asks second is told that all is well, of images that the base weights have drawn."""
    shared = [RolloutEngine(settings, policy, PROMPTS, Distributed(r, 2, r, policy.device)) for r in range(2)]
    assert [each.shared for each in (engine, *shared)] == [False, True, True]
    engine.synchronise(0)
    for each in shared:
        each.adapter, each.version = engine.adapter, engine.version
    with acting(standing, stand_ins.ForgetsOnce, forget=False):
        for each in shared:
            with pytest.raises(RunFailure, match=r"it draws with no LoRA, .*Other processes draw at it as well"):
                each.latents(some_rows(engine, prompts=(0,)), 4)


@pytest.mark.weekly
def test_the_first_probe_is_of_the_longest_prompt(settings, policy, standing):
    short = [f"a {colour} star" for colour in ("red", "green", "blue", "white")]
    made = RolloutEngine(settings, policy, [*short, PROMPTS[1]], Distributed.start("cpu"))
    with (
        acting(standing, stand_ins.FewerTokens),
        pytest.raises(UserError, match=f"its images are not this policy's .*{PROMPTS[1]}"),
    ):
        made.verify()


@pytest.mark.weekly
def test_a_late_one_is_waited_for_as_long_as_the_settings_say(settings, engine, standing, policy):
    late = asking(settings, engine.engine.url, engine={"timeout": 0.2, "retries": 0})
    impatient = RolloutEngine(late, policy, PROMPTS, engine.distributed)
    engine.synchronise(0)
    impatient.adapter = engine.adapter
    rows = some_rows(engine, prompts=(0,))
    with acting(standing, stand_ins.Late, forget=False):
        with pytest.raises(
            RunFailure, match=r"no complete answer within 0\.2 s; gave up after 1 attempts .*retries = 0"
        ):
            impatient.latents(rows, 4)
        assert len(engine.latents(rows, 4)) == 1  # slow, and in time


def test_nobody_there(base, tmp_path):
    nobody = asking(base, "http://127.0.0.1:9", output_dir=str(tmp_path))
    with pytest.raises(
        UserError, match=r"rollout engine sglang at http://127.0.0.1:9/v1/models: .*refused.*; start it"
    ):
        check_reachable(nobody, Distributed.start("cpu"))


# What the probe allows


@pytest.mark.weekly
def test_rounding_of_another_forward_is_allowed_and_nothing_else(base, policy, engine):
    """Our own fused forward is another implementation of the network."""
    fused = SD3Policy(base.model, device=torch.device("cpu"), cache_dir=Path(base.data.cache_dir), seed=0, fused=True)
    engine.synchronise(0)
    values = policy.parameters_of_lora(policy_file(policy, engine), "x")  # the same, through a file
    assert all(torch.equal(values[name], parameter) for name, parameter in policy.trainable_parameters())
    latents = engine._draw(some_rows(engine, prompts=(0, 0)), (0, 1, 2, 3, 4))
    for each in (policy, fused):
        if each is fused:
            for (_, parameter), value in zip(
                each.trainable_parameters(), each.parameters_of_lora(policy_file(policy, engine), "x").values()
            ):
                parameter.data.copy_(value)
        found = compare(each, PROMPTS[0], latents, guidance=1.5, dtype=torch.float32)
        assert found.agrees, str(found)
        assert found.error < found.allowed / 2, str(found)
        assert not compare(each, PROMPTS[0], latents, guidance=1.501, dtype=torch.float32).agrees
        assert not compare(each, PROMPTS[1], latents, guidance=1.5, dtype=torch.float32).agrees
    assert compare(policy, PROMPTS[0], latents, guidance=1.501, dtype=torch.float32, tolerance=0.01).agrees
    latents[1, -1, 0, 0, 0] = torch.nan
    assert not compare(policy, PROMPTS[0], latents, guidance=1.5, dtype=torch.float32, tolerance=0.01).agrees


def policy_file(policy, engine) -> Path:
    folder = engine.folder / "exported"
    policy.export(folder)
    return folder


# MessagePack


NOT_WHOLE, NO_IMAGES = "the answer is not MessagePack", "the answer is no list of images"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        *((data, NOT_WHOLE) for data in (b"", b"\xa3ab", b"\xc1", b"\x90\x01", b"\x81\x90\x01", b"\x91\xa1\xff")),
        (b"\x91" * 5000 + b"\x01", NOT_WHOLE),
        *((data, NO_IMAGES) for data in (b"\x80", b"\x91\x01", b"\x91\xd4\x01\x00")),
    ],
)
def test_what_is_no_list_of_images_is_refused(data, said):
    with pytest.raises(Refused, match=said):
        _rows(data)


def test_without_messagepack_a_run_says_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)  # importing it fails, as if it were not installed
    with pytest.raises(UserError, match=r'needs msgpack .*: pip install "advgrpo\[engine\]"'):
        connect(settings)


# What an engine cannot serve


def test_of_qwen_image_no_layers_that_the_engine_joins():
    rest = " ".join(target for target in LORA_TARGETS if not target.endswith(QWEN_JOINED))
    with pytest.raises(
        UserError, match=f"model.lora.targets holds attn.add_q_proj, .*train --model.lora.targets {rest},"
    ):
        check_targets("QwenImagePipeline", LORA_TARGETS)
    with pytest.raises(UserError, match="holds add_k_proj, which"):
        check_targets("QwenImagePipeline", ("add_k_proj",))
    check_targets("QwenImagePipeline", tuple(rest.split()))
    check_targets("FluxPipeline", LORA_TARGETS)


# Noise


def test_a_rows_noise_depends_on_its_number_alone():
    seeds = row_seeds(2**62 + 5, torch.tensor([3, 4, 9]))
    assert seeds[1] == seeds[0] + 1
    assert seeds[2] == seeds[0] + 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    together, alone = (
        torch_noise(seeds, (2, 4, 4), "torch_float32"),
        torch_noise(seeds[1:2], (2, 4, 4), "torch_float32"),
    )
    assert torch.equal(together[1:2], alone)
    drawn = torch.randn((1, 2, 4, 4), generator=torch.Generator().manual_seed(seeds[1]))
    assert torch.equal(alone, drawn)
    half = torch_noise(seeds, (2, 4, 4), "torch_bfloat16")
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(half, together)


def test_a_request_holds_one_prompts_rows_whose_seeds_follow_each_other(engine):
    requests, order = _requests(some_rows(engine, prompts=(0, 0, 1, 1, 1, 0)), (0, 4))
    assert [(each.prompt, each.count) for each in requests] == [(PROMPTS[0], 2), (PROMPTS[1], 3), (PROMPTS[0], 1)]
    assert order == list(range(6))
    rows = some_rows(engine, prompts=(0, 1, 0))
    turned = Rows(rows.prompts, rows.seeds[::-1], rows.initial)
    requests, order = _requests(turned, (0, 4))
    assert [each.seed for each in requests] == rows.seeds
    assert order == [2, 1, 0]


def test_latents_come_as_families_have_them(engine):
    """SD3's as they are, FLUX.1's and Qwen-Image's as tokens or with an axis of frames."""
    (channels, height, width), request = engine.drawing.shape, Request("a", 3, 1, (0, 4))
    latents = torch.randn(2, channels, height, width)
    for packed in (latents, pack(latents), latents[:, :, None], latents[:, None], latents.double()):
        assert torch.equal(_trajectory(packed, request, engine.drawing), latents)
    for wrong in (latents[:1], latents[..., 1:], pack(latents)[:, 1:], latents.flatten()):
        with pytest.raises(Mismatch, match="it gave latents of shape"):
            _trajectory(wrong, request, engine.drawing)


def test_what_is_asked_for_is_what_the_engines_api_has(engine):
    """The fields of RolloutRequest in SGLang's io_struct.py at 00e1106."""
    known = {
        *("prompt", "negative_prompt", "seed", "generator_device", "width", "height", "num_inference_steps"),
        *("num_outputs_per_prompt", "guidance_scale", "true_cfg_scale", "rollout", "rollout_sde_type"),
        *("rollout_log_prob_no_const", "rollout_debug_mode", "rollout_return_dit_trajectory"),
        *("rollout_return_step_indices", "suppress_logs"),
    }
    for pipeline, (scale, by_rows) in SERVED.items():
        drawing = replace(engine.drawing, pipeline=pipeline)
        body = json.loads(engine.engine._body(Request("a", 3, 2, (0, 4)), drawing))
        assert set(body) <= known
        assert body[scale] == 1.5
        assert ("negative_prompt" in body) == by_rows
        assert (body["rollout_sde_type"], body["generator_device"], body["seed"]) == ("ode", "cpu", 3)
