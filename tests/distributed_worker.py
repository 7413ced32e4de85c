"""The jobs that test_distributed.py starts.

`torchrun distributed_worker.py SCENARIO FOLDER` is one rank of one job. `python distributed_worker.py --torchrun ...`
is torchrun that leaves processes `TORCHRUN_SECONDS` between SIGTERM and SIGKILL, instead of 30.
`python distributed_worker.py --fork FOLDER SCENARIO ...` runs several jobs of two ranks at once, with one import of
torch and without torchrun, which would end a job's other ranks itself as soon as one ends. Rank r's standard error goes
to FOLDER/SCENARIO.r.stderr, its exit code to FOLDER/SCENARIO.r.code.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from advgrpo.errors import UserError
from advgrpo.runtime import watch
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import StopRequested

# The scenarios wait for these limits to pass; the defaults would take half a minute each.
watch.POLL_SECONDS = 0.2
watch.SILENCE_SECONDS = 5.0
watch.BEHIND_SECONDS = 2.0
watch.GRACE_SECONDS = 2.0
watch.SAVE_SECONDS = 4.0
TIMEOUT_SECONDS = 3.0
TORCHRUN_SECONDS = 5.0


def collectives(job: Distributed, folder: Path) -> None:
    """Every collective once; each rank writes what it got, rank 0 also as tensors."""
    rank = job.rank
    result = {"place": [rank, job.world_size, str(job.device), job.is_main]}
    rows = torch.arange(3 * (rank + 1), dtype=torch.float64).view(rank + 1, 3) + 100 * rank
    result["all_gather"] = job.all_gather(rows).tolist()
    result["bfloat16"] = job.all_gather(torch.full((2,), rank + 0.5).bfloat16()).float().tolist()
    result["bool"] = job.all_gather(torch.tensor([rank == 1])).tolist()
    result["empty"] = list(job.all_gather(torch.zeros(0, 2)).shape)
    result["some empty"] = job.all_gather(torch.full((rank, 2), 7)).tolist()
    tensors = [torch.full((2, 2), rank + 1.0).t(), torch.nn.Parameter(torch.tensor([0.5])), torch.ones(3).bfloat16()]
    job.all_reduce_sum(tensors)
    result["all_reduce"] = [tensor.tolist() for tensor in tensors]
    with job.temporary_group() as group:
        result["from rank 1"] = [part.decode() for part in job.from_rank(1, [b"ab" * rank, b"", b"c" * rank], group)]
    result["nothing from rank 1"] = [part.decode() for part in job.from_rank(1, [b"", b"ab"[rank * 2 :]])]
    result["json"] = job.gather_json({"rank": rank, "text": "ü" * rank})
    result["mismatch"] = mismatch(job)
    with job.monitored("slow start", at_most_seconds=60.0):
        time.sleep(4 * rank)  # longer than the collective timeout
    with job.monitored("ask a judge", at_most_seconds=TIMEOUT_SECONDS):
        for attempt in range(3 * rank):  # each short enough, all together not
            job.progress(f"attempt {attempt}", within_seconds=TIMEOUT_SECONDS)
            time.sleep(1.5)
    result["after"] = job.all_gather(torch.tensor([rank])).tolist()
    (folder / f"{rank}.json").write_text(json.dumps(result))


def mismatch(job: Distributed) -> str:
    try:
        job.all_gather(torch.zeros(1, 2 + job.rank))
    except ValueError as error:
        return str(error)
    return ""


def raises(job: Distributed, folder: Path) -> None:
    """Rank 1 fails while rank 0 waits for it in a collective."""
    if job.rank == 1:
        raise OSError("the image store is on fire")
    job.all_reduce_sum([torch.ones(1)])


def raises_beside_a_gather(job: Distributed, folder: Path) -> None:
    """Rank 1 fails after slow work, while rank 0 waits for longer than the timeout in another library's collective."""
    group = job.patient_group()
    if job.rank == 1:
        job.progress("a slow judge", within_seconds=60.0)
        time.sleep(TIMEOUT_SECONDS + 1.0)
        raise OSError("the image store is on fire")
    with job.collective("gathering"):
        dist.all_gather_into_tensor(torch.empty(2), torch.ones(1), group=group)


