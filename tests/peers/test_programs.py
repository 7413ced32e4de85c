"""The peers' own programs with their functions replaced: who holds what, pipelines, rollouts, launched scripts.

Needs checkouts (`ADVGRPO_PEERS`). Planted bugs that turned this file red: functions found by their local name
(Adv-GRPO's pipelines got Flow-SDE), importers left out, the launcher's call after the main block, a schedule refused
for its end above 0 (MixGRPO-Flash).
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advgrpo_kernels.integrations import _self_check, adv_grpo, dance_grpo, flow_grpo, miles_diffusion, mix_grpo
from tests.peers import checkouts

ROOT = Path(__file__).parents[2]
PATCH = "diffusers_patch.sd3_sde_with_logprob"
PIPELINES = {
    "flow_grpo": ["sd3_pipeline_with_logprob"],
    "adv_grpo": ["sd3_pipeline_with_logprob", "sd3_pipeline_with_logprob_fast"],
    "miles_diffusion": ["sd3_pipeline_with_logprob", "sd3_pipeline_with_logprob_fast"],
}


def package(peer):
    return "adv_grpo" if peer == "adv_grpo" else "flow_grpo"


def with_pipelines(peer):
    names = [f"{package(peer)}.{PATCH}", *(f"{package(peer)}.diffusers_patch.{name}" for name in PIPELINES[peer])]
    return checkouts.importable(peer, names)


def is_ours(function, ours):
    return function.__code__ is ours.__code__


def test_adv_grpos_pipelines_hold_flow_cps_under_the_name_of_flow_sde():
    with with_pipelines("adv_grpo") as (home, slow, fast):
        original = home.sde_step_with_logprob_new
        assert slow.sde_step_with_logprob is fast.sde_step_with_logprob is original
        for module in (slow, home):  # the importer alone, then the module that defines it
            adv_grpo.patch(module)
            assert is_ours(slow.sde_step_with_logprob, adv_grpo.sde_step_with_logprob_new)
            assert is_ours(fast.sde_step_with_logprob, adv_grpo.sde_step_with_logprob_new) == (module is home)
            adv_grpo.unpatch(module)
            assert (
                slow.sde_step_with_logprob is fast.sde_step_with_logprob is home.sde_step_with_logprob_new is original
            )


def test_the_functions_of_other_models_are_refused():
    names = [f"flow_grpo.{PATCH}", "flow_grpo.diffusers_patch.wan_pipeline_with_logprob"]
    with checkouts.importable("miles_diffusion", names) as (_, wan):
        for peer in (flow_grpo, miles_diffusion):
            with pytest.raises(
                ValueError, match=r"wan_pipeline.*takes .*determistic.* another version of that codebase"
            ):
                peer.patch(wan)
    with (
        checkouts.importable("mix_grpo") as (module,),
        pytest.raises(ValueError, match="dance_grpo_step and its replacement do not give the same"),
    ):
        dance_grpo.patch(module)


def unit_pipeline_of(path):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("peer", PIPELINES)
def test_real_pipelines_give_the_same_images(peer, unit_pipeline):
    """Ten steps with guidance on an untrained SD3 of width 64, with every pipeline of SD3 that the peer has."""
    pipe, fused = unit_pipeline_of(unit_pipeline), adv_grpo if peer == "adv_grpo" else flow_grpo
    settings = {"num_inference_steps": 10, "guidance_scale": 4.5, "height": 64, "width": 64, "output_type": "pt"}
    settings |= {"negative_prompt": [""] * 2, "max_sequence_length": 16, "noise_level": 0.8}
    with with_pipelines(peer) as (home, *modules):
        runs = []
        for module in modules:
            for name in ("pipeline_with_logprob", "pipeline_with_logprob_new", "pipeline_with_logprob_random"):
                if hasattr(module, name):
                    extra = {}
                    if module.__name__.endswith("_fast"):
                        extra = (
                            {"sde_window_size": 3}
                            if peer != "adv_grpo"
                            else {"random_timestep": 2, "train_num_steps": 3}
                        )
                    runs += [(module, name, extra)]
                    if "sde_window_size" in extra:
                        runs += [(module, name, extra | {"sde_type": "cps"})]

        def images():
            results = []
            for module, name, extra in runs:
                torch.manual_seed(5)
                __import__("random").seed(5)
                results.append(getattr(module, name)(pipe, ["a red cube", "two birds"], **settings, **extra))
            return results

        theirs = images()
        fused.patch(home)
        ours = images()
        assert len(theirs) >= {"flow_grpo": 1, "adv_grpo": 4, "miles_diffusion": 3}[peer]
        for (_, name, extra), their, our in zip(runs, theirs, ours):
            for part, (a, b) in enumerate(zip(their, our)):
                a, b = ([value] if torch.is_tensor(value) else value for value in (a, b))
                for x, y in zip(a, b, strict=True):
                    text = _self_check.unequal(x.float(), y.float(), _self_check.Tolerance(5e-5, 5e-5))
                    assert text is None, f"{name} {extra} output {part}: {text}"


class Transformer(torch.nn.Module):
    """Takes what FLUX takes, gives a velocity in bfloat16 that depends on latents and time."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, hidden_states, timestep, **rest):
        velocity = self.layer(hidden_states.float()) + timestep.view(-1, 1, 1)
        return (velocity.bfloat16(),)


