"""What a session left becomes a page that hides nothing.

Planted bugs that turned this file red: refused ops left out; a rehearsal's figures compared with predictions; the
folders of two GPUs mixed; the earlier of two runs of a part kept; a goal of another part left at "see".
"""

import json

import pytest

from bench import collect, model, step_report

ENVIRONMENT = {"device": "cuda", "gpu": "NVIDIA H200", "torch": "2.11.0"}
RATIO = {"ratio": 2.0, "low": 1.9, "high": 2.1}
UNIT = {
    "ours": 11.0,
    "b1": 10.0,
    "b0": 6.0,
    "over_b1": {"ratio": 1.1, "low": 1.08, "high": 1.12},
    "over_b0": {"ratio": 1.83, "low": 1.8, "high": 1.9},
    "unit": "images/s",
    "rounds": 7,
}
STEP = {
    "size": "full",
    "environment": ENVIRONMENT,
    "b1_compiled": True,
    "sampler": UNIT,
    "sampler_shared": {name: value for name, value in UNIT.items() if "b0" not in name},
    "sampler_mfu": 0.481,
    "goals": [
        {"id": "P1c", "what": "sampler", "target": "2x", "measured": "1.83x", "met": False},
        *(
            {"id": name, "what": "other parts'", "target": "", "measured": f"see {part}", "met": None}
            for name, part in step_report.ELSEWHERE.items()
        ),
    ],
    "refused": ["update"],
    "failed": {"waterfall": "RuntimeError: no\nmore"},
    "left_out": {"peak memory": "no time"},
}
KERNELS = {
    "environment": ENVIRONMENT,
    "refused": ["merge_lora"],
    "left_out": ["gelu"],
    "entries": [
        {
            "case": "gated_residual",
            "ours_us": {"median": 60.0},
            "over_eager": RATIO,
            "over_compiled": None,
            "share_of_limit": 0.78,
            "limit": "copy",
        },
        {
            "case": "gaussian_step",
            "ours_us": {"median": 30.0},
            "over_eager": RATIO,
            "over_compiled": None,
            "share_of_limit": 0.81,
            "limit": "copy",
        },
    ],
}
PROFILE = {
    "size": "full",
    "environment": ENVIRONMENT,
    "trajectory": {"kernels": 4446, "host_syncs": 0},
    "idle_share": 0.04,
}
ROW = {"seconds": 3.7, "log_prob_mismatch_max": 0.0, "held_gb": 45.0}
TRAIN = {"environment": ENVIRONMENT, "failed": {}, "random": {"rows": [ROW], "planned_gb": {"update": 50.0}}}


def session(folder, gpu: str | None = "NVIDIA H200", **reports):
    folder.mkdir()
    parts = {name: {"predicted": 100, "seconds": 90.0, "steps": [{"name": name, "exit": 0}]} for name in reports}
    (folder / "session.json").write_text(json.dumps({"machine": {"gpu": gpu}, "parts": parts}))
    for name, report in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    return folder


def test_a_page_with_everything_that_was_measured_and_what_was_not(tmp_path):
    first = session(tmp_path / "a", step=STEP)
    second = session(tmp_path / "b", kernels=KERNELS, train=TRAIN, profile=PROFILE)
    target = collect.collect([first, second], tmp_path / "results")
    assert target == tmp_path / "results" / "nvidia-h200"
    page = (target / "README.md").read_text()
    assert "| step.sampler.ours | " in page
    assert "B1's blocks are compiled" in page
    assert "| sampler | 1.10x [1.08, 1.12] | 1.83x [1.80, 1.90] | 11.000 images/s | 10.000 | 6.000 | 7 |" in page
    assert "| sampler, shared noise | 1.10x [1.08, 1.12] |  | 11.000 images/s | 10.000 |  | 7 |" in page
    assert "| P1c | sampler | 2x | 1.83x | **missed** |" in page
    assert "images/s, MFU 48.1% of 989 TFLOP/s" in page
    for row in (
        "| P8 | other parts' |  | 4446, 0 | met |",
        "| P9 | other parts' |  | 81% | met |",
        "| P10 | other parts' |  | see tests/kernels/test_launch_counts.py |  |",
        "| P11 | other parts' |  | 4.0% | **missed** |",
    ):
        assert row in page
    assert "| gated_residual | 60.0 | 2.00x [1.90, 2.10] |  | 78% of copy |" in page
    assert "planned 50.0 GB, held 45.0 GB (0.90 of the plan)" in page
    for line in (
        "- step: update refused",
        "- step: waterfall failed: RuntimeError: no",
        "- step: peak memory left out: no time",
        "- kernels: merge_lora refused",
        "- kernels: gelu left out: no time was left",
    ):
        assert line in page
    names = {path.name for path in target.iterdir()}
    assert names == {
        *("README.md", "session.json", "step.png", "kernels.png"),
        *("step.json", "kernels.json", "train.json", "profile.json"),
    }
    assert json.loads((target / "session.json").read_text()).keys() == {"step", "kernels", "train", "profile"}


def test_goals_of_other_parts_are_of_a_gpu_at_full_size_and_of_the_limit_they_name():
    rows = [{"id": name, "measured": "see", "met": None} for name in ("P8", "P9", "P11")]

    def met(profile: dict, kernels: dict) -> list[bool | None]:
        return [row["met"] for row in step_report.from_elsewhere(rows, {"profile": profile, "kernels": kernels})]

    assert met(PROFILE, KERNELS) == [True, True, False]
    on_cpu = {"environment": {"device": "cpu"}}
    assert met(PROFILE | on_cpu, KERNELS | on_cpu) == [None] * 3
    (step_entry,) = [entry for entry in KERNELS["entries"] if entry["case"] == "gaussian_step"]
    assert met(PROFILE | {"size": "small"}, {**KERNELS, "entries": [step_entry | {"limit": "matmul"}]}) == [None] * 3


def test_of_a_part_that_ran_twice_the_later_folder_counts(tmp_path):
    again = STEP | {"sampler": UNIT | {"ours": 12.0}}
    folders = [session(tmp_path / "a", step=STEP), session(tmp_path / "b", step=again)]
    target = collect.collect(folders, tmp_path / "results")
    assert json.loads((target / "step.json").read_text())["sampler"]["ours"] == 12.0


def test_a_rehearsal_says_so_and_measures_nothing(tmp_path):
    target = collect.collect([session(tmp_path / "a", gpu=None, step=STEP)], tmp_path / "results")
    page = (target / "README.md").read_text()
    assert target.name == "rehearsal"
    assert "A rehearsal without a GPU" in page
    assert f"\n0 of {len(model.predict())} predicted figures measured" in page


def test_two_gpus_and_foreign_folders_are_refused(tmp_path, capsys):
    folders = [session(tmp_path / "a", step=STEP), session(tmp_path / "b", gpu="NVIDIA H100", step=STEP)]
    with pytest.raises(ValueError, match="different GPUs: NVIDIA H100, NVIDIA H200"):
        collect.collect(folders, tmp_path / "results")
    with pytest.raises(SystemExit):
        collect.main([str(tmp_path), "--results", str(tmp_path / "results")])
    assert "want a folder that bench/gpu_session.py has left" in capsys.readouterr().err
    (folders[0] / "step.json").write_text("{")
    with pytest.raises(ValueError, match=r"step\.json is damaged"):
        collect.collect(folders[:1], tmp_path / "results")
    assert not (tmp_path / "results").exists()
