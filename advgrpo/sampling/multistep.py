"""The second order of DPM-Solver++ for the steps after the window: `rollout.tail_solver dpm2`.

From level k to k + 1, with x_k = α_k x̂ + σ_k ε, λ = log(α/σ), h = λ_{k+1} - λ_k, h' = λ_k - λ_{k-1}, and m_k the image
x̂ that the network sees in x_k, the multistep solver in its midpoint form (Lu et al., arXiv 2211.01095, algorithm 2) is

    x_{k+1} = (σ_{k+1}/σ_k) x_k + α_{k+1} (1 - e^{-h}) (m_k + (h / 2h') (m_k - m_{k-1}))

Without the last term it is a step of the ODE as the sampler takes it, Euler's of a rectified flow and DDIM's of a model
that predicts noise. So only that term is added, c_k (m_k - m_{k-1}), and c_k = α_{k+1} (1 - e^{-h}) h / 2h' is in a
table.

As in MixGRPO-Flash (arXiv 2507.21802; Tencent-Hunyuan/MixGRPO at e5cdd6a, `dpm_apply_strategy post`): m of the window's
last step is the first step's m_{k-1}, though noise was added since, and the last step, which leads to the image at an
infinite λ, is of first order.
"""

from __future__ import annotations

import torch


def corrections(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """c of the steps between levels, but of the first, which has no step before it, and of the last, which ends at the
    image.

    Args:
        signal, noise: α and σ of n levels, float64 [n], from more noise to less.

    Returns:
        [n - 3] float64, finite and at least 0; 0 after a level without any signal, where λ is infinite.
    """
    log_ratio = signal.log() - noise.log()
    h = log_ratio.diff()
    before, now = h[:-2], h[1:-1]
    return signal[2:-1] * -torch.expm1(-now) * now / (2 * before)
