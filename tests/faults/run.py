"""Jobs on up to three machines that fail as seeds say, compared with runs that nothing happens to.

    python -m tests.faults.run                        those of schedules 0 to 49 that are not in results.json, into it
    python -m tests.faults.run --seeds 7 8            these, anew where they are there
    python -m tests.faults.run --no-network --keep DIR

Each machine is a network namespace with torchrun's agent in it and one process of a training of seconds; a fourth is
where they meet. Without root, or with --no-network, all are on loopback, and nothing is done to the network.
What became of each schedule is kept at once in results.json: a command that was ended goes on where it is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.checkpoint import checkpoints, iteration_of
from advgrpo.training.resuming import SUMMARY_FILE
from tests.faults import job
from tests.faults.machine import before_others
from tests.faults.network import Network, missing
from tests.faults.schedule import ITERATIONS, MACHINES, Schedule
from tests.faults.world import make_world
from tests.zygote import run as run_forked

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
SCHEDULES = 50
MARK = "<!-- python -m tests.faults.run --write -->"
LORA = Path("lora") / "pytorch_lora_weights.safetensors"
# Of a LoRA's norm, and of an iteration's mean reward: sums over other numbers of processes round otherwise (6e-8 in
# results.json). A run that lacks one of the five iterations is 1e-3 of the norm away.
TOLERANCE = 1e-5
ALL = (MACHINES,) * ITERATIONS  # processes, by iteration, of a job whose machines are all there


class Undisturbed:
    """Runs that nothing happens to, each made when it is first asked for; for several threads.

    Args:
        flags: of the training.
        folder: for the runs.
    """

    def __init__(self, flags: list[str], folder: Path):
        self._flags, self._folder = flags, folder / "undisturbed"
        self._one, self._made = threading.Lock(), dict[tuple[int, ...], Path]()

    def by(self, sizes: Sequence[int]) -> Path:
        """The run whose iterations so many processes do: it ends where their number changes, and the others go on.

        Raises:
            JobError: one of its parts failed.
        """
        with self._one:
            return self._by(tuple(sizes))

    def _by(self, sizes: tuple[int, ...]) -> Path:
        if sizes in self._made:
            return self._made[sizes]
        output = self._folder / "-".join(map(str, sizes))
        shutil.rmtree(output, ignore_errors=True)  # of another command, with --keep
        same = len(list(itertools.takewhile(lambda size: size == sizes[-1], reversed(sizes))))
        done = len(sizes) - same
        if done:
            shutil.copytree(self._by((*sizes[:done], *sizes[done - 1 : done] * same)), output)
            (output / SUMMARY_FILE).unlink()
            for each in checkpoints(output / "checkpoints"):
                if iteration_of(each) > done:
                    shutil.rmtree(each)
        # On a busy computer they may wait: nobody is to be found dead.
        arguments = [*self._flags, "--output-dir", str(output), "--collective-timeout", "300"]
        how = {"processes": sizes[-1], "environment": job.environment(), "merged": True}
        ended = run_forked("advgrpo.train:main", arguments, **how)
        if ended.returncode:
            raise job.JobError(ended.stdout)
        self._made[sizes] = output
        return output


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two runs have the same LoRA, metrics, and newest checkpoint, to the bit."""

    def content(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        tensors = load_file(run / LORA) | load_file(checkpoints(run / "checkpoints")[-1] / "tensors.safetensors")
        return [{name: value for name, value in row.items() if "second" not in name} for row in rows], tensors

    (rows, tensors), (other_rows, others) = content(ours), content(theirs)
    alike = tensors.keys() == others.keys() and all(torch.equal(each, others[name]) for name, each in tensors.items())
    return alike and rows == other_rows


def difference(ours: Path, theirs: Path) -> float:
    """Norm of the difference of two runs' LoRAs over the norm of the second; 0 where they are the same bits."""
    mine, other = load_file(ours / LORA), load_file(theirs / LORA)
    apart = sum(float((mine[name].double() - other[name].double()).square().sum()) for name in other)
    return (apart / sum(float(each.double().square().sum()) for each in other.values())) ** 0.5


def rewards_apart(ours: Path, theirs: Path) -> float:
    """Largest difference of an iteration's mean reward between two runs; infinite where iterations are missing."""
    mine, other = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (ours, theirs))
    if [row["iteration"] for row in mine] != [row["iteration"] for row in other]:
        return float("inf")
    return max(abs(a["reward_generated"] - b["reward_generated"]) for a, b in zip(mine, other))


