"""Ours against B1 and B0 on whole steps: `python -m bench.step [--size tiny|small|full] [--json FILE] [--png FILE]`.

Times sampler, adversary, update and the whole iteration of our trainer, of B1 (the best that can be assembled without
us) and of B0 (the released loop, `bench/baseline.py`), in one process, taking turns and with the same algorithm on all
sides: a noise per image for the three of them; then, as `..._shared`, one noise per prompt for ours and B1, which both
share a prompt's prefix. With that our update is captured in CUDA graphs, and `update_shared_eager` is it without them.
`..._fp8` has our ODE steps in FP8, and `..._fp8_everywhere` the window's steps and the update as well, forward and
backward; the others have neither. At full size ours decodes references in every iteration,
since each meets new prompts. A contender that does not compute what we do (`bench/parity.py`) is refused, not timed,
and the exit status is 1. Prints ours over B1 first, where the sampler's time goes (B0, then one change after the
other), and the goals with what this machine can say about them.

`--size tiny` is the shipped model with its weights; `--size full` is SD3.5-medium's exact configuration with random
weights: no downloads and no diffusers, but a GPU; `--size small` is a random model of seconds, for rehearsals. The unit
of all is one iteration of `bench/contenders.py`.

With `--seconds` it ends by itself: at first every measurement gets the three rounds that make a figure, in the order of
their worth (`ORDER`), then all get more, in turn, as long as there is time. Every entry says how many it got, and what
did not fit is named. `--json` is rewritten after every round, so a run that is cut off keeps what it has found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch

from advgrpo.config import merge
from advgrpo.policy.fused.attention import choose_attention
from advgrpo.runtime.streams import SideStream, Stream
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.scoring import Scored
from advgrpo.types import Rollout

from . import step_report, timing
from .baseline import B0, Baseline
from .budget import Budget, OutOfTime, Report
from .contenders import Contenders, random, small, tiny
from .parity import Check, check_adversary, check_sampler, check_update, tolerance
from .random_policy import FULL
from .step_report import Precision

SCHEMA = 4
REPEATS = {"cuda": 7, "cpu": 5}
FORWARD_TFLOP = 35.579400290304  # one B=16 forward of SD3.5-medium, counted (tests/policy/test_stock_model.py)
PEAK_TFLOP_S = 989  # dense bfloat16 of an H100 or H200, for MFU
SHARED = step_report.SHARED
ORDER = (
    "sampler",
    "iteration",
    "update",
    "adversary",
    "peak memory",
    "iteration_shared",
    "sampler_fp8",
    "FP8 forward",
    "update_shared",
    "iteration_fp8",
    "iteration_fp8_everywhere_shared",
    "sampler_shared",
    "iteration_fp8_shared",
    "update_fp8_everywhere_shared",
    "iteration_fp8_everywhere",
    "update_fp8_everywhere",
    "sampler_fp8_shared",
    "waterfall",
)
APART = 16  # iterations from where one of six trainers begins to where the next one does: no prompt is met twice


@dataclass(frozen=True)
class Unit:
    """One thing that all sides do, "ours", "b1" and "b0", and how much of it a call is."""

    sides: dict[str, Callable[[], object]]
    amount: float
    unit: str


def units(c: Contenders) -> dict[str, Unit]:
    """What is timed; rollouts that the others' adversary and update start from are made here, once."""
    sides: dict[str, dict[str, Callable[[], object]]] = {name: {"ours": run} for name, run in own_units(c).items()}
    for name, other in c.baselines.items():
        for unit, run in _their_units(c, other).items():
            sides[unit][name] = run
    return {
        name: Unit(own, *((1, "iterations/s") if name == "iteration" else (c.images, "images/s")))
        for name, own in sides.items()
    }


def own_units(c: Contenders) -> dict[str, Callable[[], object]]:
    """Ours of each unit. The rollout that adversary and update start from is made when one of them first runs."""
    ours, table = c.objective, c.table()

    @cache
    def drawn() -> tuple[Rollout, Scored]:
        rollout = ours.rollout(table, 0)
        return rollout, ours.scorer.score(rollout, 0)

    def adversary() -> object:
        rollout, _ = drawn()
        return ours.train_discriminator(rollout, ours.scorer.score(rollout, 0), 0)

    return {
        "sampler": lambda: ours.rollout(table, 0),
        "adversary": adversary,
        "update": lambda: ours.update(*drawn(), table, c.trainer.begin(0)),
        "iteration": c.trainer.iterate,
    }


