"""Collectives on torch.distributed, and the promise that when a rank fails all end with its error within a minute.

Processes are started by torchrun; one process needs no setup and every collective is then the identity. NCCL serves
GPUs, gloo the CPU. Python objects travel as JSON, so nothing received is ever unpickled.

How a failure spreads. Every rank runs a small thread (watch.py) with its own connection to the job's key-value store
(torchrun's agent hosts it, so it outlives rank 0 and every attempt of torchrun --max-restarts; keys are therefore
prefixed by the attempt). Each second the thread leaves a note and looks for a failure report:

- A rank that raises inside `guard()` writes its error into the store before it exits; the others find it, raise it (as
  `RankFailure`, or `UserError` if it was one) at their next collective or `check_stop`, and are ended after
  `watch.GRACE_SECONDS` if they do not get that far, for example because they wait inside NCCL.
- A rank that dies without a word (killed, out of memory, machine lost) or is stopped is noticed by its neighbour after
  `watch.SILENCE_SECONDS`.
- A rank that lives but hangs, or calls collectives in another order, lets the others run into the collective timeout.
  With gloo that raises where they wait, and says who is missing, at what work; the missing rank's stack is printed.
  With NCCL its own watchdog would end the process without a Python error, so it gets a longer timeout, and the ring of
  watches says the same: a neighbour that lives, is behind and begins nothing new for as long as it may hangs.

`watch.seconds_to_the_end` adds up how long each of these takes with the default timeout. Longer than the minute may
take only what can be slow for a good reason: reading models and prompts, and what is done for the first time while
others wait (`SLOW_SECONDS`).

Work that only some ranks do, or that takes them different times (loading a model the first time, writing a checkpoint,
scoring, evaluating), would run into that timeout too. It belongs in `monitored()`, where ranks wait for each other
through the store: as long as every rank shows signs of life and begins new work now and then (`progress`).

How a job stops early. Any rank may `ask_to_stop`, from a signal handler too. Rank 0 alone decides where: at its next
`check_stop`, which stands between two pieces of work, or where it waits in `monitored`, `StopRequested` is raised, and
from then on it enters no collective. It has to be rank 0, which saves: if another rank left first, rank 0 could wait
for it in a collective. The others follow at their own `check_stop`, or are ended where they wait.
"""

import atexit
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from advgrpo.errors import UserError
from advgrpo.runtime import watch
from advgrpo.runtime.watch import CollectiveError, RankFailure, StopRequested, Watch

T = TypeVar("T")
START_SECONDS = 600.0  # machines of one job come up minutes apart
SLOW_SECONDS = 600.0  # for one step of work that waits for a disk or network, or compiles kernels the first time
_NCCL_EXTRA_SECONDS = 20.0  # until NCCL's watchdog ends the process: the watches have said more by then
_SAY_WHO_IS_LATE_SECONDS = 30.0
_FIRST_PATIENCE_SECONDS = 0.05  # for the answer to a token that may be old; the next ones are longer


