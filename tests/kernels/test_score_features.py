"""The head's scores on backbone features.

Planted bugs that turned this file red: GELU's slope without 1/sqrt(2π); w1 shifted by a row; features not normalised
in the backward; norms below 1 left alone; w2's gradient without the cdf; one tile of features only; patch scores of
the wrong image; local gradients not divided by n.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import score_features, score_features_ref
from advgrpo_kernels.ops.score_features import _score_features_op
from advgrpo_kernels.testing import assert_within_budget

GOLDEN = Path(__file__).parents[1] / "golden"


def make_head(D, H, dtype=torch.float32):
    return {
        "w1": torch.randn(H, D, dtype=dtype) * D**-0.5,
        "b1": torch.randn(H, dtype=dtype) * 0.1,
        "w2": torch.randn(1, H, dtype=dtype) * H**-0.5,
        "b2": torch.randn(1, dtype=dtype) * 0.1,
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("side", ["fake", "real"])
def test_reward_of_the_public_implementation(side, backend, device):
    """The released variant: features L2-normalised in the reward, cls in row 0 of the recorded features."""
    golden = {
        key: torch.from_numpy(np.asarray(value)).to(device)
        for key, value in np.load(GOLDEN / "dino_adv_grpo.npz").items()
    }
    head = dict(zip(("w1", "b1", "w2", "b2"), (golden[f"w{i}_before"] for i in range(4))))
    features = golden[side]
    weights = (float(golden["cls_weight"]), float(golden["patch_loss_weight"]))
    settings = {"weights": weights, "normalize": True, "backend": backend}
    got = score_features(features[:, 0], features[:, 1:], golden[f"patch_idx_reward_{side}"], head, **settings)
    torch.testing.assert_close(got.reward, golden[f"reward_{side}"], rtol=1e-5, atol=1e-6)


def test_mix_and_choice_of_patches():
    head = make_head(6, 8)
    cls, patches = torch.randn(3, 6), torch.randn(3, 5, 6)
    everything = score_features(cls, patches, None, head)
    assert torch.equal(everything.reward, 0.7 * everything.global_score + 0.3 * everything.local_score)
    listed = score_features(cls, patches, torch.arange(5).expand(3, 5), head)
    torch.testing.assert_close(everything.reward, listed.reward)
    single = score_features(cls, patches, torch.full((3, 1), 2), head)
    torch.testing.assert_close(single.local_score, score_features(patches[:, 2], patches, None, head).global_score)


def test_gradient_reaches_the_head_only():
    head = {name: tensor.requires_grad_() for name, tensor in make_head(5, 4, torch.float64).items()}
    cls, patches = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2], [1, 1]])

    def function(*parameters):
        head_ = dict(zip(("w1", "b1", "w2", "b2"), parameters))
        return score_features_ref(cls, patches, indices, head_, normalize=True, compute_dtype=torch.float64)

    assert torch.autograd.gradcheck(function, tuple(head.values()))
    score_features(cls, patches, indices, head).reward.sum().backward()
    assert patches.grad is None


def test_bad_arguments_raise():
    head, cls, patches = make_head(6, 8), torch.randn(3, 6), torch.randn(3, 5, 6)
    with pytest.raises(ValueError, match=r"cls must be floating point \[3, 6\]"):
        score_features(cls[:2], patches, None, head)
    with pytest.raises(ValueError, match=r"head\['w2'\] must be float \(1, 8\)"):
        score_features(cls, patches, None, {**head, "w2": torch.randn(8, 1)})
    with pytest.raises(ValueError, match=r"missing \['b2'\]"):
        score_features(cls, patches, None, {key: head[key] for key in ("w1", "b1", "w2")})
    with pytest.raises(ValueError, match="indices must be int64"):
        score_features(cls, patches, torch.zeros(3, 2), head)


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]
NAMES = ("w1", "b1", "w2", "b2")


@pytest.mark.every_second("dtype", "normalize", "B")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("B", "P", "n", "D", "H"), [(1, 1, 1, 3, 2), (3, 11, 5, 20, 24), (2, 70, 67, 40, 130)])
def test_triton_forward_and_head_gradients_within_error_budget(dtype, normalize, B, P, n, D, H, device):
    """The last shape has several tiles of rows, hidden units and features, all ragged."""
    cls, patches = torch.randn(B, D, device=device).to(dtype), torch.randn(B, P, D, device=device).to(dtype)
    indices = torch.randint(0, P, (B, n), device=device)

    def call(function, **settings):
        def of_head(*parameters, **more):
            head = dict(zip(NAMES, parameters))
            return torch.stack(function(cls, patches, indices, head, normalize=normalize, **settings, **more))

        return of_head

    parameters = [make_head(D, H)[name].to(device) for name in NAMES]
    upstream = torch.randn(3, B, device=device)
    triton = call(score_features, backend="triton")
    assert_within_budget(triton, call(score_features_ref), parameters, upstream)


def test_triton_all_patches_views_and_mixed_dtypes(device):
    head = {name: tensor.to(device) for name, tensor in make_head(6, 8).items()}
    features = torch.randn(3, 6, 12, device=device)[:, :, ::2]
    args = (features[:, 0].double(), features[:, 1:], None, head)
    got, expected = (score_features(*args, backend=backend) for backend in ("triton", "torch"))
    for value, reference in zip(got, expected):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_triton_normalises_short_and_zero_features(device):
    head = {name: tensor.to(device) for name, tensor in make_head(6, 8).items()}
    cls, patches = 1e-6 * torch.randn(2, 6, device=device), torch.zeros(2, 3, 6, device=device)
    got, expected = (
        score_features(cls, patches, None, head, normalize=True, backend=backend) for backend in ("triton", "torch")
    )
    for value, reference in zip(got, expected):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_triton_row_does_not_depend_on_the_batch(device):
    """To the bit on a GPU; the interpreter multiplies with BLAS, whose rounding depends on a row's place."""
    head = {name: tensor.to(device) for name, tensor in make_head(20, 24).items()}
    cls, patches = torch.randn(4, 20, device=device), torch.randn(4, 9, 20, device=device)
    indices = torch.randint(0, 9, (4, 5), device=device)
    whole = score_features(cls, patches, indices, head, normalize=True, backend="triton")
    part = score_features(cls[1:3], patches[1:3], indices[1:3], head, normalize=True, backend="triton")
    for value, reference in zip(part, whole):
        tolerance = 0.0 if device == "cuda" else 1e-6
        torch.testing.assert_close(value, reference[1:3], rtol=tolerance, atol=tolerance)


