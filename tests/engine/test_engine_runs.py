"""Runs with a rollout engine: what they learn is what runs without one learn, they go on, and end well when it dies.

Bugs planted, each seen red (tests/mutants, engine-*): the window's steps that the engine has taken are taken again; the
engine keeps the weights of the iteration before; noise keyed by row instead of image.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from advgrpo import config as configuration
from advgrpo.errors import RunFailure
from advgrpo.training.resuming import differences
from tests import zygote
from tests.engine import stand_ins
from tests.engine.stand_ins import Engine, acting
from tests.training.test_supervised import build

# Between diffusers' forward and ours, after two iterations: distance over the way gone, of a parameter. Adam makes
# whole steps of gradients that are next to nothing.
TOLERANCE = 2e-3
POLICY = {"rollout": {"window": {"steps": [2]}, "initial_noise": "shared"}}
NFT = {"rollout": {"initial_noise": "per_image"}, "update": {"objective": "nft"}, "nft": {"old_decay_rate": 0.1}}


@pytest.fixture
def settings(unit_config):
    small = {
        "data": {"held_out_prompts": ""},
        "evaluation": {"metrics": []},
        "rollout": {"noise": "torch_float32"},
        "update": {"learning_rate": 1e-2},
        "adversary": {"schedule": "always"},
    }
    return change(unit_config, small)


def change(base, *changes):
    merged = base.model_dump()
    for each in changes:
        merged = configuration.merge(merged, each)
    return configuration.build(merged, "test")


def with_engine(settings, url, folder, **engine):
    asked = {"kind": "sglang", "urls": [url], "retries": 0, "wait": 0, "backoff": 0.01, **engine}
    return change(settings, {"output_dir": str(folder), "rollout": {"engine": asked}})


def parameters_of(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in trainer.policy.trainable_parameters()]


@pytest.mark.parametrize("changes", [NFT, pytest.param(POLICY, marks=pytest.mark.weekly)], ids=["nft", "policy"])
def test_a_run_with_an_engine_learns_what_one_without_learns(settings, url, tmp_path, changes):
    settings = change(settings, changes)
    alone, served = build(settings).trainer, build(with_engine(settings, url, tmp_path / "served")).trainer
    start = parameters_of(alone)
    for _ in range(2):
        own, theirs = alone.iterate(), served.iterate()
    for before, one, other in zip(start, parameters_of(alone), parameters_of(served)):
        assert (one - before).norm() > 0
        assert (one - other).norm() <= TOLERANCE * (one - before).norm()
    if "log_prob_mismatch_max" in theirs:
        assert theirs["log_prob_mismatch_max"] == own["log_prob_mismatch_max"] == 0, "likelihoods are the trainer's own"


@pytest.mark.weekly
@pytest.mark.parametrize("shared", [True, False])
def test_of_a_window_the_engine_takes_the_steps_before(settings, url, tmp_path, monkeypatch, shared):
    noise = {"rollout": {"initial_noise": "shared" if shared else "per_image"}}
    trainer = build(with_engine(change(settings, POLICY, noise), url, tmp_path / "served")).trainer
    sampler, taken, asked = trainer.objective.sampler, [], []
    run, draw = sampler.run, trainer.objective.engine.engine.draw
    monkeypatch.setattr(sampler, "run", lambda table, *a, **k: taken.append(table.taken) or run(table, *a, **k))
    monkeypatch.setattr(
        trainer.objective.engine.engine,
        "draw",
        lambda requests, *a: asked.append([(r.count, r.steps) for r in requests]) or draw(requests, *a),
    )
    trainer.iterate()
    assert set(taken) == {(2, 3)}
    rows = 1 if shared else 4
    assert [each for each in asked if each[0][1] == (0, 2)] == [[(rows, (0, 2))]] * 2


@pytest.mark.weekly
def test_a_run_goes_on_with_an_engine_that_was_started_anew(settings, url, standing, tmp_path):
    """To the bit: this engine repeats itself."""
    settings = change(settings, NFT)
    whole = build(with_engine(settings, url, tmp_path / "whole")).trainer
    for _ in range(2):
        whole.iterate()
    first = change(with_engine(settings, url, tmp_path / "parts"), {"iterations": 1, "output": {"checkpoint_every": 1}})
    build(first).train()
    standing.forget()
    second = build(change(first, {"iterations": 2}), resume=True)
    second.trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(whole), parameters_of(second.trainer)))


class LiesWhenItDraws(Engine):
    """Passes every probe, of two images; then its images stray from the policy's, before the window."""

    strayed = 0

    def trajectory(self, request, seeds):
        found, sigmas = super().trajectory(request, seeds)
        if len(seeds) > 2:
            self.strayed += 1
            found = [found[0], *(1.1 * each for each in found[1:])]
        return found, sigmas


