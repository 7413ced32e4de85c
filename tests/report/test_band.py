"""Bands of recorded runs: which runs are compared, what is outside, and that it is said once.

Planted bugs that turn it red (tests/mutants/band-*): another method compared; said again after every evaluation. And of
docs/report.md: a preset without a band left out, another number of runs, a band that was removed.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from advgrpo import config
from advgrpo.config.nearest import FREE_OF_CURVES, changes
from advgrpo.errors import UserError
from advgrpo.report import band as bands
from advgrpo.report.__main__ import main
from advgrpo.report.band import Band, band_of, read_band, write_band
from advgrpo.report.page import write_report
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from tests.report.made import make_run

CURVES = [
    {"dino_similarity": [(0, 0.7), (40, value), (80, value + 0.05)]} for value in (0.74, 0.76, 0.75, 0.79, 0.77)
]  # fmt: skip
BAND = Band("tiny", CURVES)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder in the place of advgrpo/presets/curves."""
    folder = tmp_path / "curves"
    folder.mkdir()
    monkeypatch.setattr(bands, "_folder", lambda: folder)
    return folder


def test_a_value_below_every_recorded_run_is_named_with_their_range():
    (found,) = BAND.outside({"dino_similarity": [(0, 0.1), (20, 0.1), (40, 0.71), (80, 0.5)]})
    assert str(found) == ("at iteration 40 dino_similarity 0.71 is below every one of 5 recorded runs (0.74 to 0.79)")
    (found,) = BAND.outside({"dino_similarity": [(40, 0.74), (80, 0.84001)]})
    assert str(found) == (
        "at iteration 80 dino_similarity 0.84001 is above every one of 5 recorded runs (0.79000 to 0.84000)"
    )
    assert not BAND.outside({"dino_similarity": [(40, 0.74), (80, 0.84)], "other": [(40, 0.0)]})


def test_a_run_that_repeats_a_recorded_one_is_not_outside_of_it():
    """Of a third a band keeps six digits."""
    kept = [{"retrieval": [(40, value)]} for value in (0.333333, 0.5)]
    assert not Band("tiny", kept).outside({"retrieval": [(40, 1 / 3)]})
    kept = [{"retrieval": [(40, value)]} for value in (0.354167, 0.5)]
    assert not Band("tiny", kept).outside({"retrieval": [(40, 17 / 48)]})


def test_one_run_is_no_band():
    assert Band("tiny", CURVES[:1]).at("dino_similarity", 40) is None
    assert Band("tiny", CURVES[:1]).shape("dino_similarity") is None
    assert BAND.shape("dino_similarity") == ([0, 40, 80], [0.7, 0.74, 0.79], pytest.approx([0.7, 0.79, 0.84]))


def test_runs_are_recorded_and_compared_where_the_settings_are_the_presets(tmp_path, shipped):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed, shift=0.01 * seed) for seed in (1, 2, 3)]
    out = shipped / "tiny.json"
    assert main(["band", *map(str, runs), "--preset", "tiny", "--out", str(out)]) == 0
    made = read_band(out)
    assert made.runs == 3
    low, high, count = made.at("dino_similarity", 10)
    assert count == 3
    assert high - low == pytest.approx(0.02, abs=0.005)
    same = config.load(file=runs[0] / "config.yaml")
    assert band_of(same) == made
    same.output.checkpoint_every, same.evaluation.every, same.fast, same.iterations = 3, 7, False, 99
    same.model.sequence_parallel, same.data.decode_workers = 2, 1
    assert band_of(same) == made
    for section, name, value in (("update", "learning_rate", 1e-5), ("evaluation", "guidance_scale", 3.0)):
        other = same.model_copy(deep=True)
        setattr(getattr(other, section), name, value)
        assert band_of(other) is None
        assert [each.name for each in changes(other, "tiny", ignoring=FREE_OF_CURVES)] == [f"{section}.{name}"]


