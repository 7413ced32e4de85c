"""What a run shows while it works: a bar on a terminal, plain lines in a log.

One `Display` serves a whole run, because a terminal can hold only one live region: work inside an iteration (an
evaluation, encoding prompts) is a second line of the same region.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from advgrpo.reporting.metric_names import fixed_rewards
from advgrpo.types import Flag

_PLAIN_EVERY = 10.0  # seconds between the lines of `steps` where there is no terminal
_WIDE = 120  # columns from which the bar may be long
_GAP = "  "

# metric -> (label, short label, format), the most important first
_SHOWN = {
    "reward_generated": ("r_gen", "gen", "{:+.3f}"),
    "reward_reference": ("r_ref", "ref", "{:+.3f}"),
    "discriminator_accuracy": ("adversary", "adv", "{:.0%}"),
    "sft_loss": ("loss", "loss", "{:.4f}"),
    "nft_loss": ("loss", "loss", "{:.4f}"),
    "awm_loss": ("loss", "loss", "{:.4f}"),
    "images_per_second": ("images/s", "img/s", "{:.1f}"),
}


def figures(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, short label, value) of an iteration's metrics, the most important first.

    In a mix of rewards, whose normalised sum says little, r_gen is the adversary's own and every reward is shown.
    """
    shown, fixed, learned = dict(_SHOWN), fixed_rewards(record), "reward_adversary" in record
    if len(fixed) + learned > 1:
        first = "reward_adversary" if learned else "reward_generated"
        speed, own = shown.pop("images_per_second"), shown.pop("reward_generated")
        named = {key: (key.removeprefix("reward_"), key.removeprefix("reward_")[:8], "{:+.3f}") for key in fixed}
        shown = {first: own, **shown, **named, "images_per_second": speed}
    return [
        (label, short, form.format(record[key]))
        for key, (label, short, form) in shown.items()
        if isinstance(record.get(key), (int, float))
    ]


def fitted(parts: Sequence[tuple[str, str, str]], width: int) -> str:
    """As many of `figures` as fit into `width` characters: with full labels, else with short ones, else fewer."""
    long = _GAP.join(f"{label} {value}" for label, _, value in parts)
    if len(long) <= width:
        return long
    for count in range(len(parts), 0, -1):
        short = " ".join(f"{label} {value}" for _, label, value in parts[:count])
        if len(short) <= width:
            return short
    return ""


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Display:
    """Progress of a run on `console`; says nothing where the console is quiet (ranks other than 0)."""

    def __init__(self, console: Console):
        self.console = console
        self._live: Progress | None = None
        self._open = 0  # who needs the live region: the iterations, and every `steps` block
        self._iterations: TaskID | None = None
        self._flagged: list[str] = []

    def print_line(self, text: str) -> None:
        """Print a line without breaking the live region."""
        # soft_wrap and no markup: log lines stay whole, and "[...]" in a prompt or path is text.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def iterations(self, total: int, start: int) -> Iterator[None]:
        """The line of training, from iteration `start` of `total`; `show` moves it on."""
        self._total, self._start, self._began = total, start, time.monotonic()
        with self._region() as live:
            if live is not None:
                self._iterations = live.add_task("", total=total, completed=start, title=self._title(start), left="")
            try:
                yield
            finally:
                self._iterations = None

    def show(self, record: Mapping[str, Any]) -> None:
        """An iteration's figures; `record` holds its number from 0 as "iteration"."""
        done = record["iteration"] + 1
        left, parts = f"{self._time_left(done)} left", figures(record)
        if self._live is None:
            values = [f"{label} {value}" for label, _, value in parts]
            self.print_line(_GAP.join([self._title(done), *values, left]))
            return
        taken = len(self._title(done)) + len(left) + self._bar_width() + 3  # a blank between columns
        self._live.update(
            self._iterations,
            completed=done,
            title=self._title(done),
            left=left,
            description=fitted(parts, self.console.width - taken),
        )

    def show_flags(self, flags: Sequence[Flag], iteration: int) -> None:
        """A red flag is shown with its advice when it appears, and again when it has cleared."""
        for flag in flags:
            if flag.name not in self._flagged:
                self.print_line(f"iteration {iteration + 1}: {flag}")
        names = [flag.name for flag in flags]
        for name in self._flagged:
            if name not in names:
                self.print_line(f"iteration {iteration + 1}: red flag {name} has cleared")
        self._flagged = names

    @contextlib.contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress of `total` pieces of work, such as "evaluating"; yields a function to call with the number done.

        Without a terminal a line appears every ten seconds, so that short work is silent.
        """
        with self._region() as live:
            if live is not None:
                task = live.add_task("", total=total, title=f"{what} 0/{total}", left="")
                try:
                    yield lambda done: live.update(task, completed=done, title=f"{what} {done}/{total}")
                finally:
                    live.remove_task(task)
                return
            said = began = time.monotonic()

            def tell(done: int) -> None:
                nonlocal said
                now = time.monotonic()
                if now - said >= _PLAIN_EVERY and done:
                    said = now
                    self.print_line(
                        f"{what} {done}/{total}{_GAP}{duration((now - began) / done * (total - done))} left"
                    )

            yield tell

    @contextlib.contextmanager
    def _region(self) -> Iterator[Progress | None]:
        """The terminal's one live region, for as long as somebody is inside; None without a terminal."""
        if not self.console.is_terminal or self.console.quiet:
            yield None
            return
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.fields[title]}", markup=False),
                BarColumn(bar_width=self._bar_width()),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.description}", markup=False),
                console=self.console,
                refresh_per_second=2,
                transient=False,
            )
            self._live.start()
        self._open += 1
        try:
            yield self._live
        finally:
            self._open -= 1
            if not self._open:
                self._live.stop()
                self._live = None

    def _bar_width(self) -> int:
        return 40 if self.console.width >= _WIDE else 10

    def _title(self, done: int) -> str:
        return f"iteration {done}/{self._total}"

    def _time_left(self, done: int) -> str:
        """From the mean over this process's iterations: their durations differ (evaluations, adversary updates)."""
        seconds = (time.monotonic() - self._began) / max(1, done - self._start) * max(0, self._total - done)
        return duration(seconds)
