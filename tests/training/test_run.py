"""Whole runs on untrained unit models: what they leave, exact resume, signals, several processes, bad input.

Bugs planted in a copy, each seen red: EMA left out of the checkpoint; replay buffer left out; iteration off by one
after resume; reference draw keyed by rank; loss weighted by the local instead of the global number of images;
the generator's turns not looked for in the summary; in a grid's heading the seed or the score left out, or the base's
score over all its images beside that of one each.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.intervals import Interval
from advgrpo.reporting.plots import draw_curves
from advgrpo.runtime.distributed import Distributed
from advgrpo.train import main
from advgrpo.training.run import Run
from tests.zygote import Forked

ROOT = Path(__file__).parents[2]
METRICS = [
    "iteration",
    "reward_generated",
    "reward_reference",
    "reward_std",
    "zero_std_fraction",
    "discriminator_loss",
    "discriminator_accuracy",
    "discriminator_updates",
    "policy_loss",
    "kl",
    "ratio_mean",
    "clip_fraction",
    "pre_update_clip_fraction",
    "log_prob_mismatch_max",
    "grad_norm",
    "dino_similarity",
    "images_per_second",
    "seconds",
    "seconds_sample",
    "seconds_score",
    "seconds_discriminator",
    "seconds_update",
]


def run(settings, *, resume=False, console=None) -> Run:
    made = Run(settings, Distributed.start("cpu"), resume=resume, console=console or Console(quiet=True))
    made.train()
    return made


def metrics(folder) -> list[dict]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def command(settings, tmp_path, *flags: str, processes: int = 1) -> list[str]:
    file = tmp_path / "settings.yaml"
    file.write_text(config.dump(settings))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "advgrpo.train", "--config", str(file), *flags]


def forked(settings, tmp_path, *flags: str, **how) -> Forked:
    """`command`, in a fork of a process that has imported what it needs."""
    *_, name, file = command(settings, tmp_path)
    return Forked("advgrpo.train:main", [name, file, *flags], environment=environment(), **how)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen | Forked) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"no {count} iterations within two minutes")


def test_what_a_run_leaves(unit_config, unit_pipeline, monkeypatch):
    monkeypatch.setattr("advgrpo.training.run.draw_curves", draw_curves)  # rendered, once
    unit_config.output.tensorboard = True
    unit_config.evaluation.every, unit_config.evaluation.grid_prompts = 1, 2
    said = io.StringIO()
    run(unit_config, console=Console(file=said, width=80))
    before = said.getvalue().split("iteration 1/2")[0].splitlines()
    assert 8 < len(before) <= 13  # make adds two when it installs: fifteen lines before training starts
    folder = Path(unit_config.output_dir)
    assert config.load(file=folder / "config.yaml") == unit_config
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for number, row in enumerate(rows):
        assert set(METRICS) <= row.keys()
        assert row["iteration"] == number
        assert row["log_prob_mismatch_max"] == 0
        assert row["pre_update_clip_fraction"] == 0
    assert "eval_dino_similarity" in rows[0]
    assert list((folder / "tensorboard").iterdir())
    for image in ("curves.png", "samples/base.png", "samples/iteration-000001.png", "samples/final.png"):
        assert min(Image.open(folder / image).size) > 200
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seed"] == 42
    assert set(summary["base"]) == set(summary["final"]) == {"dino_similarity", "rule_accuracy"}
    assert set(summary["ci95"]["base"]) == set(summary["ci95"]["final"]) == set(summary["base"])
    for name, gain in summary["gain"].items():
        assert gain["mean"] == pytest.approx(summary["final"][name] - summary["base"][name], abs=1e-6)
        assert f"gain {Interval(**gain).text('+.4f')}" in " ".join(said.getvalue().split())
    assert summary["gain"].keys() == summary["final"].keys()
    assert summary["iterations"] == 2
    assert summary["trained"] is True
    pipe = StableDiffusion3Pipeline.from_pretrained(unit_pipeline)
    pipe.load_lora_weights(folder / "lora")
    assert pipe.get_active_adapters()


def test_grids_say_what_they_show_and_compare_with_as_many_images(unit_config, monkeypatch):
    """While training one image of each prompt is scored: the base's number beside it is that of its first ones."""
    headings = {}
    monkeypatch.setattr("advgrpo.training.run.draw_grid", lambda _, path, header: headings.update({path.stem: header}))
    evaluation = unit_config.evaluation
    evaluation.every, evaluation.during_images_per_prompt, evaluation.images_per_prompt = 1, 1, 4
    evaluation.metrics, evaluation.guidance_scale = ("dino_similarity",), 2.5
    made = run(unit_config)
    base, few = made.base["eval_dino_similarity"], made.base["eval_dino_similarity_first"]
    assert f"{base:.3f}" != f"{few:.3f}"
    during = metrics(unit_config.output_dir)[0]["eval_dino_similarity"]
    final = json.loads((Path(unit_config.output_dir) / "summary.json").read_text())["final"]["dino_similarity"]
    drawn = "seed 42 · 2 steps, guidance 2.5 · dino_similarity"
    assert headings == {
        "base": f"run · base model · {drawn} {base:.3f}",
        "iteration-000001": f"run · iteration 1 of 2 · {drawn} {few:.3f} -> {during:.3f}",
        "final": f"run · iteration 2 of 2 · {drawn} {base:.3f} -> {final:.3f}",
    }