def rollout_inputs():
    torch.manual_seed(0)
    z, text = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    return {
        "z": z,
        "encoder_hidden_states": text,
        "pooled_prompt_embeds": text,
        "text_ids": text[0],
        "image_ids": text[0],
    }


FLASH = {"dpm_solver_order": 2, "dpm_solver_type": "midpoint", "dpm_apply_strategy": "post"}


@pytest.mark.parametrize("ratio", [None, 0.4, 0.2], ids=["MixGRPO", "Flash", "Flash*"])
@pytest.mark.parametrize("flow_sampling", [True, False], ids=["flow", "dance"])
def test_mix_grpos_rollout_runs_for_every_window(ratio, flow_sampling):
    """The repository's scripts: 25 steps, shift 3, windows of 4; Flash compresses what is behind the window."""
    algorithm = "null" if ratio is None else "dpmsolver++"
    args = SimpleNamespace(
        dpm_algorithm_type=algorithm,
        dpm_post_compress_ratio=ratio,
        flow_grpo_sampling=flow_sampling,
        eta=0.7,
        shift=3,
        sample_strategy="progressive",
        drop_last_sample=False,
        **FLASH,
    )
    with checkouts.importable("mix_grpo") as (module,):
        model, schedule = Transformer(), module.sd3_time_shift(3, torch.linspace(1, 0, 26))

        def rollouts():
            for start in range(22):
                determistic = [not start <= i < start + 4 for i in range(25)]
                inputs = rollout_inputs()
                with torch.no_grad():
                    yield module.run_sample_step(
                        args,
                        progress_bar=range(25),
                        sigma_schedule=schedule,
                        transformer=model,
                        grpo_sample=True,
                        determistic=determistic,
                        **inputs,
                    )

        theirs = list(rollouts())
        assert mix_grpo.patch(module) == ["flow_grpo_step", "dance_grpo_step"]
        ours = list(rollouts())
        lengths = {latents.shape[1] for _, _, latents, _ in ours}
        assert lengths == {26} if ratio is None else len(lengths) > 5  # compressed
        for start, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            # bfloat16 velocities: the original rounds products with them; over 25 steps that adds up.
            for name, a, b in zip(("last", "clean", "latents"), their, our):
                text = _self_check.unequal(a.float(), b.float(), _self_check.Tolerance(3e-2, 2e-2))
                assert text is None, f"window at {start}, {name}: {text}"
            window = slice(start, start + 4)
            text = _self_check.unequal(their[3][:, window], our[3][:, window], _self_check.Tolerance(5e-2, 2e-2))
            assert text is None, f"window at {start}, log-probs: {text}"


