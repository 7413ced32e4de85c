"""What runs on a machine of a fault's job, in forks of tests/zygote.py: the meeting place, torchrun's agent, a worker.

The agent is torchrun's own (`elastic_launch`), but that its workers are forks, which saves the seconds of their
imports. As with torchrun's command a worker outlives an agent that is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advgrpo.runtime import watch
from advgrpo.train import main as train
from advgrpo.training.policy_gradient import PolicyGradient

_CLONE_NEWNET, _CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x40000000, 0x20000, 0x1000, 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
COLLECTIVE_TIMEOUT = 8.0
# A fraction of the defaults, or a schedule would take minutes; torchrun's own are in RENDEZVOUS.
LIMITS = {"POLL_SECONDS": 0.3, "SILENCE_SECONDS": 6.0, "BEHIND_SECONDS": 2.0, "GRACE_SECONDS": 2.0, "SAVE_SECONDS": 4.0,
          "LINGER_SECONDS": 2.0}  # fmt: skip
RENDEZVOUS = {"is_host": "false", "last_call_timeout": 6, "join_timeout": 600, "close_timeout": 5, "heartbeat": 3,
              "keep_alive_interval": 2, "keep_alive_max_attempt": 4, "read_timeout": 10}  # fmt: skip
SHUTDOWN_SECONDS = 6


@dataclass(frozen=True)
class Place:
    """Where a process is, and whom it meets."""

    machine: int
    namespace: str  # a file for setns; "" on loopback
    interface: str
    address: str
    endpoint: str  # of the meeting place, HOST:PORT
    hosts: str = ""  # what stands for /etc/hosts in a namespace
    first: bool = False  # its processes run before whatever else the computer does

    def enter(self) -> None:
        """This process and its children are on that machine from now on."""
        if self.first:
            _run_first()
        if self.namespace:
            descriptor = os.open(self.namespace, os.O_RDONLY)
            _system("setns", descriptor, _CLONE_NEWNET)
            os.close(descriptor)
            # There is no name server, and to find that out takes seconds: names are in a file, and the server is here.
            _system("unshare", _CLONE_NEWNS)
            _system("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            _system("mount", self.hosts.encode(), b"/etc/hosts", None, _MS_BIND, None)
            _system("mount", b"/dev/null", b"/etc/resolv.conf", None, _MS_BIND, None)
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface


@contextmanager
def before_others() -> Iterator[None]:
    """This thread, and all that it starts within, runs before whatever else the computer does, which real machines
    would not wait for: with the limits above, a few seconds without a core are taken for death. Nothing where that is
    not allowed (CAP_SYS_NICE)."""
    usual, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    _run_first()
    try:
        yield
    finally:
        os.sched_setscheduler(0, usual, parameters)


def _run_first() -> None:
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _system(call: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), call)(*arguments):
        raise OSError(ctypes.get_errno(), call)


def meeting_place(arguments: list[str]) -> int:
    """[Place]: the store of the rendezvous, on a machine that trains nothing."""
    from torch.distributed import TCPStore

    place = Place(**json.loads(arguments[0]))
    place.enter()
    host, port = place.endpoint.split(":")
    store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    print("here", flush=True)
    signal.pause()
    del store
    return 0


def agent(arguments: list[str]) -> int:
    """[Place, MIN:MAX, restarts, trace, pace, *flags of the training]: torchrun on one machine."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    described, nodes, restarts, *rest = arguments
    place = Place(**json.loads(described))
    place.enter()
    # Or a machine that has met another process 0 before waits for that one's store (docs/clusters.md).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    least, most = map(int, nodes.split(":"))
    config = LaunchConfig(
        min_nodes=least, max_nodes=most, nproc_per_node=1, max_restarts=int(restarts), run_id="faults",
        rdzv_backend="c10d", rdzv_endpoint=place.endpoint, rdzv_configs=dict(RENDEZVOUS), local_addr=place.address,
        start_method="fork", monitor_interval=0.1, shutdown_timeout=SHUTDOWN_SECONDS,
    )  # fmt: skip
    # Events that nobody records: each looks through all modules, of which the trainer's fork has thousands.
    dynamic_rendezvous.construct_and_record_rdzv_event = lambda **_event: None
    # Of every start after the first one: torchrun's flag is for the last.
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, SHUTDOWN_SECONDS)
    try:
        elastic_launch(config, worker)(place.machine, *rest)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def worker(machine: int, trace: str, pace: str, *flags: str) -> None:
    """One process of the training, which takes `pace` seconds longer for every iteration and leaves a trace."""
    # What torchrun's command, which starts programs, does not hand on and torch's forks do.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    for name, seconds in LIMITS.items():
        setattr(watch, name, seconds)
    rollout = PolicyGradient.rollout

    def traced(objective: Any, table: Any, iteration: int, *chosen: Any) -> Any:
        begun = Begun(
            time.time(), machine, os.getpid(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), iteration
        )
        begun.write(Path(trace))
        time.sleep(float(pace))
        return rollout(objective, table, iteration, *chosen)

    PolicyGradient.rollout = traced
    sys.exit(train(list(flags)))


@dataclass(frozen=True)
class Begun:
    """A worker begins an iteration: a line of TRACE."""

    at: float  # time.time
    machine: int
    pid: int
    rank: int
    world_size: int
    iteration: int

    def write(self, trace: Path) -> None:
        with trace.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(trace: Path) -> list[Begun]:
        """All lines so far."""
        text = trace.read_text() if trace.exists() else ""
        return [Begun(**json.loads(line)) for line in text.splitlines() if line.endswith("}")]
