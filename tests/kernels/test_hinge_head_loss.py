"""The head's hinge loss: the public implementation's recorded step, and the kernel against autograd of the reference.

Planted bugs that turned this file red: the same sign on both sides; gradient outside the hinge; NaN scores counted as
satisfied; patches not averaged; loop lengths compiled in as they are, of either kernel; a kernel for every kind of
count of images; rows of the second side over the first; upstream gradient ignored; patches counted in the accuracy;
loss weights exchanged.
"""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import hinge_head_loss, sample_patches
from advgrpo_kernels.ops import _head
from advgrpo_kernels.ops import hinge_head_loss as module
from advgrpo_kernels.ops._head import coarse
from advgrpo_kernels.ops.hinge_head_loss import _hinge_head_loss_op, hinge_head_loss_ref
from advgrpo_kernels.testing import assert_within_budget

NAMES = ("w1", "b1", "w2", "b2")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]


def make_head(D, H, device):
    """Scores spread over both sides of the hinge's corners at -1 and 1."""
    shapes = {"w1": (H, D), "b1": (H,), "w2": (1, H), "b2": (1,)}
    scales = {"w1": D**-0.5, "b1": 0.1, "w2": 4 * H**-0.5, "b2": 0.1}
    return {name: torch.randn(shape, device=device) * scales[name] for name, shape in shapes.items()}


def make_features(B, B2, n, D, device, dtype=torch.float32):
    shapes = ((B, D), (B, n, D), (B2, D), (B2, n, D))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_and_gradients_of_the_public_implementation(backend, device):
    """The released variant: raw features, cls and patches weighted 1 : 0.3, patches drawn with replacement."""
    recorded = np.load(Path(__file__).parents[1] / "golden" / "dino_adv_grpo.npz")
    golden = {key: torch.from_numpy(np.asarray(value)).to(device) for key, value in recorded.items()}
    head = {name: golden[f"w{i}_before"].requires_grad_() for i, name in enumerate(NAMES)}
    features = []
    for side in ("real", "fake"):
        cls, patches = golden[side][:, 0], golden[side][:, 1:]
        chosen = sample_patches(patches, 16, indices=golden[f"patch_idx_d_{side}"], backend=backend)
        features += [cls, chosen.patches]
    weights = (1.0, float(golden["patch_loss_weight"]))
    got = hinge_head_loss(*features, head, weights=weights, backend=backend)
    assert got.loss.item() == pytest.approx(float(golden["d_loss"]), abs=1e-6)
    assert got.accuracy.item() == pytest.approx(float(golden["d_acc"]))
    grads = torch.autograd.grad(got.loss, [head[name] for name in NAMES])
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad, golden[f"w{i}_grad"], rtol=1e-4, atol=2e-7)


@pytest.mark.every_second("dtype", "normalize", "B")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("B", "B2", "n", "D", "H"), [(1, 1, 1, 3, 2), (3, 3, 5, 20, 24), (2, 3, 67, 40, 70)])
def test_triton_loss_and_gradients_within_error_budget(dtype, normalize, B, B2, n, D, H, device):
    features = make_features(B, B2, n, D, device, dtype)

    def call(function, **settings):
        def of_head(*parameters, **more):
            head = dict(zip(NAMES, parameters))
            return function(*features, head, normalize=normalize, **settings, **more).loss

        return of_head

    parameters = list(make_head(D, H, device).values())
    triton = call(hinge_head_loss, backend="triton")
    assert_within_budget(triton, call(hinge_head_loss_ref), parameters, torch.tensor(0.7, device=device))


class Recorder:
    """Stands for a kernel and launches nothing: what Triton would compile another variant for, of every launch.

    That is the compile-time arguments, and of every integer whether it is 1 or a multiple of 16, unless the kernel says
    not to look.
    """

    def __init__(self, kernel):
        self.names = list(inspect.signature(kernel.fn).parameters)
        options = getattr(kernel, "kwargs", None) or {"do_not_specialize": kernel.do_not_specialize}
        self.overlooked = set(options["do_not_specialize"] or ())  # by the interpreter's kernels, and by compiled ones
        self.variants = set()

    def __getitem__(self, grid):
        def launch(*args, **constants):
            given = dict(zip(self.names, args))
            looked_at = {k: v for k, v in given.items() if isinstance(v, int) and k not in self.overlooked}
            kinds = {name: "one" if value == 1 else value % 16 == 0 for name, value in looked_at.items()}
            self.variants.add(str((kinds, constants)))

        return launch


