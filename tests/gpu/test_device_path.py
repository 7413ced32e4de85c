"""What only a GPU can run, on a GPU, without diffusers: captured steps of sampler and update, drift per attention
backend, FP8 sampling and training, the update from foreign weights, discriminator updates, the decoder, collectives of
one rank beside captured graphs, and that the host never waits.

Marked `gpu` where they need one. The same tests run on a CPU with a model of milliseconds and the emulator of
`graph_emulator.py`, so that what a lent GPU meets first is not a typing error. On a GPU: SD3.5-medium's width, heads
and tokens with four blocks in bfloat16, which compile and run the kernels of the full model.

Bugs planted in a copy, each seen red on a CPU: a sampler that does not refill its static latents; a capture key without
the prompts' shapes; window steps on merged weights; a host tensor stacked in `Updater.reweigh` (on the meta device); an
FP8 base that is not prepared; rows that `_gather_rows` cuts short.
"""

import contextlib
import types
import warnings
from dataclasses import replace

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.policy.fused.attention import choose_attention
from advgrpo.policy.fused.decoder import SD3_DECODER
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.sampler import Sampler
from advgrpo_kernels import fp8_linear, fp8_linear_ref, fp8_quantize
from bench import contenders
from bench.random_policy import SMALL, Size
from bench.stock_model import SD35_MEDIUM
from tests import device_twin
from tests.device_twin import FIRST_FEATURES, FIRST_VISITS, ITERATION_READS
from tests.graph_emulator import EmulatedGraphs

