"""How many kernels the transformer layer ops launch, counted as in test_launch_counts.py.

Planted bugs that turned this file red: modulation vectors copied; q, k, v copied out of the fused tensor; zeros for
unused results; maxima taken though the scale is given.
"""

import pytest
import torch

from advgrpo_kernels import ada_layer_norm, fp8_quantize, gated_residual, gelu, group_norm, qk_rms_norm, swiglu
from tests.kernels import test_launch_counts as counting


class Launches(counting.Launches):
    """Sees also the copies inside composite operators such as `contiguous`, whose schema is that of a view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs) if result is NotImplemented else result


@pytest.fixture
def launches(interpreted):
    return Launches(interpreted)


def test_qk_norm_is_one_launch_each_way(launches):
    qkv, txt = (torch.zeros(2, n, 3, 2, 16, requires_grad=True) for n in (5, 3))
    weights, upstream = torch.zeros(4, 16).unbind(), [torch.ones(2, 2, 8, 16)] * 3
    text = {"txt_qkv": txt, "txt_weights": weights[2:], "backend": "triton"}
    by_head = {"rotary": [torch.zeros(2, 8, 8)] * 2, "rotary_pairs": "half"}
    with launches:
        for rotary in ({}, by_head):
            out = qk_rms_norm(qkv, weights[:2], **text, **rotary)
            torch.autograd.grad(out, (qkv, txt), upstream)
    assert launches.names == 2 * ["_qk_rms_norm_fwd_kernel", "_qk_rms_norm_bwd_kernel"]


def test_both_modulations_are_one_launch_each_way(launches):
    x, emb = torch.zeros(2, 3, 16, requires_grad=True), torch.zeros(2, 4 * 16)
    upstream = [torch.ones(2, 3, 16)] * 2
    with launches:
        out = ada_layer_norm(x, *emb.chunk(4, dim=1), backend="triton")  # strided vectors are read in place
        torch.autograd.grad(out, x, upstream)
    assert launches.names == ["_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel"]


def test_residual_of_a_dual_block_with_the_next_norm_is_one_launch_each_way(launches):
    activations = [torch.zeros(2, 3, 16, requires_grad=True) for _ in range(3)]
    emb, following, upstream = torch.zeros(2, 9 * 16), torch.zeros(2, 6 * 16), [torch.ones(2, 3, 16)] * 2
    gates, norm = emb.chunk(9, dim=1), following.chunk(6, dim=1)
    x, out, out2 = activations
    with launches:
        results = gated_residual(x, out, gates[2], out2, gates[8], shift=norm[0], scale=norm[1], backend="triton")
        torch.autograd.grad(results, activations, upstream)
    assert launches.names == ["_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel"]


def test_plain_residual_passes_its_gradient_on(launches):
    x, out, gate = (
        torch.zeros(2, 3, 16, requires_grad=True),
        torch.zeros(2, 3, 16, requires_grad=True),
        torch.ones(2, 16),
    )
    upstream = torch.ones(2, 3, 16)
    with launches:
        torch.autograd.grad(gated_residual(x, out, gate, backend="triton"), (x, out), upstream)
    assert launches.names == ["_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel"]


def test_group_norm_with_silu_is_three_launches_in_either_layout(launches):
    x, weight, bias = torch.zeros(2, 8, 4, 3), torch.zeros(8), torch.zeros(8)
    with launches:
        group_norm(x, 2, weight, bias, silu=True, backend="triton")
        group_norm(x.to(memory_format=torch.channels_last), 2, weight, bias, silu=True, backend="triton")
    once = ["_group_norm_moments_kernel", "_group_norm_scales_kernel", "_group_norm_fwd_kernel"]
    assert [name for name in launches.names if name != "_to_copy"] == 2 * once


def test_gelu_is_one_launch_each_way(launches):
    x, bias, upstream = torch.zeros(2, 3, 16, requires_grad=True), torch.zeros(16), torch.ones(2, 3, 16)
    with launches:
        torch.autograd.grad(gelu(x, bias, backend="triton"), x, upstream)
    assert launches.names == ["_gelu_fwd_kernel", "_gelu_bwd_kernel"]


def test_swiglu_of_a_part_of_a_wider_product_is_one_launch_each_way(launches):
    """Neither it nor its gradient is copied: a block of FLUX.2 has both as parts."""
    x, upstream = torch.zeros(2, 3, 40)[..., 8:].requires_grad_(), torch.ones(2, 3, 24)[..., 8:]
    with launches:
        torch.autograd.grad(swiglu(x, backend="triton"), x, upstream)
    assert launches.names == ["_swiglu_fwd_kernel", "_swiglu_bwd_kernel"]


def test_quantisation_fused_or_by_row_is_one_launch_and_by_tensor_two(launches):
    x, vector, scale = torch.zeros(2, 3, 16), torch.zeros(2, 16), torch.ones(())
    with launches:
        ada_layer_norm(x, vector, vector, quantize=True, backend="triton")
        gated_residual(x, x, vector, shift=vector, scale=vector, quantize=True, backend="triton")
        gelu(x, quantize=True, backend="triton")
        swiglu(x, quantize=True, backend="triton")
        fp8_quantize(x, backend="triton")
        fp8_quantize(x, granularity="tensor", scale=scale, backend="triton")
        fp8_quantize(x, granularity="tensor", backend="triton")
    assert launches.names == [
        "_residual_norm_fwd_kernel",
        "_residual_norm_fwd_kernel",
        "_gelu_fp8_kernel",
        "_swiglu_fp8_kernel",
        "_fp8_rows_kernel",
        "_fp8_tensor_kernel",
        "_fp8_amax_kernel",
        "_fp8_tensor_kernel",
    ]
