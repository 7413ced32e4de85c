"""The peers' real functions beside ours on what the short cases of `patch` do not reach: ranks, levels, schedules.

Needs checkouts (`ADVGRPO_PEERS`). Every test calls the real function and the one that `patch` puts in its place with
the same inputs and compares results, gradients and generators.

Planted bugs that turned this file red: a mean over all but the first two dimensions, one level for all rows, sigma_max
of the default schedule, a list of generators reduced to its first, a group's deviation taken over all prompts.
"""

import itertools

import numpy as np
import pytest
import torch

from advgrpo_kernels.integrations import _self_check, adv_grpo, dance_grpo, flow_factory, flow_grpo, mix_grpo, unirl
from advgrpo_kernels.integrations import miles_diffusion as miles
from advgrpo_kernels.integrations import verl_omni as verl
from tests.kernels.peers import sd3_scheduler
from tests.peers import checkouts

GENERATOR = object()
CLOSE = _self_check.Tolerance(1e-5, 2e-5)
SHAPES = {"image": (2, 16, 8, 8), "packed": (2, 24, 16), "video": (2, 4, 3, 6, 6), "rows": (3, 40)}


@pytest.fixture
def real(request):
    """The modules of the peer that a test names with `@of(...)`."""
    with checkouts.importable(request.param) as modules:
        yield modules


def of(*peers):
    return pytest.mark.parametrize("real", peers, indirect=True)


def agree(theirs, ours, names=None, tolerance=CLOSE):
    assert len(theirs) == len(ours)
    for name, their, our in zip(names or itertools.count(), theirs, ours):
        text = _self_check.unequal(their, our, tolerance)
        assert text is None, f"{name}: {text}"


def both(theirs, ours, *args, **kwargs):
    """Results of both functions with equal generators for GENERATOR, and where those and the global one stand then."""
    results = []
    for function in (theirs, ours):
        torch.manual_seed(4)
        generator = torch.Generator().manual_seed(3)
        filled = [generator if value is GENERATOR else value for value in args]
        keywords = {name: generator if value is GENERATOR else value for name, value in kwargs.items()}
        with torch.no_grad():
            taken = function(*filled, **keywords)
        results.append([*taken, torch.randn(2, generator=generator), torch.randn(2)])
    return results


def gradient_of_ratio(log_prob, velocity):
    """Of the first clipped loss that a trainer takes, with advantages of both signs."""
    advantages = torch.linspace(-1, 1, len(log_prob)) + 0.3
    ratio = torch.exp((log_prob - log_prob.detach()).clamp(-5, 5))
    return torch.autograd.grad((-advantages * ratio).mean(), velocity, retain_graph=True)[0]


def inputs(shape, dtype=torch.float32, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers).to(dtype) for _ in range(2)]


STEPS = [
    ("flow_grpo", "sde_step_with_logprob", flow_grpo.sde_step_with_logprob, ["image"], [{}]),
    ("adv_grpo", "sde_step_with_logprob", adv_grpo.sde_step_with_logprob, SHAPES, [{}]),
    ("adv_grpo", "sde_step_with_logprob_new", adv_grpo.sde_step_with_logprob_new, SHAPES, [{}]),
    (
        "miles_diffusion",
        "sde_step_with_logprob",
        flow_grpo.sde_step_with_logprob,
        SHAPES,
        [{"sde_type": kind, "return_sqrt_dt": True} for kind in ("sde", "cps")],
    ),
]


@pytest.mark.parametrize(
    ("real", "name", "ours", "shapes", "settings"),
    STEPS,
    indirect=["real"],
    ids=[f"{peer}.{name}" for peer, name, *_ in STEPS],
)
def test_steps_of_the_flow_grpo_family(real, name, ours, shapes, settings):
    module = next(m for m in real if m.__name__.endswith("sd3_sde_with_logprob"))
    theirs, scheduler = getattr(module, name), sd3_scheduler()
    for shape, setting, level in itertools.product(shapes, settings, (0.1, 0.7, 1.0)):
        for dtype in (torch.float32, torch.bfloat16):
            x, v = inputs(SHAPES[shape], dtype)
            for t in range(10):
                call = (scheduler, v, scheduler.timesteps[t : t + 1], x, level, None, GENERATOR)
                agree(*both(theirs, ours, *call, **setting))
            rows = scheduler.timesteps[torch.arange(len(x)) * 3]
            trained = []
            for function in (theirs, ours):
                velocity = v.clone().requires_grad_()
                result = function(scheduler, velocity, rows, x, level, x + 0.1 * v, **setting)
                gradient = gradient_of_ratio(result[1], velocity)
                trained.append([*result, gradient.float()])
            place = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
            agree(trained[0][:-1], trained[1][:-1])
            agree(trained[0][-1:], trained[1][-1:], ["gradient"], _self_check.Tolerance(1e-7, place))