def test_same_seed_same_losses_and_another_seed_others(unit_config, tmp_path):
    run(unit_config)
    again = unit_config.model_copy(deep=True)
    again.output_dir = str(tmp_path / "again")
    run(again)
    assert metrics(again.output_dir) == metrics(unit_config.output_dir)
    other = unit_config.model_copy(deep=True)
    other.output_dir, other.seed, other.iterations = str(tmp_path / "other"), 43, 1
    run(other)
    assert metrics(other.output_dir)[0]["reward_generated"] != metrics(unit_config.output_dir)[0]["reward_generated"]


@pytest.mark.slow
def test_kill_and_resume_equals_never_having_stopped(unit_config, tmp_path):
    unit_config.iterations = 4
    unit_config.output.checkpoint_every = 2
    whole = unit_config.model_copy(deep=True)
    whole.output_dir = str(tmp_path / "whole")
    done = forked(whole, tmp_path)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    folder = Path(unit_config.output_dir)
    process = forked(unit_config, tmp_path)
    wait_for_rows(folder, 3, process)  # one iteration past the checkpoint: it must be repeated exactly
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resume = [sys.executable, "-m", "advgrpo.train", "--resume", str(folder)]
    subprocess.run(resume, env=environment(), check=True, capture_output=True, timeout=300)
    assert metrics(folder) == metrics(whole.output_dir)
    name = "lora/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(folder / name), load_file(Path(whole.output_dir) / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    last = "checkpoints/iteration-000004/tensors.safetensors"
    assert (folder / last).read_bytes() == (Path(whole.output_dir) / last).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.weekly)])
def test_signals_save_and_exit_cleanly(unit_config, tmp_path, number):
    unit_config.iterations = 1000
    process = forked(unit_config, tmp_path)
    folder = Path(unit_config.output_dir)
    wait_for_rows(folder, 2, process)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "--resume" in shown.replace("\n", "")
    done = len(metrics(folder))
    assert (folder / "checkpoints" / f"iteration-{done:06d}" / "manifest.json").exists()
    unit_config.iterations = done + 1
    run(unit_config, resume=True)
    assert len(metrics(folder)) == done + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "processes", "micro_batch"),
    [
        ("policy", 3, 2),
        pytest.param("nft", 2, 2, marks=pytest.mark.weekly),
        pytest.param("scouts", 3, 2, marks=pytest.mark.weekly),
        pytest.param("awm", 3, 8, marks=pytest.mark.weekly),
    ],
)
def test_several_processes_give_the_losses_of_one(objective, processes, micro_batch, unit_config, tmp_path):
    """Three have shares that differ, or, of one micro-batch of 8 to a minibatch, the third has nothing at all."""
    cheaper = objective == "scouts"
    unit_config.iterations, unit_config.update.objective = 3, "policy" if cheaper else objective
    unit_config.rollout.prompts_per_iteration = 4
    unit_config.rollout.micro_batch = micro_batch  # of 2: a group of four spans two processes
    unit_config.rollout.initial_noise, unit_config.rollout.window.order = "per_image", "contiguous"
    unit_config.adversary.patch_sampling, unit_config.adversary.reference_choice = "with_replacement", "in_turn"
    unit_config.update.ema_rule = "mini_batch"
    unit_config.update.kl_weight = 0.0 if cheaper else 0.01
    if cheaper:
        unit_config.rollout.scouts, unit_config.rollout.scout_tail_steps = 2, 1
        unit_config.update.informative_share, unit_config.update.skip_dead_groups = 0.5, True
    run(unit_config)
    several = unit_config.model_copy(deep=True)
    several.output_dir = str(tmp_path / "several")
    done = forked(several, tmp_path, processes=processes)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    alone, together = metrics(unit_config.output_dir), metrics(several.output_dir)
    assert len(alone) == len(together) == 3
    for one, both in zip(alone, together):
        assert both.pop("flags") == one.pop("flags")
        counted = [name for name in one if name.endswith(("dark_share", "edge_density"))]
        for name in counted:  # of pixels beyond a threshold: rounding may take one of them across it
            assert both.pop(name) == pytest.approx(one.pop(name), abs=4 / (16 * 32 * 32)), name
        assert len(counted) == 4
        rounding = 1e-5 if cheaper else 1e-6  # the loss is a mean of large advantages, which divide by a small spread
        assert both == pytest.approx(one, abs=rounding, rel=1e-5)
    last = "checkpoints/iteration-000003/tensors.safetensors"
    ours, theirs = (load_file(Path(each.output_dir) / last) for each in (several, unit_config))
    for part, step in (("policy.", unit_config.update.learning_rate), ("head.", unit_config.adversary.learning_rate)):
        for name in (name for name in theirs if name.startswith(part)):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.01 * step)