WIDE = Size(
    replace(SD35_MEDIUM, num_layers=4, dual_attention_layers=(0, 1)),
    SD3_DECODER,
    64,
    205,
    {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
)
WINDOW = {"initial_noise": "shared", "num_steps": 5, "window": {"steps": [1, 2]}}
# a shared prefix, the branching step, a window step, ODE steps
THREE_BLOCKS = replace(SMALL, transformer=replace(SMALL.transformer, num_layers=3))  # the ends stay as they are
ON_GPU = {
    "rollout": {"prompts_per_iteration": 2, "group_size": 8, "micro_batch": 8, **WINDOW},
    "adversary": {"batch_size": 12, "replay_capacity": 16, "updates_per_iteration": 4},
    "update": {"learning_rate": 1e-4},
}
ON_CPU = {"rollout": WINDOW, "update": {"learning_rate": 1e-4}}


pytestmark = pytest.mark.usefixtures("layers_by_pytorch")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a CPU some ops also check values, which is free there; a captured step must not."""
    for module in ("gaussian_step", "_gaussian", "patches", "clipped_policy_loss"):
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)


def trainer_on(device: str, folder, *, precision: str = "model", small: Size = SMALL, **changes):
    """A trainer with captured graphs, on a random model: `small` on a CPU."""
    if device == "cpu":
        settings = configuration.merge(configuration.merge(contenders.SMALL_SETTINGS, ON_CPU), changes)
        trainer = contenders.random(folder, "cpu", small, graphs=EmulatedGraphs(), **settings).trainer
        for group in trainer.objective.scorer.adversary.optimizer.param_groups:
            group["fused"] = True  # as on a GPU: the plain one reads its step count on the host
        return trainer
    settings = configuration.merge(ON_GPU, changes)
    return contenders.random(folder, "cuda", WIDE, precision=precision, **settings).trainer


def tables(trainer):
    return trainer.objective.table(0)


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu)


DEVICES = ["cpu", on_gpu("cuda")]


@pytest.mark.parametrize(("device", "precision"), [("cpu", "model"), on_gpu("cuda", "model"), on_gpu("cuda", "fp8")])
@pytest.mark.parametrize(
    ("whole", "captures"),
    [
        pytest.param(True, 1, id="trajectory"),
        pytest.param(False, 4, id="steps"),  # ODE with a row per prompt and per image, the branching one, a window step
    ],
)
def test_every_kind_of_step_replays_the_eager_bits(device, precision, whole, captures, tmp_path):
    trainer = trainer_on(device, tmp_path, precision=precision)
    captured, table, policy = trainer.objective.sampler, tables(trainer), trainer.policy
    assert captured.whole
    captured.whole = whole
    eager = Sampler(policy, captured.guidance_scale, captured.likelihood, share_prefix=True, merged=True)
    policy.merge()
    micro_batch = trainer.objective.micro_batches.of(0)[0]
    row, ids = micro_batch.row.to(policy.device), micro_batch.image_ids.to(policy.device)
    for seed in range(5):  # two eager calls, one captured, two replayed
        prompts = policy.encode([f"{prompt}, {seed}" for prompt in micro_batch.prompts])
        inputs = (table, prompts, eager.initial_latents(seed, micro_batch.prompt_groups), row)
        expected, steps = eager.run(*inputs, noise_seed=seed, image_ids=ids + seed)
        found, own_steps = captured.run(*inputs, noise_seed=seed, image_ids=ids + seed)
        assert torch.isfinite(found).all()
        assert torch.equal(found, expected), f"latents differ in call {seed}"
        for own, other in zip(own_steps, steps, strict=True):
            assert torch.equal(own.log_prob, other.log_prob)
            assert torch.equal(own.next_latents, other.next_latents)
    assert captured.captures == captures


@pytest.mark.parametrize(
    ("device", "attention", "precision"),
    [
        ("cpu", "cpu", "model"),
        *(on_gpu("cuda", name, "model") for name in ("cudnn", "flash", "efficient", "math")),
        *(on_gpu("cuda", name, "fp8") for name in ("cudnn", "flash")),
    ],
)
def test_before_the_first_step_the_drift_is_exactly_zero(device, attention, precision, tmp_path):
    trainer = trainer_on(device, tmp_path, precision=precision, model={"attention": attention})
    before = trainer.policy.lora.master.detach().clone()
    for _ in range(3):
        metrics = trainer.iterate()
        assert metrics["log_prob_mismatch_max"] == 0.0
        assert metrics["pre_update_clip_fraction"] == 0.0
        assert metrics["grad_norm"] > 0
    assert trainer.objective.sampler.captures == 1  # the trajectory
    assert trainer.updater.captured.captures == 3  # by itself: two steps, and one with image 0's KL
    assert not torch.equal(trainer.policy.lora.master, before)


@pytest.mark.parametrize(
    ("device", "graphs", "precision"),
    [
        pytest.param("cpu", False, "model", marks=pytest.mark.weekly),
        on_gpu("cuda", False, "model"),
        on_gpu("cuda", True, "fp8"),
    ],
)
def test_the_update_runs_without_its_graphs_and_captures_a_base_in_fp8(device, graphs, precision, tmp_path):
    trainer = trainer_on(device, tmp_path, model={"base_precision": precision}, update={"graphs": graphs})
    for _ in range(3):
        metrics = trainer.iterate()
        assert metrics["log_prob_mismatch_max"] == 0.0
        assert metrics["grad_norm"] > 0
    assert trainer.updater.captured.captures == (3 if graphs else 0)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.weekly), on_gpu("cuda")])
def test_captured_updates_leave_the_eager_gradient_and_weights(device, tmp_path):
    """Two trainers in step: eager calls, captures and replays; by an attention whose backward repeats its bits."""
    attention = "math" if device == "cuda" else "auto"
    trainers = [
        trainer_on(device, tmp_path / str(graphs), model={"attention": attention}, update={"graphs": graphs})
        for graphs in (True, False)
    ]
    captured, eager = (trainer.policy.lora.master for trainer in trainers)
    for number in range(5):
        before = captured.detach().clone()
        for trainer in trainers:
            trainer.iterate()
        assert captured.grad.abs().max() > 0
        assert torch.equal(captured.grad, eager.grad), f"gradients differ in iteration {number}"
        assert torch.equal(captured, eager), f"weights differ in iteration {number}"
        assert not torch.equal(captured, before)
    assert [trainer.updater.captured.captures for trainer in trainers] == [3, 0]


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "cpu"), ("cpu", "math"), *(on_gpu("cuda", name) for name in ("cudnn", "flash", "efficient", "math"))],
)
@pytest.mark.parametrize("tokens", [1024, 1229])
def test_attention_gives_the_same_bits_with_and_without_a_gradient(device, name, tokens):
    shape, dtype = ((16, 24, tokens, 64), torch.bfloat16) if device == "cuda" else ((2, 2, 61, 16), torch.float32)
    _, attend = choose_attention(name, torch.device(device), dtype)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    with torch.no_grad():
        sampled = attend(q, k, v)
    trained = attend(*(t.requires_grad_() for t in (q, k, v)))
    assert torch.equal(sampled, trained.detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["recompute", "truncated_importance"])
def test_an_update_from_merged_window_steps_runs(device, mode, tmp_path):
    changes = {"rollout": {"window_forward": "merged"}, "update": {"old_log_prob": mode}}
    trainer = trainer_on(device, tmp_path, **changes)
    metrics = trainer.iterate()
    assert metrics["log_prob_mismatch_max"] == 0.0
    assert metrics["log_prob_mismatch_mean"] > 0
    assert 0.5 < metrics["importance_weight_mean"] <= 2.0


@pytest.mark.parametrize("device", DEVICES)
def test_captured_head_updates_equal_eager_ones(device, tmp_path):
    """The generator stands still, so that nothing but the head differs between iterations."""
    losses = []
    for captured in (True, False):
        trainer = trainer_on(device, tmp_path / str(captured), update={"learning_rate": contenders.FROZEN})
        if not captured:
            trainer.objective.discriminator_trainer.captured_update.backend = None
        rows = [trainer.iterate() for _ in range(3)]
        losses.append([row["discriminator_loss"] for row in rows])
        assert (trainer.objective.discriminator_trainer.captured_update.captures > 0) == captured
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_the_decoder_in_the_models_dtype_is_close_to_float32(device, tmp_path):
    policy = trainer_on(device, tmp_path).policy
    latents = torch.randn(4, *policy.latent_shape(), device=device)
    fast, reference = policy.decode(latents), policy.reference_decoder.images(latents)
    noise = (fast - reference).square().mean()
    assert fast.dtype == torch.float32
    assert 10 * torch.log10(1 / noise.clamp(min=1e-12)) > 30  # decibels; random weights, so the bound is loose


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_the_fp8_product_is_its_references(bias):
    x, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((16 * 1024, 1536), (6144, 1536)))
    b = torch.randn(6144, device="cuda").bfloat16() if bias else None
    x8, weight8 = fp8_quantize(x), fp8_quantize(weight)
    expected = fp8_linear_ref(x8, weight8, b, out_dtype=torch.float32)
    found = fp8_linear(x8, weight8, b).float()
    assert (found - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.gpu
def test_fp8_ode_steps_stay_near_the_models_own(tmp_path):
    own, quantised = (trainer_on("cuda", tmp_path / name, precision=name) for name in ("model", "fp8"))
    latents = torch.randn(2, *own.policy.latent_shape(), device="cuda")
    results = []
    for trainer in (own, quantised):
        policy, table = trainer.policy, tables(trainer)
        policy.merge()
        prepared = policy.prepare(policy.encode(["a", "b"]), table.timesteps, guidance=2.0)
        with torch.no_grad():
            results.append(policy.predict_merged(latents, table.numbers[0], prepared)[0].float())
    assert (results[1] - results[0]).norm() < 0.1 * results[0].norm()


@pytest.mark.parametrize("device", DEVICES)
def test_training_over_an_fp8_base_is_near_the_models_own(device, tmp_path):
    gradients = []
    for precision in ("model", "fp8"):
        changes = {"model": {"base_precision": precision}, "update": {"learning_rate": contenders.FROZEN}}
        trainer = trainer_on(device, tmp_path / precision, small=THREE_BLOCKS, **changes)
        rollout = trainer.objective.rollout(tables(trainer), 0)
        advantages = torch.linspace(-1, 1, trainer.length.images, device=trainer.policy.device)
        settings = {"total": len(advantages), "watch_kl": False}
        stats = trainer.updater.accumulate(rollout.micro_batches, advantages, tables(trainer), **settings)
        assert stats.max_mismatch().item() == 0.0
        gradients.append(trainer.policy.lora.master.grad.float().clone())
    own, quantised = gradients
    assert torch.isfinite(quantised).all()
    assert not torch.equal(quantised, own), "the base was not quantised"
    assert torch.nn.functional.cosine_similarity(own, quantised, dim=0) > 0.9


@pytest.fixture
def alone_in_a_job():
    """A process group of one rank, NCCL on a GPU and gloo on a CPU, as `Distributed.start` makes it under torchrun."""
    made = []

    def join(device: torch.device) -> Distributed:
        place = Distributed(0, 1, 0, device)
        place._store = torch.distributed.HashStore()
        place._watch = types.SimpleNamespace(failure=None, note=types.SimpleNamespace(place=0))
        place._join(30.0)
        made.append(place)
        return place

    yield join
    if made:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.weekly
def test_collectives_of_one_rank_beside_captured_graphs(device, tmp_path, alone_in_a_job):
    """NCCL watches its collectives from a thread of its own, which a capture must survive, and a replay as well."""
    alone = trainer_on(device, tmp_path / "alone").iterate()
    trainer = trainer_on(device, tmp_path / "job")
    place = alone_in_a_job(trainer.policy.device)
    rows = []
    for _ in range(3):  # eager, captured, replayed
        rows.append(trainer.iterate())
        vector = trainer.policy.lora.master.detach().clone()
        torch.distributed.all_reduce(vector)
        assert torch.equal(vector, trainer.policy.lora.master)
        payload = torch.arange(35, dtype=torch.uint8, device=place.device).reshape(5, 7)
        (gathered,) = place._gather_rows(payload, 7, "uint8")
        assert torch.equal(gathered, payload)
    assert trainer.objective.sampler.captures == 1  # the trajectory
    assert all(row["log_prob_mismatch_max"] == 0.0 for row in rows)
    assert rows[0]["discriminator_loss"] == alone["discriminator_loss"]


@contextlib.contextmanager
def waits_are(mode: str):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_sampler_and_update_never_wait(tmp_path):
    trainer = trainer_on("cuda", tmp_path)
    for _ in range(3):
        trainer.iterate()  # everything is captured
    table, updater = tables(trainer), trainer.updater
    with waits_are("error"):
        rollout = trainer.objective.rollout(table, 0)  # prompts that were seen: the first visit of one copies it
        advantages = torch.linspace(-1, 1, trainer.length.images, device="cuda")
        stats = updater.accumulate(rollout.micro_batches, advantages, table, total=len(advantages), watch_kl=True)
        updater.step(stats.max_mismatch())
        stats.sums()


@contextlib.contextmanager
def places_of_waits():
    """The places of this repository in which CUDA says that the host waits, as `device_twin.place` names them."""
    places: set[str] = set()

    def note(message, *_, **__):  # called where the warning is given
        if "synchroniz" in str(message):
            places.add(device_twin.place())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


@pytest.mark.gpu
def test_an_iteration_waits_where_the_device_twin_says(tmp_path):
    trainer = trainer_on("cuda", tmp_path)
    for _ in range(3):
        trainer.iterate()
    with places_of_waits() as places, waits_are("warn"):
        trainer.iterate()
    assert "advgrpo/training/policy_gradient.py:_update_metrics" in places
    assert places <= ITERATION_READS.keys() | FIRST_VISITS | FIRST_FEATURES  # every iteration meets two new prompts


@pytest.mark.parametrize("device", DEVICES)
def test_images_decoded_beside_the_sampler_have_the_same_bits(device, tmp_path):
    """On a CPU, which has no streams, in place; tests/training/test_decode_stream.py emulates them."""
    drawn = []
    for stream in ("main", "side"):
        objective = trainer_on(device, tmp_path / stream, rollout={"decode_stream": stream}).objective
        rollouts = [objective.rollout(objective.table(0), 0) for _ in range(3)]  # eager, captured and replayed
        drawn.append([each.images for rollout in rollouts for each in rollout.micro_batches])
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
