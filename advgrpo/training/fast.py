"""What --fast switches on here, and why the rest is off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from advgrpo.config import Config, ModelSection
from advgrpo.errors import UserError
from advgrpo.plan.captured import needs_room, why_no_graphs, why_not_captured, why_not_fused, why_not_ours
from advgrpo.plan.estimate import GB
from advgrpo.plan.memory import peak_with_captured_update
from advgrpo.policy.fused.attention import choose_attention
from advgrpo.policy.pipelines import FAMILIES, pipeline_class
from advgrpo.runtime.distributed import Distributed
from advgrpo_kernels import _cpu
from advgrpo_kernels._runtime import DEFAULT_BACKEND, HAS_TRITON
from advgrpo_kernels.ops._csrc import library


@dataclass(frozen=True)
class FastPath:
    name: str
    on: bool
    why: str  # what it saves when on, why it is off otherwise


@dataclass(frozen=True)
class FastPaths:
    """The decisions the trainer reads, and the table it prints."""

    share_prefix: bool
    fused: bool  # our transformer, and with it merged weights
    fused_optimizer: bool
    graphs: bool
    captured_update: bool  # forward and backward of its steps are graphs as well
    table: tuple[FastPath, ...]

    @classmethod
    def choose(
        cls, config: Config, device: torch.device, *, processes: int = 1, free_gb: float | None = None
    ) -> FastPaths:
        """Raises UserError where a path is asked for that this machine or model does not have.

        Args:
            processes: share an iteration's images, which decides what each of them keeps in memory.
            free_gb: of the GPU with the least (`least_memory_gb`), so that all processes decide alike; None: of this.
        """
        gpu_only = "" if device.type == "cuda" else "no CUDA device"
        plain, kind = "" if config.fast else "--no-fast", pipeline_class(config.model.path)
        fused_off = why_not_fused(config, kind)
        _refuse_what_is_not_there(config, device, fused_off, kind)
        merged_off, ode = fused_off or _why_not_merged(config.model), "ODE steps"
        if config.has_merged_copy:
            merged_off = plain or why_not_ours(config.model, kind)
            ode = "ODE steps, by a whole copy beside the base in parts,"
        no_graphs = fused_off or gpu_only or why_no_graphs(config.model)
        not_captured = no_graphs or why_not_captured(config, kind) or _why_no_room(config, device, processes, free_gb)
        own_noise = ""
        if config.rollout.initial_noise == "per_image":
            own_noise = "rollout.initial_noise = per_image: every image is its own trajectory"
        off = _Off(plain or own_noise, fused_off, merged_off, no_graphs, not_captured)
        rows = _rows(config, device, off, ode)
        own_optimizer = config.fast and not config.model.in_parts
        graphs = not no_graphs, not not_captured
        return cls(not off.prefix, not fused_off, own_optimizer, *graphs, rows)

    def print(self, console: Console) -> None:
        """A line for each path: what it saves, or why it is off."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")  # a line each, whatever the terminal's width
        for row in self.table:
            state = Text("on", "green") if row.on else Text("off", "dim")
            table.add_row(state, Text(row.name), Text(row.why))
        console.print(table)


def _refuse_what_is_not_there(config: Config, device: torch.device, fused_off: str, kind: str) -> None:
    """UserError for a setting that asks for our forward where it is off, or for an attention that cannot run here."""
    if fused_off and config.rollout.window_forward == "merged":
        raise UserError(f"rollout.window_forward = 'merged' needs the fused transformer ({fused_off}); use trainer")
    if fused_off and config.model.attention != "auto":
        raise UserError(
            f"model.attention = {config.model.attention!r} is the fused transformer's ({fused_off}); use auto"
        )
    if fused_off and config.model.sequence_parallel > 1:
        raise UserError(
            f"model.sequence_parallel = {config.model.sequence_parallel} is the fused transformer's ({fused_off}); "
            "use 1"
        )
    if fused_off and config.update.graphs is True:
        raise UserError(f"update.graphs = True captures the fused transformer ({fused_off}); use auto")
    if not fused_off:  # an explicit backend that this machine lacks is an error now
        masked = FAMILIES[kind].masked_text
        choose_attention(config.model.attention, device, getattr(torch, config.model.dtype), masked=masked)


@dataclass(frozen=True)
class _Off:
    """Why each of these is off; "" where it is on."""

    prefix: str
    fused: str
    merged: str
    graphs: str
    captured: str


def _rows(config: Config, device: torch.device, off: _Off, ode: str) -> tuple[FastPath, ...]:
    """The table; `ode` names the steps that merged weights run."""
    no_triton = _why_no_triton(device)
    no_cpu = (off.fused and off.merged) or _why_no_cpu_kernels(config.model, device)
    ours = not (no_triton and no_cpu)
    norms = "one kernel per norm and residual" if ours else "norms and residuals by PyTorch's operators"
    of_sampler = "trajectory" if config.rollout.window.one_for_all else "sampling step"
    return (
        _row(
            "shared prefix",
            off.prefix,
            "one trajectory per prompt up to the window",
        ),
        _row("fused transformer", off.fused, f"stacked matrix products, {norms}"),
        _row("merged LoRA", off.merged, f"{ode} run merged weights: no adapter matmuls"),
        _row(
            "fused AdamW",
            _why_not_our_optimizer(config) or _why_no_csrc(device),
            "clipping, AdamW and EMA in three launches, no wait",
        ),
        _row("Triton kernels", no_triton, "fused step, loss, advantages, patches and head, with --no-fast as well"),
        _row("CPU kernels", no_cpu, "" if no_cpu else _what_the_cpu_runs()),
        _row(
            "CUDA graphs",
            off.graphs,
            f"one launch per {of_sampler}; one per discriminator update, two on several GPUs",
        ),
        _row(
            "captured update",
            off.captured,
            "one launch per step of the window, forward and backward; its activations stay in memory",
        ),
        _row(
            "FP8 sampling",
            _why_no_fp8(config.rollout.precision, "rollout.precision", device, off.merged),
            _where_fp8(device, f"{ode} on FP8 tensor cores", f"{ode} in FP8"),
        ),
        _row(
            "FP8 training",
            _why_no_fp8(
                config.model.base_precision,
                "model.base_precision",
                device,
                "" if config.model.shard_base == "blocks" else off.fused,
            ),
            _where_fp8(device, "frozen weights quantised once, adapters never", "frozen weights in FP8"),
        ),
    )