@pytest.mark.weekly
@pytest.mark.slow
def test_a_failing_rank_ends_all_with_its_error(unit_config, tmp_path):
    """An exception on rank 1 alone: both end within a minute, and both say why."""
    unit_config.rollout.micro_batch = 2
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys\n"
        "from advgrpo.training.policy_gradient import PolicyGradient\n"
        "from advgrpo.train import main\n"
        "real = PolicyGradient.rollout\n"
        "def rollout(self, *which):\n"
        "    if self.distributed.rank == 1 and which[1] == 1:\n"
        "        raise RuntimeError('planted failure')\n"
        "    return real(self, *which)\n"
        "PolicyGradient.rollout = rollout\n"
        "sys.exit(main())\n"
    )
    line = command(unit_config, tmp_path, processes=2)
    line[line.index("-m", 3) : line.index("-m", 3) + 2] = [str(script)]
    started = time.monotonic()
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "planted failure" in done.stdout + done.stderr
    assert time.monotonic() - started < 75  # start-up included


def test_fast_and_plain_runs_have_the_same_losses(unit_config, tmp_path):
    run(unit_config)
    plain = unit_config.model_copy(deep=True)
    plain.output_dir, plain.fast = str(tmp_path / "plain"), False
    run(plain)
    for fast, slow in zip(metrics(unit_config.output_dir), metrics(plain.output_dir)):
        assert fast.pop("flags") == slow.pop("flags")
        fast.pop("monitor_merge_error", None)  # the plain path merges nothing
        assert fast == pytest.approx(slow, rel=2e-3, abs=2e-4)


def test_features_are_computed_once_and_shared_by_reward_and_head(unit_config, monkeypatch):
    from advgrpo.adversary.feature_head import FeatureHeadAdversary

    made = Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    trainer, computed, scored, trained = made.trainer, [], [], []
    discriminators = trainer.objective.discriminator_trainer
    real_features, real_score, real_train = (
        FeatureHeadAdversary.features,
        FeatureHeadAdversary.score,
        discriminators.train,
    )

    def features(self, images, prompts):
        computed.append(len(images))
        return real_features(self, images, prompts)

    def score(self, features, ids, **keywords):
        scored.append(features)
        return real_score(self, features, ids, **keywords)

    monkeypatch.setattr(FeatureHeadAdversary, "features", features)
    monkeypatch.setattr(FeatureHeadAdversary, "score", score)
    monkeypatch.setattr(
        trainer.objective.discriminator_trainer,
        "train",
        lambda batch, *a: trained.append(batch) or real_train(batch, *a),
    )
    trainer.iterate()
    computed.clear()
    trainer.iteration = 0  # the same prompts again: their references are cached by now
    trainer.iterate()
    assert sum(computed) == unit_config.images_per_iteration
    assert trained[-1].generated is scored[-2]
    assert trained[-1].reference is scored[-1]


def test_alternate_schedule_leaves_the_generator_alone(unit_config):
    unit_config.adversary.schedule = "alternate"
    unit_config.adversary.alternate_period = 2
    run(unit_config)
    first, second = metrics(unit_config.output_dir)
    assert (first["discriminator_updates"], first["policy_loss"]) == (2, None)
    assert second["discriminator_updates"] == 0
    assert second["grad_norm"] > 0


