"""Modules as the peers have them, with functions that give what theirs give: `patch` runs what it replaces.

Written from the formulas (by predicted clean image and noise), not from the peers' code. Each call of `module` makes
new functions and classes, as an import does; `imported` registers modules for the time of a `with` block.
"""

import sys
import textwrap
from contextlib import contextmanager
from types import ModuleType

HEADER = """
import math
import torch

def mean_of(x, v, now, after, std, cps):
    clean, noise = x - now * v, x + (1 - now) * v
    if cps:
        return (1 - after) * clean + torch.sqrt(after**2 - std**2) * noise
    return x + (after - now) * (v + std**2 / (2 * now) * noise)

def rows(scheduler, timestep, sample):
    index = torch.tensor([int((scheduler.timesteps == t).nonzero()[0]) for t in timestep])
    shape = [-1] + [1] * (sample.dim() - 1)
    return scheduler.sigmas[index].view(shape), scheduler.sigmas[index + 1].view(shape)

def density(d, std, normaliser=True):
    value = -(d**2) / (2 * std**2)
    if normaliser:
        value = value - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return value.flatten(1).mean(1)

def flow_std(sigmas, now, level):
    return level * torch.sqrt(now / (1 - torch.where(now == 1, sigmas[1], now)))

def new_noise(v, generator):
    return torch.randn(v.shape, generator=generator, dtype=v.dtype)
"""

FLOW_SDE = """
def {name}(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None{more}):
    x, v = sample.float(), model_output.float()
    now, after = rows(self, timestep, x)
    cps = {cps}
    std = after * math.sin(noise_level * math.pi / 2) if cps else flow_std(self.sigmas, now, noise_level)
    mean, s = mean_of(x, v, now, after, std, cps), std if cps else std * torch.sqrt(now - after)
    prev_sample = mean + s * new_noise(v, generator) if prev_sample is None else prev_sample.float()
    d = prev_sample.detach() - mean
    log_prob = -(d**2).flatten(1).mean(1) if cps else density(d, s)
    result = prev_sample, log_prob, mean, std
    return (*result, torch.sqrt(now - after)) if {sqrt_dt} else result
"""
FLOW_GRPO = HEADER + FLOW_SDE.format(
    name="sde_step_with_logprob",
    more=", sde_type='sde', return_sqrt_dt=False",
    cps="sde_type == 'cps'",
    sqrt_dt="return_sqrt_dt",
)
EARLY_FLOW_GRPO = HEADER + FLOW_SDE.format(name="sde_step_with_logprob", more="", cps="False", sqrt_dt="False")
ADV_GRPO = EARLY_FLOW_GRPO + FLOW_SDE.format(name="sde_step_with_logprob_new", more="", cps="True", sqrt_dt="False")

