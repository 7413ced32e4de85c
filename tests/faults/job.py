"""A job of several machines on this one, what is done to it, and what became of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.machine import Begun, Place
from tests.faults.network import Network
from tests.faults.schedule import LONG, MACHINES, SHORT, Fault, Schedule
from tests.zygote import ROOT, Forked

PACE = 0.7  # seconds that an iteration takes longer, asleep: most blows fall there, between two collectives
LEAST, RESTARTS = 1, 10  # machines that are enough
POOR_DELAY, POOR_LOSS = 0.02, 0.01
_POLL = 0.05


class JobError(Exception):
    """The job did not come to its end; the message has what it printed."""


@dataclass
class Outcome:
    """What became of a job."""

    seed: int
    faults: list[Fault]
    ended: bool = False
    seconds: float = 0.0
    lost: list[int] = field(default_factory=list)  # iterations that were begun again, at every new start
    waits: list[float] = field(default_factory=list)  # seconds from every blow to the next iteration that begins
    sizes: list[int] = field(default_factory=list)  # world size of every iteration that counted
    hit: list[bool] = field(default_factory=list)  # whether the machine of each blow was at work in the job
    error: str = ""


class Job:
    """One training on `MACHINES` machines and one more, on which they meet. To be used in a `with`.

    Args:
        flags: of the training.
        folder: for its files.
        network: None: all on loopback.
        first: its processes run before whatever else the computer does.
    """

    def __init__(self, flags: list[str], folder: Path, network: Network | None, *, first: bool, pace: float = PACE):
        self._flags, self._folder, self._network, self._first, self._pace = flags, folder, network, first, pace
        self.trace = folder / "trace.jsonl"
        self._endpoint = f"{self._address(MACHINES)}:{29400 if network else _free_port()}"
        self._processes: dict[int, list[Forked]] = {machine: [] for machine in range(MACHINES)}
        self._gone: set[int] = set()
        self._started: set[int] = set()  # processes of the machines that were seen
        self._hosts = folder / "hosts"
        names = [f"{self._address(machine)} machine{machine}\n" for machine in range(MACHINES + 1)]
        # torchrun looks its own name up at every event
        self._hosts.write_text("".join([f"127.0.0.1 localhost {socket.gethostname()}\n", *names]))
        self._head = self._fork("meeting_place", MACHINES, [])

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_error: object) -> None:
        (self._folder / "log").write_text(self.said(1_000_000))
        agents = [self._head, *itertools.chain(*self._processes.values())]
        running = {each.pid for each in agents if each.poll() is None}
        orphans = {each.pid for each in self.begun()} | self._started
        _signal_all(running | {child for pid in running for child in children(pid)} | orphans, signal.SIGKILL)

    def begun(self) -> list[Begun]:
        return Begun.read(self.trace)

    def start(self, machine: int) -> None:
        """torchrun's agent on a machine, also again."""
        arguments = [f"{LEAST}:{MACHINES}", str(RESTARTS), str(self.trace), str(self._pace), *self._flags]
        self._processes[machine].append(self._fork("agent", machine, arguments))
        self._gone.discard(machine)

    def ended(self) -> bool:
        """Whether the run is done: a machine has ended well, and the run's summary is there. Others, which wait for one
        that is gone or came when all was done, are a scheduler's to end.

        Raises:
            JobError: no machine goes on, and the run is not done.
        """
        codes = {machine: processes[-1].poll() for machine, processes in self._processes.items() if processes}
        if 0 in codes.values() and (self._folder / "run" / "summary.json").exists():
            return True
        if codes and all(code is not None for machine, code in codes.items() if machine not in self._gone):
            raise JobError(f"exit codes of the machines: {codes}\n{self.said()}")
        return False

    def said(self, most: int = 6000) -> str:
        """The end of what each machine printed."""
        texts = [f"--- machine {m}:\n{p.said()[-most:]}" for m, all_of in self._processes.items() for p in all_of]
        return "\n".join(texts)

    def strike(self, fault: Fault) -> list[tuple[float, Callable[[], None]]]:
        """Do it; what is to be done later about it, and in how many seconds."""
        what, _, how = fault.kind.partition(" ")
        network, machine = self._network, fault.machine
        if fault.kind == "machine joins late":
            self.start(machine)
            return []
        if fault.kind.startswith("cut off"):
            network.cut.add(machine)
            if fault.kind == "cut off":
                self._gone.add(machine)
                return []
            return [(SHORT if how.endswith("briefly") else LONG, lambda: network.cut.discard(machine))]
        pids = self._victims(what if what in ("worker", "agent") else "machine", machine)
        if how in ("frozen", "paused"):
            _signal_all(pids, signal.SIGSTOP)
            return [(LONG if how == "frozen" else SHORT, lambda: _signal_all(pids, signal.SIGCONT))]
        _signal_all(pids, signal.SIGKILL)
        if fault.kind in ("worker killed", "poor network"):
            return []
        self._gone.add(machine)
        return [(LONG / 2, lambda: self.start(machine))] if how != "lost" else []

    def _victims(self, what: str, machine: int) -> list[int]:
        agent = self._processes[machine][-1].pid
        workers = children(agent)
        self._started.update(workers)
        return {"worker": workers, "agent": [agent], "machine": [agent, *workers]}[what]

    def _fork(self, what: str, machine: int, arguments: list[str]) -> Forked:
        network = self._network
        place = Place(
            machine=machine, address=self._address(machine), endpoint=self._endpoint,
            namespace=network.namespace(machine) if network else "",
            interface=network.interface(machine) if network else "lo", hosts=str(self._hosts),
            first=self._first,
        )  # fmt: skip
        entry, described = f"tests.faults.machine:{what}", json.dumps(asdict(place))
        return Forked(entry, [described, *arguments], environment=environment(), merged=True)

    def _address(self, machine: int) -> str:
        return self._network.address(machine) if self._network else "127.0.0.1"