def test_likelihoods_are_recomputed_whatever_the_engine_has_drawn(settings, url, standing, tmp_path):
    """By the trainer's own forward, of the very latents that it gave: the window begins elsewhere, without a mismatch
    between the likelihoods of the rollout and the update's."""
    own_noise = {"rollout": {"window": {"steps": [2]}, "initial_noise": "per_image"}}
    with acting(standing, LiesWhenItDraws):
        found = build(with_engine(change(settings, own_noise), url, tmp_path / "run")).trainer.iterate()
        assert standing.strayed == 2, "micro-batches"
    assert found["log_prob_mismatch_max"] == 0


def test_a_run_goes_on_without_its_engine_and_with_one_that_it_had_not():
    asked = [
        {"rollout": {"engine": each}} for each in ({"kind": "none", "urls": []}, {"kind": "sglang", "urls": ["x"]})
    ]
    assert not differences(*asked)


@pytest.mark.weekly
def test_what_an_engine_began_ends_without_it_as_a_run_that_had_none(settings, url, tmp_path):
    settings = change(settings, NFT, {"iterations": 1, "output": {"checkpoint_every": 1}})
    began = with_engine(settings, url, tmp_path / "parts")
    start = parameters_of(build(change(settings, {"output_dir": str(tmp_path / "start")})).trainer)
    build(began).train()
    alone = change(began, {"iterations": 2, "rollout": {"engine": {"kind": "none", "urls": []}}})
    second, whole = build(alone, resume=True).trainer, build(settings).trainer
    for trainer, times in ((second, 1), (whole, 2)):
        for _ in range(times):
            trainer.iterate()
    for ours, theirs, begun in zip(parameters_of(second), parameters_of(whole), start):
        assert (ours - theirs).norm() <= TOLERANCE * (theirs - begun).norm()


@pytest.mark.weekly
def test_an_engine_that_dies_ends_the_run_with_a_checkpoint_it_goes_on_from(settings, url, standing, tmp_path):
    settings = change(with_engine(change(settings, NFT), url, tmp_path / "run"), {"output": {"checkpoint_every": 0}})
    run = build(settings)
    iterate, wanted = run.trainer.iterate, []

    def iterate_and_die():
        found = iterate()
        wanted.append(parameters_of(run.trainer))
        standing.__class__ = Gone
        return found

    run.trainer.iterate = iterate_and_die
    with acting(standing, Engine), pytest.raises(RunFailure, match=r"rollout engine sglang at http.*set_lora: .*500"):
        run.train()
    assert [each.name for each in (Path(settings.output_dir) / "checkpoints").iterdir()] == ["iteration-000001"]
    run.close()
    resumed = build(settings, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted[0], parameters_of(resumed.trainer)))
    assert resumed.trainer.iterate()


@pytest.mark.weekly
def test_processes_that_share_an_engine_learn_what_one_learns(settings, url, standing, tmp_path):
    """Process 0 brings it up to date; process 1 draws with that."""
    loras = []
    for processes in (1, 2):
        standing.forget()
        small = {"rollout": {"micro_batch": 2}, "update": {"minibatches": 1}, "device": "cpu"}
        own = change(with_engine(change(settings, NFT), url, tmp_path / f"of-{processes}"), small)
        (tmp_path / "run.yaml").write_text(configuration.dump(own))
        arguments = ["--config", str(tmp_path / "run.yaml")]
        done = zygote.run("advgrpo.train:main", arguments, processes=processes, environment={**os.environ})
        assert done.returncode == 0, done.stderr
        loras.append(safetensors.torch.load_file(Path(own.output_dir) / "lora/pytorch_lora_weights.safetensors"))
    for name, one in loras[0].items():
        assert (one - loras[1][name]).norm() <= TOLERANCE * one.norm(), name


class Gone(stand_ins.Engine):
    def set_lora(self, request):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
