"""What `patch` replaces and where, what it refuses because the two functions do not agree, and what `unpatch` leaves.

Planted bugs that turned this file red: functions found by their local name, modules that imported before or after the
patch left out, an importer's `unpatch` that reports success, the check left out, its random numbers not put back, only
the last function's check decides, drawn steps alone compared, a tolerance of 1, a partial that is not named.
"""

import functools
import logging
import pickle
import sys

import pytest
import torch

from advgrpo_kernels.integrations import (
    _patching,
    adv_grpo,
    dance_grpo,
    flow_factory,
    flow_grpo,
    miles_diffusion,
    mix_grpo,
    unirl,
    verl_omni,
)
from tests.kernels import stand_ins
from tests.kernels.peers import module_with

HOME = "adv_grpo__diffusers_patch__sd3_sde_with_logprob"
RENAMED = "from adv_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob_new as sde_step_with_logprob"
PACKAGES = {"adv_grpo": "__path__ = []", "adv_grpo__diffusers_patch": "__path__ = []"}


def is_ours(function, ours):
    cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (function, ours)]
    return function.__code__ is ours.__code__ and cells[0] == cells[1] and function is not ours


@pytest.fixture
def adv():
    """Adv-GRPO's step module and a pipeline that imports its second function under the name of the first."""
    with stand_ins.imported(**PACKAGES, **{HOME: stand_ins.ADV_GRPO}, adv_pipeline=RENAMED) as modules:
        yield modules[2:]


def test_a_renamed_import_is_what_it_was_imported_from(adv):
    """The local name is that of the other function, with an equal signature."""
    home, pipeline = adv
    original = pipeline.sde_step_with_logprob
    assert adv_grpo.patch(pipeline) == ["sde_step_with_logprob_new"]
    assert is_ours(pipeline.sde_step_with_logprob, adv_grpo.sde_step_with_logprob_new)
    assert home.sde_step_with_logprob_new is original
    adv_grpo.unpatch(pipeline)
    assert pipeline.sde_step_with_logprob is original


def test_the_defining_module_reaches_all_that_imported_it_before_or_after(adv):
    home, pipeline = adv
    originals = home.sde_step_with_logprob, home.sde_step_with_logprob_new
    assert adv_grpo.patch(home) == ["sde_step_with_logprob", "sde_step_with_logprob_new"]
    with stand_ins.imported(later=f"{RENAMED}\nagain = sde_step_with_logprob") as (later,):
        assert later.sde_step_with_logprob is pipeline.sde_step_with_logprob is home.sde_step_with_logprob_new
        assert is_ours(later.again, adv_grpo.sde_step_with_logprob_new)
        assert is_ours(home.sde_step_with_logprob, adv_grpo.sde_step_with_logprob)
        adv_grpo.unpatch(home)
        assert (home.sde_step_with_logprob, home.sde_step_with_logprob_new) == originals
        assert pipeline.sde_step_with_logprob is later.sde_step_with_logprob is later.again is originals[1]


def test_our_own_functions_are_left_alone(adv):
    """A module that took one from this package must not get the peer's for it."""
    ours = adv_grpo.sde_step_with_logprob_new
    with stand_ins.imported(mine="from advgrpo_kernels.integrations.adv_grpo import sde_step_with_logprob_new") as (m,):
        adv_grpo.patch(adv[0])
        adv_grpo.unpatch(adv[0])
        assert m.sde_step_with_logprob_new is adv_grpo.sde_step_with_logprob_new is ours


def test_everywhere_can_be_switched_off(adv, caplog):
    home, pipeline = adv
    with caplog.at_level("WARNING", "advgrpo_kernels.integrations"):
        adv_grpo.patch(home, everywhere=False)
    assert "but not as adv_pipeline.sde_step_with_logprob" in caplog.text
    assert pipeline.sde_step_with_logprob is not home.sde_step_with_logprob_new
    adv_grpo.unpatch(home)


@pytest.mark.weekly
def test_an_importer_that_holds_ours_already_is_left_as_it_is_and_says_so(adv, caplog):
    home, pipeline = adv
    adv_grpo.patch(home)
    with caplog.at_level("INFO", "advgrpo_kernels.integrations"):
        assert adv_grpo.patch(pipeline) == []
    said = "adv_pipeline: replaced already through another module: sde_step_with_logprob (through adv_grpo."
    assert said in caplog.text
    with pytest.raises(RuntimeError, match=r"adv_pipeline holds what was replaced through adv_grpo\..*: unpatch that"):
        adv_grpo.unpatch(pipeline)
    adv_grpo.unpatch(home)
    with pytest.raises(RuntimeError, match="adv_pipeline is not patched"):
        adv_grpo.unpatch(pipeline)


