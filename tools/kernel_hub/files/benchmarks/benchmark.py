"""What `kernels benchmark` runs: ops at the sizes of SD3.5-medium beside eager PyTorch, small ones on a CPU.

float16, whose places are fine enough for the runner's tolerance of 1e-2.
"""

import math

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class AdvgrpoKernelsBenchmark(Benchmark):
    seed = 0

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=self.device)).half()

    def sizes(self) -> tuple[int, int, int]:
        """(images, image tokens, channels)"""
        return (1, 64, 128) if self.device == "cpu" else (16, 1024, 1536)

    def setup_ada_layer_norm(self) -> None:
        images, tokens, channels = self.sizes()
        self.x = self.randn(images, tokens, channels)
        self.shift, self.scale = self.randn(images, 2 * channels, scale=0.05).chunk(2, dim=1)

    def benchmark_ada_layer_norm(self) -> None:
        self.out = self.kernel.ada_layer_norm(self.x, self.shift, self.scale)

    def verify_ada_layer_norm(self) -> torch.Tensor:
        normed = F.layer_norm(self.x, self.x.shape[-1:], eps=1e-6)
        return normed * (1 + self.scale[:, None]) + self.shift[:, None]

    def setup_gated_residual(self) -> None:
        self.setup_ada_layer_norm()
        self.update, self.gate = self.randn(*self.x.shape), self.randn(*self.shift.shape, scale=0.5)

    def benchmark_gated_residual(self) -> None:
        norm = {"shift": self.shift, "scale": self.scale}
        self.out = self.kernel.gated_residual(self.x, self.update, self.gate, **norm)[1]

    def verify_gated_residual(self) -> torch.Tensor:
        hidden = self.x + self.gate[:, None] * self.update
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return normed * (1 + self.scale[:, None]) + self.shift[:, None]

    def setup_gelu(self) -> None:
        images, tokens, channels = self.sizes()
        self.x, self.bias = self.randn(images, tokens, 4 * channels, scale=0.5), self.randn(4 * channels, scale=0.5)

    def benchmark_gelu(self) -> None:
        self.out = self.kernel.gelu(self.x, self.bias)

    def verify_gelu(self) -> torch.Tensor:
        return F.gelu(self.x + self.bias, approximate="tanh")

    def setup_swiglu(self) -> None:
        images, tokens, channels = self.sizes()
        self.x = self.randn(images, tokens, 8 * channels, scale=0.5)

    def benchmark_swiglu(self) -> None:
        self.out = self.kernel.swiglu(self.x)

    def verify_swiglu(self) -> torch.Tensor:
        gate, value = self.x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def setup_qk_rms_norm(self) -> None:
        images, tokens, channels = self.sizes()
        self.qkv = self.randn(images, tokens, 3, channels // 64, 64)
        self.weights = [self.randn(64, scale=0.1) + 1 for _ in range(2)]

    def benchmark_qk_rms_norm(self) -> None:
        self.out = self.kernel.qk_rms_norm(self.qkv, self.weights).query

    def verify_qk_rms_norm(self) -> torch.Tensor:
        """The queries; the keys are computed too, as they are by the op."""
        results = []
        for x, weight in zip(self.qkv.unbind(2), self.weights):
            x = x.transpose(1, 2).float()
            results.append((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).half() * weight)
        return results[0]

    def setup_gaussian_step(self) -> None:
        images = self.sizes()[0]
        self.latents = torch.randn(images, 16, 64, 64, device=self.device)
        self.velocity, self.noise = self.randn(*self.latents.shape), torch.randn_like(self.latents)
        self.coefficients = torch.tensor([0.9, -0.1, 0.3], device=self.device)

    def benchmark_gaussian_step(self) -> None:
        step = self.kernel.gaussian_step(self.latents, self.velocity, self.coefficients, noise=self.noise)
        self.out = step.next_latents

    def verify_gaussian_step(self) -> torch.Tensor:
        """The next latents; their log-probability is computed too, as it is by the op."""
        a, b, s = self.coefficients
        mean = a * self.latents + b * self.velocity
        latents = mean + s * self.noise
        log_prob = -(latents - mean).square() / (2 * s.square()) - torch.log(s) - 0.5 * math.log(2 * math.pi)
        self.log_prob = log_prob.mean(dim=(1, 2, 3))
        return latents