def _their_units(c: Contenders, other: Baseline) -> dict[str, Callable[[], object]]:
    micro_batches = other.rollout(c.prompts, c.window)
    advantages = other.advantages(other.score(micro_batches)[2])

    def adversary() -> None:
        generated, reference, *_ = other.score(micro_batches)
        other.adversary(generated, reference, c.config.adversary.updates_per_iteration)
        other.remember(generated)

    return {
        "sampler": partial(other.rollout, c.prompts, c.window),
        "adversary": adversary,
        "update": partial(other.update, micro_batches, advantages),
        "iteration": partial(other.iteration, c.prompts, c.window),
    }


def eager_update(c: Contenders) -> Callable[[], object] | None:
    """Our update without its CUDA graphs; None where it has none."""
    ours, captured, table = c.objective, c.trainer.updater.captured, c.table()
    backend = captured.backend
    if backend is None:
        return None
    rollout = ours.rollout(table, 0)
    scored = ours.scorer.score(rollout, 0)

    def run() -> None:
        captured.backend = None
        try:
            ours.update(rollout, scored, table, c.trainer.begin(0))
        finally:
            captured.backend = backend

    return run


def verify(c: Contenders) -> dict[str, dict[str, Check]]:
    """Check of each unit against each of the others, by their names; the iteration stands on all of them."""
    checks: dict[str, dict[str, Check]] = {name: {} for name in step_report.UNITS}
    for side, other in c.baselines.items():
        for name, check in _verified(c, other).items():
            checks[name][side] = check
    return checks


def _verified(c: Contenders, other: Baseline) -> dict[str, Check]:
    allowed = tolerance(c.trainer.policy.dtype)
    checks = {}
    for name, check in (("sampler", check_sampler), ("adversary", check_adversary), ("update", check_update)):
        try:
            checks[name] = check(c, other, allowed)
        except Exception as error:  # a kernel that does not run here must not take the other figures with it
            traceback.print_exc()
            checks[name] = Check(float("inf"), allowed, f"{type(error).__name__}: {error}")
    failed = [name for name, check in checks.items() if not check.passed]
    checks["iteration"] = Check(float(len(failed)), 0.0, f"{', '.join(failed)} failed" if failed else "its parts agree")
    return checks


def figures(unit: Unit, times: dict[str, np.ndarray], wanted: int) -> dict[str, object]:
    """Rates, our ratios over the others with their intervals, and in how many of the wanted rounds."""
    entry: dict[str, object] = {name: unit.amount / (float(np.median(values)) * 1e-6) for name, values in times.items()}
    entry["unit"] = unit.unit
    for name in times.keys() - {"ours"}:
        entry[f"over_{name}"] = timing.as_json(timing.ratio(times[name], times["ours"]))
    for name, values in times.items():
        entry[f"{name}_seconds"] = timing.as_json(timing.summarise(values * 1e-6))
    return entry | {"rounds": len(times["ours"]), "rounds_wanted": wanted}


def sampler_with(
    c: Contenders, *, attention=None, graphs: bool, decode_stream: Stream | None = None
) -> Callable[[], Rollout]:
    """Our rollout with some of what makes it fast switched off, or decoding on another stream."""
    trainer, ours, own = c.trainer, c.objective, c.objective.sampler
    network = trainer.policy.network
    transformer = getattr(network, "transformer", network)  # of a FusedNetwork, or RandomPolicy's own
    chosen, table = transformer._attend, c.table()
    sampler = Sampler(
        trainer.policy,
        own.guidance_scale,
        own.likelihood,
        share_prefix=own.share_prefix,
        merged=True,
        graphs=own.graphs if graphs else None,
        shared_noise=own.shared_noise,
    )

    stream, other = ours.decode_stream, decode_stream or ours.decode_stream

    def run() -> Rollout:
        ours.sampler, ours.decode_stream, transformer._attend = sampler, other, attention or chosen
        try:
            return ours.rollout(table, 0)
        finally:
            ours.sampler, ours.decode_stream, transformer._attend = own, stream, chosen

    return run