def restarts(job: Distributed, folder: Path) -> None:
    """The first attempt fails as `raises`; what it has left in the store is no news to the second."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raises(job, folder)
    with job.monitored("the second attempt"):
        pass
    (folder / f"{job.rank}.restarted").write_text(str(job.gather_json(job.rank)))


def user_error(job: Distributed, folder: Path) -> None:
    if job.rank == 1:
        raise UserError("prompts=none.txt does not exist")
    with job.monitored("load the prompts"):
        pass


def busy(job: Distributed, folder: Path) -> None:
    """Rank 1 fails while rank 0's main thread never looks, as if it waited inside NCCL."""
    if job.rank == 1:
        raise OSError("the image store is on fire")
    time.sleep(600)


def killed(job: Distributed, folder: Path) -> None:
    """Rank 1 dies without a word while rank 0 waits outside of the process group."""
    if job.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with job.monitored("nothing"):
        pass


def killed_in_a_collective(job: Distributed, folder: Path) -> None:
    """As `killed`, but rank 0 waits where the dead rank's connection is, and notices by that."""
    job.all_gather(torch.ones(1))
    job.progress("an example")
    if job.rank == 1:
        time.sleep(1.0)  # rank 0 is in the collective
        os.kill(os.getpid(), signal.SIGKILL)
    job.all_gather(torch.ones(1))


def hangs_for_nccl(job: Distributed, folder: Path) -> None:
    """As `hangs`, where the collective itself never notices."""
    job.progress("an example")
    if job.rank == 1:
        time.sleep(600)
    job._watch.note.place += 1  # as a collective that has begun
    time.sleep(600)


def saves_first(job: Distributed, folder: Path) -> None:
    """Rank 1 fails while rank 0's main thread is stuck: what is to be saved is saved, however long the grace is."""
    job.before_exit(lambda: print("saved", file=sys.stderr))
    busy(job, folder)


def cannot_save(job: Distributed, folder: Path) -> None:
    """As `saves_first`, but the disk hangs too."""
    job.before_exit(lambda: time.sleep(600))
    busy(job, folder)


def hangs(job: Distributed, folder: Path) -> None:
    """Rank 1 lives but never calls the collective."""
    job.progress("an example")
    if job.rank == 1:
        time.sleep(600)
    job.all_gather(torch.ones(1))


def stuck(job: Distributed, folder: Path) -> None:
    """Rank 1 lives but does not get on with work that takes ranks different times."""
    with job.monitored("score", at_most_seconds=2.0):
        if job.rank == 1:
            job.progress("reward ocr")
            time.sleep(600)


def stopped(job: Distributed, folder: Path) -> None:
    """SIGSTOP freezes rank 1, its watch included."""
    if job.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with job.monitored("nothing"):
        pass


def freezes(job: Distributed, folder: Path) -> None:
    """SIGSTOP under torchrun, which alone can end rank 1; rank 0's main thread never looks."""
    if job.rank == 1:
        (folder / "frozen").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def lingers(job: Distributed, folder: Path) -> None:
    """Rank 1's report is read by rank 0 before rank 1, and with torchrun the whole job, ends."""
    if job.rank == 1:
        raise OSError("the image store is on fire")
    watch.POLL_SECONDS = 1.5  # so that it is some time before rank 0 looks
    acknowledge = job._watch._acknowledge

    def read() -> None:  # before rank 1 is told so: by the main thread it could be later than rank 1's end
        print(f"read at {time.time()}", file=sys.stderr)
        acknowledge()

    job._watch._acknowledge = read
    while job._watch.failure is None:
        time.sleep(0.01)


