"""Sceptical timing: cold L2, interleaved variants, medians with their spread, limits measured in the same run.

On a GPU every call is timed by CUDA events behind the read of a buffer much larger than the L2 cache, which leaves it
full of lines that nothing has to write back. `interleave` lets the GPU sleep between that read and the first event for
as long as the host took to enqueue the call in a warm-up, so the events enclose what the device does, back to back, of
few launches and of many alike. A stream's queue ends that: of a call of more than some thousand launches the host still
enqueues the rest while the first run. `Turns` does not sleep unless it is told to: of a whole iteration the host's time
is part. Launches are counted elsewhere (tests/kernels/test_launch_counts.py).
On a CPU the clock is the process's CPU time, which neighbours disturb less, and the figures are no more than a
comparison of both sides there.
"""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .budget import Budget, OutOfTime

CARRIED = Path(__file__).parents[1] / ".whl"
FEWEST = 3  # rounds, where time runs short
FLUSH_BYTES = 2**30  # 20 times the L2 of an H200, ~0.25 ms to read
CYCLES = 2e9  # of a second of a GPU's clock, rounded up: a slower one sleeps longer
LONGEST_SLEEP = 0.05  # seconds: the first warm-up also compiles
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Summary:
    """Microseconds."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """Median of the baseline over ours (above 1: ours is faster) with a bootstrap 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """What this device reaches in this run; a copy counts the bytes read and written."""

    copy_gb_s: float
    matmul_tflop_s: float


class Turns:
    """Rounds in which every variant is called once, in turn and timed; each round starts with another one.

    Rounds may be played in several sittings, with other work between them.

    Args:
        after_round: gets the times so far; reading them waits for the device, between the rounds.
        host_ahead: on a GPU, time what the device does, without what it waits for the host's launches.
    """

    def __init__(
        self,
        variants: Mapping[str, Callable[[], object]],
        device: str,
        after_round: Callable[[dict[str, np.ndarray]], None] | None = None,
        *,
        host_ahead: bool = False,
    ) -> None:
        self.variants, self.device, self.after_round = dict(variants), device, after_round
        self.rounds, self.last = 0, 0.0  # last: seconds of the latest round, or by a warm-up of the next one
        self.host_ahead = host_ahead
        self._to_enqueue = dict.fromkeys(self.variants, 0.0)  # seconds of the host, in the latest warm-up
        self._readings: dict[str, list[Callable[[], float]]] = {name: [] for name in self.variants}

    def warm_up(self, names: Sequence[str] | None = None) -> None:
        """One call that is not timed of each, or of those that are named where the others have run before."""
        started = time.monotonic()
        for name in self.variants if names is None else names:
            begun = time.monotonic()
            self.variants[name]()
            self._to_enqueue[name] = time.monotonic() - begun
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.last = time.monotonic() - started + sum(map(self._sleep, self.variants))

    def play(self, rounds: int, budget: Budget) -> None:
        """Until there are `rounds` of them, as long as one that takes as long as the last still fits."""
        names = list(self.variants)
        while self.rounds < rounds and self.last <= budget.left:
            started, first = time.monotonic(), self.rounds % len(names)
            for name in names[first:] + names[:first]:
                self._readings[name].append(self._clock(name))
            self.rounds += 1
            if self.after_round is not None:
                self.after_round(self.times)
            self.last = time.monotonic() - started

    def _sleep(self, name: str) -> float:
        """Seconds that the GPU sleeps before a call that is timed: twice what the host took, in which it is ahead."""
        ahead = self.host_ahead and self.device == "cuda"
        return 2 * min(self._to_enqueue[name], LONGEST_SLEEP) if ahead else 0.0

    def _clock(self, name: str) -> Callable[[], float]:
        if self.device != "cuda":
            return _host_clock(self.variants[name])
        return _cuda_clock(self.variants[name], self._sleep(name))

    @property
    def times(self) -> dict[str, np.ndarray]:
        """us [rounds] by name."""
        return {name: np.array([read() for read in readings]) for name, readings in self._readings.items()}


