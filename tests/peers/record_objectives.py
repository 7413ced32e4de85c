"""What the peers' losses, windows and advantages give on random inputs, written to tests/golden/*.npz.

    ADVGRPO_PEERS=FOLDER python -m tests.peers.record_objectives

They are methods of classes whose modules import a whole trainer: each class is cut out of its file and run alone, as it
stands, in float32 on a CPU. tests/golden/README.md says what is in the files.
"""

from __future__ import annotations
import __future__

import ast
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
VERL_OMNI = "verl-omni/verl_omni/trainer/diffusion/diffusion_algos.py"
MIX_GRPO = "MixGRPO/fastvideo/utils/grpo_states.py"
FLOW_FACTORY = "Flow-Factory/src/flow_factory/advantage/advantage_processor.py"
ROWS, SHAPE = 16, (4, 5, 6)
SIGMAS = [(0.97, 0.9), (0.75, 0.6), (0.3, 0.1)]  # noise level before and after three steps


def cut(file: str, name: str) -> Any:
    """The class of a peer's file, without what registers it and what it inherits."""
    tree = ast.parse(Path(os.environ["ADVGRPO_PEERS"], file).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    found.bases = []
    found.decorator_list = [node for node in found.decorator_list if "dataclass" in ast.unparse(node)]
    code = compile(ast.Module([found], []), file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    names = {"torch": torch, "np": np, "dataclass": dataclass}
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


FILES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "grpo_guard_verl_omni": grpo_guard,
    "flow_dppo_verl_omni": flow_dppo,
    "distill_verl_omni": distill,
    "windows_mix_grpo": windows,
    "gdpo_flow_factory": gdpo,
}

if __name__ == "__main__":
    for file, record in FILES.items():
        torch.manual_seed(0)
        arrays = {name: value.numpy() for name, value in record().items()}
        np.savez_compressed(GOLDEN / f"{file}.npz", **arrays)
        print(file, {name: value.shape for name, value in arrays.items() if not name[:1].isdigit()})
