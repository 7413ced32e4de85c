"""The update's forward and backward as captured graphs, on the emulator: the eager bits, and graphs that are kept."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.plan.captured import why_not_captured
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training import fast, run
from advgrpo.types import MicroBatch, MicroBatchRollout
from tests.graph_emulator import EmulatedGraphs
from tests.parts import some_weekly, updater_of
from tests.sampling.test_rollout import build

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")

PROMPTS, ROW = ["a small red star", "a large green ring"], torch.tensor([0, 0, 1, 1])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a CPU some ops also check values, which is free there; a captured step must not."""
    for module in ("gaussian_step", "_gaussian", "clipped_policy_loss"):
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)


def policy_of(settings):
    policy = SD3Policy(
        settings.model, device=torch.device("cpu"), cache_dir=Path(settings.data.cache_dir), seed=0, fused=True
    )
    policy.network.transformer.recompute_qk = True  # as on a GPU: by hooks of saved tensors, inside what is captured
    return policy


def trained(settings, graphs=None, *, iterations: int = 4, window=(0, 1)):
    """(policy, updater, statistics of each minibatch) after optimizer steps on what the policy has drawn itself."""
    policy = policy_of(settings)
    updater = updater_of(policy, settings, graphs)
    share = settings.rollout.initial_noise == "shared"
    sampler = Sampler(
        policy, settings.rollout.guidance_scale, settings.rollout.likelihood, share_prefix=share, merged=True,
        shared_noise=share, keep_means=settings.update.trust_region != "ratio",
    )  # fmt: skip
    seen = []
    for number in range(iterations):
        policy.merge()
        table = step_table(policy, 4, window, rollout=settings.rollout)
        rollouts = []
        for place in range(2):
            ids = torch.arange(4) + 4 * place
            text = policy.encode([f"{prompt} {number} {place}" for prompt in PROMPTS])
            initial = sampler.initial_latents(number, torch.arange(2) if share else ids)
            branch = place if table.branches else None
            latents, steps = sampler.run(table.of(branch), text, initial, ROW, noise_seed=number, image_ids=ids)
            micro_batch = MicroBatch(ids, PROMPTS, torch.arange(2), ROW, 0, branch=branch)
            rollouts.append(MicroBatchRollout(micro_batch, text, steps, latents))
        advantages = torch.linspace(-1, 1, 8).roll(number)
        stats = updater.accumulate(rollouts, advantages, table, total=8, watch_kl=True)
        assert stats.max_mismatch() == 0
        updater.step(stats.max_mismatch())
        seen.append(stats.sums())
    return policy, updater, torch.stack(seen)


# What a captured step may depend on, by which sections of a preset, beside the shapes that are part of its key.
OF_ROLLOUT = ("dynamics", "likelihood", "eta", "guidance_scale")
OF_UPDATE = (
    *("trust_region", "max_divergence", "kl_weight", "kl_to", "kl_space", "kl_variance", "teacher"),
    *("step_weights", "policy_weight", "old_log_prob", "clip_range"),
)


# A model that the memory plan leaves out.
UNCOUNTED = {"rewards": {"pickscore": {"weight": 1.0, "path": "someone/clip"}}}
# Of those whose settings let auto capture their update on a GPU, one for each way of doing it.
PRESETS = (
    *("sd35m-dino-fast", "sd35m-tempflow", "tiny", "tiny-adv-ocr", "tiny-distill", "tiny-flow-dppo"),
    *("tiny-flow-grpo-pickscore-kl", "tiny-grpo-guard", "tiny-tempflow"),
)


def of_preset(name: str) -> dict:
    """What of a preset its captured steps may depend on, as settings; a teacher stands in for its own."""
    preset = config.load(preset=name)
    rollout = {field: getattr(preset.rollout, field) for field in OF_ROLLOUT}
    if preset.rollout.window.branching:
        rollout["window"] = {"branching": True, "steps": [0, 1], "order": "fixed"}
    update = {field: getattr(preset.update, field) for field in OF_UPDATE}
    model = {field: getattr(preset.model, field) for field in ("base_precision", "gradient_checkpointing")}
    return {"rollout": rollout, "update": update, "model": model}