def test_triton_index_out_of_range_is_nan(device):
    head = tuple(make_head(6, 8)[name].to(device) for name in NAMES)
    cls, patches = torch.randn(2, 6, device=device), torch.randn(2, 5, 6, device=device)
    indices = torch.tensor([[0, 5], [1, 2]], device=device)
    reward, *_ = _score_features_op(cls, patches, indices, *head, 0.7, 0.3, False, False)
    assert torch.isnan(reward).tolist() == [True, False]


def test_opcheck(device):
    head = tuple(make_head(6, 8)[name].to(device).requires_grad_() for name in NAMES)
    cls, patches = torch.randn(2, 6, device=device), torch.randn(2, 5, 6, device=device)
    indices = torch.tensor([[0, 3], [1, 2]], device=device)
    torch.library.opcheck(_score_features_op, (cls, patches, indices, *head, 0.7, 0.3, True, True))


def test_compiles_without_graph_break(device):
    head = {name: tensor.to(device).requires_grad_() for name, tensor in make_head(6, 8).items()}
    cls, patches = torch.randn(2, 6, device=device), torch.randn(2, 5, 6, device=device)
    indices = torch.tensor([[0, 3], [1, 2]], device=device)

    def function(head):
        return score_features(cls, patches, indices, head, backend="triton").reward.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(head), list(head.values())) for run in (function, compiled)]
    for value, expected in zip(*grads):
        assert torch.equal(value, expected)


@pytest.mark.gpu
def test_real_size_within_error_budget():
    """DINOv2 ViT-B/14 at 518 px: 96 images, 64 of 1,369 patches, width 768."""
    cls, patches = torch.randn(96, 768, device="cuda"), torch.randn(96, 1369, 768, device="cuda").bfloat16()
    indices = torch.randint(0, 1369, (96, 64), device="cuda")
    parameters = [make_head(768, 512)[name].cuda() for name in NAMES]

    def reward(function):
        def of_head(*parameters, **more):
            return function(cls, patches, indices, dict(zip(NAMES, parameters)), **more).reward

        return of_head

    upstream = torch.randn(96, device="cuda")
    assert_within_budget(reward(score_features), reward(score_features_ref), parameters, upstream)