def test_an_importer_patched_alone_says_who_keeps_the_original_and_takes_back_what_others_got_from_it(adv, caplog):
    home, pipeline = adv
    original = pipeline.sde_step_with_logprob
    with caplog.at_level("WARNING", "advgrpo_kernels.integrations"):
        adv_grpo.patch(pipeline)
    assert f"not as {home.__name__}.sde_step_with_logprob_new" in caplog.text
    with stand_ins.imported(third="from adv_pipeline import sde_step_with_logprob as step") as (third,):
        assert third.step is not original
        adv_grpo.unpatch(pipeline)
        assert third.step is original


def test_holders_that_are_no_modules_are_named(adv, caplog):
    """A partial made before keeps the original, one made after keeps ours: nothing can be put in its place."""
    home, _ = adv
    with caplog.at_level("WARNING", "advgrpo_kernels.integrations"):
        adv_grpo.patch(home)
        adv_grpo.unpatch(home)
        assert caplog.text == ""
        before = functools.partial(home.sde_step_with_logprob)
        adv_grpo.patch(home)
        name = "adv_grpo.diffusers_patch.sd3_sde_with_logprob.sde_step_with_logprob"
        assert f"{name} is replaced, but an object of type partial holds the original and keeps it" in caplog.text
        caplog.clear()
        after = functools.partial(home.sde_step_with_logprob_new)
        adv_grpo.unpatch(home)
    assert f"{name}_new is restored, but an object of type partial holds the replacement and keeps it" in caplog.text
    assert before.func is home.sde_step_with_logprob
    assert is_ours(after.func, adv_grpo.sde_step_with_logprob_new)


def test_two_modules_with_functions_of_their_own_are_told_apart():
    """Every trainer of DanceGRPO defines its own; what imports one of them must get that one back."""
    source = stand_ins.dance()
    importer = "from train_grpo_flux import flux_step\nfrom train_grpo_wan_2_1 import flux_step as wan"
    with stand_ins.imported(train_grpo_flux=source, train_grpo_wan_2_1=source) as (flux, wan):
        originals = flux.flux_step, wan.flux_step
        dance_grpo.patch(flux)
        dance_grpo.patch(wan)
        with stand_ins.imported(both=importer) as (both,):
            dance_grpo.unpatch(wan)
            assert both.wan is originals[1]
            assert is_ours(both.flux_step, dance_grpo.flux_step)
            dance_grpo.unpatch(flux)
            assert both.flux_step is originals[0]


def test_a_copy_in_a_module_nobody_declared_is_known_by_the_name_it_was_defined_under():
    user = "from vendored import sde_step_with_logprob_new as go"
    with stand_ins.imported(vendored=stand_ins.ADV_GRPO, user=user) as (vendored, user):
        assert adv_grpo.patch(vendored) == ["sde_step_with_logprob", "sde_step_with_logprob_new"]
        assert is_ours(user.go, adv_grpo.sde_step_with_logprob_new)
        adv_grpo.unpatch(vendored)


def test_a_function_of_that_name_from_elsewhere_is_passed_over():
    """Wan's pipeline has a `sde_step_with_logprob` with other parameters; a module may hold both."""
    wan = "def sde_step_with_logprob(self, model_output, timestep, sample, determistic=False): pass"
    both = "from wan import sde_step_with_logprob as wan\nfrom vendored import sde_step_with_logprob"
    with stand_ins.imported(wan=wan, vendored=stand_ins.FLOW_GRPO, both=both) as (wan, _, both):
        assert flow_grpo.patch(both) == ["sde_step_with_logprob"]
        assert both.wan is wan.sde_step_with_logprob
        with pytest.raises(ValueError, match=r"wan.sde_step_with_logprob takes \(self, .*another version"):
            flow_grpo.patch(wan)
        with pytest.raises(ValueError, match=r"has none of .*wan.sde_step_with_logprob takes"):
            flow_grpo.patch(module_with(step=wan.sde_step_with_logprob))


def test_a_decorated_function_is_refused():
    source = stand_ins.FLOW_GRPO + "sde_step_with_logprob = torch.no_grad()(sde_step_with_logprob)"
    with pytest.raises(ValueError, match="wrapped by a decorator, which a replacement would lose"):
        flow_grpo.patch(stand_ins.module(source))


def test_a_patched_function_is_pickled_as_the_peer_s(adv):
    home, _ = adv
    original = home.sde_step_with_logprob
    adv_grpo.patch(home)
    pickled = pickle.dumps(home.sde_step_with_logprob)
    assert pickle.loads(pickled) is home.sde_step_with_logprob
    adv_grpo.unpatch(home)
    assert pickle.loads(pickled) is original  # in a process that is not patched it is the original


