"""Collectives on torch.distributed, and the promise that when a rank fails all end with its error within a minute.

Processes are started by torchrun; one process needs no setup and every collective is then the identity. NCCL serves
GPUs, gloo the CPU. Python objects travel as JSON, so nothing received is ever unpickled.

How a failure spreads. Every rank runs a small thread with its own connection to the job's key-value store (torchrun's
agent hosts it, so it outlives rank 0). Each second the thread leaves a sign of life and looks for a failure report:

- A rank that raises inside `guard()` writes its error into the store before it exits; the others find it, raise it (as
  `RankFailure`, or `UserError` if it was one) at their next collective, and are ended after `GRACE_SECONDS` if they do
  not get that far, for example because they wait inside NCCL.
- A rank that dies without a word (killed, out of memory, machine lost) is noticed by its neighbour after
  `SILENCE_SECONDS`.
- A rank that lives but hangs, or calls collectives in another order, lets the others run into the collective timeout.
  With gloo that raises where they wait; with NCCL its watchdog thread ends the process, some seconds later and without
  a Python error, which is why the reports above do not depend on it.

Work that only some ranks do, or that takes them different times (loading a model the first time, writing a checkpoint,
evaluating), would run into that timeout too. It belongs in `monitored()`, where ranks wait for each other through the
store: as long as every rank shows signs of life, however long it takes.
"""

import atexit
import faulthandler
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advgrpo.errors import UserError

POLL_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # + polls + grace stays under a minute; nothing holds the GIL this long
GRACE_SECONDS = 10.0
LINGER_SECONDS = (
    5.0  # a failed rank stays this long for the others to read its report: torchrun ends all once one exits
)
START_SECONDS = 600.0  # machines of one job come up minutes apart
_MEETING_POLL_SECONDS = 0.05


class CollectiveError(RuntimeError):
    """A collective failed or timed out on this rank, and no rank reported why."""


class RankFailure(RuntimeError):
    """Another rank failed; the message holds its error."""


@dataclass(frozen=True)
class _Failure:
    rank: int
    reporter: int
    summary: str
    details: str
    is_user_error: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "_Failure":
        summary = "".join(traceback.format_exception_only(error)).strip()
        if isinstance(error, UserError):
            return cls(rank, rank, str(error), str(error), is_user_error=True)
        return cls(rank, rank, summary, "".join(traceback.format_exception(error))[-10_000:])

    def is_own(self, rank: int) -> bool:
        return self.rank == self.reporter == rank

    @property
    def exit_code(self) -> int:
        return UserError.EXIT_CODE if self.is_user_error else 1

    def as_exception(self) -> Exception:
        if self.is_user_error:
            return UserError(f"{self.details} (found on rank {self.rank})")
        return RankFailure(f"rank {self.rank} failed with this error:\n{self.details.rstrip()}")