def test_shares_of_a_batch_that_differ_in_every_update_need_few_kernels(monkeypatch):
    """8 processes draw 96 of 768 images a side, so their shares differ: few variants of each kernel serve all."""
    recorders = {}
    for owner, name in ((_head, "_head_rows_kernel"), (_head, "_head_bwd_kernel"), (module, "_hinge_kernel")):
        recorders[name] = Recorder(getattr(owner, name))
        monkeypatch.setattr(owner, name, recorders[name])
    generator, shares = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        sides = [torch.randperm(768, generator=generator)[:96] // 96 for _ in range(2)]
        shares |= {tuple(int((side == process).sum()) for side in sides) for process in range(8)}
    assert len(shares) > 80
    head = {name: tensor.requires_grad_() for name, tensor in make_head(4, 2, "cpu").items()}
    for B, B2 in shares:
        hinge_head_loss(*make_features(B, B2, 1024, 4, "cpu"), head, total=96, backend="triton").loss.backward()
    variants = {name: len(recorder.variants) for name, recorder in recorders.items()}
    assert variants["_head_rows_kernel"] == 1
    assert max(variants.values()) <= 14, variants


def test_coarse_loop_lengths_waste_little():
    for tiles in range(1, 300):
        assert tiles <= coarse(tiles) <= 1.25 * tiles


@pytest.mark.parametrize("total", [None, 8])
def test_triton_accuracy_total_and_weights(total, device):
    features, head = make_features(3, 3, 5, 12, device), make_head(12, 10, device)
    settings = {"weights": (1.0, 0.3), "total": total}
    got = hinge_head_loss(*features, head, backend="triton", **settings)
    expected = hinge_head_loss(*features, head, backend="torch", **settings)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.accuracy, expected.accuracy)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_images_of_weight_0_change_nothing_and_other_weights_scale(backend, device):
    """A batch that is filled up has loss, accuracy and gradients of the one it was made of."""
    head = {name: tensor.requires_grad_() for name, tensor in make_head(12, 10, device).items()}
    features = make_features(4, 3, 5, 12, device)
    weights = [torch.tensor(w, device=device) for w in ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0])]
    own = [features[0][:2], features[1][:2], features[2][:1], features[3][:1]]
    full = hinge_head_loss(*features, head, total=4, image_weights=weights, backend=backend)
    expected = hinge_head_loss(*own, head, total=4, backend=backend)
    doubled = hinge_head_loss(*features, head, total=4, image_weights=[2 * w for w in weights], backend=backend)
    torch.testing.assert_close(full.accuracy, expected.accuracy)
    torch.testing.assert_close(full.loss, expected.loss)
    torch.testing.assert_close(doubled.loss, 2 * expected.loss)
    values = list(head.values())
    for one, other in zip(torch.autograd.grad(full.loss, values), torch.autograd.grad(expected.loss, values)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_images_have_no_loss_and_gradients_of_zero(backend, device):
    """The part of a process that holds none of a batch of 4."""
    head = {name: tensor.requires_grad_() for name, tensor in make_head(12, 10, device).items()}
    none = hinge_head_loss(*make_features(0, 0, 5, 12, device), head, total=4, backend=backend)
    assert (none.loss.item(), none.accuracy.item()) == (0.0, 0.0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(none.loss, list(head.values())))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_non_finite_features_give_a_non_finite_loss(backend, device):
    features, head = make_features(2, 2, 3, 12, device), make_head(12, 10, device)
    features[3][1, 2, 5] = float("nan")
    assert not torch.isfinite(hinge_head_loss(*features, head, backend=backend).loss)


def test_opcheck(device):
    features, head = make_features(2, 2, 3, 12, device), make_head(12, 10, device)
    parameters = tuple(tensor.requires_grad_() for tensor in head.values())
    image_weights = torch.tensor([1.0, 0.0, 0.5, 1.0], device=device)
    torch.library.opcheck(_hinge_head_loss_op, (*features, *parameters, 0.7, 0.3, True, 0, image_weights))


def test_compiles_without_graph_break(device):
    features = make_features(2, 2, 3, 12, device)
    head = {name: tensor.requires_grad_() for name, tensor in make_head(12, 10, device).items()}

    def function(head):
        return hinge_head_loss(*features, head, backend="triton").loss * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(head), list(head.values())) for run in (function, compiled)]
    for value, expected in zip(*grads):
        assert torch.equal(value, expected)


def test_bad_arguments_raise(device):
    features, head = make_features(2, 2, 3, 12, device), make_head(12, 10, device)
    with pytest.raises(ValueError, match="want generated_cls"):
        hinge_head_loss(*features[:2], features[2][:1], features[3], head)
    ones = torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"image_weights of the generations must be float32 \[2\]"):
        hinge_head_loss(*features, head, image_weights=(ones, ones[:1]))
    with pytest.raises(ValueError, match=r"image_weights of the references must be float32 \[2\], got torch.int64"):
        hinge_head_loss(*features, head, image_weights=(ones.long(), ones))
    with pytest.raises(ValueError, match="patches per image differ"):
        hinge_head_loss(*features[:3], features[3][:, :2], head)