def run_under(
    schedule: Schedule, flags: list[str], folder: Path, network: Network | None, *, first: bool, limit: float = 150.0
) -> Outcome:
    """A job that writes to `folder`/run under a schedule, to its end or to the end of `limit` seconds."""
    flags = [*flags, "--output-dir", str(folder / "run")]
    outcome, began = Outcome(schedule.seed, list(schedule.faults)), time.monotonic()
    if any(fault.kind == "poor network" for fault in schedule.faults):
        network.delay, network.loss = POOR_DELAY, POOR_LOSS
    late = [fault.machine for fault in schedule.faults if fault.kind == "machine joins late"]
    with Job(flags, folder, network, first=first) as job:
        for machine in range(MACHINES):
            if machine not in late:
                job.start(machine)
        try:
            _drive(job, schedule, outcome, began + limit)
            outcome.ended = True
        except JobError as error:
            outcome.error = str(error)
        history = History(job.begun())
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.lost, outcome.sizes = history.lost(), history.sizes()
    outcome.error = outcome.error or history.overlap()
    return outcome


def _drive(job: Job, schedule: Schedule, outcome: Outcome, deadline: float) -> None:
    """Strike when it is time, until the job has ended."""
    to_come = list(schedule.faults)
    later: list[tuple[float, Callable[[], None]]] = []
    waiting: Blow | None = None
    while not job.ended():
        now, begun = time.monotonic(), job.begun()
        if now > deadline:
            raise JobError(f"not done in time; begun last: {begun[-4:]}\n{job.said()}")
        if waiting and (gone_on := waiting.over(begun)):
            outcome.waits.append(round(gone_on, 1))
            waiting = None
        if to_come and not (later or waiting) and _is_time(to_come[0], begun):
            fault = to_come.pop(0)
            waiting = Blow(time.time(), begun)
            outcome.hit.append(fault.machine in at_work(begun))
            later = [(now + seconds, action) for seconds, action in job.strike(fault)]
        for due in [each for each in later if each[0] <= now]:
            due[1]()
            later.remove(due)
        time.sleep(_POLL)


def _is_time(fault: Fault, begun: list[Begun]) -> bool:
    times = [each.at for each in begun if each.iteration >= fault.iteration]
    return bool(times) and time.time() - min(times) >= fault.after


def at_work(begun: list[Begun]) -> set[int]:
    """The machines of the newest start of the job."""
    newest = max(begun, key=lambda each: each.at)
    return {each.machine for each in begun[-newest.world_size :]}


class Blow:
    """A fault that has just struck, and when the job goes on after it."""

    def __init__(self, at: float, begun: list[Begun]):
        self._at, self._pids = at, {each.pid for each in begun}
        self._under_way = max(each.iteration for each in begun)

    def over(self, begun: list[Begun]) -> float | None:
        """Seconds until process 0 began another iteration, or in another process the same; None before that."""
        for each in begun:
            new = each.iteration > self._under_way or each.pid not in self._pids
            if each.rank == 0 and each.at > self._at and new:
                return each.at - self._at
        return None


class History:
    """What process 0 of every start of a job has begun, in the order of time."""

    def __init__(self, begun: list[Begun]):
        rows = sorted((each for each in begun if each.rank == 0), key=lambda each: each.at)
        self._starts = [list(group) for _, group in itertools.groupby(rows, key=lambda each: each.pid)]

    def lost(self) -> list[int]:
        """How many iterations that had been begun each new start began again."""
        furthest = itertools.accumulate((start[-1].iteration for start in self._starts), max)
        return [before - start[0].iteration + 1 for before, start in zip(furthest, self._starts[1:])]

    def sizes(self) -> list[int]:
        """By iteration: how many processes it had when it was begun last."""
        counted = {each.iteration: each.world_size for start in self._starts for each in start}
        return [counted[iteration] for iteration in sorted(counted)]

    def overlap(self) -> str:
        """What is wrong where two starts of the job were at work at a time; "" where none were."""
        pids = [start[0].pid for start in self._starts]
        return "" if len(pids) == len(set(pids)) else f"two process 0 at work at a time: {self._starts}"


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are there."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def environment() -> dict[str, str]:
    """Of every process of a job."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _signal_all(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