CHANGES = {
    "shared noise": {},
    "noise per image, kl": {"rollout": {"initial_noise": "per_image"}, "update": {"kl_weight": 0.1}},
    "divergence, kl to the average": {
        "update": {"trust_region": "divergence", "kl_to": "ema", "kl_weight": 0.1, "max_divergence": 1e-3}
    },
    "base in fp8": {"model": {"base_precision": "fp8"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    **dict.fromkeys(PRESETS),
}
USUAL = {"shared noise", "noise per image, kl"}


@pytest.mark.parametrize("name", some_weekly(CHANGES, sorted(CHANGES.keys() - USUAL)))
def test_captured_updates_have_the_eager_bits_and_graphs_are_kept(name, unit_config, tmp_path):
    own = of_preset(name) if CHANGES[name] is None else CHANGES[name]
    change = config.merge({"update": {"graphs": True, "learning_rate": 1e-2}}, own)
    settings = config.build(config.merge(unit_config.model_dump(), change), name)
    if settings.update.kl_to == "teacher":
        teacher = policy_of(settings)
        with torch.no_grad():
            teacher.network.lora.master.add_(0.1)
        teacher.export(tmp_path / "teacher")
        settings.update.teacher = str(tmp_path / "teacher")
    backend = EmulatedGraphs()
    eager, _, expected = trained(settings)
    captured, updater, found = trained(settings, backend)
    assert torch.equal(found, expected)
    for (label, own), (_, other) in zip(captured.trainable_parameters(), eager.trainable_parameters()):
        assert torch.equal(own, other), label
        assert own.grad.abs().max() > 0
    branching = settings.rollout.window.branching  # each micro-batch trains one step, a graph of its own
    # else a graph for each step; another where only image 0's KL is watched
    kinds = 2 if branching else 2 + (settings.update.kl_weight == 0)
    assert updater.captured.captures == kinds
    assert backend.replays == (1 if branching else 2) * 2 * 4 - 2 * kinds


@pytest.mark.weekly
def test_every_preset_that_captures_its_update_by_itself_is_like_one_of_these():
    presets = {name: config.load(preset=name) for name in config.preset_names()}
    captured = [name for name, each in presets.items() if each.fast and not each.why_update_is_not_captured]
    assert set(PRESETS) <= set(captured)
    ways = [of_preset(name) for name in PRESETS]
    assert [name for name in captured if of_preset(name) not in ways] == []


@pytest.mark.parametrize(
    ("change", "memory", "why"),
    [
        ({"update": {"graphs": False}}, 24.0, "update.graphs = false"),
        (
            {"update": {"objective": "nft"}, "rollout": {"initial_noise": "per_image"}},
            24.0,
            "update.objective = nft: only the policy gradient's",
        ),
        ({}, 24.0, ""),
        ({}, 1.0, "update.graphs = auto: 1.3 GB by the memory plan, and the GPU has 1.0 free"),
        (
            UNCOUNTED,
            24.0,
            "update.graphs = auto cannot tell whether it fits (the memory plan does not count rewards.pick",
        ),
        (config.merge(UNCOUNTED, {"update": {"graphs": True}}), 24.0, ""),
        ({"update": {"graphs": True}}, 1.0, ""),  # taken at its word
        ({"rollout": {"initial_noise": "per_image"}}, 24.0, "rollout.initial_noise = per_image: steps of all images"),
        ({"rollout": {"initial_noise": "per_image"}, "update": {"graphs": True}}, 24.0, ""),
    ],
)
def test_the_update_is_captured_where_it_pays_and_fits_or_the_table_says_why_not(
    change, memory, why, unit_config, monkeypatch
):
    monkeypatch.setattr(fast, "memory_gb", lambda device: memory)
    monkeypatch.setattr(fast, "choose_attention", lambda *given, **options: None)  # tries it out on the device
    settings = config.build(config.merge(unit_config.model_dump(), change), "test")
    for device, expected in (("cuda", why), ("cpu", "no CUDA device")):
        paths = fast.FastPaths.choose(settings, torch.device(device))
        row = next(row for row in paths.table if row.name == "captured update")
        assert row.on == paths.captured_update == (expected == "")
        assert row.why.startswith(expected or "one launch per step of the window")


def test_what_the_smallest_card_of_a_job_has_no_room_for_none_captures(unit_config, monkeypatch):
    """The process whose GPU has room asks the others."""
    monkeypatch.setattr(fast, "memory_gb", lambda device: 24.0)
    monkeypatch.setattr(fast, "choose_attention", lambda *given, **options: None)
    job = SimpleNamespace(device=torch.device("cuda"), gather_json=lambda own: [own, 1.0])
    assert fast.least_memory_gb(job) == 1.0
    assert not fast.FastPaths.choose(unit_config, job.device, processes=2, free_gb=1.0).captured_update
    assert fast.FastPaths.choose(unit_config, job.device, processes=2).captured_update
    assert fast.least_memory_gb(SimpleNamespace(device=torch.device("cpu"))) is None


def test_a_run_decides_by_the_smallest_card(unit_config, monkeypatch):
    given = []
    choose = fast.FastPaths.choose
    monkeypatch.setattr(run, "least_memory_gb", lambda distributed: 1.5)
    monkeypatch.setattr(run.FastPaths, "choose", lambda *args, **named: given.append(named) or choose(*args, **named))
    build(unit_config)
    assert given == [{"processes": 1, "free_gb": 1.5}]


def test_an_unknown_model_is_captured_when_asked(unit_config, monkeypatch):
    def unknown(settings, *, processes):
        raise UserError("its architecture is not known")

    monkeypatch.setattr(fast, "peak_with_captured_update", unknown)
    why = fast._why_no_room(unit_config, torch.device("cuda"), 1, None)
    assert why == "update.graphs = auto cannot tell whether it fits (its architecture is not known); true captures it"
    unit_config.update.graphs = True
    assert fast._why_no_room(unit_config, torch.device("cuda"), 1, None) == ""


def test_where_no_test_knows_captured_steps_they_are_asked_for(unit_config, monkeypatch):
    """`policy_of` is SD3's; and what our forward does not compute cannot be captured by it at all."""
    by_itself = [name for name, family in fast.FAMILIES.items() if family.captured_by_itself]
    assert by_itself == ["StableDiffusion3Pipeline"]
    assert (
        why_not_captured(unit_config, "FluxPipeline")
        == "update.graphs = auto: no test holds captured steps of a FluxPipeline to the eager bits; true captures them"
    )
    monkeypatch.setattr(fast, "pipeline_class", lambda path: "StableDiffusionXLPipeline")
    unit_config.update.graphs = True
    with pytest.raises(UserError, match=r"update\.graphs = True captures the fused transformer \(a Stable.*; use auto"):
        fast.FastPaths.choose(unit_config, torch.device("cuda"))
