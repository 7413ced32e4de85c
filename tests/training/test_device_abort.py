"""An iteration that is called off on the device: no step of it is taken, and the next one begins anew.

Bugs planted in a copy, each seen red: the norm not watched; the scalar added to instead of set at the next iteration;
`spoil` that does nothing; `wrong` the other way round.
"""

import math

import pytest
import torch

from advgrpo.config import Config
from advgrpo.training.device_abort import DeviceAbort
from advgrpo.training.ema import Ema
from advgrpo.training.optimizer import FusedAdamW, TorchAdamW

WRONG, RIGHT = torch.tensor(True), torch.tensor(False)


@pytest.fixture(params=[FusedAdamW, TorchAdamW])
def stepper(request):
    section = Config().update
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    return request.param(parameters, section, Ema.of([(str(i), p) for i, p in enumerate(parameters)], section))


def step(stepper, abort: DeviceAbort, *, gradient: float = 1.0, wrong: torch.Tensor | None = None) -> bool:
    """One step of an iteration; whether it changed a weight."""
    parameters = stepper.optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.fill_(1.0)
    parameters[1].grad[0, 1] = gradient
    if wrong is not None:
        abort.begin(wrong)
    abort.spoil([p.grad for p in parameters])
    abort.watch(stepper.step())
    assert all(torch.isfinite(p).all() for p in parameters)
    return not all(torch.equal(old, new) for old, new in zip(before, parameters))


def test_steps_are_taken_while_nothing_is_wrong(stepper):
    abort = DeviceAbort(torch.device("cpu"))
    assert step(stepper, abort, wrong=RIGHT)
    assert step(stepper, abort)


def test_an_iteration_that_is_wrong_from_its_start_takes_no_step_and_the_next_one_does(stepper):
    abort = DeviceAbort(torch.device("cpu"))
    assert not step(stepper, abort, wrong=WRONG)
    assert not step(stepper, abort)
    assert step(stepper, abort, wrong=RIGHT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_gradient_calls_off_the_rest_of_the_iteration_alone(stepper, bad):
    abort = DeviceAbort(torch.device("cpu"))
    assert step(stepper, abort, wrong=RIGHT)
    assert not step(stepper, abort, gradient=bad)
    assert not step(stepper, abort)
    assert step(stepper, abort, wrong=RIGHT)


def test_what_one_process_knows_reaches_all_by_the_sum_of_gradients():
    here, there = DeviceAbort(torch.device("cpu")), DeviceAbort(torch.device("cpu"))
    here.begin(WRONG)
    there.begin(RIGHT)
    gradients = [[torch.ones(2)], [torch.ones(2)]]
    for abort, own in zip((here, there), gradients):
        abort.spoil(own)
    assert torch.equal(gradients[1][0], torch.ones(2))
    assert (gradients[0][0] + gradients[1][0]).isnan().all()