DANCE = HEADER + (
    """
def {name}(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    now, after = sigmas[index], sigmas[index + 1]
    clean, s = latents - now * model_output, eta * torch.sqrt(now - after)
    mean = mean_of(latents, model_output, now, after, torch.tensor(eta if sde_solver else 0.0), False)
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * s
    d = prev_sample.detach().float() - mean.float()
    return prev_sample, clean, density(d, s, normaliser={normaliser})
"""
)
MIX = HEADER + (
    """
def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None, determistic=False):
    now, after = sigmas[index], sigmas[index + 1]
    std = flow_std(sigmas, now, eta)
    mean, s = mean_of(latents, model_output, now, after, std, False), std * torch.sqrt(now - after)
    if prev_sample is None:
        prev_sample = mean + s * new_noise(model_output, generator)
    if determistic:
        prev_sample = latents + (after - now) * model_output
    log_prob = density(prev_sample.detach() - mean, s)
    return prev_sample, latents - now * model_output, log_prob, mean, s
"""
)
FLOW_FACTORY = HEADER + (
    """
from dataclasses import dataclass

@dataclass
class SDESchedulerOutput:
    next_latents: torch.Tensor = None
    next_latents_mean: torch.Tensor = None
    std_dev_t: torch.Tensor = None
    dt: torch.Tensor = None
    log_prob: torch.Tensor = None
    noise_pred: torch.Tensor = None

KEPT = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"]

class FlowMatchEulerDiscreteSDEScheduler:
    '''Noise on all steps but the last.'''

    def __init__(self, dynamics_type="Flow-SDE", shift=3.0):
        self.dynamics_type, self.is_eval, self.shift = dynamics_type, False, shift
        self.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])

    def set_timesteps(self, count=None, sigmas=None):
        linear = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        self.sigmas = (self.shift * linear / (1 + (self.shift - 1) * linear)).float()
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep):
        return int((self.timesteps == timestep).nonzero()[0])

    def get_noise_level_for_sigma(self, sigma):
        return torch.where(torch.isin(sigma, self.sigmas[:-2]), 0.7, 0.0)

    def step(self, noise_pred, timestep, latents, next_latents=None, timestep_next=None, generator=None,
             noise_level=None, compute_log_prob=True, return_dict=True, return_kwargs=KEPT, dynamics_type=None,
             sigma_max=None):
        kind, stored = dynamics_type or self.dynamics_type, latents.dtype
        if timestep_next is None:
            index = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
            now, after = self.sigmas[index], self.sigmas[[i + 1 for i in index]]
        else:
            now, after = timestep / 1000, timestep_next / 1000
        if self.is_eval or kind == "ODE":
            noise_level = 0.0
        elif noise_level is None:
            noise_level = self.get_noise_level_for_sigma(now)
        x, v = latents.float(), noise_pred.float()
        now, after, level = (torch.as_tensor(t).expand(len(x)).view(-1, *[1] * (x.dim() - 1)) for t in
                             (now, after, noise_level))
        std = {
            "Flow-SDE": lambda: flow_std([0, torch.as_tensor(sigma_max or self.sigmas[1])], now, level),
            "Dance-SDE": lambda: level, "CPS": lambda: after * torch.sin(level * math.pi / 2),
            "ODE": lambda: torch.zeros_like(now),
        }[kind]()
        mean = mean_of(x, v, now, after, std, kind == "CPS")
        s = std if kind == "CPS" else std * torch.sqrt(now - after)
        if next_latents is None:
            next_latents = mean
            if kind != "ODE":
                next_latents = (mean + s * new_noise(v, generator)).to(ROUNDED or stored)
        next_latents = next_latents.float()
        log_prob = None
        if compute_log_prob:
            d = next_latents.detach() - mean
            log_prob = {"CPS": -(d**2).flatten(1).mean(1), "ODE": torch.zeros(len(x))}.get(kind)
            log_prob = density(d, s) if log_prob is None else log_prob
        values = dict(next_latents=next_latents, next_latents_mean=mean, noise_pred=v, log_prob=log_prob,
                      std_dev_t=STD(std, s), dt=after - now)
        return SDESchedulerOutput(**{k: values[k] for k in return_kwargs}) if return_dict else tuple(values.values())

ROUNDED = None  # a dtype instead of that of the latents
STD = lambda std, s: std
"""
)
VERL_OMNI = HEADER + (
    """
from diffusers import FlowMatchEulerDiscreteScheduler

class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    def sample_previous_step(self, sample, model_output, timestep=None, generator=None, per_token_timesteps=None,
                             noise_level=0.7, prev_sample=None, sde_type="sde", return_logprobs=True,
                             return_sqrt_dt=False, include_logprob_normalizer=True):
        if timestep is None:
            now, after = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        else:
            now, after = rows(self, timestep, sample)
        cps, dt, level = sde_type == "cps", now - after, torch.as_tensor(noise_level)
        std = {"sde": flow_std(self.sigmas, now, level), "cps": after * torch.sin(level * math.pi / 2),
               "dance_sde": level * torch.ones_like(now)}[sde_type]
        mean, s = mean_of(sample, model_output, now, after, std, cps), std if cps else std * torch.sqrt(dt)
        if prev_sample is None:
            prev_sample = mean + s * new_noise(model_output, generator)
        d, log_prob = prev_sample.detach() - mean, None
        if return_logprobs:
            log_prob = -(d**2).flatten(1).mean(1) if cps else density(d, s, include_logprob_normalizer)
        result = prev_sample, log_prob, mean, s if sde_type == "dance_sde" else std
        return (*result, torch.sqrt(dt).reshape(-1).expand(len(sample))) if return_sqrt_dt else result
"""
)
UNIRL = HEADER + (
    """
class StepStrategy:
    cps = False

    def _finalize_logp(self, prev_sample, mean, s, eta, dtype):
        return prev_sample, None

    def denoise(self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, sigma_max=0.99,
                step_index=0):
        x, v, dtype = sample.float(), noise_pred.float(), sample.dtype
        now, after = (t.reshape(-1, *[1] * (x.dim() - 1)) for t in (sigma, sigma_next))
        mean, s = self.step(x, v, now, after, eta, torch.tensor(sigma_max))
        prev_sample = mean + s * new_noise(v, None) if prev_sample is None else prev_sample.float()
        return *self._finalize_logp(prev_sample, mean, s, eta, dtype), mean

class SDEStrategy(StepStrategy):
    def _finalize_logp(self, prev_sample, mean, s, eta, dtype):
        if eta < 1e-7:
            return prev_sample, None
        prev_sample = prev_sample.to(dtype).float()
        return prev_sample, self.compute_log_prob(prev_sample.detach() - mean, s)

    def compute_log_prob(self, d, s):
        return density(d, s)

class FlowSDEStrategy(SDEStrategy):
    def step(self, x, v, now, after, eta, sigma_max):
        std = flow_std([None, sigma_max], now, eta)
        return mean_of(x, v, now, after, std, False), std * torch.sqrt(now - after)

class CPSSDEStrategy(SDEStrategy):
    def step(self, x, v, now, after, eta, sigma_max):
        std = after * math.sin(eta * math.pi / 2)
        return mean_of(x, v, now, after, std, True), std

    def compute_log_prob(self, d, s):
        return -(d**2).flatten(1).mean(1)

class DanceSDEStrategy(SDEStrategy):
    def step(self, x, v, now, after, eta, sigma_max):
        return mean_of(x, v, now, after, eta, False), eta * torch.sqrt(now - after)

class Euler(StepStrategy):
    def step(self, x, v, now, after, eta, sigma_max):
        return x + (after - now) * v, torch.zeros_like(now)
"""
)
MILES = HEADER + (
    """
def sde_step_with_logprob(scheduler, model_output, timestep, sample, prev_sample, noise_level=0.7):
    x, v, prev_sample = sample.float(), model_output.float(), prev_sample.float()
    now, after = rows(scheduler, timestep, x)
    std = flow_std(scheduler.sigmas, now, noise_level)
    mean = mean_of(x, v, now, after, std, False)
    return prev_sample, density(prev_sample - mean, std * torch.sqrt(now - after)), mean, std
"""
)
TRACKER = """
import numpy as np

class PerPromptStatTracker:
    def __init__(self, global_std=False):
        self.global_std, self.stats, self.history_prompts = global_std, {{}}, set()

    def update(self, prompts, rewards, {dists}type="grpo"):
        if type != "grpo":
            return f"original {{type}}{shown}"
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.zeros_like(rewards)
        for name in np.unique(prompts):
            mine = rewards[prompts == name]
            self.stats[name] = mine
            self.history_prompts.add(hash(name))
            std = (rewards if self.global_std else mine).std(axis=0, keepdims=True)
            advantages[prompts == name] = (mine - mine.mean(axis=0, keepdims=True)) / (std + 1e-4)
        return advantages

    def get_stats(self):
        return sum(len(v) for v in self.stats.values()) / len(self.stats), len(self.history_prompts)

    def clear(self):
        self.stats = {{}}
"""
EARLY_TRACKER = TRACKER.format(dists="", shown="")
DISTS_TRACKER = TRACKER.format(dists="dists=None, ", shown=" {dists}")


def module(source: str, name: str = "peer") -> ModuleType:
    """`source` executed as the module `name`; not in sys.modules."""
    made = ModuleType(name)
    exec(compile(textwrap.dedent(source), f"<{name}>", "exec"), vars(made))
    return made


def dance(name: str = "flux_step", normaliser: bool = True) -> str:
    return DANCE.format(name=name, normaliser=normaliser)


@contextmanager
def imported(**sources: str):
    """Modules in sys.modules, executed in this order; dots in a name are written as two underscores."""
    made = {}
    try:
        for name, source in sources.items():
            name = name.replace("__", ".")
            made[name] = sys.modules[name] = ModuleType(name)
            exec(compile(textwrap.dedent(source), f"<{name}>", "exec"), vars(made[name]))
        yield list(made.values())
    finally:
        for name in made:
            sys.modules.pop(name, None)
