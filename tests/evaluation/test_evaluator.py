"""What an evaluation says about a model, with its uncertainty.

Planted bugs that turn it red: the interval over images instead of prompts; `first` taken from the first prompts; no
word of what is evaluated to the processes that wait.
"""

import contextlib
import io
import math

import pytest
import torch
from rich.console import Console

from advgrpo.config import Config
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.reporting.display import Display
from advgrpo.runtime.distributed import SLOW_SECONDS
from advgrpo.runtime.mesh import Mesh
from tests.parts import evaluator_of

SCORES = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.7, 0.9], [0.2, 0.2, 0.8], [1.0, 0.4, 0.4]])  # [prompts, images]


class Looked:
    """The `Reward` protocol; an image's score is its only value."""

    def score(self, images, prompts, references=None):
        return images[:, 0, 0, 0]


@pytest.fixture
def evaluator(monkeypatch):
    """Draws image k of prompt p as a constant SCORES[p, k]."""

    def images(self, prompts, ids):
        return torch.stack([SCORES[i // 1000, i % 1000].expand(3, 2, 2) for i in ids.tolist()])

    monkeypatch.setattr(Evaluator, "images", images)
    prompts = [f"prompt {k}" for k in range(len(SCORES))]
    settings = Config.model_validate({"rollout": {"micro_batch": 8}})
    return evaluator_of(None, settings, prompts, {"looked": Looked()})


def half_width(clusters):
    return 3.182446 * clusters.double().std().item() / math.sqrt(len(clusters))  # t(.975) of 3 degrees of freedom


def test_means_come_with_their_interval_over_prompts(evaluator):
    found = evaluator.run(3, first=1)
    assert found == pytest.approx(
        {
            "eval_looked": SCORES.mean().item(),
            "eval_looked_ci95": half_width(SCORES.mean(1)),
            "eval_looked_first": SCORES[:, 0].mean().item(),
            "eval_looked_first_ci95": half_width(SCORES[:, 0]),
        },
        rel=1e-5,
    )


def test_the_first_images_are_those_of_an_evaluation_of_as_many(evaluator):
    whole, few = evaluator.run(3, first=2), evaluator.run(2)
    assert few == {"eval_looked": whole["eval_looked_first"], "eval_looked_ci95": whole["eval_looked_first_ci95"]}


def test_one_prompt_has_no_interval(evaluator):
    evaluator.prompts = evaluator.prompts[:1]
    assert set(evaluator.run(3)) == {"eval_looked"}


def test_processes_that_wait_learn_of_every_chunk(evaluator, monkeypatch):
    """Two prompts at once; the first chunk may compile kernels, the others' limit is the collective timeout."""
    told, cold = [], SLOW_SECONDS
    monkeypatch.setattr(
        evaluator.distributed, "progress", lambda what, within_seconds=0: told.append((what, within_seconds))
    )
    evaluator.run(3)
    assert told[1:-1] == [
        ("evaluate: prompt 1 of 4", cold),
        ("evaluate: metric looked", cold),
        ("evaluate: prompt 3 of 4", None),
        ("evaluate: metric looked", None),
    ]


def test_who_draws_with_others_may_wait_for_what_they_judge(evaluator, monkeypatch):
    """Process 0 judges the first two prompts, while process 1 waits for it in the next ones' first exchange."""
    told, distributed = [], evaluator.distributed
    monkeypatch.setattr(distributed, "progress", lambda what, within_seconds=0: told.append((what, within_seconds)))
    monkeypatch.setattr(type(distributed), "all_gather", lambda self, local: local.repeat(2))
    monkeypatch.setattr(Evaluator, "_latents", lambda self, prompts, ids: [])
    first, second = ((f"evaluate: prompt {n} of 4", SLOW_SECONDS) for n in (1, 3))
    metric = "evaluate: metric looked", SLOW_SECONDS  # the first that this process computes
    for rank, expected in enumerate([[first, metric, second], [first, second, metric]]):
        evaluator.mesh = Mesh(rank, 2, 2)
        told.clear()
        evaluator.scores(3)
        assert told[1:-1] == expected


def test_progress_counts_prompts(evaluator, monkeypatch):
    told = []
    evaluator.display = Display(Console(file=io.StringIO()))
    monkeypatch.setattr("advgrpo.reporting.display._PLAIN_EVERY", 0.0)
    monkeypatch.setattr(evaluator.display, "print_line", told.append)
    evaluator.run(3)
    assert [line.split("  ")[0] for line in told] == ["evaluating 2/4", "evaluating 4/4"]
    told.clear()
    evaluator.base().run(3)
    assert told[0].startswith("evaluating the base model 2/4")


def test_scores_are_in_the_order_of_the_prompts_whoever_made_them(evaluator, monkeypatch):
    """Two processes share the prompts in turn; what they gather is the one's, then the other's."""
    alone = evaluator.scores(2)
    assert torch.allclose(alone["looked"], SCORES[:, :2].double())
    distributed, parts = evaluator.distributed, []
    monkeypatch.setattr(type(distributed), "all_gather", lambda self, local: parts.append(local) or local.repeat(2))
    for name in ("monitored", "interruptible"):
        monkeypatch.setattr(type(distributed), name, lambda self, *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(type(distributed), "step", lambda self, *a, **k: None)
    monkeypatch.setattr(distributed, "world_size", 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", rank)
        evaluator.scores(2)
    monkeypatch.setattr(type(distributed), "all_gather", lambda self, local: torch.cat(parts))
    assert torch.equal(evaluator.scores(2)["looked"], alone["looked"])