class Distributed:
    """This process's place in the job, and the collectives. Made by `Distributed.start`.

    Attributes:
        rank, world_size, local_rank: as torchrun set them; 0, 1, 0 in a single process.
        device: where this rank computes: `cpu`, or `cuda:local_rank`.
        stops_together: where rank 0 alone could not save: nothing ends early by itself, the caller asks all ranks for
            their `stop_reason` and ends on all of them. The same on all.

    Every collective must be called by all ranks in the same order. It raises `CollectiveError` when it fails or takes
    longer than the timeout, and the other rank's error when one is known.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.device = device
        self.timeout_seconds = 0.0
        self._store: dist.Store | None = None
        self._watch: Watch | None = None
        self._stop_reason: str | None = None
        self._stopped = False
        self._interruptible = False
        self._last_meeting = ""
        self.stops_together = False

    @classmethod
    def start(cls, device: str = "auto", *, timeout_seconds: float = 40.0) -> "Distributed":
        """Join the job that torchrun's environment describes, or stand alone without one.

        Args:
            device: "cuda", "cpu", or "auto" for CUDA where there is a GPU.
            timeout_seconds: how long a collective may take before it is an error, and a rank that others wait for may
                take to begin something new.

        Raises:
            UserError: an unknown or absent device, more processes than GPUs, or an incomplete environment.
        """
        rank, world_size, local_rank = _read_environment()
        self = cls(rank, world_size, local_rank, _choose_device(device, local_rank))
        if world_size > 1:
            store = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))[0]
            # All are here from now on, before the process group's own, shorter timeout begins.
            attempt = _agree_on_attempt(store, rank, world_size)
            self.timeout_seconds = timeout_seconds
            self._store = dist.PrefixStore(attempt, store)
            self._watch = Watch(dist.PrefixStore(attempt, store.clone()), rank, world_size)
            self._watch.start()
            with self.guard():
                self._join(timeout_seconds)
        return self

    def _join(self, timeout_seconds: float) -> None:
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("collectives", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_seconds + (_NCCL_EXTRA_SECONDS if on_gpu else 0.0)),
            device_id=self.device if on_gpu else None,
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    @property
    def started_by_torchrun(self) -> bool:
        """Whether an agent started this process, and may have started it before."""
        return "TORCHELASTIC_RUN_ID" in os.environ

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
        with torch.no_grad(), self.collective("all_reduce_sum"):
            flat = torch.cat([tensor.reshape(-1).to(self.device, torch.float32) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view(tensor.shape))

    def patient_group(self, groups: list[list[int]] | None = None) -> dist.ProcessGroup:
        """All ranks of a job of several, for collectives in work that takes ranks different times (`monitored`).

        They wait for `SLOW_SECONDS`; who hangs is noticed by the watches before that, where all ranks take part.

        Args:
            groups: this rank's of these instead, which share out all ranks; every rank passes the same.
        """
        timeout = timedelta(seconds=SLOW_SECONDS)
        with self.collective("forming a group"):
            if groups is None:
                return dist.new_group(timeout=timeout)
            return dist.new_subgroups_by_enumeration(groups, timeout=timeout)[0]

    @contextmanager
    def temporary_group(self) -> Iterator[dist.ProcessGroup]:
        """`patient_group` of all ranks, for as long as the block."""
        group = self.patient_group()
        yield group
        dist.destroy_process_group(group)

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON-serialisable `value` of every rank, in rank order, on all ranks."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = _to_bytes(value).to(self.device)
        return [_from_bytes(part) for part in self._gather_rows(payload[:, None], 1, "JSON")]

    def from_rank(self, source: int, contents: Sequence[bytes], group: dist.ProcessGroup | None = None) -> list[bytes]:
        """The byte strings of rank `source`, on all ranks; the others pass as many, which are ignored.

        Args:
            group: `temporary_group` or `patient_group`, where ranks come to this at different times.
        """
        if self.world_size == 1 or not contents:
            return list(contents)
        with self.collective("from_rank"):
            lengths = torch.tensor([len(content) for content in contents], device=self.device)
            dist.broadcast(lengths, source, group=group)
            sizes = lengths.tolist()
            if not sum(sizes):  # no tensor can be made of no bytes
                return [b""] * len(sizes)
            if self.rank == source:
                payload = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8).to(self.device)
            else:
                payload = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            dist.broadcast(payload, source, group=group)
            parts = payload.cpu().split(sizes)
        return [part.numpy().tobytes() for part in parts]

    def progress(self, doing: str, *, within_seconds: float | None = None) -> None:
        """Note what this rank begins now; those that wait for it in `monitored` show it, and it proves it is not stuck.

        Costs nothing: the note travels with the next sign of life.

        Args:
            within_seconds: how long the work may take before this rank counts as hanging; None: the collective timeout.
        """
        if self._watch is not None:
            note = self._watch.note
            note.doing, note.within = doing, self.timeout_seconds if within_seconds is None else within_seconds
            note.steps += 1

    def ask_to_stop(self, reason: str) -> None:
        """Let the whole job end early; see `check_stop`. May be called from a signal handler, on any rank.

        Raises:
            StopRequested: on rank 0, called from a signal handler inside `interruptible`.
        """
        self._stop_reason = self._stop_reason or reason
        if self._watch is not None:
            self._watch.wanted_stop = self._stop_reason
        if self._interruptible:
            self._interruptible = False
            self._stop_here()

    @property
    def stop_reason(self) -> str | None:
        """Why the job has been asked to stop, as far as this rank knows; None while it has not."""
        return self._stop_reason or (self._watch.stop_reason if self._watch is not None else None)

    @property
    def stopped_by_others(self) -> bool:
        """Whether the job stops on the wish of another machine, and this one is to go on (`Watch.goes_on`)."""
        return self._watch is not None and self._watch.goes_on

    def check_stop(self) -> None:
        """Where work can end, between two pieces of it; that it was reached also proves that this rank is not stuck.

        Raises:
            StopRequested: somebody asked for it, and rank 0, which must be the first, has stopped or stops here.
            RankFailure, UserError: the error of a rank that failed meanwhile.
        """
        watched, reason = self._watch, self.stop_reason
        if watched is not None:
            watched.note.steps += 1
            if watched.failure is not None:
                raise watched.failure.as_exception()
            if watched.has_stopped:
                raise StopRequested(reason)
        self._stop_here()

    def _stop_here(self) -> None:
        """StopRequested on rank 0 if somebody asked for it; the others learn that it stops."""
        reason = self.stop_reason
        if self.is_main and reason is not None and not self.stops_together:
            if self._watch is not None:
                self._stopped = True
                asked = watch.machine() if self._stop_reason else self._watch.stop_machine
                self._store.set("stopped", watch.stop_wish(reason, asked))
            raise StopRequested(reason)

    def step(self, doing: str, *, within_seconds: float | None = None) -> None:
        """A new piece of work where the job may also end: `check_stop`, then `progress`."""
        self.check_stop()
        self.progress(doing, within_seconds=within_seconds)

    def stoppable(self, work: Collection[T], what: str, *, within_seconds: float | None = None) -> Iterator[T]:
        """The pieces of `work` with a `step` before each of them, called "WHAT 1 of 8" and so on."""
        for number, piece in enumerate(work, 1):
            self.step(f"{what} {number} of {len(work)}", within_seconds=within_seconds)
            yield piece

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be broken off anywhere, such as waiting for another machine: a signal stops rank 0 at once."""
        self._interruptible = True
        try:
            self.check_stop()
            yield
        finally:
            self._interruptible = False

    def before_exit(self, action: Callable[[], None]) -> None:
        """What to do, in another thread, once the job has failed; within `watch.SAVE_SECONDS`, and it must not raise.

        The main thread may be stuck, or be ending by itself meanwhile.
        """
        if self._watch is not None:
            self._watch.before_exit = action

    @contextmanager
    def monitored(self, what: str, *, at_most_seconds: float | None = None) -> Iterator[None]:
        """Work that takes ranks different times, free of the collective timeout; at its end all ranks meet.

        The wait ends early with the error of a rank that fails, or falls silent, meanwhile. All ranks enter, also those
        with nothing to do; collectives inside keep their timeout. Ranks that wait say now and then for whom.

        Args:
            what: names the work in errors, such as "load the models"; the same on all ranks.
            at_most_seconds: how long others wait for a rank that does not call `progress`; None: the collective
                timeout.

        Raises:
            CollectiveError: a rank got stuck for that long, or for longer than its `progress` allowed; or another is at
                other work.
            StopRequested: on rank 0, which does not wait once the job shall stop, and then on the others.
        """
        self.progress(what, within_seconds=at_most_seconds)
        yield
        if self.world_size > 1:
            self._meet(what)
        self.progress(f"what follows {what!r}")

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
                atexit.register(watch.exit_now, cause.exit_code)
            if cause.is_own(self.rank):
                raise
            is_echo = isinstance(error, (CollectiveError, RankFailure, UserError))
            raise cause.as_exception() from (None if is_echo else error)

    def close(self) -> None:
        """Leave the job. Rank 0 leaves last, as the store may live in its process. Safe to call after a failure."""
        if self._watch is None:
            return
        watched, self._watch = self._watch, None
        in_order = watched.failure is None and not watched.has_reported
        stopped, code = self._stopped or watched.has_stopped, watch.INTERRUPTED if watched.goes_on else 0
        if in_order and self.is_main and stopped:
            self._store.set("saved", "")
        if in_order and not self.is_main:
            watched.say_goodbye()
        elif in_order and stopped:  # torchrun may end this process soon: it does not wait for ranks that have died
            watched.wait_for_goodbyes(2 * watch.POLL_SECONDS + watch.GRACE_SECONDS)
        elif in_order:
            watched.wait_for_goodbyes()
        if self.device.type == "cuda" and stopped and in_order:
            # Others may have been ended inside a collective, which NCCL waits for.
            atexit.register(watch.exit_now, code)
        elif dist.is_initialized() and (in_order or self.device.type == "cpu"):
            dist.destroy_process_group()
        watched.leave()

    def _gather_rows(self, payload: Tensor, row_bytes: int, signature: str) -> list[Tensor]:
        """uint8 [n, row_bytes] of every rank, n differing; `signature` must not differ."""
        with self.collective("all_gather"):
            digest = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:7], "big")
            header = torch.tensor([[payload.shape[0], digest]], device=self.device)
            counts, digests = self._gather_equal(header).cpu().unbind(dim=1)
            if (digests != digest).any():
                other = int((digests != digest).nonzero()[0])
                raise ValueError(
                    f"all_gather: rank {other} passed another dtype or shape than rank {self.rank}: {signature}"
                )
            padded = torch.zeros(int(counts.max()), row_bytes, dtype=torch.uint8, device=self.device)
            padded[: payload.shape[0]] = payload
            gathered = self._gather_equal(padded).view(self.world_size, *padded.shape)
        return [rows[: int(count)] for rows, count in zip(gathered, counts)]

    def _gather_equal(self, rows: Tensor) -> Tensor:
        """[n, ...] of every rank, as many on each, in one collective: [ranks * n, ...]."""
        gathered = rows.new_zeros(self.world_size * rows.shape[0], *rows.shape[1:])
        if rows.numel():
            dist.all_gather_into_tensor(gathered, rows)
        return gathered

    @contextmanager
    def collective(self, name: str, *, of_all: bool = True) -> Iterator[None]:
        """Around a collective, this class's own or another library's, called by all ranks in the same order.

        Args:
            of_all: False: some ranks alone take part, so that it is no place that all of them pass.

        Raises:
            CollectiveError, StopRequested: in place of what a process group raises.
        """
        watched = self._watch
        if watched.failure is not None:
            raise watched.failure.as_exception()
        watched.note.place += of_all
        try:
            yield
        except (CollectiveError, RankFailure):
            raise
        except RuntimeError as error:
            if watched.has_stopped:  # rank 0 has left in order, and its connections with it
                raise StopRequested(watched.stop_reason) from None
            raise CollectiveError(f"{name} failed on rank {self.rank}: {error}") from error

    def _meet(self, what: str) -> None:
        """A barrier through the store, without the process group's timeout; ends when no missing rank moves on."""
        with self.collective(f"meeting {what!r}"):
            place = self._watch.note.place
            key = f"meeting/{place}"
            theirs = self._store.compare_set(f"{key}/what", "", what).decode()
            if theirs != what:
                raise CollectiveError(f"rank {self.rank} finished {what!r} while another finished {theirs!r}")
            if self._store.add(key, 1) == self.world_size:
                self._store.set(f"{key}/all", "")
            else:
                self._wait_for_the_others(f"{key}/all", place, what)
            if self.is_main and self._last_meeting:  # everybody has left the meeting before this one
                for part in ("", "/what", "/all"):
                    self._store.delete_key(f"{self._last_meeting}{part}")
            self._last_meeting = key

    def _wait_for_the_others(self, everybody_is_here: str, place: int, what: str) -> None:
        """Asleep in the store, which the last one's key wakes: a thousand ranks that ask again and again would be most
        of its work."""
        began = said = time.monotonic()
        seen: dict[int, tuple[tuple[int, int], float]] = {}
        while not watch.all_come(self._store, [everybody_is_here], watch.POLL_SECONDS):
            if self._watch.failure is not None:
                raise self._watch.failure.as_exception()
            if self._watch.has_stopped:
                raise StopRequested(self._watch.stop_reason)
            self._stop_here()
            stuck = self._watch.late(place, began, seen)
            if stuck:
                raise CollectiveError(f"meeting {what!r}: {stuck}")
            now = time.monotonic()
            if now - said > _SAY_WHO_IS_LATE_SECONDS:
                said = now
                if late := self._watch.waited_for(place):
                    watch.tell(self.rank, f"{what}: {now - began:.0f} s waiting for {late}")


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


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name shared by the processes that start together, and by none before them; all are there when it returns.

    torchrun's store outlives an attempt, and with it the keys of processes that are gone. TORCHELASTIC_RESTART_COUNT
    does not tell attempts apart: an agent counts its own failures only, so after one the machines of a job disagree.
    Hence a handshake: each process leaves a fresh token, rank 0 answers every token it finds with the attempt's name,
    and the answer to one's own token cannot be old.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + START_SECONDS
    if rank == 0:
        _welcome(store, own, range(1, world_size), deadline)
        return own
    store.set(f"hello/{rank}", own)
    while not watch.all_come(store, [f"welcome/{own}"], watch.POLL_SECONDS):
        _check_start(deadline)
    attempt = store.get(f"welcome/{own}").decode()
    store.set(f"{attempt}/here/{rank}", "")
    return attempt


def _welcome(store: dist.Store, attempt: str, ranks: Sequence[int], deadline: float) -> None:
    """Answer all ranks' newest tokens until all have said, in the attempt's name, that they have read the answer.

    A round asks the store for all ranks at once, four requests for however many: one that has left an old token, or
    comes again with another, costs one more round, and not of its own.
    """
    tokens, here = ([f"{kind}/{rank}" for rank in ranks] for kind in ("hello", f"{attempt}/here"))
    patience = _FIRST_PATIENCE_SECONDS
    while True:
        if watch.all_come(store, tokens, watch.POLL_SECONDS):
            answers = [f"welcome/{token.decode()}" for token in store.multi_get(tokens)]
            store.multi_set(answers, [attempt] * len(answers))
            if watch.all_come(store, here, patience):
                return
            patience = min(2 * patience, watch.POLL_SECONDS)
        _check_start(deadline)


def _check_start(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"not all processes of the job came up within {START_SECONDS:.0f} s; see the others' logs")


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(payload: Tensor) -> Any:
    return json.loads(bytes(payload.reshape(-1).tolist()))