REFUSED = {
    "cps for sde": (
        adv_grpo,
        stand_ins.ADV_GRPO + "_old = sde_step_with_logprob_new.__code__\n"
        "sde_step_with_logprob_new.__code__ = sde_step_with_logprob.__code__\n",
        r"sde_step_with_logprob_new and .* prev_sample: largest difference 0.\d+, tolerance 5e-06 \+ 1e-05",
    ),
    "no constants in Flow-SDE": (
        flow_grpo,
        stand_ins.FLOW_GRPO.replace("normaliser=True", "normaliser=False"),
        r"log_prob: largest difference",
    ),
    "another std_dev_t": (
        flow_factory,
        stand_ins.FLOW_FACTORY.replace("STD = lambda std, s: std", "STD = lambda std, s: s"),
        r"std_dev_t: largest difference [\d.]+, .*case dynamics_type='Flow-SDE', noise_level=0.7, step 0 of 8, float32",
    ),
    "no rounding to the stored dtype": (
        flow_factory,
        stand_ins.FLOW_FACTORY.replace("ROUNDED = None", "ROUNDED = torch.float32"),
        r"left_to_round: largest difference 0.00\d+, tolerance 0 .*bfloat16, drawn",
    ),
    "another schedule's sigma_max": (
        flow_grpo,
        stand_ins.FLOW_GRPO.replace("sigmas[1]", "sigmas[2]"),
        "step 0 of 8",
    ),
    "noise from elsewhere": (
        mix_grpo,
        stand_ins.MIX.replace("generator=generator", "generator=None"),
        "flow_grpo_step and its replacement",
    ),
    "one more number drawn": (
        dance_grpo,
        stand_ins.dance().replace("    clean, s =", "    torch.rand(1)\n    clean, s ="),
        "flux_step and its replacement",
    ),
    "other gradients": (
        flow_grpo,
        stand_ins.FLOW_GRPO.replace("d = prev_sample.detach() - mean", "d = prev_sample - mean.detach()"),
        "gradient of log_prob|the original returns",
    ),
    "mean and next swapped": (
        flow_grpo,
        stand_ins.FLOW_GRPO.replace("result = prev_sample, log_prob, mean", "result = mean, log_prob, prev_sample"),
        "prev_sample: largest difference",
    ),
    "fails": (flow_grpo, stand_ins.FLOW_GRPO.replace("d**2", "d**absent"), "the original fails with NameError"),
    "one float less precise": (
        flow_grpo,
        stand_ins.FLOW_GRPO.replace("model_output.float()", "model_output.bfloat16().float()"),
        "prev_sample: largest difference",
    ),
    "no division by the deviation": (
        adv_grpo,
        stand_ins.EARLY_TRACKER.replace("(std + 1e-4)", "1.0"),
        "advantages of update 0: largest difference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_function_that_gives_something_else_is_refused_and_nothing_is_replaced(case):
    peer, source, message = REFUSED[case]
    module = stand_ins.module(source)
    before = dict(vars(module))
    methods = {name: dict(vars(value)) for name, value in before.items() if isinstance(value, type)}
    with pytest.raises(ValueError, match=message) as caught:
        peer.patch(module)
    assert str(caught.value).endswith("Another version of that codebase? Nothing was replaced")
    assert "peer." in str(caught.value)
    assert dict(vars(module)) == before
    assert {name: dict(vars(before[name])) for name in methods} == methods


def test_the_check_takes_the_variant_that_agrees():
    """DanceGRPO's log-prob had no constants until August 2025."""
    for normaliser, ours in ((True, dance_grpo.flux_step), (False, dance_grpo.flux_step_without_constants)):
        for name in ("flux_step", "dance_grpo_step"):
            module = stand_ins.module(stand_ins.dance(name, normaliser))
            assert dance_grpo.patch(module) == [name]
            assert is_ours(getattr(module, name), ours)


@pytest.mark.parametrize("source", [stand_ins.EARLY_TRACKER, stand_ins.DISTS_TRACKER])
def test_both_trackers_are_accepted_by_every_integration_that_has_one(source):
    for peer in (flow_grpo, adv_grpo, miles_diffusion):
        module = stand_ins.module(source)
        assert peer.patch(module) == ["PerPromptStatTracker.update"]
        assert module.PerPromptStatTracker().update(["a"], [1.0], type="dpo").startswith("original dpo")
        peer.unpatch(module)


def test_the_check_leaves_the_caller_s_settings_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            flow_grpo.patch(stand_ins.module(stand_ins.FLOW_GRPO))
            flow_factory.patch(stand_ins.module(stand_ins.FLOW_FACTORY))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), expected)
    assert logging.root.manager.disable == logging.NOTSET


def test_a_check_that_refuses_puts_the_random_numbers_back_too():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="flux_step"):
        dance_grpo.patch(stand_ins.module(REFUSED["one more number drawn"][1]))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "peer", [adv_grpo, dance_grpo, flow_factory, flow_grpo, miles_diffusion, mix_grpo, unirl, verl_omni]
)
def test_every_integration_says_what_it_looks_for(peer):
    with pytest.raises(ValueError, match=r"peer has none of \w+") as caught:
        peer.patch(module_with(helper=len))
    assert all(target.name in str(caught.value) for target in peer.TARGETS)
    assert _patching._RECORD not in vars(sys)
