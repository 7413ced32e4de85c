"""TensorBoard, wandb and trackio: numbers, sample grids, settings, groups and tags; what happens when one fails.

Where wandb and trackio are installed they run for real, offline; everywhere they are stood in for by modules whose
functions take what theirs take. Bugs planted in a copy, each seen red: the id made anew when a run goes on; kept when
one begins; a failure raised while training; swallowed without a word; a failed tracker called again; the others lost
with it; a start that fails let pass in a new run; captions, group, tags or settings dropped; the base's grid sent again
on resuming; the final metrics not sent; no summary of what was lost.
"""

import importlib.util
import inspect
import io
import json
import struct
import sys
import time
import types
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.reporting.display import Display
from advgrpo.reporting.trackers import RunInfo, TensorBoardTracker, Trackers, TrackioTracker, WandbTracker, choose
from advgrpo.reporting.tracking import RunLog, load_metrics
from advgrpo.training.run import Run
from tests.training.test_run import run

SETTINGS = {"seed": 1, "rollout": {"group_size": 8}}


def info(folder: Path, **more) -> RunInfo:
    return RunInfo(folder, SETTINGS, "night", **{"group": "seeds", "tags": ("a", "b"), **more})


def grid(folder: Path) -> Path:
    Image.new("RGB", (40, 20), (200, 10, 10)).save(folder / "grid.png")
    return folder / "grid.png"


def real(package: str) -> types.ModuleType | None:
    return importlib.import_module(package) if importlib.util.find_spec(package) else None


class FakeRun:
    def __init__(self, calls: list) -> None:
        self.calls = calls

    def log(self, data, step=None):
        self.calls.append(("log", step, data))

    def finish(self):
        self.calls.append(("finish",))


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, *, project, name, group, tags, config, dir, id, resume, settings):
        self.calls.append(("init", {k: v for k, v in locals().items() if k != "self"}))
        return FakeRun(self.calls)

    def Settings(self, *, console, finish_timeout, finish_timeout_raises):
        return {"console": console, "finish_timeout": finish_timeout}

    def Image(self, data_or_path, *, caption):
        return ("image", data_or_path, caption)


class FakeTrackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.calls = []

    def init(self, project, *, name, group, config, resume, embed, auto_log_gpu, auto_log_cpu):
        self.calls.append(("init", {k: v for k, v in locals().items() if k != "self"}))
        return FakeRun(self.calls)

    def Image(self, value, caption=None):
        return ("image", value, caption)


FAKES = {"wandb": (FakeWandb, WandbTracker), "trackio": (FakeTrackio, TrackioTracker)}


def faked(monkeypatch, package: str):
    kind, tracker = FAKES[package]
    module = kind()
    monkeypatch.setitem(sys.modules, package, module)
    return module, tracker("project")


def report(tracker, folder: Path, steps, **more) -> None:
    tracker.start(info(folder, **more))
    for step in steps:
        tracker.images("samples", grid(folder), ["a star", "a ring"], step)
        tracker.log({"reward": step / 4}, step)
    tracker.finish()


# The stand-ins, and that they are like the real ones.


@pytest.mark.parametrize("package", FAKES)
def test_stand_ins_take_what_the_packages_take(package):
    module = real(package)
    if module is None:
        pytest.skip(f"{package} is not installed")
    for name in ("init", "Image"):
        own = inspect.signature(getattr(FAKES[package][0], name)).parameters.keys() - {"self"}
        theirs = inspect.signature(getattr(module, name)).parameters
        assert own <= theirs.keys() or "value" in own, name
    if package == "wandb":
        module.Settings(console="off", finish_timeout=1, finish_timeout_raises=True)


@pytest.mark.parametrize("package", FAKES)
def test_what_the_packages_are_told(tmp_path, monkeypatch, package):
    fake, tracker = faked(monkeypatch, package)
    report(tracker, tmp_path, [0, 1])
    (_, options), *rest = fake.calls
    assert options["project"] == "project"
    assert options["group"] == "seeds"
    assert options["config"]["rollout"] == {"group_size": 8}
    assert (options["tags"] if package == "wandb" else options["config"]["tags"]) == ["a", "b"]
    assert options["name"].startswith("night")
    image = ("image", str(tmp_path / "grid.png"), "a star\na ring")
    once = [[("log", step, {"samples": image}), ("log", step, {"reward": step / 4})] for step in (0, 1)]
    assert rest == [*once[0], *once[1], ("finish",)]


@pytest.mark.parametrize("package", FAKES)
def test_a_run_that_goes_on_continues_its_own_and_a_new_one_does_not(tmp_path, monkeypatch, package):
    fake, tracker = faked(monkeypatch, package)
    report(tracker, tmp_path, [0])
    report(tracker, tmp_path, [1], resumed=True, start_iteration=1)
    report(tracker, tmp_path, [0], resumed=True)  # stopped before its first record was written
    report(tracker, tmp_path, [0])
    key = "id" if package == "wandb" else "name"
    first, again, early, other = (call[1][key] for call in fake.calls if call[0] == "init")
    assert first == again == early != other
    assert all(call[1]["resume"] == "allow" for call in fake.calls if call[0] == "init")