def test_a_report_draws_the_band_and_says_what_is_outside(tmp_path, shipped):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]
    write_band(runs, "tiny", shipped / "tiny.json")
    page = write_report(make_run(tmp_path / "low", seed=4, shift=-0.3)).read_text()
    assert page.count('class="band"') == 2
    assert "3 recorded runs of tiny" in page
    assert page.count("is below every one of 3 recorded runs") == 2
    inside = write_report(make_run(tmp_path / "other", seed=5, changes={"update": {"learning_rate": 1e-5}})).read_text()
    assert 'class="band"' not in inside


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda runs: runs.pop(), "RUN names 1 of the 2 runs"),
        (lambda runs: (runs[0] / "summary.json").unlink(), "has not ended"),
        (lambda runs: (runs[0] / "evaluations.jsonl").unlink(), r"has no evaluations\.jsonl"),
        (lambda runs: runs.append(runs[0]), "has the seed 1 of another one"),
        (lambda runs: _set(runs[1], "update", "learning_rate", 0.5), "update.learning_rate = 0.5 instead of 0.0003"),
    ],
)
@pytest.mark.in_ci(2)
def test_runs_that_make_no_band_are_refused(tmp_path, spoil, said):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2)]
    spoil(runs)
    with pytest.raises(UserError, match=said):
        write_band(runs, "tiny", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_shipped_bands_are_of_their_presets_settings():
    assert "tiny" in bands.recorded_presets()
    for name in bands.recorded_presets():
        band = bands.shipped_band(name)
        assert band.preset == name
        assert band.runs >= 3
        assert band.is_of(config.load(preset=name)), f"{name} is not what was recorded any more: record it again"
        assert band_of(config.load(preset=name)) == band


def test_a_band_of_a_preset_that_was_changed_is_for_nobody(tmp_path, shipped):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2)]
    write_band(runs, "tiny", shipped / "tiny.json")
    content = json.loads((shipped / "tiny.json").read_text())
    assert band_of(config.load("tiny")) is not None
    del content["settings"]["update.eps"]  # as if it were younger than the band
    (shipped / "tiny.json").write_text(json.dumps(content))
    assert band_of(config.load("tiny")) is not None
    content["settings"]["update.learning_rate"] *= 2
    (shipped / "tiny.json").write_text(json.dumps(content))
    assert band_of(config.load("tiny")) is None


@pytest.mark.parametrize("settings", [{}, {"update.of_an_older_program": 1}])
def test_a_band_that_knows_none_of_a_runs_settings_is_not_its_band(settings):
    """Seen red: it was every run's."""
    assert not Band("tiny", CURVES, settings).is_of(config.load("tiny"))


def test_a_damaged_band_is_named(shipped):
    file = shipped / "tiny.json"
    for content in (
        "{",
        '{"version": 2}',
        json.dumps({"version": 1, "preset": "tiny", "settings": {"seed": 1}, "runs": [{"metrics": {"a": [1]}}]}),
        json.dumps({"version": 1, "preset": "tiny", "settings": {}, "runs": []}),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=r"tiny\.json is no band"):
            band_of(config.load("tiny"))


def test_a_run_says_once_that_it_is_outside_also_when_it_is_resumed(unit_config, monkeypatch):
    """Of the recorded runs none was as bad, or as good: the unit model is untrained."""
    unit_config.evaluation.every, unit_config.iterations, unit_config.output.checkpoint_every = 1, 4, 2
    unit_config.evaluation.metrics = ("dino_similarity",)
    recorded = Band("tiny", [{"dino_similarity": [(i, 5.0 + k) for i in range(9)]} for k in range(2)])
    monkeypatch.setattr("advgrpo.training.run.band_of", lambda settings: recorded)
    said = []
    for resume in (False, True):
        console = io.StringIO()
        made = Run(unit_config, Distributed.start("cpu"), resume=resume, console=Console(file=console, width=250))
        made.train()
        unit_config.iterations = 6
        said.append([line for line in console.getvalue().splitlines() if "recorded runs" in line])
    (line,), again = said
    assert line.startswith("note: at iteration 1 dino_similarity")
    assert "is below every one of 2 recorded runs (5.00 to 6.00), with the settings of the preset tiny" in line
    assert again == []


def _set(run, section, name, value):
    settings = config.load(file=run / "config.yaml")
    setattr(getattr(settings, section), name, value)
    (run / "config.yaml").write_text(config.dump(settings))


def test_the_page_names_the_presets_with_a_band_and_those_without():
    """Made from the files: docs/report.md must have these two sentences word by word."""
    root = Path(__file__).parents[2]
    presets = sorted(file.stem for file in (root / "advgrpo" / "presets").glob("*.yaml"))
    shipped = {file.stem: read_band(file) for file in sorted(bands._folder().glob("*.json"))}
    assert shipped.keys() < set(presets)

    def length(band: Band) -> int:
        return max(iteration for curve in band.curves for points in curve.values() for iteration, _ in points)

    names = sorted(shipped)
    have = ", ".join(f"`{name}` ({len(shipped[name].curves)} of {length(shipped[name])})" for name in names)
    none = [name for name in presets if name not in shipped]
    small = ", ".join(f"`{name}`" for name in none if name.startswith("tiny-"))
    families = sorted({re.match(r"[a-z]+[0-9]*m?(-image)?", name)[0] for name in none if not name.startswith("tiny")})
    assert all(not name.startswith(family) for name in shipped for family in families), "name what is left of a family"
    full = ", ".join(f"`{family}-*`" for family in families)
    page = " ".join((root / "docs" / "report.md").read_text().split())
    assert f"These do, by the number of runs and the iterations they have: {have}." in page
    without = (
        f"**These have none**, so a run of theirs is compared with nothing: {small}, and every preset at full size"
    )
    assert f"{without}: {full}." in page
