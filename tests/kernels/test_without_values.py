"""Tensors that only stand for others (fake, meta, functional, batched, traced) give results of the right shapes:
nothing reads their values. And arrays of other libraries are refused by the argument's name.

Planted bugs that turned this file red: values looked at whenever the tensor is on the CPU; fake tensors alone left
out of it, or the modes, or meta tensors; a seeded choice of patches made on the host; no check of one argument.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import advgrpo_kernels as k
from advgrpo_kernels._runtime import can_look_at

B, P, D, H, N = 2, 5, 6, 4, 3


def make_head(device="cpu"):
    shapes = {"w1": (H, D), "b1": (H,), "w2": (1, H), "b2": (1,)}
    return {name: torch.ones(shape, device=device) for name, shape in shapes.items()}


def arguments(device="cpu") -> dict[str, torch.Tensor]:
    """Zeros: a step without noise, which a look at the coefficients would turn into another result."""
    return {
        "x": torch.zeros(B, 3, 4, device=device),
        "c": torch.zeros(B, 3, device=device),
        "rows": torch.zeros(B, device=device),
        "ids": torch.zeros(B, dtype=torch.int64, device=device),
        "features": torch.zeros(B, P, D, device=device),
        "indices": torch.full((B, N), 99, device=device),  # out of range: a look would raise
    }


# What each call returns, as shapes; None where it returns none.
CALLS = {
    "gaussian_step_seeded": (
        lambda t: k.gaussian_step(t["x"], t["x"], t["c"], seed=1, sample_ids=t["ids"], return_mean=True),
        [(B, 3, 4), (B,), (B, 3, 4)],
    ),
    "gaussian_step_noise": (lambda t: k.gaussian_step(t["x"], t["x"], t["c"], noise=t["x"]), [(B, 3, 4), (B,), None]),
    "gaussian_step_ode": (lambda t: k.gaussian_step(t["x"], t["x"], t["c"]), [(B, 3, 4), None, None]),
    "gaussian_log_prob": (lambda t: [k.gaussian_log_prob(t["x"], t["x"], t["x"], t["c"])], [(B,)]),
    "clipped_policy_loss": (
        lambda t: k.clipped_policy_loss(
            *(t["x"], t["x"], t["x"], t["c"], t["rows"], t["rows"]),
            clip_range=0.1,
            uncond_velocity=t["x"],
            reference_mean=t["x"],
            kl_weight=0.1,
            kl_std=t["rows"],
        ),
        [(), (B,), (B,), (), (), (B, 3, 4), (B, 3, 4), None],
    ),
    "clipped_policy_loss_divergence": (
        lambda t: k.clipped_policy_loss(
            *(t["x"], t["x"], t["x"], t["c"], t["rows"], t["rows"]),
            clip_range=0.1,
            trust_region="divergence",
            old_mean=t["x"],
        ),
        [(), (B,), (B,), (), (), (B, 3, 4), None, (B,)],
    ),
    "group_advantages": (lambda t: k.group_advantages(t["rows"], t["ids"], std="global"), [(B,), (B,), (B,), ()]),
    "sample_patches_seeded": (lambda t: k.sample_patches(t["features"], N, seed=1), [(B, N, D), (B, N)]),
    "sample_patches": (
        lambda t: k.sample_patches(t["features"], N, indices=t["indices"], normalize=True),
        [(B, N, D), (B, N)],
    ),
    "score_features": (
        lambda t: k.score_features(
            t["x"][:, 0, :1].expand(B, D), t["features"], t["indices"], make_head(t["x"].device)
        ),
        [(B,)] * 3,
    ),
    "hinge_head_loss": (
        lambda t: k.hinge_head_loss(*[t["features"][:, 0], t["features"]] * 2, make_head(t["x"].device)),
        [(), ()],
    ),
}


def shapes(results) -> list[tuple[int, ...] | None]:
    return [None if result is None else tuple(result.shape) for result in results]


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("call", CALLS)
def test_shapes_come_out_without_values(call, kind):
    function, expected = CALLS[call]
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        results = function(arguments("cpu" if kind == "fake" else "meta"))
    assert shapes(results) == expected
    tensors = [result for result in results if result is not None]
    assert all(isinstance(t, FakeTensor) if kind == "fake" else t.is_meta for t in tensors)


@pytest.mark.parametrize("call", CALLS)
def test_shapes_come_out_of_a_trace(call):
    """`make_fx` runs the call with the values hidden from Python, as `torch.export` and AOTAutograd do."""
    function, expected = CALLS[call]
    names = list(arguments())
    values = {**arguments(), "indices": torch.zeros(B, N, dtype=torch.int64)}

    def flat(*tensors):
        return [result for result in function(dict(zip(names, tensors))) if result is not None]

    traced = make_fx(flat)(*values.values())
    assert shapes(traced(*values.values())) == [shape for shape in expected if shape is not None]


def test_real_tensors_in_a_fake_mode_and_fake_ones_outside():
    """Models are built in the mode; later calls happen outside of it, or with a table that is real."""
    table = torch.zeros(B, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not can_look_at(table)
        fake = torch.zeros(B, 3, 4)
        assert shapes(k.gaussian_step(fake, fake, table, noise=fake)) == [(B, 3, 4), (B,), None]
    assert not can_look_at(fake)
    assert can_look_at(table)
    assert can_look_at(torch.nn.Parameter(table))


def test_coefficients_under_vmap():
    steps = torch.func.vmap(lambda c: k.gaussian_log_prob(*[torch.zeros(B, 4)] * 3, c))(torch.ones(3, 3))
    assert steps.shape == (3, B)


array = np.zeros((B, 3, 4), dtype=np.float32)
x, c, rows, features = (arguments()[name] for name in ("x", "c", "rows", "features"))
ids, head = arguments()["ids"], make_head()
loss = {"clip_range": 0.1, "likelihood": "squared_error"}
ARRAYS = {
    "latents": lambda: k.gaussian_step(array, x, c, seed=1),
    "coefficients": lambda: k.gaussian_step(x, x, np.zeros(3), seed=1),
    "noise": lambda: k.gaussian_step(x, x, c, noise=array),
    "sample_ids": lambda: k.gaussian_step(x, x, c + 1, seed=1, sample_ids=np.arange(B)),
    "velocity": lambda: k.gaussian_log_prob(x, array, x, c),
    "next_latents": lambda: k.gaussian_log_prob(x, x, array, c),
    "uncond_velocity": lambda: k.gaussian_log_prob(x, x, x, c, uncond_velocity=array),
    "advantages": lambda: k.clipped_policy_loss(x, x, x, c, rows, np.zeros(B), **loss),
    "reference_mean": lambda: k.clipped_policy_loss(x, x, x, c, rows, rows, reference_mean=array, **loss),
    "kl_std": lambda: k.clipped_policy_loss(x, x, x, c, rows, rows, reference_mean=x, kl_std=np.ones(B), **loss),
    "old_mean": lambda: k.clipped_policy_loss(
        x, x, x, c, rows, rows, trust_region="divergence", old_mean=array, **loss
    ),
    "rewards": lambda: k.group_advantages(np.zeros(B), ids),
    "group_ids": lambda: k.group_advantages(rows, [0, 1]),
    "patches": lambda: k.sample_patches(np.zeros((B, P, D)), N, seed=1),
    "indices": lambda: k.sample_patches(features, N, indices=np.zeros((B, N), dtype=np.int64)),
    "cls": lambda: k.score_features(np.zeros((B, D)), features, None, head),
    "head['w2']": lambda: k.score_features(features[:, 0], features, None, {**head, "w2": np.zeros((1, H))}),
    "generated_cls": lambda: k.hinge_head_loss(features[:, 0], features, np.zeros((B, D)), features, head),
    "head['b1']": lambda: k.hinge_head_loss(*[features[:, 0], features] * 2, {**head, "b1": np.zeros(H)}),
    "x": lambda: k.gelu(array),
    "x of swiglu": lambda: k.swiglu(array),
    "bias": lambda: k.gelu(x, np.zeros(4)),
    "scale": lambda: k.ada_layer_norm(x, torch.zeros(B, 4), np.zeros((B, 4))),
    "residual": lambda: k.gated_residual(array, x, torch.zeros(B, 4)),
    "gate": lambda: k.gated_residual(x, x, np.zeros((B, 4))),
    "qkv[1]": lambda: k.qk_rms_norm([x[..., None], array[..., None], x[..., None]], [torch.ones(1)] * 2),
    "a[0]": lambda: k.merge_lora([torch.ones(4, 4)], [array], [torch.ones(4, 1)], 1.0, outs=[torch.ones(4, 4)]),
    "grads[0]": lambda: k.multi_tensor_adamw([x], [array], [x], [x], torch.tensor(0), lr=0.1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_other_arrays_are_refused_by_name(name):
    with pytest.raises(TypeError) as caught:
        ARRAYS[name]()
    assert str(caught.value).startswith(f"{name.split()[0]} must be a torch.Tensor, got ")
    assert "torch.as_tensor" in str(caught.value)