# The real ones.


def test_tensorboard_gets_everything(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(TensorBoardTracker(), tmp_path, range(4))
    report(TensorBoardTracker(), tmp_path, range(2, 5), resumed=True, start_iteration=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["scalars"] == ["reward"]
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Scalars("reward")] == [0, 1, 2, 3, 4]
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))
    assert shown.size == (40, 20)
    assert shown.getpixel((5, 5)) == (200, 10, 10)
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert texts["samples/prompts/text_summary"] == "1. a star\n2. a ring"
    assert texts["run/group/text_summary"] == "seeds"
    assert texts["run/tags/text_summary"] == "a, b"
    assert "group_size: 8" in texts["run/settings/text_summary"]


def wandb_records(file: Path) -> list:
    """Of an offline run's file: LevelDB's log format, a protocol buffer a record."""
    from wandb.proto import wandb_internal_pb2

    content, records, part = file.read_bytes()[7:], [], b""
    at = 0
    while at + 7 <= len(content):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report(WandbTracker("project"), tmp_path, [0, 1])
    report(WandbTracker("project"), tmp_path, [2], resumed=True, start_iteration=2)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 20  # wandb's own process closes the file a little after `finish`
    while not all(any(r.HasField("exit") for r in wandb_records(file)) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    begun = [next(r.run for r in wandb_records(file) if r.HasField("run")) for file in files]
    assert begun[0].run_id == begun[1].run_id == (tmp_path / "wandb_run_id").read_text()
    assert begun[0].run_group == "seeds"
    assert begun[0].project == "project"
    assert begun[0].display_name == "night"
    assert list(begun[0].tags) == ["a", "b"]
    assert {"seed": "1", "rollout": '{"group_size":8}'}.items() <= {
        item.key: item.value_json.replace(" ", "") for item in begun[0].config.update
    }.items()
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(files[0])
        if record.HasField("history")
    ]
    assert [row["reward"] for row in rows] == [0, 0.25]
    assert rows[0]["samples.caption"] == "a star\na ring"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) >= 2


def test_trackio_for_real(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    project = f"project-{tmp_path.name[-12:]}".replace("_", "-")  # the package may have been imported before
    report(TrackioTracker(project), tmp_path, [0, 1])
    report(TrackioTracker(project), tmp_path, [2], resumed=True, start_iteration=2)
    names = {record["name"] if isinstance(record, dict) else record for record in storage.get_run_records(project)}
    assert names == {f"night-{(tmp_path / 'trackio_run_id').read_text()}"}
    logs = storage.get_logs(project, names.pop())
    assert [(row["step"], row["reward"]) for row in logs if "reward" in row] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    images = [row["samples"] for row in logs if "samples" in row]
    assert [image["caption"] for image in images] == ["a star\na ring"] * 3
    trackio.delete_project(project, force=True)


# Failures.


class Breaks:
    """A tracker that fails where it is told to."""

    name, setting = "breaks", "output.breaks = true"

    def __init__(self, where: str, error: Exception | None = None) -> None:
        self.where, self.error, self.calls = where, error or ConnectionError("no\nroute"), []

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what == self.where:
            raise self.error

    def start(self, run):
        self._do("start")

    def log(self, metrics, step):
        self._do("log")

    def images(self, name, grid, captions, step):
        self._do("images")

    def finish(self):
        self._do("finish")


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "breaks", types.ModuleType("breaks"))


@pytest.mark.parametrize("where", ["log", "images", "finish"])
def test_a_tracker_that_fails_is_given_up_aloud_and_the_others_go_on(tmp_path, packages, where):
    said, bad, good = [], Breaks(where), Breaks("never")
    trackers = Trackers([bad, good], said.append)
    trackers.start(info(tmp_path))
    for step in range(3):
        trackers.images("samples", grid(tmp_path), ["a"], step)
        trackers.log({"x": 1.0}, step)
    trackers.finish()
    trackers.finish()
    assert bad.calls.count(where) == 1
    assert bad.calls[-1] == where  # and never called again
    assert good.calls == ["start", *["images", "log"] * 3, "finish"]
    when = "at the end" if where == "finish" else "at iteration 0"
    assert trackers.lost == {"breaks": f"{when}: ConnectionError: no route"}
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: breaks has failed {when}")
    assert "metrics.jsonl has everything" in said[0]


def test_a_tracker_that_does_not_start_stops_a_new_run_only(tmp_path, packages):
    said, good = [], Breaks("never")
    with pytest.raises(UserError, match=r"output\.breaks = true: breaks does not start \(ConnectionError: no route\)"):
        Trackers([good, Breaks("start")], said.append).start(info(tmp_path))
    assert good.calls == ["start", "finish"]
    trackers = Trackers([Breaks("start"), good], said.append)
    trackers.start(info(tmp_path, resumed=True))
    trackers.log({}, 5)
    assert good.calls[2:] == ["start", "log"]
    assert list(trackers.lost) == ["breaks"]
    assert "WARNING: breaks has failed at the start" in said[0]