class Distributed:
    """This process's place in the job, and the collectives. Made by `Distributed.start`.

    Attributes:
        rank, world_size, local_rank: as torchrun set them; 0, 1, 0 in a single process.
        device: where this rank computes: `cpu`, or `cuda:local_rank`.

    Every collective must be called by all ranks in the same order. It raises `CollectiveError` when it fails or takes
    longer than the timeout, and the other rank's error when one is known.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.device = device
        self._store: dist.Store | None = None
        self._watch: _Watch | None = None
        self._meetings = 0

    @classmethod
    def start(cls, device: str = "auto", *, timeout_seconds: float = 60.0) -> "Distributed":
        """Join the job that torchrun's environment describes, or stand alone without one.

        Args:
            device: "cuda", "cpu", or "auto" for CUDA where there is a GPU.
            timeout_seconds: how long a collective may take before it is an error.

        Raises:
            UserError: an unknown or absent device, more processes than GPUs, or an incomplete environment.
        """
        rank, world_size, local_rank = _read_environment()
        self = cls(rank, world_size, local_rank, _choose_device(device, local_rank))
        if world_size > 1:
            self._store = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))[0]
            self._watch = _Watch(self._store.clone(), rank, world_size)
            self._watch.start()
            with self.guard():
                self._join(timeout_seconds)
        return self

    def _join(self, timeout_seconds: float) -> None:
        self._meet("start", START_SECONDS)  # before the process group's own, shorter timeout begins
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("collectives", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=self.device if on_gpu else None,
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate `[n, ...]` of all ranks in rank order to `[sum of n, ...]`; n may differ, also be 0.

        Any dtype, bit for bit, on any device; without gradient. The result is on `tensor`'s device.

        Raises:
            ValueError: a tensor without dimensions, or ranks that differ in dtype or in the other dimensions.
        """
        if tensor.dim() == 0:
            raise ValueError("all_gather needs a tensor [n, ...]; got one without dimensions")
        rows, row_shape = tensor.shape[0], tensor.shape[1:]
        if self.world_size == 1:
            return tensor.detach().clone()
        row_bytes = row_shape.numel() * tensor.element_size()
        payload = tensor.detach().contiguous().reshape(rows, row_shape.numel()).view(torch.uint8)
        parts = self._gather_rows(payload.to(self.device), row_bytes, f"{tensor.dtype} [n, {list(row_shape)}]")
        gathered = torch.cat(parts)
        return gathered.view(tensor.dtype).reshape(gathered.shape[0], *row_shape).to(tensor.device)

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Sum every tensor over the ranks, in place, with one flat float32 all-reduce.

        Raises:
            ValueError: a tensor that float32 cannot hold exactly (float64 or integers).
        """
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"all_reduce_sum adds in float32; tensors[{i}] is {tensor.dtype}")
        if self.world_size == 1 or not tensors:
            return
        with torch.no_grad(), self._collective("all_reduce_sum"):
            flat = torch.cat([tensor.reshape(-1).to(self.device, torch.float32) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view(tensor.shape))

    def sum_scalars(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over the ranks in rank order, in float64: the same to the last bit on all ranks.

        Raises:
            ValueError: ranks have different keys.
        """
        gathered = self.gather_json(values)
        for rank, other in enumerate(gathered):
            if other.keys() != values.keys():
                raise ValueError(
                    f"sum_scalars: rank {rank} and rank {self.rank} differ in {other.keys() ^ values.keys()}"
                )
        return {key: sum(other[key] for other in gathered) for key in values}

    def barrier(self) -> None:
        """Wait for all ranks, no longer than the timeout; see `monitored` for work that may take longer."""
        if self.world_size > 1:
            with self._collective("barrier"):
                dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON-serialisable `value` of every rank, in rank order, on all ranks."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = _to_bytes(value).to(self.device)
        return [_from_bytes(part) for part in self._gather_rows(payload[:, None], 1, "JSON")]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """`value` of rank `source` on all ranks (JSON-serialisable; what other ranks pass is ignored)."""
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        with self._collective("broadcast_json"):
            payload = _to_bytes(value).to(self.device) if self.rank == source else None
            size = torch.tensor([0 if payload is None else len(payload)], device=self.device)
            dist.broadcast(size, source)
            if payload is None:
                payload = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
            dist.broadcast(payload, source)
        return _from_bytes(payload)

    def gather_tensors_to_main(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors on rank 0, in rank order and on the CPU, bit for bit; an empty list on other ranks.

        Names, shapes and dtypes may differ between ranks.
        """
        local = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.world_size == 1:
            return [{name: tensor.clone() for name, tensor in local.items()}]
        layouts = self.gather_json(
            [[name, str(t.dtype).removeprefix("torch."), list(t.shape), t.nbytes] for name, t in local.items()]
        )
        longest = max(sum(nbytes for *_, nbytes in layout) for layout in layouts)
        payload = torch.zeros(longest, dtype=torch.uint8)
        start = 0
        for tensor in local.values():
            payload[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
            start += tensor.nbytes
        payload = payload.to(self.device)
        received = [torch.zeros_like(payload) for _ in layouts] if self.is_main else None
        if longest:
            with self._collective("gather_tensors_to_main"):
                dist.gather(payload, received, dst=0)
        return [_unpack(part.cpu(), layout) for part, layout in zip(received or [], layouts)]

    @contextmanager
    def monitored(self, what: str, *, at_most_seconds: float = 3600.0) -> Iterator[None]:
        """Work that takes ranks different times, free of the collective timeout; at its end all ranks meet.

        The wait ends early with the error of a rank that fails, or falls silent, meanwhile. All ranks enter, also those
        with nothing to do; collectives inside keep their timeout.

        Args:
            what: names the work in errors, such as "load the models"; the same on all ranks.
            at_most_seconds: how long a rank waits for the others after its own part.

        Raises:
            CollectiveError: the others did not arrive in that time, or are at other work.
        """
        yield
        if self.world_size > 1:
            self._meet(what, at_most_seconds)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the whole training inside this: an exception here ends all ranks, and theirs ends this one.

        The exception is raised on; on ranks that fail only because another did, that rank's error takes its place.
        """
        try:
            yield
        except BaseException as error:
            if self.world_size == 1 or (isinstance(error, SystemExit) and not error.code):
                raise
            cause = self._watch.report(error)
            if self.device.type == "cuda":
                # NCCL's teardown at exit waits for kernels that wait for the rank that is gone.
                atexit.register(_exit_now, cause.exit_code)
            if cause.is_own(self.rank):
                raise
            is_echo = isinstance(error, (CollectiveError, RankFailure, UserError))
            raise cause.as_exception() from (None if is_echo else error)

    def close(self) -> None:
        """Leave the job. Rank 0 leaves last, as the store may live in its process. Safe to call after a failure."""
        if self._watch is None:
            return
        watch = self._watch
        if watch.failure is None and not watch.has_reported:
            watch.wait_for_goodbyes() if self.is_main else watch.say_goodbye()
        if dist.is_initialized() and (watch.failure is None or self.device.type == "cpu"):
            dist.destroy_process_group()
        watch.stop()
        self._watch = None

    def _gather_rows(self, payload: Tensor, row_bytes: int, signature: str) -> list[Tensor]:
        """uint8 [n, row_bytes] of every rank, n differing; `signature` must not differ."""
        with self._collective("all_gather"):
            digest = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:7], "big")
            header = torch.tensor([payload.shape[0], digest], device=self.device)
            headers = [torch.zeros_like(header) for _ in range(self.world_size)]
            dist.all_gather(headers, header)
            counts, digests = torch.stack(headers).cpu().unbind(dim=1)
            if (digests != digest).any():
                other = int((digests != digest).nonzero()[0])
                raise ValueError(
                    f"all_gather: rank {other} passed another dtype or shape than rank {self.rank}: {signature}"
                )
            padded = torch.zeros(int(counts.max()), row_bytes, dtype=torch.uint8, device=self.device)
            padded[: payload.shape[0]] = payload
            gathered = [torch.zeros_like(padded) for _ in range(self.world_size)]
            if padded.numel():
                dist.all_gather(gathered, padded)
        return [rows[: int(count)] for rows, count in zip(gathered, counts)]

    @contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        if self._watch.failure is not None:
            raise self._watch.failure.as_exception()
        try:
            yield
        except (CollectiveError, RankFailure):
            raise
        except RuntimeError as error:
            raise CollectiveError(f"{name} failed on rank {self.rank}: {error}") from error

    def _meet(self, what: str, at_most_seconds: float) -> None:
        """A barrier through the store, without the process group's timeout."""
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        deadline = time.monotonic() + at_most_seconds
        with self._collective(f"meeting {what!r}"):
            theirs = self._store.compare_set(f"{key}/what", "", what).decode()
            if theirs != what:
                raise CollectiveError(f"rank {self.rank} finished {what!r} while another finished {theirs!r}")
            arrived = self._store.add(key, 1)
            while arrived < self.world_size:
                if self._watch.failure is not None:
                    raise self._watch.failure.as_exception()
                if time.monotonic() > deadline:
                    raise CollectiveError(
                        f"{arrived} of {self.world_size} ranks arrived within {at_most_seconds:.0f} s"
                    )
                time.sleep(_MEETING_POLL_SECONDS)
                arrived = self._store.add(key, 0)