def _row(name: str, off_because: str, saves: str) -> FastPath:
    return FastPath(name, not off_because, off_because or saves)


def _why_not_merged(model: ModelSection) -> str:
    """Why sampling runs the weights that are trained, by our forward, or ""."""
    whole = model.shard_base == "none"
    return "" if whole else f"model.shard_base = {model.shard_base}: merged weights would be whole on each process"


def _why_not_our_optimizer(config: Config) -> str:
    optimizer = config.update.optimizer
    if config.model.in_parts:
        return f"model.shard_base = {config.model.shard_base}: the norm is of gradients in parts"
    if optimizer == "auto":
        return "" if config.fast else "--no-fast"
    return "" if optimizer == "fused" else f"update.optimizer = {optimizer}"


def _why_no_room(config: Config, device: torch.device, processes: int, free_gb: float | None) -> str:
    """Why update.graphs = auto does not find room for the graphs of the update beside everything else, or ""."""
    if not needs_room(config):
        return ""
    try:
        needed = peak_with_captured_update(config, processes=processes)
    except UserError as unknown:
        return f"update.graphs = auto cannot tell whether it fits ({unknown}); true captures it"
    held = memory_gb(device) if free_gb is None else free_gb
    fits = needed <= held
    return "" if fits else f"update.graphs = auto: {needed:.1f} GB by the memory plan, and the GPU has {held:.1f} free"


def least_memory_gb(distributed: Distributed) -> float | None:
    """Of all processes' GPUs, the least of `memory_gb`; None on a CPU. All processes call it together.

    Captured steps have the bits of eager ones, but not their seconds nor their memory: what one card of a job has no
    room for, none does.
    """
    if distributed.device.type != "cuda":
        return None
    return min(distributed.gather_json(memory_gb(distributed.device)))


def memory_gb(device: torch.device) -> float:
    """Of a GPU, what is free or this process's own already, 10^9 bytes."""
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GB


def _why_no_triton(device: torch.device) -> str:
    """Why the ops run their PyTorch references, or ""; as `advgrpo_kernels._runtime.pick_backend` decides."""
    if device.type != "cuda":
        return "no CUDA device"
    if DEFAULT_BACKEND == "torch":
        return "ADVGRPO_KERNELS_BACKEND = torch: PyTorch's operators instead"
    return "" if HAS_TRITON else "triton is not installed: PyTorch's operators instead"


def _why_no_cpu_kernels(model: ModelSection, device: torch.device) -> str:
    """Why the layer ops are not the ones compiled for this CPU, or ""; compiles them where they are wanted.

    Raises:
        UserError: ADVGRPO_KERNELS_CPU requires them, and they cannot be compiled; or it is no word that is known.
    """
    if device.type != "cpu":
        return f"the model is on {device.type}"
    if model.dtype != "float32":
        return f"model.dtype = {model.dtype}: they are for float32"
    if DEFAULT_BACKEND == "torch":
        return "ADVGRPO_KERNELS_BACKEND = torch: PyTorch's operators instead"
    try:
        return "" if _cpu.usable() else f"{_cpu.why_not()}: PyTorch's operators instead"
    except (_cpu.CpuKernelsUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


def _what_the_cpu_runs() -> str:
    """Of the kernels compiled for it; matrix products are among them where PyTorch's leave half of it unused."""
    norms = "norms, residuals, GELU and attention over few tokens, compiled for this CPU"
    why_not = _cpu.why_no_products()
    return f"{norms}; matrix products are PyTorch's: {why_not}" if why_not else f"matrix products, {norms}"


def _why_no_csrc(device: torch.device) -> str:
    """Why AdamW is not the compiled one, or ""; the optimizer takes the same steps either way."""
    if device.type != "cuda":
        return "no CUDA device: PyTorch's operators, the same steps"
    return "" if library() is not None else "csrc/ is not built: PyTorch's operators, which do not wait either"


def _where_fp8(device: torch.device, on_gpu: str, elsewhere: str) -> str:
    return on_gpu if device.type == "cuda" else f"{elsewhere}, slower than without: no FP8 tensor cores"


def _why_no_fp8(precision: str, field: str, device: torch.device, fused_off: str) -> str:
    """Why FP8 is off, or ""; UserError where it is asked for and cannot be."""
    if precision != "fp8":
        return f"{field} = {precision}"
    if fused_off:
        raise UserError(f"{field} = 'fp8' needs the fused transformer ({fused_off}); use {field} = model")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"{field} = 'fp8' needs a GPU of compute capability 8.9; use {field} = model")
    return ""