def test_full_fine_tuning_runs_and_exports_a_transformer(unit_config):
    unit_config.model.train = "full"
    unit_config.iterations = 1
    run(unit_config)
    assert (Path(unit_config.output_dir) / "transformer" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.in_ci(1)
def test_bfloat16_runs_on_policy_as_well(unit_config, checkpointing):
    """The precision of the full-size presets: frozen base and backbone in bfloat16, adapters and latents float32."""
    unit_config.model.dtype = unit_config.adversary.dtype = "bfloat16"
    unit_config.model.gradient_checkpointing = checkpointing
    made = run(unit_config)
    for row in metrics(unit_config.output_dir):
        assert row["log_prob_mismatch_max"] == 0
        assert row["grad_norm"] > 0
    assert {p.dtype for _, p in made.trainer.policy.trainable_parameters()} == {torch.float32}
    assert made.trainer.policy.network.transformer.dtype == torch.bfloat16


def test_nan_reward_stops_the_run_with_the_prompts_name(unit_config, monkeypatch):
    made = Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    monkeypatch.setattr(made.trainer.objective.scorer.adversary.head["b2"], "data", torch.tensor([float("nan")]))
    with pytest.raises(FloatingPointError, match=r"prompt 'a .* on .*'"):
        made.train()
    assert (Path(unit_config.output_dir) / "metrics.jsonl").read_text() == ""


def test_disk_full_while_saving_leaves_the_old_checkpoint(unit_config, monkeypatch):
    import errno

    from advgrpo.runtime import checkpoint

    unit_config.output.checkpoint_every = 1
    real, calls = checkpoint._write_files, []

    def full(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "_write_files", full)
    with pytest.raises(UserError, match=r"[Ff]ull|space"):
        run(unit_config)
    monkeypatch.undo()
    assert [p.name for p in (Path(unit_config.output_dir) / "checkpoints").iterdir()] == ["iteration-000001"]
    run(unit_config, resume=True)
    assert len(metrics(unit_config.output_dir)) == 2


def reference_folder(tmp_path, prompts) -> Path:
    folder = tmp_path / "references"
    folder.mkdir()
    for i in range(len(prompts)):
        image = Image.new("RGB", (32, 32), (i, 0, 0))
        image.paste("white", (8, 8, 24, 24))  # images in a single colour are refused
        image.save(folder / f"{i}.png")
    index = {p: [f"{i}.png"] for i, p in enumerate(prompts)}
    (folder / "references.json").write_text(json.dumps(index))
    return folder


BAD_INPUT = {
    "missing prompt file": (lambda c, t: setattr(c.data, "prompts", str(t / "none.txt")), "none.txt"),
    "empty prompt file": (
        lambda c, t: ((t / "empty.txt").write_text(""), setattr(c.data, "prompts", str(t / "empty.txt"))),
        "empty.txt",
    ),
    "prompt without references": (
        lambda c, t: (t / "prompts.txt").write_text("a dog\nb cat\n"),
        "'b cat' has no refer",
    ),
    "unreadable image": (lambda c, t: (t / "references" / "0.png").write_bytes(b"no image"), "unreadable"),
    "grey image": (lambda c, t: Image.new("L", (32, 32)).save(t / "references" / "0.png"), "mode L, not RGB"),
    "black image": (
        lambda c, t: Image.new("RGB", (32, 32)).save(t / "references" / "0.png"),
        "0.png is in a single colour; remove it",
    ),
    "tiny image": (lambda c, t: Image.new("RGB", (8, 8)).save(t / "references" / "0.png"), "8x8"),
    "wrong model folder": (lambda c, t: setattr(c.model, "path", str(t)), "model.path = "),
    "group not divisible": (
        lambda c, t: setattr(c.rollout, "micro_batch", 3),
        "rollout.group_size = 4 is not divisible",
    ),
    "window outside": (lambda c, t: setattr(c.rollout.window, "steps", (4,)), "rollout.window.steps = [4]"),
    "held-out prompt trained on": (
        lambda c, t: setattr(c.data, "held_out_prompts", c.data.prompts),
        "data.held_out_prompts shares 1 prompts",
    ),
    "judge outside the tiny world": (
        lambda c, t: ((t / "held.txt").write_text("a cat\n"), setattr(c.data, "held_out_prompts", str(t / "held.txt"))),
        "judges the tiny world",
    ),
    "output is a file": (lambda c, t: ((t / "run").write_text(""), None), "output_dir = "),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_found_before_work_starts(name, unit_config, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    unit_config.data.prompts, unit_config.data.held_out_prompts = str(prompts), ""
    unit_config.data.references = str(reference_folder(tmp_path, ["a dog"]))
    break_it, expected = BAD_INPUT[name]
    break_it(unit_config, tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_text(config.dump(unit_config))
    assert main(["--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unknown_preset_and_key_exit_with_2(tmp_path, capsys):
    assert main(["--preset", "tyny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("reward: {kind: dino}")
    assert main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "unknown key 'reward'" in capsys.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(unit_config):
    run(unit_config)
    with pytest.raises(UserError, match="already holds a run"):
        run(unit_config)


def test_resume_refuses_other_settings_and_damaged_or_foreign_checkpoints(unit_config, tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint in .* yet; start it again with .* --resume auto"):
        run(unit_config, resume=True)
    run(unit_config)
    unit_config.iterations = 3
    other = unit_config.model_copy(deep=True)
    other.update.learning_rate = 0.5
    with pytest.raises(UserError, match=r"update.learning_rate: 0.0003 -> 0.5"):
        run(other, resume=True)
    folder = Path(unit_config.output_dir) / "checkpoints" / "iteration-000002"
    state = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(state[:-10])
    with pytest.raises(UserError, match=r"tensors\.safetensors"):
        run(unit_config, resume=True)
    (folder / "tensors.safetensors").write_bytes(state)
    run(unit_config, resume=True)
    assert len(metrics(unit_config.output_dir)) == 3
    with pytest.raises(UserError, match="is done already"):
        run(unit_config, resume=True)
    (Path(unit_config.output_dir) / "summary.json").unlink()  # cut short in the last evaluation: only that is repeated
    run(unit_config, resume=True)
    assert (Path(unit_config.output_dir) / "summary.json").exists()
    (Path(unit_config.output_dir) / "checkpoints" / "iteration-000003" / "manifest.json").write_text("{}")
    unit_config.iterations = 4
    with pytest.raises(UserError, match=r"iteration-000003.*--resume-from .*iteration-000002"):
        run(unit_config, resume=True)


def test_a_run_that_trains_nothing_says_so_first_and_last(unit_config, tmp_path, capsys):
    """All iterations are warm-up: the LoRA stays zero."""
    unit_config.iterations = unit_config.adversary.warmup_iterations = 1
    file = tmp_path / "settings.yaml"
    file.write_text(config.dump(unit_config))
    assert main(["--config", str(file)]) == 0
    assert capsys.readouterr().out.startswith("note: all 1 iterations are warm-up of the adversary's head")
    summary = json.loads((Path(unit_config.output_dir) / "summary.json").read_text())
    assert summary["trained"] is False
    assert "adversary.warmup_iterations = 1" in summary["not_trained_because"]
    trained = load_file(Path(unit_config.output_dir) / "lora" / "pytorch_lora_weights.safetensors")
    assert not any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


def test_a_generator_that_never_had_its_turn_is_said_at_the_end(unit_config):
    """With this schedule nobody can know beforehand."""
    unit_config.adversary.schedule, unit_config.adversary.fooled_margin = "fooled_or_generator", 1e6
    said = io.StringIO()
    run(unit_config, console=Console(file=said, width=80))
    summary = json.loads((Path(unit_config.output_dir) / "summary.json").read_text())
    assert summary["trained"] is False
    assert summary["not_trained_because"].startswith("no iteration trained the generator")
    assert f"note: {summary['not_trained_because']}" in said.getvalue()


def test_infinity_as_no_limit_trains_and_is_resumed(unit_config):
    """Neither gradient, ratio nor importance weight is limited; the checkpoint's JSON holds that."""
    update = unit_config.update
    update.max_grad_norm = update.clip_range = update.importance_cap = float("inf")
    update.old_log_prob = "truncated_importance"
    unit_config.iterations = 1
    run(unit_config)
    saved = config.load(file=Path(unit_config.output_dir) / "config.yaml")
    assert saved == unit_config
    saved.iterations = 2
    run(saved, resume=True)
    rows = metrics(unit_config.output_dir)
    assert [row["iteration"] for row in rows] == [0, 1]
    assert all(row["clip_fraction"] == row["importance_capped_fraction"] == 0 for row in rows)