def kept_by_graphs_gb() -> float:
    """GB of private pools beyond their live tensors: a replay allocates nothing there, so that no peak shows it."""
    pools = (each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) != (0, 0))
    return sum(each["total_size"] - each["allocated_size"] for each in pools) / 1e9


def _holder(precision: Precision) -> str:
    """The session's property that has ours in FP8, with a noise per image; with one per prompt `SHARED` follows."""
    return step_report.PRECISIONS[precision].removeprefix("_")


class Session:
    """A run: the contenders, how much time is left, and the report."""

    def __init__(self, size: str, device: str, repeats: int, options: argparse.Namespace, folder: Path) -> None:
        self.size, self.device, self.repeats, self.folder = size, device, repeats, folder
        self.options, self.budget = options, Budget(options.seconds)
        self.turns: dict[str, timing.Turns] = {}
        facts = timing.environment(device)
        print("  ".join(f"{name} {value}" for name, value in facts.items()))
        known = {"size": size, "seconds": options.seconds, "environment": facts}
        self.report = Report(options.json, schema=SCHEMA, **known, refused=[], left_out={}, failed={})
        torch.manual_seed(0)
        changes: dict[str, dict] = {}
        if options.attention:
            changes["model"] = {"attention": options.attention}
        changes["rollout"] = {"initial_noise": "per_image"}
        if options.prompts:
            changes["rollout"] |= {"prompts_per_iteration": options.prompts, "micro_batch": 8}
        if options.window:
            changes["rollout"]["window"] = {"steps": options.window}
        self.changes = changes
        builders = {"tiny": tiny, "small": small, "full": partial(random, size=FULL)}
        started = time.monotonic()
        self.c: Contenders = builders[size](folder, device, compiled=options.compile, **changes)
        self.shared = self.c.with_noise("shared")
        self.shared.trainer.iteration = APART
        self.building = time.monotonic() - started
        self.report.put("attention", self._attention_name())
        self.report.put("window", list(self.c.window))
        self.report.put("images", self.c.images)
        self.report.put("b1_compiled", self.c.baselines["b1"].recipe.compiled)

    def _attention_name(self) -> str:
        section = self.c.config.model
        return choose_attention(section.attention, self.c.device, self.c.trainer.policy.dtype)[0]

    def run(self, only: list[str]) -> Report:
        """Verify; then everything in the order of its worth, as few rounds as make a figure; then more of them."""
        self.checks = self._verify(only)
        self._attempt("on-policy", self._on_policy)
        parts: dict[str, Callable[[], None]] = {}
        for name in self.checks:
            if self._passed(name):
                parts[name] = partial(self._measure, name)
            else:
                print(step_report.unit_line(name, None, self.checks[name]))
        if "b0" in self._passed("sampler"):
            parts["waterfall"] = self._waterfall
        if self.device == "cuda":
            parts["peak memory"] = self._peak_memory
        if self.size == "full":
            parts["FP8 forward"] = self._fp8_forward
            for precision, name in self._in_fp8():
                if self._passed(name):
                    parts[step_report.in_precision(name, precision)] = partial(self._measure_fp8, name, precision)
        for name in ORDER:
            if name in parts:
                self._attempt(name, parts[name], self._expected(name))
                self._say(name)
        self._more_rounds()
        self._put("goals", step_report.goals(self.report))
        return self.report

    def _verify(self, only: list[str]) -> dict[str, dict[str, Check]]:
        """Checks of these units, of those with shared noise as well, into the report; what fails is refused."""
        found, shared = verify(self.c), verify(self.shared)
        checks = {name: found[name] for name in only}
        checks |= {f"{name}{SHARED}": shared[name] for name in only if name != "adversary"}  # which sees images alone
        self.report["parity"] = {
            unit: {side: vars(check) | {"passed": check.passed} for side, check in own.items()}
            for unit, own in checks.items()
        }
        failed = [(unit, side) for unit, own in checks.items() for side, check in own.items() if not check.passed]
        self.report.put("refused", [f"{unit} of {side}" for unit, side in failed])
        return checks

    def _passed(self, name: str) -> list[str]:
        """Whom our side of a unit is timed with."""
        return [side for side, check in self.checks.get(name, {}).items() if check.passed]

    def _attempt(self, name: str, part: Callable[[], None], expected: float = 0.0) -> None:
        """Run `part`; what it cannot do is said, and does not take the others with it."""
        try:
            left = self.budget.left
            if expected > left or not left:
                raise OutOfTime(f"about {expected:.0f} s do not fit in the {left:.0f} s that are left")
            part()
        except OutOfTime as error:
            print(f"{name:10} left out: {error}")
            self.report["left_out"][name] = str(error)
        except Exception as error:  # kept in the report; the exit status tells
            traceback.print_exc()
            self.report["failed"][name] = f"{type(error).__name__}: {error}"
            self.turns.pop(name, None)
        self._put("goals", step_report.goals(self.report))

    def _expected(self, name: str) -> float:
        """Seconds until `name` has its first figure, as far as what was timed before tells; 0 where nothing does."""

        def seconds(unit: str, *sides: str) -> float:  # one call of each side
            entry = self.report.get(unit, {})
            timed = [entry.get(f"{side}_seconds") for side in sides or step_report.SIDES]
            return sum(each["median"] for each in timed if each)

        sampler, rows = seconds("sampler"), 7 / 3  # the waterfall's rows lie between ours and B0
        building = {each: 0.0 if _holder(each) in vars(self) else self.building for each in step_report.IN_FP8}
        in_fp8 = {
            step_report.in_precision(name, each): building[each] + seconds(name) + seconds(name, "ours")
            for each, name in self._in_fp8()
        }
        of_fp8 = building["sampling"] if self.size == "full" else 0.0
        shared = {f"{name}{SHARED}": 2 * seconds(name, "ours", "b1") for name in step_report.UNITS}
        shared[f"update{SHARED}"] += 2 * seconds("update", "ours")  # without its graphs as well
        expected = (
            in_fp8
            | shared
            | {  # one call to warm up and one that is timed
                "iteration": 3 * sampler,
                "update": sampler,
                "peak memory": seconds("iteration"),
                "FP8 forward": of_fp8,
                "waterfall": of_fp8 + 2 * rows * sampler,
            }
        )
        return expected.get(name, 0.0)

    def _say(self, name: str) -> None:
        """The line of a unit that has a figure."""
        if name in self.checks and name in self.report:
            print(step_report.unit_line(name, self.report[name], self.checks[name]))

    def _put(self, name: str, value: object) -> None:
        """A figure, and what the goals say with it: on disk at once."""
        self.report[name] = value
        self.report.put("goals", step_report.goals(self.report))

    def _play(
        self,
        name: str,
        variants: dict[str, Callable[[], object]],
        put: Callable[[dict], None],
        warm: Sequence[str] | None = None,
    ) -> None:
        """The first rounds of `name`, after one call of each (parity has run them before) or of `warm`; more come
        later.

        Raises:
            OutOfTime: not even one round fits.
        """
        turns = timing.Turns(variants, self.device, put)
        turns.warm_up(warm)
        turns.play(min(self.repeats, timing.FEWEST), self.budget)
        if not turns.rounds:
            left = f"{self.budget.left:.1f} s that are left"
            raise OutOfTime(f"a round of {turns.last:.1f} s does not fit in the {left}")
        self.turns[name] = turns

    def _more_rounds(self) -> None:
        """What time is left: one more round of each part in turn, until all have what was asked for."""
        grown = set()
        while self.turns:
            for name, turns in list(self.turns.items()):
                if turns.rounds >= self.repeats or turns.last > self.budget.left:
                    del self.turns[name]
                    continue
                grown.add(name)
                self._attempt(name, partial(turns.play, turns.rounds + 1, self.budget))
        for name in ORDER:
            if name in grown:
                self._say(name)

    @cached_property
    def units(self) -> dict[str, Unit]:
        return units(self.c)

    @cached_property
    def shared_units(self) -> dict[str, Unit]:
        return units(self.shared)

    def unit(self, name: str) -> Unit:
        """With those of its sides that compute the same."""
        own = self.shared_units if name.endswith(SHARED) else self.units
        unit = own[name.removesuffix(SHARED)]
        return replace(unit, sides={side: unit.sides[side] for side in ("ours", *self._passed(name))})

    @staticmethod
    def _in_fp8() -> Iterator[tuple[Precision, str]]:
        """What is timed in FP8, of both noises."""
        for precision, names in step_report.IN_FP8.items():
            yield from ((precision, f"{name}{noise}") for noise in ("", SHARED) for name in names)

    @cached_property
    def fp8(self) -> Contenders | None:
        """The same at full size with ODE steps in FP8; a second model, so it is built when it is needed."""
        return self._another(2, "model") if self.size == "full" else None

    @cached_property
    def fp8_shared(self) -> Contenders:
        return self._with_shared_noise(self.fp8, 3)

    @cached_property
    def fp8_everywhere(self) -> Contenders:
        """With the frozen base in FP8 as well; a third model."""
        return self._another(4, "fp8")

    @cached_property
    def fp8_everywhere_shared(self) -> Contenders:
        return self._with_shared_noise(self.fp8_everywhere, 5)

    def _another(self, number: int, base_precision: str) -> Contenders:
        """Ours alone, sampling in FP8. All models stay until the end, 96 GB by the plan, of which 19 for each captured
        update; B0's saved activations, 32 GB, come on top."""
        changes = merge(self.changes, {"model": {"base_precision": base_precision}})
        made = random(self.folder, self.device, FULL, precision="fp8", **changes)
        made.baselines.clear()
        made.trainer.iteration = number * APART
        return made

    @staticmethod
    def _with_shared_noise(c: Contenders, number: int) -> Contenders:
        made = c.with_noise("shared")
        made.trainer.iteration = number * APART
        return made

    def _ours_in(self, precision: Precision, name: str) -> Contenders:
        return getattr(self, f"{_holder(precision)}{SHARED if name.endswith(SHARED) else ''}")

    @cached_property
    def limits(self) -> timing.Calibration:
        found = timing.calibrate(self.device)
        self.report.put("calibration", timing.as_json(found))
        return found

    def _on_policy(self) -> None:
        metrics = self.c.trainer.iterate()
        names = ("log_prob_mismatch_max", "pre_update_clip_fraction")
        self._put("on_policy", {name: metrics[name] for name in names})

    def _measure(self, name: str) -> None:
        unit, eager = self.unit(name), self._eager(name)

        def put(times: dict[str, np.ndarray]) -> None:
            without = {side: values for side, values in times.items() if side != "eager"}
            self._put(name, figures(unit, without, self.repeats))
            if "eager" in times:
                others = {side: values for side, values in without.items() if side != "ours"}
                self._put(f"{name}_eager", figures(unit, {"ours": times["eager"], **others}, self.repeats))
            if self.size == "full" and name == "sampler":  # FLOPs of the algorithm: 16 rows are 8 guided images
                steps, rate = self.c.config.rollout.num_steps, self.report["sampler"]["ours"]
                self._put("sampler_mfu", rate * steps * FORWARD_TFLOP / 8 / PEAK_TFLOP_S)

        self._play(name, unit.sides | ({} if eager is None else {"eager": eager}), put)

    def _eager(self, name: str) -> Callable[[], object] | None:
        """What the unit is without the update's CUDA graphs; None of others and where it has none."""
        return eager_update(self.shared) if name == f"update{SHARED}" else None

    def _measure_fp8(self, name: str, precision: Precision) -> None:
        """The unit `name` with ours in FP8. Not held to the others' numbers: FP8 rounds."""
        own, key = self.unit(name), step_report.in_precision(name, precision)
        ours = own_units(self._ours_in(precision, name))[name.removesuffix(SHARED)]
        unit = replace(own, sides=own.sides | {"ours": ours})

        def put(times: dict[str, np.ndarray]) -> None:
            self._put(key, figures(unit, times, self.repeats))

        self._play(key, unit.sides, put, warm=("ours",))

    def _waterfall(self) -> None:
        """Sampler images/s of B0 and after each change in turn; None for what this device does not have."""
        rows = self._waterfall_rows()

        def put(times: dict[str, np.ndarray]) -> None:
            rates = {name: self.c.images / (float(np.median(values)) * 1e-6) for name, values in times.items()}
            rounds = len(times["B0"])
            entries = [{"step": name, "images_per_second": rates.get(name), "rounds": rounds} for name in rows]
            self._put("waterfall", entries)

        self._play("waterfall", {name: run for name, run in rows.items() if run is not None}, put)

    def _waterfall_rows(self) -> dict[str, Callable[[], object] | None]:
        c, gpu, fp8 = self.c, self.device == "cuda", self.fp8
        _, plain = choose_attention("flash" if gpu else "auto", c.device, c.trainer.policy.dtype)
        b0 = c.baselines["b0"]
        merging = replace(b0, recipe=replace(B0, merge_lora=True))
        return {
            "B0": partial(b0.rollout, c.prompts, c.window),
            "merge": partial(merging.rollout, c.prompts, c.window),
            "fuse": sampler_with(c, attention=plain, graphs=False),
            "attention": sampler_with(c, graphs=False) if gpu else None,
            "graph": sampler_with(c, graphs=True) if gpu else None,
            "side stream": sampler_with(c, graphs=True, decode_stream=SideStream(c.device)) if gpu else None,
            "FP8": sampler_with(fp8, graphs=True) if fp8 else None,
        }

    def _peak_memory(self) -> None:
        """GB allocated at most during one iteration of each side, and what our graphs keep; the weights of all are in
        every figure."""
        found, unit = {}, self.unit("iteration")
        timing.free()
        for name, run in unit.sides.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            found[name] = torch.cuda.max_memory_allocated() / 1e9 + (kept_by_graphs_gb() if name == "ours" else 0.0)
        self._put("peak_memory_gb", found)

    def _fp8_forward(self) -> None:
        """A merged FP8 forward of 16 rows, over what its FLOPs take at the matrix-product rate measured here."""
        policy, table = self.fp8.trainer.policy, self.fp8.table()
        policy.merge()
        latents = torch.randn(8, *policy.latent_shape(), device=self.fp8.device)
        prepared = policy.prepare(policy.encode([f"prompt {i}" for i in range(8)]), table.timesteps, guidance=2.0)
        with torch.no_grad():
            run = {"forward": lambda: policy.predict_merged(latents, table.numbers[2], prepared)}
            share = self.budget.share(0.2)
            times = timing.interleave(run, "cuda", repeats=4 * self.repeats, warmup=10, budget=share)["forward"]
        seconds = FORWARD_TFLOP / self.limits.matmul_tflop_s
        self._put("fp8_forward_over_roofline", float(np.median(times)) * 1e-6 / seconds)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure, as soon as it is known")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw ratios and waterfall")
    parser.add_argument("--repeats", type=int, help="calls of each side (7 on a GPU, 5 on a CPU)")
    parser.add_argument("--seconds", type=float, help="end by then, with fewer calls or fewer measurements")
    parser.add_argument("--unit", action="append", choices=list(step_report.UNITS), help="only this; may be repeated")
    parser.add_argument("--attention", metavar="NAME", help="model.attention of ours (default: the preset's)")
    parser.add_argument(
        "--window", type=int, nargs="+", metavar="STEP", help="the window's steps (default: the preset's)"
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="of an iteration, in micro-batches of 8 images")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="B1's blocks by torch.compile (default: on a GPU)"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.size == "full" and args.device == "cpu":
        parser.error("--size full needs a GPU: 2.2 billion parameters at 2.2 TFLOP a sequence")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(args.size, args.device, args.repeats or REPEATS[args.device], args, Path(folder))
        report = session.run(args.unit or list(step_report.UNITS))
    print(step_report.tables(report))
    if args.png and "sampler" in report:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        step_report.draw(report, args.png)
    return 1 if report["refused"] or report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