@of("miles_diffusion")
def test_lists_of_generators_and_levels_per_row(real):
    theirs, scheduler = real[1].sde_step_with_logprob, sd3_scheduler()
    (x, v), rows = inputs(SHAPES["image"]), sd3_scheduler().timesteps[[1, 6]]
    results = []
    for function in (theirs, flow_grpo.sde_step_with_logprob):
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        levels = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1)
        results.append([*function(scheduler, v, rows, x, levels, None, generators)])
    agree(*results)


@of("miles_diffusion")
def test_the_scoring_function_of_miles(real):
    theirs, scheduler = real[0].sde_step_with_logprob, sd3_scheduler()
    for shape in SHAPES.values():
        x, v = inputs(shape, torch.bfloat16)
        rows = scheduler.timesteps[torch.arange(len(x)) * 4]
        agree(
            theirs(scheduler, v, rows, x, prev_sample=x + v, noise_level=0.9),
            miles.sde_step_with_logprob(scheduler, v, rows, x, prev_sample=x + v, noise_level=0.9),
        )


@of("dance_grpo")
def test_flux_step(real):
    (module,) = real
    sigmas = torch.linspace(1, 0, 17) * 3 / (1 + 2 * torch.linspace(1, 0, 17))
    for shape, index, solver in itertools.product(SHAPES.values(), range(16), (True, False)):
        x, v = inputs(shape)
        agree(*both(module.flux_step, dance_grpo.flux_step, v, x, 0.3, sigmas, index, None, True, solver))
        trained = []
        for function in (module.flux_step, dance_grpo.flux_step):
            velocity = v.clone().requires_grad_()
            _, clean, log_prob = function(velocity, x, 0.3, sigmas, index, x + 0.2 * v, True, solver)
            trained.append([clean, log_prob, gradient_of_ratio(log_prob, velocity)])
        agree(*trained)


@of("mix_grpo")
def test_both_steps_of_mix_grpo_on_whole_and_compressed_schedules(real):
    """MixGRPO-Flash's schedules end above 0, at one point behind the window."""
    (module,) = real
    whole = torch.linspace(1, 0, 26) * 3 / (1 + 2 * torch.linspace(1, 0, 26))
    for sigmas in (whole, torch.cat([whole[:19], whole[19:20]]), torch.cat([whole[:14], whole[14:25:5]])):
        for shape, index, flag in itertools.product(SHAPES.values(), range(0, len(sigmas) - 1, 4), (True, False)):
            x, v = inputs(shape)
            call = (v, x, 0.7, sigmas, index, None)
            agree(*both(module.flow_grpo_step, mix_grpo.flow_grpo_step, *call, GENERATOR, flag))
            agree(*both(module.dance_grpo_step, mix_grpo.dance_grpo_step, *call, True, flag))


