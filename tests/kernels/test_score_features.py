"""The head's scores on backbone features."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import score_features, score_features_ref

GOLDEN = Path(__file__).parents[1] / "golden"


def make_head(D, H, dtype=torch.float32):
    return {
        "w1": torch.randn(H, D, dtype=dtype) * D**-0.5,
        "b1": torch.randn(H, dtype=dtype) * 0.1,
        "w2": torch.randn(1, H, dtype=dtype) * H**-0.5,
        "b2": torch.randn(1, dtype=dtype) * 0.1,
    }


@pytest.mark.parametrize("side", ["fake", "real"])
def test_reward_of_the_public_implementation(side):
    """The released variant: features L2-normalised in the reward, cls in row 0 of the recorded features."""
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / "dino_adv_grpo.npz").items()}
    head = dict(zip(("w1", "b1", "w2", "b2"), (golden[f"w{i}_before"] for i in range(4))))
    features = golden[side]
    weights = (float(golden["cls_weight"]), float(golden["patch_loss_weight"]))
    got = score_features(
        features[:, 0], features[:, 1:], golden[f"patch_idx_reward_{side}"], head, weights=weights, normalize=True
    )
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