def interleave(
    variants: Mapping[str, Callable[[], object]],
    device: str,
    *,
    repeats: int,
    warmup: int,
    budget: Budget | None = None,
    after_round: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Time one call of each variant in turn, `repeats` rounds, each starting with another one: us [rounds] by name.

    On a GPU it is the device's time: the host is ahead of it (see the top of this file).

    Args:
        budget: fewer rounds where its share runs short, and fewer calls of warm-up, but never under `FEWEST` rounds and
            two warm-up calls of each (the first of which compiles), as long as the whole run has the time.
        after_round: gets the times so far; reading them waits for the device, between the rounds.

    Raises:
        OutOfTime: after the warm-up not even `FEWEST` rounds fit into what the run has left.
    """
    budget, fewest = budget or Budget(None), min(repeats, FEWEST)
    turns = Turns(variants, device, after_round, host_ahead=True)
    for number in range(warmup):
        if number >= 2 and (fewest + 1) * turns.last > budget.left:
            break
        turns.warm_up()
    if fewest * turns.last <= budget.run.left:
        turns.play(fewest, budget.run)
    if turns.rounds < fewest:
        left = f"{budget.run.left:.1f} s that are left"
        raise OutOfTime(f"{fewest} rounds of {turns.last:.1f} s do not fit in the {left}")
    turns.play(repeats, budget)
    return turns.times


def summarise(times: np.ndarray) -> Summary:
    return Summary(*(float(np.percentile(times, p)) for p in (50, 10, 90)))


def ratio(baseline: np.ndarray, ours: np.ndarray, seed: int = 0) -> Ratio:
    """Both arrays are resampled together, because the i-th calls were neighbours in time."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(ours), size=(BOOTSTRAP_DRAWS, len(ours)))
    draws = np.median(baseline[picks], axis=1) / np.median(ours[picks], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Ratio(float(np.median(baseline) / np.median(ours)), float(low), float(high))


def calibrate(device: str, *, repeats: int = 20) -> Calibration:
    """Copy bandwidth and matrix-product rate: bf16 8192³ on a GPU; 512³ float32 and 32 MiB on a CPU."""
    on_gpu = device == "cuda"
    side, dtype, elements = (8192, torch.bfloat16, 2**30) if on_gpu else (512, torch.float32, 2**23)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    medians = {k: np.median(v) * 1e-6 for k, v in interleave(runs, device, repeats=repeats, warmup=3).items()}
    copied = 2 * source.numel() * source.element_size()
    return Calibration(copied / medians["copy"] / 1e9, 2 * side**3 / medians["matmul"] / 1e12)


def environment(device: str) -> dict[str, object]:
    """What a figure depends on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    commit = _output("git", "rev-parse", "--short", "HEAD") or _carried_commit()
    facts = {"device": device, "torch": torch.__version__, "triton": triton_version, "commit": commit}
    facts["python"] = platform.python_version()
    if device == "cuda":
        query = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit"
        facts["gpu"], facts["nvidia_smi"] = (
            torch.cuda.get_device_name(),
            _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        )
        facts["cuda"] = torch.version.cuda
    else:
        facts["cpu"], facts["threads"] = platform.processor() or platform.machine(), torch.get_num_threads()
        facts["note"] = "cpu: not a GPU figure"
    return facts


def as_json(value: Summary | Ratio | Calibration | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def _host_clock(run: Callable[[], object]) -> Callable[[], float]:
    start = time.process_time()
    run()
    elapsed = (time.process_time() - start) * 1e6
    return lambda: elapsed


def free() -> None:
    """Give back what the clock holds on the GPU, before memory is measured."""
    _flush_buffer.cache_clear()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")


def _cuda_clock(run: Callable[[], object], sleep: float = 0.0) -> Callable[[], float]:
    """Events are read when somebody asks, so nothing waits for the device between the calls of a round.

    sleep: seconds of the GPU before the call, which is then in its queue.
    """
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().sum()
    if sleep:
        torch.cuda._sleep(round(sleep * CYCLES))
    start.record()
    run()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return read


def _carried_commit() -> str | None:
    """Where only files were copied to: what `make gpu-carry` wrote beside the wheels."""
    file = CARRIED / "commit"
    return f"{file.read_text().strip()}, when it was carried" if file.exists() else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
