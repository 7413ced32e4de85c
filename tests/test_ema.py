"""The moving average follows its formula and never leaves a trace in the parameters."""

import pytest
import torch

from advgrpo.ema import Ema
from advgrpo.errors import UserError


@pytest.fixture
def model():
    return torch.nn.Linear(3, 2)


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_formula(model):
    expected = model.weight.detach().double()
    ema = Ema(model.named_parameters(), decay=0.9)
    for seed in range(5):
        move(model, seed)
        ema.step()
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_decay_zero_follows_the_parameters(model):
    ema = Ema(model.named_parameters(), decay=0.0)
    move(model, 1)
    ema.step()
    assert torch.equal(ema.state_dict()["weight"], model.weight)


def test_swap_shows_the_average_and_restores_every_bit(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    move(model, 1)
    ema.step()
    with torch.no_grad():
        model.bias[0] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.swap():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in ema.state_dict().items())
        assert not torch.equal(model.weight, before["weight"])
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    after = model.state_dict()
    assert all(torch.equal(after[name].view(torch.int32), before[name].view(torch.int32)) for name in before)
    assert not torch.equal(ema.state_dict()["weight"], model.weight)


def test_swap_restores_after_an_error(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    move(model, 1)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    assert torch.equal(model.weight, before)
    ema.step()


def test_no_step_and_no_second_swap_while_swapped(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    with ema.swap():
        with pytest.raises(RuntimeError, match="leave swap"):
            ema.step()
        with pytest.raises(RuntimeError, match="leave swap"):
            ema.swap().__enter__()


def test_state_round_trip_continues_bit_for_bit(model):
    ema = Ema(model.named_parameters(), decay=0.9)
    move(model, 1)
    ema.step()
    other = Ema(model.named_parameters(), decay=0.9)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    move(model, 2)
    ema.step()
    other.step()
    assert torch.equal(ema.state_dict()["weight"], other.state_dict()["weight"])


def test_a_foreign_state_is_refused(model):
    ema = Ema(model.named_parameters(), decay=0.9)
    with pytest.raises(UserError, match="'bias' is only in one"):
        ema.load_state_dict({"weight": model.weight})
    with pytest.raises(UserError, match=r"EMA of 'weight' is torch\.float32 \[3, 3\]"):
        ema.load_state_dict({"weight": torch.zeros(3, 3), "bias": model.bias})


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        Ema(model.named_parameters(), decay=1.0)
    with pytest.raises(ValueError, match="different names"):
        Ema([], decay=0.9)
    with pytest.raises(ValueError, match=r"parameter weight is torch\.bfloat16"):
        Ema(model.bfloat16().named_parameters(), decay=0.9)
