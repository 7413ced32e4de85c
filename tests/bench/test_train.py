"""The session's part that trains: rows as they come, a run that stands still or drifts is a failure.

Planted bugs that turned this file red: a learning rate that moves nothing; the report written at the end; a run without
time that counts as done.
"""

import json
from types import SimpleNamespace

import pytest

import advgrpo
from bench import contenders, train
from bench.budget import Budget, Report
from bench.gpu_session import LORA


def test_random_weights_move_without_drift_and_every_row_is_kept(tmp_path):
    report = Report(tmp_path / "train.json", failed={})
    train.train_random("small", "cpu", Budget(None), report, tmp_path)
    kept = json.loads((tmp_path / "train.json").read_text())["random"]
    assert len(kept["rows"]) == train.ITERATIONS["small"]
    assert all(row["log_prob_mismatch_max"] == 0 and row["grad_norm"] > 0 for row in kept["rows"])
    assert 0 < kept["relative_change_of_lora"] < 0.1
    assert kept["images"] == 8


def test_a_run_whose_weights_stand_still_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MOVING", contenders.SETTINGS)
    monkeypatch.setitem(train.ITERATIONS, "small", 1)
    with pytest.raises(RuntimeError, match="the LoRA moved by 0 of its norm"):
        train.train_random("small", "cpu", Budget(None), Report(None, failed={}), tmp_path)


def test_the_worlds_lora_comes_back_to_be_judged_at_home(tmp_path, monkeypatch):
    trained, asked = tmp_path / "run" / "lora", []
    trained.mkdir(parents=True)
    (trained / LORA).write_bytes(b"12345")

    def trains(config, callbacks):
        asked.append(config)
        return SimpleNamespace(stopped="", summary={"final": {}}, lora=trained)

    monkeypatch.setattr(advgrpo, "train", trains)
    report, back = Report(None, failed={}), tmp_path / "back"
    back.mkdir()
    for size in ("small", "full"):
        train.train_world("tiny", size, "cpu", Budget(None), report, tmp_path, back)
        assert [file.read_bytes() for file in back.iterdir()] == [b"12345"]
        (back / LORA).unlink()
    assert report["world"]["lora_bytes"] == 5
    assert [config.evaluation.metrics for config in asked] == [("dino_similarity",)] * 2
    assert asked[1].evaluation.every > 0


def test_what_fails_is_named_and_the_other_run_goes_on(tmp_path, monkeypatch):
    def no_diffusers(*arguments):
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(train, "train_world", no_diffusers)
    monkeypatch.setitem(train.ITERATIONS, "small", 1)
    assert train.main(["--device", "cpu", "--json", str(tmp_path / "train.json")]) == 1
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["failed"] == {"world": "ModuleNotFoundError: No module named 'diffusers'"}
    assert len(report["random"]["rows"]) == 1