@of("flow_factory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flow_factory_s_scheduler_patched_and_not(real, dtype):
    """Patched: the first ratio is exactly 1 in every dtype that a trajectory is kept in, as it is theirs."""
    (module,) = real
    cls, place = module.FlowMatchEulerDiscreteSDEScheduler, 2 * torch.finfo(dtype).eps
    loose = CLOSE if dtype == torch.float32 else _self_check.Tolerance(5e-3, place)
    for dynamics, shape, t in itertools.product(flow_factory.DYNAMICS, SHAPES.values(), range(0, 10, 3)):
        scheduler = cls(dynamics_type=dynamics, shift=3.0)
        scheduler.set_timesteps(10, sigmas=[1 - i / 10 for i in range(10)])
        x, v = inputs(shape, dtype)
        call = (scheduler, v, scheduler.timesteps[t], x)
        theirs, ours = both(cls.step, flow_factory.step, *call, generator=GENERATOR, return_dict=False)
        agree(theirs[:1] + theirs[3:4], ours[:1] + ours[3:4], ["next", "log_prob"], loose)
        agree(theirs[1:3] + theirs[4:], ours[1:3] + ours[4:])
        for function, (stored, _, _, log_prob, *_) in ((cls.step, theirs), (flow_factory.step, ours)):
            again = function(*call, next_latents=stored.to(dtype), return_dict=False)[3]
            torch.testing.assert_close(again, log_prob, rtol=0, atol=0, equal_nan=True)  # NaN: a step without noise
        scheduler.eval()
        theirs, ours = both(cls.step, flow_factory.step, *call, return_dict=False)
        agree(theirs[:2], ours[:2], tolerance=loose)


@of("verl_omni")
def test_verl_omni_s_scheduler(real):
    (module,) = real
    cls = module.FlowMatchSDEDiscreteScheduler
    for kind, shape, t in itertools.product(verl.DYNAMICS, SHAPES.values(), range(0, 10, 3)):
        x, v = inputs(shape)
        settings = {"sde_type": kind, "noise_level": 0.8, "return_sqrt_dt": True}
        scheduler = cls(shift=3.0)
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(t)
        scheduler._init_step_index(scheduler.timesteps[t])
        functions = (cls.sample_previous_step, verl.sample_previous_step)
        agree(*both(*functions, scheduler, x, v, generator=GENERATOR, **settings))
        rows, trained = scheduler.timesteps[torch.arange(len(x)) * 3], []
        for function in functions:
            velocity = v.clone().requires_grad_()
            result = function(scheduler, x, velocity, rows, prev_sample=x + 0.1 * v, **settings)
            trained.append([*result, gradient_of_ratio(result[1], velocity)])
        agree(*trained)


@of("unirl")
def test_unirl_s_strategies(real):
    (module,) = real
    theirs = module.StepStrategy.denoise
    pairs = [(1.0, 0.9), (0.9, 0.6), (0.3, 0.05), (0.1, 0.0)]
    for name, shape, (now, after), dtype in itertools.product(
        unirl.STRATEGIES, SHAPES.values(), pairs, (torch.float32, torch.bfloat16)
    ):
        (x, v), strategy = inputs(shape, dtype), getattr(module, name)()
        sigma = torch.tensor(now, dtype=torch.float64), torch.tensor(after)
        loose = CLOSE if dtype == torch.float32 else _self_check.Tolerance(5e-3, 2 * torch.finfo(dtype).eps)
        results = both(theirs, unirl.denoise, strategy, v, x, *sigma, eta=0.8)
        agree(*results, tolerance=loose)
        rows, trained = [value.expand(len(x)) for value in sigma], []
        for function in (theirs, unirl.denoise):
            velocity = v.clone().requires_grad_()
            _, log_prob, mean = function(
                strategy, velocity, x, *rows, eta=0.8, prev_sample=results[0][0], sigma_max=0.93
            )
            trained.append([log_prob, mean])
            trained[-1].append(gradient_of_ratio(log_prob, velocity).float())
        agree(trained[0][:2], trained[1][:2])
        place = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
        agree(trained[0][2:], trained[1][2:], tolerance=_self_check.Tolerance(1e-6, place))


@of("flow_grpo", "adv_grpo", "miles_diffusion")
def test_advantages_over_many_epochs(real):
    """Books, NaN and infinite rewards, other types; equal groups are exactly 0 here and 1e-12 there."""
    module = next(m for m in real if m.__name__.endswith("stat_tracking"))
    peer = adv_grpo if module.__name__.startswith("adv") else flow_grpo
    for global_std in (False, True):
        epochs, theirs, ours = list(rewards_of_epochs(with_nan=not global_std)), [], []
        theirs += run_tracker(module, global_std, epochs)
        peer.patch(module)
        ours += run_tracker(module, global_std, epochs)
        peer.unpatch(module)
        for their, our in zip(theirs, ours):
            np.testing.assert_allclose(our, their, rtol=2e-5, atol=2e-6)


def rewards_of_epochs(with_nan):
    """(prompts, rewards): groups of one to many, per image or per timestep, of all magnitudes."""
    random = np.random.default_rng(0)
    for epoch in range(200):
        size = int(random.integers(2, 40))
        prompts = [f"prompt {i}" for i in random.integers(0, 1 + size // 3, size)]
        rewards = random.normal(size=(size, 3) if epoch % 2 else size) * 10.0 ** random.integers(-3, 4)
        if epoch % 50 == 7 and with_nan:
            rewards[0] = (np.nan, np.inf)[epoch // 50 % 2]
        yield prompts, rewards


def run_tracker(module, global_std, epochs):
    tracker, results = module.PerPromptStatTracker(global_std), []
    for i, (prompts, rewards) in enumerate(epochs):
        kind = "sft" if i % 4 == 2 else "rwr" if i % 4 == 1 else "grpo"
        with np.errstate(all="ignore"):
            results.append(tracker.update(prompts, rewards, type=kind))
        results.append(np.array(tracker.get_stats()))
        tracker.clear()
    return results
