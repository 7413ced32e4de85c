"""What the peers' losses, windows and advantages give on random inputs, written to tests/golden/*.npz.

    ADVGRPO_PEERS=FOLDER python -m tests.peers.record_objectives [FILE ...]

They are methods of classes whose modules import a whole trainer: each class is cut out of its file and run alone, as it
stands, in float32 on a CPU. tests/golden/README.md says what is in the files.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.sampling.toy import bent

GOLDEN = Path(__file__).parents[1] / "golden"
VERL_OMNI = "verl-omni/verl_omni/trainer/diffusion/diffusion_algos.py"
MIX_GRPO = "MixGRPO/fastvideo/utils/grpo_states.py"
FLOW_FACTORY = "Flow-Factory/src/flow_factory/advantage/advantage_processor.py"
MIX_SAMPLING = "MixGRPO/fastvideo/utils/sampling_utils.py"
TEMPFLOW = "TempFlow-GRPO/flow_grpo/diffusers_patch/sd3_{}_with_logprob_perstep.py"
AWM_TRAINER = "Flow-Factory/src/flow_factory/trainers/awm.py"
ROWS, SHAPE = 16, (4, 5, 6)
SIGMAS = [(0.97, 0.9), (0.75, 0.6), (0.3, 0.1)]  # noise level before and after three steps


def cut(file: str, name: str) -> Any:
    """The class or function of a peer's file, without what registers it and what it inherits."""
    tree = ast.parse(Path(os.environ["ADVGRPO_PEERS"], file).read_text())
    (found,) = [node for node in tree.body if getattr(node, "name", "") == name]
    if isinstance(found, ast.ClassDef):
        found.bases = []
    found.decorator_list = [node for node in found.decorator_list if "dataclass" in ast.unparse(node)]
    code = compile(ast.Module([found], []), file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    names = {"torch": torch, "np": np, "dataclass": dataclass, "contextmanager": contextmanager}
    exec(code, names)
    return names[name]


def moved_steps() -> list[dict[str, torch.Tensor]]:
    """Steps of Flow-SDE (noise level 0.7) that a policy took, and the mean of another policy a little off."""
    steps = []
    for sigma, after in SIGMAS:
        std, sqrt_dt = torch.tensor(0.7 * (sigma / (1 - sigma)) ** 0.5), torch.tensor((sigma - after) ** 0.5)
        old_mean, drift, z = torch.randn(3, ROWS, *SHAPE).unbind()
        next_latents = old_mean + std * sqrt_dt * z
        drift = drift * torch.linspace(0.0, 0.3, ROWS).view(-1, 1, 1, 1)
        steps.append(
            {"old_mean": old_mean, "mean": old_mean + drift, "next_latents": next_latents}
            | {"std_dev_t": std, "sqrt_dt": sqrt_dt, "advantages": 3 * torch.randn(ROWS)}
        )
    return steps


def log_prob(step: dict[str, torch.Tensor], mean: torch.Tensor) -> torch.Tensor:
    """Of the step taken, averaged over elements as in Flow-GRPO's code."""
    s = step["std_dev_t"] * step["sqrt_dt"]
    constants = torch.log(s) + torch.log(torch.sqrt(2 * torch.as_tensor(torch.pi)))
    return (-((step["next_latents"] - mean) ** 2) / (2 * s**2) - constants).mean(dim=(1, 2, 3))


def policy_losses(name: str, **settings: float) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradient by the mean of a policy loss of verl-omni, for every step."""
    recorded = {name: torch.tensor(value) for name, value in settings.items()}
    loss_class, config = cut(VERL_OMNI, name), SimpleNamespace(diffusion_loss=SimpleNamespace(**settings))
    for number, step in enumerate(moved_steps()):
        mean = step["mean"].clone().requires_grad_()
        loss, metrics = loss_class.compute_loss(
            old_log_prob=log_prob(step, step["old_mean"]),
            log_prob=log_prob(step, mean),
            advantages=step["advantages"],
            config=config,
            old_prev_sample_mean=step["old_mean"],
            prev_sample_mean=mean,
            std_dev_t=step["std_dev_t"].expand(ROWS, 1, 1, 1),
            sqrt_dt=step["sqrt_dt"],
        )
        (grad_mean,) = torch.autograd.grad(loss, mean)
        share = metrics.get("actor/kl_mask_fraction", metrics.get("actor/pg_clipfrac"))
        found = {"loss": loss.detach(), "grad_mean": grad_mean, "clip_fraction": torch.tensor(share)}
        if "actor/kl_new_old_mean" in metrics:
            found["divergence_mean"] = torch.tensor(metrics["actor/kl_new_old_mean"])
        recorded |= {f"{number}_{key}": value for key, value in (step | found).items()}
    return recorded


def grpo_guard() -> dict[str, torch.Tensor]:
    """Ratios on both sides of the clip."""
    return policy_losses("GRPOGuardLoss", clip_ratio=5e-3, adv_clip_max=2.0)


def flow_dppo() -> dict[str, torch.Tensor]:
    """Divergences on both sides of the threshold."""
    return policy_losses("FlowDPPOLoss", kl_mask_threshold=2e-2, add_kl_coefficient=True)


def distill() -> dict[str, torch.Tensor]:
    """Both distillation losses and their gradients: of the means of a step, and of velocities."""
    step = moved_steps()[1]
    flat = {name: step[name].flatten(2) for name in ("mean", "old_mean")}  # they average over two dimensions
    mean, recorded = flat["mean"].clone().requires_grad_(), {"std_dev_t": step["std_dev_t"]}
    std = step["std_dev_t"].expand(ROWS, 1, 1)
    teacher = flat["old_mean"]
    losses = {
        "transition": cut(VERL_OMNI, "DistillKLLoss").compute_loss(
            prev_sample_mean=mean, teacher_prev_sample_mean=teacher, std_dev_t=std
        ),
        "velocity": cut(VERL_OMNI, "DistillFlowMatchingMSELoss").compute_loss(
            noise_pred=mean, teacher_noise_pred=teacher
        ),
    }
    for name, (loss, _) in losses.items():
        recorded |= {f"{name}_loss": loss.detach(), f"{name}_grad": torch.autograd.grad(loss, mean)[0]}
    return {"student": flat["mean"], "teacher": teacher} | recorded


def windows() -> dict[str, torch.Tensor]:
    """First and last step of MixGRPO's sliding window by iteration, and of its random one by seed; 10 steps."""
    states, recorded = cut(MIX_GRPO, "GRPOTrainingStates"), {}
    size, last = 4, 10
    for name, settings in {
        "sliding": {"iters_per_group": 3, "prog_overlap": True, "prog_overlap_step": 1, "roll_back": True},
        "strided": {"iters_per_group": 2, "prog_overlap": True, "prog_overlap_step": 2, "roll_back": True},
        "apart": {"iters_per_group": 2, "roll_back": True},
    }.items():
        state, seen = states(group_size=size, max_timesteps=last, **settings), []
        for _ in range(30):
            steps = state.get_current_timesteps()
            seen.append([steps[0], steps[-1]] if steps else [-1, -1])
            state.update_iteration()
        recorded[name] = torch.tensor(seen)
    state, seen = states(iters_per_group=1, group_size=size, max_timesteps=last, sample_strategy="random"), []
    for seed in range(200):
        state.update_iteration(seed)
        steps = state.get_current_timesteps()
        seen.append([steps[0], steps[-1]])
    return recorded | {"random": torch.tensor(seen)}


def kept_noise(kept: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """diffusers' `randn_tensor`, which keeps what it returns."""

    def randn_tensor(shape: Any, **_: Any) -> torch.Tensor:
        kept.append(torch.randn(tuple(shape)))
        return kept[-1]

    return randn_tensor


def flash() -> dict[str, torch.Tensor]:
    """MixGRPO-Flash's rollout: three images, stochastic steps 1 and 2 of 10, then five of second order for seven."""
    spec = importlib.util.spec_from_file_location("mix_sampling", Path(os.environ["ADVGRPO_PEERS"], MIX_SAMPLING))
    theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    noise, schedules, step = [], [], theirs.dpm_step

    def dpm_step(*given: Any, sigmas: torch.Tensor, **more: Any) -> Any:
        schedules.append(sigmas)
        return step(*given, sigmas=sigmas, **more)

    class Transformer:
        eval = staticmethod(lambda: None)
        __call__ = staticmethod(lambda hidden_states, **_: (bent(hidden_states),))

    theirs.randn_tensor, theirs.dpm_step = kept_noise(noise), dpm_step
    args = SimpleNamespace(
        dpm_algorithm_type="dpmsolver++", dpm_apply_strategy="post", dpm_post_compress_ratio=0.8, dpm_solver_order=2,
        dpm_solver_type="midpoint", flow_grpo_sampling=True, sample_strategy="progressive", eta=0.7, shift=3,
        drop_last_sample=False,
    )  # fmt: skip
    window = [1, 2]
    _, _, latents, _ = theirs.run_sample_step(
        args,
        z=torch.randn(3, 2, 3, 3),
        progress_bar=range(10),
        sigma_schedule=theirs.sd3_time_shift(3, torch.linspace(1, 0, 11)),
        transformer=Transformer(),
        encoder_hidden_states=torch.zeros(3, 1, 1),
        pooled_prompt_embeds=None,
        text_ids=torch.zeros(1, 1),
        image_ids=None,
        grpo_sample=True,
        determistic=[i not in window for i in range(10)],
    )
    drawn = torch.stack([noise[i] for i in window])  # their function draws where it adds none as well
    recorded = {"sigmas": schedules[0], "window": torch.tensor(window), "eta": torch.tensor(args.eta), "noise": drawn}
    return recorded | {"latents": latents.transpose(0, 1).contiguous()}


def tempflow() -> dict[str, torch.Tensor]:
    """TempFlow-GRPO's rollout: two trajectories of five steps, and six images from each of the first four steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps

    noise, scales = [], []
    step = cut(TEMPFLOW.format("sde"), "sde_step_with_logprob")
    step.__globals__.update(randn_tensor=kept_noise(noise), math=math)

    def sde_step(*given: Any, **more: Any) -> Any:
        found = step(*given, **more)
        if not more["determistic"]:
            scales.append(found[3].flatten()[0])
        return found

    class Transformer:
        config = SimpleNamespace(in_channels=2)
        __call__ = staticmethod(lambda hidden_states, **_: (bent(hidden_states),))

    draw = cut(TEMPFLOW.format("pipeline"), "pipeline_with_logprob")
    draw.__globals__.update(sde_step_with_logprob=sde_step, retrieve_timesteps=retrieve_timesteps, XLA_AVAILABLE=False)
    initial, text = torch.randn(2, 2, 3, 3), torch.zeros(2, 1)
    owner = SimpleNamespace(
        check_inputs=lambda *_, **__: None,
        _execution_device="cpu",
        joint_attention_kwargs=None,
        do_classifier_free_guidance=False,
        interrupt=False,
        clip_skip=None,
        encode_prompt=lambda **_: (text, None, text, None),
        transformer=Transformer(),
        prepare_latents=lambda *_: initial,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        progress_bar=lambda **_: nullcontext(SimpleNamespace(update=lambda: None)),
        vae=SimpleNamespace(
            config=SimpleNamespace(scaling_factor=1.0, shift_factor=0.0),
            dtype=torch.float32,
            decode=lambda latents, **_: (latents,),
        ),
        image_processor=SimpleNamespace(postprocess=lambda image, **_: image),
        maybe_free_model_hooks=lambda: None,
    )
    with torch.no_grad():
        images, states, branched, log_probs, _ = draw(
            owner,
            height=1,
            width=1,
            num_inference_steps=5,
            prompt_embeds=text,
            pooled_prompt_embeds=text,
            return_dict=False,
        )
    stacked = {"latents": states, "next_latents": branched, "log_prob": log_probs, "images": images, "noise": noise}
    recorded = {name: torch.stack(values) for name, values in (stacked | {"std_dev_t": scales}).items()}
    return {"sigmas": owner.scheduler.sigmas} | recorded


def gdpo() -> dict[str, torch.Tensor]:
    """Flow-Factory's advantages of three rewards on very different scales; one group agrees in all of them."""
    groups = torch.arange(6).repeat_interleave(8)
    rewards = torch.randn(3, 48) * torch.tensor([1.0, 30.0, 0.05])[:, None] + torch.randn(3, 6)[:, groups]
    rewards[:, groups == 2] = 0.5
    weights = torch.tensor([1.0, 0.5, 2.0])
    names = ("a", "b", "c")
    owner = SimpleNamespace(
        collect_group_rewards=lambda samples, given: ({k: v.numpy() for k, v in given.items()}, groups.numpy()),
        reward_weights=dict(zip(names, weights.tolist())),
        _global_mean_std=lambda values: (values.mean(), max(values.std(), 1e-6)),
        _build_gdpo_log_data=lambda *_: {},
        _to_local=torch.as_tensor,
    )
    advantages = cut(FLOW_FACTORY, "AdvantageProcessor").compute_gdpo(owner, [], dict(zip(names, rewards)), False)
    return {"groups": groups, "rewards": rewards, "weights": weights, "advantages": advantages}


@dataclass
class AwmWorld:
    """What Flow-Factory's AWM trainer asks of the rest: its velocities are given, for every pass and level."""

    clean: torch.Tensor  # [B, C, h, w]
    noise: torch.Tensor  # [T, B, C, h, w]
    timesteps: torch.Tensor  # [T, B], up to 1000
    advantages: torch.Tensor  # [B]
    velocities: dict[str, torch.Tensor]  # "old", "velocity", "reference", "average": [T, B, C, h, w]

    def loss(self, weighting: str, **betas: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss [T], gradient by the velocity [T, B, C, h, w]) of their `optimize`, as it stands."""
        leaf, asked, losses, state = self.velocities["velocity"].clone().requires_grad_(), Counter(), [], ["old"]

        @contextmanager
        def weights(name: str):
            before, state[0] = state[0], "old" if state[0] == "old" else name
            yield
            state[0] = before

        def forward(**_: Any) -> SimpleNamespace:
            given = leaf if state[0] == "velocity" else self.velocities[state[0]]
            asked[state[0]] += 1
            return SimpleNamespace(noise_pred=given[asked[state[0]] - 1])

        def backward(loss: torch.Tensor) -> None:
            losses.append(loss.detach())
            loss.backward()

        class Arguments(SimpleNamespace):
            keys = __getitem__ = lambda self, *_: []

        noises = iter(self.noise)
        trainer_class = cut(AWM_TRAINER, "AWMTrainer")
        folder = str(Path(AWM_TRAINER).parents[1])
        trainer_class.optimize.__globals__.update(
            create_generator=lambda *_: torch.Generator().manual_seed(0),
            tqdm=lambda items, **_: items,
            defaultdict=defaultdict,
            BaseSample=SimpleNamespace(
                stack=lambda _: {"all_latents": self.clean[:, None], "advantage": self.advantages}
            ),
            randn_tensor=lambda *_, **__: next(noises),
            filter_kwargs=lambda _, **given: given,
            to_broadcast_tensor=cut(f"{folder}/utils/base.py", "to_broadcast_tensor"),
            flow_match_sigma=cut(f"{folder}/utils/noise_schedule.py", "flow_match_sigma"),
        )
        trainer_class.optimize.__globals__["flow_match_sigma"].__globals__["TIMESTEP_MAX"] = 1000.0
        trainer = object.__new__(trainer_class)
        rows = len(self.clean)
        limits = {"adv_clip_range": (-AWM_CLIP, AWM_CLIP), "clip_range": (-AWM_RATIO, AWM_RATIO)}
        trainer.__dict__.update(
            accelerator=SimpleNamespace(
                device="cpu", accumulate=lambda *_: nullcontext(), backward=backward, sync_gradients=False
            ),
            adapter=SimpleNamespace(
                forward=forward,
                rollout=lambda: None,
                train=lambda: state.__setitem__(0, "velocity"),
                trainable_components=[],
                use_ema_parameters=lambda: weights("average"),
                use_ref_parameters=lambda: weights("reference"),
            ),
            training_args=Arguments(per_device_batch_size=rows, seed=0, num_inner_epochs=1, **limits),
            autocast=nullcontext,
            _sample_timesteps=lambda _: self.timesteps,
            num_train_timesteps=len(self.timesteps),
            off_policy=False,
            weighting=weighting,
            ghuber_power=AWM_POWER,
            epoch=0,
            show_progress_bar=False,
            **{"kl_beta": 0.0, "ema_kl_beta": 0.0, **betas},
        )
        trainer.optimize([SimpleNamespace(to=lambda _: None)] * rows)
        return torch.stack(losses), leaf.grad


AWM_CLIP, AWM_RATIO, AWM_POWER = 1.5, 2e-2, 0.25
AWM_KL = {"kl_beta": 0.3, "ema_kl_beta": 0.7}


def awm() -> dict[str, torch.Tensor]:
    """AWM under every weighting, ratios on both sides of the clip; with both KLs, and the KL to the average alone."""
    rows, shape = 8, (4, 3, 5)
    clean, timesteps = (
        torch.randn(rows, *shape),
        torch.stack([torch.linspace(*ends, rows) for ends in ((990, 520), (480, 20))]),
    )
    noise = torch.randn(2, rows, *shape)
    flow, apart = noise - clean, torch.linspace(0.0, 0.3, rows).view(1, -1, 1, 1, 1)
    velocities = {"old": flow + 0.7 * torch.randn(2, rows, *shape)}
    for name in ("velocity", "reference", "average"):
        velocities[name] = velocities["old"] + apart * torch.randn(2, rows, *shape)
    given = {"clean": clean, "noise": noise, "timesteps": timesteps, "advantages": 2 * torch.randn(rows)}
    limits = {"adv_clip": AWM_CLIP, "clip_range": AWM_RATIO, "huber_power": AWM_POWER, **AWM_KL}
    recorded = {**given, **velocities} | {name: torch.tensor(value) for name, value in limits.items()}
    world = AwmWorld(**given, velocities=velocities)
    for theirs, ours in (
        ("Uniform", "uniform"),
        ("t", "sigma"),
        ("t**2", "sigma_squared"),
        ("huber", "huber"),
        ("ghuber", "generalized_huber"),
    ):
        recorded[f"loss_{ours}"], recorded[f"grad_{ours}"] = world.loss(theirs)
    recorded["loss_with_kl"], recorded["grad_with_kl"] = world.loss("ghuber", **AWM_KL)
    idle = AwmWorld(**given | {"advantages": torch.zeros(rows)}, velocities=velocities)
    recorded["loss_average"], recorded["grad_average"] = idle.loss("Uniform", ema_kl_beta=AWM_KL["ema_kl_beta"])
    return recorded


FILES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "grpo_guard_verl_omni": grpo_guard,
    "flow_dppo_verl_omni": flow_dppo,
    "distill_verl_omni": distill,
    "windows_mix_grpo": windows,
    "flash_mix_grpo": flash,
    "branches_tempflow": tempflow,
    "gdpo_flow_factory": gdpo,
    "awm_flow_factory": awm,
}

if __name__ == "__main__":
    for file, record in [(file, FILES[file]) for file in sys.argv[1:] or FILES]:
        torch.manual_seed(0)
        arrays = {name: value.numpy() for name, value in record().items()}
        np.savez_compressed(GOLDEN / f"{file}.npz", **arrays)
        print(file, {name: value.shape for name, value in arrays.items() if not name[:1].isdigit()})