def test_dance_grpos_rollout_and_training_step():
    args = SimpleNamespace(eta=0.3)
    with checkouts.importable("dance_grpo") as (module,):
        model, schedule = Transformer(), module.sd3_time_shift(3, torch.linspace(1, 0, 17))

        def run():
            inputs = rollout_inputs()
            with torch.no_grad():
                sample = module.run_sample_step(
                    args, progress_bar=range(16), sigma_schedule=schedule, transformer=model, grpo_sample=True, **inputs
                )
            latents, log_probs, gradients, trained = sample[2], sample[3], [], []
            del inputs["z"]
            for i in range(0, 15, 5):
                model.zero_grad()
                times = torch.full([2], int(schedule[i] * 1000))
                log_prob = module.grpo_one_step(
                    args,
                    latents[:, i],
                    latents[:, i + 1],
                    transformer=model,
                    timesteps=times,
                    i=i,
                    sigma_schedule=schedule,
                    **inputs,
                )
                log_prob.sum().backward()
                trained.append((log_prob - log_probs[:, i]).detach())
                gradients.append(model.layer.weight.grad.clone())
            return *sample, torch.stack(trained), torch.stack(gradients)

        theirs = run()
        assert dance_grpo.patch(module) == ["flux_step"]
        ours = run()
        tolerances = [(2e-2, 1e-2)] * 3 + [(2e-2, 5e-3), (1e-6, 0), (1e-3, 2e-2)]
        names = ("last", "clean", "latents", "log-probs", "log-ratio of the first update", "gradients")
        for name, a, b, tolerance in zip(names, theirs, ours, tolerances, strict=True):
            text = _self_check.unequal(a.float(), b.float(), _self_check.Tolerance(*tolerance))
            assert text is None, f"{name}: {text}"


DRIVER = """
import sys
from advgrpo_kernels.integrations import _launcher
from tests.peers import checkouts
peer, script, *args = sys.argv[1:]
code = "no code"
with checkouts.importable(peer, []):
    try:
        code = _launcher.main(["--strict", peer, "--", script, *args])
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    main = vars(sys.modules["__main__"])
    for name in ("flux_step", "flow_grpo_step", "sde_step_with_logprob", "PerPromptStatTracker", "run_sample_step"):
        value = getattr(main.get(name), "update", main.get(name))
        value = value if name != "run_sample_step" or value is None else value.__globals__.get("flux_step", value)
        if value is not None:
            print(name, value.__code__.co_filename, value.__code__.co_name)
print("main", main["__name__"], main["__file__"], "exit", code)
"""


def launched(peer, script, *args):
    folder = checkouts.checkout(peer)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{folder}", "PATH": "", "OMP_NUM_THREADS": "1"}
    environment |= {"ADVGRPO_PEERS": str(folder.parent), "HF_HUB_OFFLINE": "1", "HOME": "/tmp"}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, peer, script, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("trainer", ["train_grpo_flux", "train_grpo_flux_lora", "train_grpo_wan_2_1"])
def test_dance_grpos_real_trainers_launched(trainer):
    """As far as their own argument parser in the main block: by then `flux_step` is ours for all that use it."""
    done = launched("dance_grpo", f"fastvideo/{trainer}.py", "--help")
    lines = done.stdout.splitlines()
    assert "--timestep_fraction" in done.stdout, done.stderr[-2000:]
    assert f"flux_step {dance_grpo.__file__} flux_step" in lines
    assert f"run_sample_step {dance_grpo.__file__} flux_step" in lines
    assert lines[-1] == f"main __main__ {checkouts.checkout('dance_grpo') / 'fastvideo' / trainer}.py exit 0"
    assert "flux_step of __main__ replaced" in done.stderr


@pytest.mark.parametrize(
    ("peer", "script", "names"),
    [
        ("mix_grpo", "fastvideo/train_grpo_flux.py", {"flow_grpo_step": mix_grpo.flow_grpo_step}),
        (
            "adv_grpo",
            "scripts/train_sd3_fast_dino_patch.py",
            {"sde_step_with_logprob": adv_grpo.sde_step_with_logprob_new},
        ),
        ("flow_grpo", "scripts/train_sd3.py", {"sde_step_with_logprob": flow_grpo.sde_step_with_logprob}),
    ],
)
def test_real_scripts_that_import_their_functions_launched(peer, script, names):
    done = launched(peer, script, "--help")
    for name, ours in names.items():
        line = f"{name} {ours.__code__.co_filename} {ours.__code__.co_name}"
        assert line in done.stdout.splitlines(), done.stdout[-500:] + done.stderr[-3000:]
    assert "replaced" in done.stderr
    assert "NOTHING WAS REPLACED" not in done.stderr