def one(
    schedule: Schedule, flags: list[str], folder: Path, undisturbed: Undisturbed, *, network: bool, first: bool = False
) -> dict:
    """What became of a schedule, as results.json has it.

    Args:
        flags: of the training, as those of `undisturbed`.
        first: before whatever else the computer does, where that is allowed: for a busy computer, and not beside
            tests that cannot wait.
    """
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as around:
        if first:
            around.enter_context(before_others())  # the switch, and who strikes
        wires = around.enter_context(Network(MACHINES + 1, schedule.seed)) if network else None
        outcome = job.run_under(schedule, flags, folder, wires, first=first)
    found = asdict(outcome) | {"error": outcome.error[:20_000]}
    if outcome.ended:
        found["same_bits"] = same_bits(folder / "run", undisturbed.by(outcome.sizes))
        found["lora_apart"] = difference(folder / "run", undisturbed.by(ALL))
        found["rewards_apart"] = rewards_apart(folder / "run", undisturbed.by(ALL))
    return found


def passed(found: dict) -> bool:
    """Ended, with the bits of the undisturbed run by as many processes in every iteration and up to rounding those of
    the one by all, and at most one iteration was done twice for a blow."""
    return (
        found["ended"]
        and not found["error"]
        and found["same_bits"]
        and found["lora_apart"] <= TOLERANCE
        and found["rewards_apart"] <= TOLERANCE
        and max(found["lost"], default=0) <= 1
    )


_BITS = {True: "the same", False: "**others**", None: "–"}


def lines(results: dict[str, dict]) -> Iterator[str]:
    """The page's table, as Markdown."""
    columns = ("seed", "blow (was that machine at work?)", "passed", "iterations done again", "s to go on", "processes",
               "bits")  # fmt: skip
    yield f"| {' | '.join(columns)} | LoRA apart |"
    yield f"|{'---|' * (len(columns) + 1)}"
    for seed, found in sorted(results.items(), key=lambda each: int(each[0])):
        hits = itertools.zip_longest(found["faults"], found["hit"])  # a job that failed may not have got all its blows
        blows = [f"{fault['kind']} ({'yes' if hit else 'no'})" for fault, hit in hits]
        apart = f"{found['lora_apart']:.1e}" if found["ended"] else "–"
        waits = ", ".join(f"{wait:.0f}" for wait in found["waits"]) or "–"
        lost = ", ".join(map(str, found["lost"])) or "none"
        yield (
            f"| {seed} | {'; '.join(blows)} | {'yes' if found['passed'] else '**no**'} | {lost} | {waits} | "
            f"{' '.join(map(str, found['sizes']))} | {_BITS[found.get('same_bits')]} | {apart} |"
        )


def missing_seeds(results: Mapping[str, dict]) -> list[int]:
    """Of the schedules that are asked for, those that are not among the results."""
    return [seed for seed in range(SCHEDULES) if str(seed) not in results]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: those that were not run")
    parser.add_argument("--no-network", action="store_true", help="all machines on loopback")
    parser.add_argument("--keep", type=Path, help="folder for the runs' files; else they are deleted")
    parser.add_argument(
        "--write", action="store_true", help=f"run nothing; write {PAGE.name}'s table from results.json"
    )
    args = parser.parse_args(argv)
    if args.write:
        above = PAGE.read_text(encoding="utf-8").split(MARK)[0]
        PAGE.write_text(
            "\n".join([f"{above}{MARK}", "", *lines(json.loads(RESULTS.read_text())), ""]), encoding="utf-8"
        )
        return 0
    torch.set_num_threads(1)
    why = "asked for" if args.no_network else missing()
    if why:
        print(f"machines on loopback, nothing happens to the network: {why}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    seeds = args.seeds or missing_seeds(results)
    done = SCHEDULES - len(missing_seeds(results))
    print(f"{len(seeds)} of {SCHEDULES} schedules to run, {done} in {RESULTS.name}", flush=True)
    if not seeds:
        return 0
    folder = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    flags = make_world(folder)
    undisturbed = Undisturbed(flags, folder)
    failed = []
    for seed in seeds:
        schedule = Schedule.draw(seed, network=not why)
        shutil.rmtree(folder / str(seed), ignore_errors=True)  # of a command that was ended, with --keep
        found = one(schedule, flags, folder / str(seed), undisturbed, network=not why, first=True)
        results[str(seed)] = found | {"network": not why, "passed": passed(found)}
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
        failed += [seed] * (not passed(found))
        kinds = " and ".join(f"{fault.kind} ({fault.machine})" for fault in schedule.faults)
        said = "passed" if passed(found) else "FAILED"
        print(f"{seed}: {kinds}: {said}, {found['seconds']} s, lost {found['lost']}, "
              f"processes {found['sizes']}, same bits {found.get('same_bits')}, "
              f"apart {found.get('lora_apart')}", flush=True)  # fmt: skip
    if args.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