def test_an_interrupt_is_no_failure_of_a_tracker(tmp_path, packages):
    trackers = Trackers([Breaks("log", KeyboardInterrupt())], print)  # type: ignore[arg-type]
    trackers.start(info(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        trackers.log({}, 0)


@pytest.mark.parametrize("package", FAKES)
def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"_project = 'project' needs {package}.* pip install {package}"):
        Trackers([FAKES[package][1]("project")], print).start(info(tmp_path))


def test_only_what_the_settings_name_is_touched(tmp_path, monkeypatch):
    for package in FAKES:
        monkeypatch.setitem(sys.modules, package, None)
    config = Config()
    assert [tracker.name for tracker in choose(config.output)] == ["tensorboard"]
    config.output.tensorboard = False
    assert choose(config.output) == []
    config.output.wandb_project, config.output.trackio_project = "p", "q"
    assert [tracker.setting for tracker in choose(config.output)] == [
        "output.wandb_project = 'p'",
        "output.trackio_project = 'q'",
    ]


def test_every_finite_number_of_an_iteration_is_told_and_texts_are_not(tmp_path, packages):
    told = []
    tracker = Breaks("never")
    tracker.log = lambda metrics, step: told.append((step, metrics))
    trackers = Trackers([tracker], print)
    trackers.start(info(tmp_path))
    with RunLog(tmp_path, total_iterations=3, trackers=trackers, display=Display(Console(file=io.StringIO()))) as log:
        log.log({"iteration": 2, "x": 0.5, "bad": float("nan"), "word": "no", "none": None}, flags=[])
    assert told == [(2, {"x": 0.5})]


# A whole run.


class Records(Breaks):
    """Keeps what a run tells it."""

    def __init__(self, where="never"):
        super().__init__(where)
        self.told = []

    def start(self, run):
        super().start(run)
        self.told.append(("start", run))

    def log(self, metrics, step):
        super().log(metrics, step)
        self.told.append(("log", step, dict(metrics)))

    def images(self, name, grid, captions, step):
        super().images(name, grid, captions, step)
        with Image.open(grid) as image:
            self.told.append(("images", name, step, list(captions), image.size))


def recorded(monkeypatch, where="never") -> Records:
    tracker = Records(where)
    monkeypatch.setitem(sys.modules, "breaks", types.ModuleType("breaks"))
    monkeypatch.setattr("advgrpo.training.run.choose", lambda output: [tracker])
    return tracker


def test_a_run_reports_settings_grids_metrics_and_how_it_ended(unit_config, monkeypatch):
    tracker = recorded(monkeypatch)
    unit_config.evaluation.every = 1
    unit_config.output.group, unit_config.output.tags = "seeds", ("x",)
    made: Run = run(unit_config)
    begun = tracker.told[0][1]
    assert (begun.name, begun.group, begun.tags, begun.resumed) == ("run", "seeds", ("x",), False)
    assert begun.settings == unit_config.model_dump(mode="json")
    images = [entry[1:4] for entry in tracker.told if entry[0] == "images"]
    prompts = made.evaluator.prompts[: unit_config.evaluation.grid_prompts]
    assert images == [("samples_base", 0, prompts), ("samples", 0, prompts), ("samples", 1, prompts)]
    logs = [entry[1:] for entry in tracker.told if entry[0] == "log"]
    rows = load_metrics(Path(unit_config.output_dir) / "metrics.jsonl")
    for row, (step, metrics) in zip(rows, logs):
        assert step == row["iteration"]
        assert metrics == {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "iteration"}
    summary = json.loads((Path(unit_config.output_dir) / "summary.json").read_text())
    step, ends = logs[-1]
    assert step == 1
    assert ends["final_dino_similarity"] == summary["final"]["dino_similarity"]
    assert ends["base_dino_similarity"] == summary["base"]["dino_similarity"]
    assert summary["trackers_lost"] == {}
    assert tracker.calls[-1] == "finish"
    assert tracker.calls.count("finish") == 1

    tracker.told.clear()
    longer = unit_config.model_copy(deep=True)
    longer.iterations = 3
    run(longer, resume=True)
    assert tracker.told[0][1].resumed
    assert tracker.told[0][1].start_iteration == 2
    assert [entry[1:3] for entry in tracker.told if entry[0] == "images"] == [("samples", 2)]


@pytest.mark.parametrize("where", ["log", "finish"])
@pytest.mark.weekly
def test_a_run_outlives_its_tracker_and_says_so(unit_config, monkeypatch, where):
    recorded(monkeypatch, where)
    said = io.StringIO()
    run(unit_config, console=Console(file=said, width=400))
    assert said.getvalue().count("WARNING: breaks has failed") == 1
    folder = Path(unit_config.output_dir)
    assert len(load_metrics(folder / "metrics.jsonl")) == 2
    lost = json.loads((folder / "summary.json").read_text())["trackers_lost"]
    assert list(lost) == ["breaks"]
    assert lost["breaks"].endswith("ConnectionError: no route")