def ends_early(job: Distributed, folder: Path) -> None:
    """Rank 1 asks for the end while it waits for rank 0, which comes to a place where it may stop."""
    watch.GRACE_SECONDS = 1.0  # rank 1 is ended before its collective times out
    try:
        if job.rank == 1:
            job.ask_to_stop("SIGTERM")
            job.all_reduce_sum([torch.ones(1)])
        for _ in job.stoppable(range(1000), "piece"):
            time.sleep(0.05)
    except StopRequested as reason:
        print(f"stopped: {reason}", file=sys.stderr)


def stops_while_waiting(job: Distributed, folder: Path) -> None:
    """Rank 0 is asked to stop while it waits for rank 1, which is at something long, on another machine."""
    os.environ |= {
        "GROUP_RANK": str(job.rank), "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "1"
    }  # fmt: skip
    try:
        if job.rank == 0:
            job.ask_to_stop("SIGTERM")
        with job.monitored("score", at_most_seconds=600.0):
            if job.rank == 1:
                time.sleep(600)
    except StopRequested as reason:
        print(f"stopped: {reason}", file=sys.stderr)


def stops_without_a_goodbye(job: Distributed, folder: Path) -> None:
    """Rank 1 is dead when rank 0 stops in order: torchrun, which has noticed, gives it little time."""
    if job.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    try:
        job.ask_to_stop("SIGTERM")
        job.check_stop()
    except StopRequested as reason:
        print(f"stopped: {reason}", file=sys.stderr)
    began = time.monotonic()
    job.close()
    print(f"closed after {time.monotonic() - began:.1f} s", file=sys.stderr)


def early(job: Distributed, folder: Path) -> None:
    """Rank 0 is done long before rank 1, whose process needs the store that rank 0 hosts."""
    if job.rank == 1:
        time.sleep(2)
        job._store.add("still there", 1)
    print("done", file=sys.stderr)


def main(scenario: str, folder: str) -> int:
    job = Distributed.start("cpu", timeout_seconds=TIMEOUT_SECONDS)
    try:
        with job.guard():
            globals()[scenario](job, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    finally:
        print(f"left at {time.time()}", file=sys.stderr)
        job.close()
    return 0


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def become_a_rank(folder: str, scenarios: list[str]) -> str:
    """Fork every rank of every job. Returns in the ranks, with their scenario; the parent waits for them and exits."""
    ranks = {}
    for scenario in scenarios:
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
        for rank in range(2):
            path = f"{folder}/{scenario}.{rank}"
            pid = os.fork()
            if pid == 0:
                os.environ.update(job, RANK=str(rank), LOCAL_RANK=str(rank))
                os.dup2(os.open(f"{path}.stderr", os.O_WRONLY | os.O_CREAT), 2)
                return scenario
            ranks[pid] = path
        time.sleep(0.3)  # dozens of processes at once would not connect within the timeout
    while ranks:
        pid, status = os.wait()
        path = ranks.pop(pid)
        Path(f"{path}.code").write_text(str(os.waitstatus_to_exitcode(status)))
        if path.endswith("stopped.0"):  # as torchrun would: nothing but SIGKILL ends a stopped process
            os.kill(next(other for other, name in ranks.items() if name.endswith("stopped.1")), signal.SIGKILL)
    sys.exit(0)


def run_and_exit(scenario: str, folder: str) -> None:
    """As the interpreter would end, without its teardown, which takes dozens of forks of torch a minute."""
    try:
        code = main(scenario, folder)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    watch.exit_now(code)


def torchrun(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.run import main as run

    PContext.close.__defaults__ = (None, TORCHRUN_SECONDS)
    run(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "--torchrun":
        torchrun(sys.argv[2:])
        sys.exit(0)
    if sys.argv[1] == "--fork":
        run_and_exit(become_a_rank(sys.argv[2], sys.argv[3:]), sys.argv[2])
    sys.exit(main(*sys.argv[1:]))