class _Watch(threading.Thread):
    """Leaves signs of life, finds failure reports, and ends a process whose main thread cannot end itself."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(name="advgrpo-watch", daemon=True)
        self.failure: _Failure | None = None
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._stopped = threading.Event()
        self.has_reported = False
        self._beats = 0
        self._neighbour = (rank + 1) % world_size
        self._neighbour_beat = b""
        self._neighbour_seen = time.monotonic()

    def run(self) -> None:
        while self.failure is None:
            try:
                self.failure = self._look()
            except dist.DistError as error:
                lost = f"rank {self._rank} lost the job's store, which ends with rank 0 or torchrun ({error})"
                self.failure = _Failure(0, 0, lost, lost)
            if self.failure is None and self._stopped.wait(POLL_SECONDS):
                return
        self._acknowledge()
        if not self._stopped.wait(GRACE_SECONDS):
            _tell(self._rank, f"{self.failure.as_exception()}\nThis rank did not end by itself and was here:")
            faulthandler.dump_traceback(file=sys.__stderr__)
            _exit_now(self.failure.exit_code)

    def stop(self) -> None:
        self._stopped.set()

    def report(self, error: BaseException) -> _Failure:
        """Publish `error` unless a rank did so before; returns the failure that counts, once others had time to see it.

        Called from the main thread.
        """
        if isinstance(error, CollectiveError) and self.failure is None:
            # Usually the echo of a rank that is about to report, or whose process has just been killed.
            _tell(self._rank, f"{error}\nWaiting for the report of the rank that caused it.")
            self._wait_until(lambda: self.failure is not None, 3 * POLL_SECONDS)
        self.has_reported = True
        mine = _Failure.of(error, self._rank)
        try:
            cause = self._publish(mine)
            if cause == mine:
                others = self._world_size - 1
                self._wait_until(lambda: self._store.add("failure/seen", 0) >= others, LINGER_SECONDS)
        except dist.DistError:  # the store is gone, and with it whoever hosted it: they end by losing it too
            return self.failure or mine
        return cause

    def say_goodbye(self) -> None:
        self.stop()
        self.join()
        self._store.set(f"alive/{self._rank}", "done")
        self._store.add("goodbyes", 1)  # last: rank 0, and the store with it, may be gone right after

    def wait_for_goodbyes(self) -> None:
        while self._store.add("goodbyes", 0) < self._world_size - 1 and self.failure is None:
            time.sleep(_MEETING_POLL_SECONDS)
        self.stop()

    def _look(self) -> _Failure | None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))
        if self._store.check(["failure"]):
            return _Failure(**json.loads(self._store.get("failure")))
        key, now = f"alive/{self._neighbour}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._neighbour_beat or beat in (b"", b"done"):
            self._neighbour_beat, self._neighbour_seen = beat, now
        elif now - self._neighbour_seen > SILENCE_SECONDS:
            text = (
                f"it has given no sign of life for {SILENCE_SECONDS:.0f} s and left no error "
                "(killed, out of memory, or its machine is gone)"
            )
            return self._publish(_Failure(self._neighbour, self._rank, text, text))
        return None

    def _publish(self, failure: _Failure) -> _Failure:
        """The first report wins; returns the winner."""
        text = json.dumps(asdict(failure))
        return _Failure(**json.loads(self._store.compare_set("failure", "", text)))

    def _acknowledge(self) -> None:
        if self.failure.is_own(self._rank):
            return
        # At once, in one line: torchrun may end this process before its main thread gets to raise the whole error.
        _tell(self._rank, f"ending because rank {self.failure.rank} failed: {self.failure.summary}")
        with suppress(dist.DistError):  # without a store nobody is left to wait for it
            self._store.add("failure/seen", 1)

    @staticmethod
    def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_MEETING_POLL_SECONDS)


def _read_environment() -> tuple[int, int, int]:
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdigit():
            raise UserError(f"environment variable {name}={text!r} must be a number: start the processes with torchrun")
        values[name] = int(text)
    return values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device!r} must be auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device='cuda' but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: "
            "start torchrun with --nproc-per-node at most that"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(payload: Tensor) -> Any:
    return json.loads(bytes(payload.reshape(-1).tolist()))


def _unpack(payload: Tensor, layout: list[list[Any]]) -> dict[str, Tensor]:
    tensors, start = {}, 0
    for name, dtype, shape, nbytes in layout:
        part = payload[start : start + nbytes].clone()  # a fresh storage: views as wider dtypes must be aligned
        tensors[name] = part.view(getattr(torch, dtype)).reshape(shape)
        start += nbytes
    return tensors


def _tell(rank: int, text: str) -> None:
    print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
