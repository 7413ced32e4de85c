"""A run with every kind of adversary, end to end, and who looks at its images without being trained on them.

Bugs planted in a copy, each seen red: a SigLIP adversary as the observer; evaluation.backbone ignored when the
adversary is DINO; the observer left out of the scorer; a shared DINO loaded a second time; a monitor that says nothing
about what it cannot judge; a held-out similarity through the adversary's DINO instead of the observer; SigLIP's
features taken for those of an evaluation.backbone of the same folder; fine-tuning that drops an evaluation.backbone in
silence, or loads it without evaluation.
"""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.trainer import paired_accuracy
from advgrpo.errors import UserError
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import blind_spots, build_observer
from advgrpo.training.run import Run
from advgrpo.vision.dino import DinoBackbone
from tests.unit_size import UNIT
from tests.vision_models import write_clip, write_siglip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory, unit_backbone) -> dict[str, str]:
    """Folders of untrained models by kind, and of "other", a second DINO."""
    from advgrpo.tiny import architecture
    from advgrpo.tiny.assets import save_half_precision

    root = tmp_path_factory.mktemp("models")
    save_half_precision(architecture.backbone(seed=9, width=64, layers=2, size=UNIT), root / "other")
    siglip, clip = write_siglip(root / "siglip"), write_clip(root / "clip")
    return {"dino": unit_backbone, "other": str(root / "other"), "siglip": siglip, "pickscore": clip}


@pytest.fixture
def settings(unit_config, models):
    """(kind, sections) -> a run of two iterations, evaluated only where `evaluated` says so."""

    def make(kind: str, *, evaluated: bool = False, **sections):
        held_out = unit_config.data.held_out_prompts if evaluated else ""
        quick = {"data": {"held_out_prompts": held_out}, "evaluation": {"backbone_image_size": 32}}
        made = config.merge(unit_config.model_dump(), quick)
        if kind == "sft":
            made = config.merge(made, {"update": {"objective": "sft"}})
        elif kind == "none":
            made = config.merge(made, {"adversary": {"kind": "none"}, "rewards": {"rule": {"weight": 1.0}}})
        else:
            made = config.merge(made, {"adversary": {"kind": kind, "backbone": models[kind], "schedule": "always"}})
        return config.build(config.merge(made, sections), "test")

    return make


def start(settings) -> tuple[Run, str]:
    """The run, and what it said while it was built."""
    said = io.StringIO()
    made = Run(settings, Distributed.start("cpu"), resume=False, console=Console(file=said, width=400))
    return made, said.getvalue()


def rows_of(made: Run) -> list[dict]:
    return [json.loads(line) for line in (Path(made.config.output_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["dino", "siglip", "pickscore", "none", "sft"])
def test_every_kind_trains_and_is_watched_by_the_dino_that_was_asked_for(settings, models, kind):
    """No reward is trained on the second DINO, whatever the adversary looks through."""
    looks = {"backbone": models["other"], "metrics": ["dino_similarity"]}
    chosen = settings(kind, evaluated=True, evaluation=looks)
    made, said = start(chosen)
    assert "monitor:" not in said
    metric = made.evaluator.metrics["dino_similarity"]
    assert metric.backbone.folder == models["other"]
    objective = made.trainer.objective
    scorer = getattr(objective, "scorer", None)  # fine-tuning has nothing to score
    assert scorer is None or metric is scorer.observer.metric
    before = [p.detach().clone() for _, p in made.trainer.policy.trainable_parameters()]
    head = None if scorer is None else scorer.adversary
    heads = {} if head is None else {name: t.clone() for name, t in head.state_dict().items()}
    made.train()
    summary = json.loads((Path(chosen.output_dir) / "summary.json").read_text())
    assert -1 <= summary["final"]["dino_similarity"] <= 1
    rows = rows_of(made)
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float)))
    assert any(not torch.equal(a, p) for a, (_, p) in zip(before, made.trainer.policy.trainable_parameters()))
    assert {"sft": "sft_loss", "none": "reward_rule"}.get(kind, "discriminator_loss") in rows[0]
    if heads:
        assert any(not torch.equal(t, heads[name]) for name, t in head.state_dict().items())
    if kind == "sft":
        return
    rollout = objective.rollout(objective.table(2), 2)
    watched = scorer.score(rollout, 2)
    images = torch.cat([micro_batch.images for micro_batch in rollout.micro_batches])
    eyes = DinoBackbone(models["other"], image_size=32, dtype="float32", device=CPU)
    torch.testing.assert_close(watched.embeddings, eyes.features(images)["cls"])
    assert watched.dino_similarity is not None
    assert all(row["monitor_group_diversity"] is not None and row["dino_similarity"] is not None for row in rows)


def test_a_dino_adversary_shares_its_network_only_with_an_observer_that_is_the_same(settings, models):
    shared = settings("dino")
    run, _ = start(shared)
    scorer = run.trainer.objective.scorer
    assert scorer.observer.backbone is scorer.adversary.backbone
    same = {"backbone": models["dino"], "backbone_image_size": shared.adversary.image_size}
    for changes, is_shared in ((same, True), ({**same, "backbone_image_size": 64}, False)):
        observer = build_observer(settings("dino", evaluation=changes), scorer.adversary, CPU)
        assert (observer.backbone is scorer.adversary.backbone) == is_shared
        assert observer.backbone.image_size == changes["backbone_image_size"]
    looked = []
    scorer.observer.metric.embed = lambda images: looked.append(images)
    run.train()
    assert not looked  # the adversary's features were enough


def test_a_siglip_is_no_dino_although_its_features_are_there_already(settings, models):
    """Folder and size are the adversary's own, so that its features would be at hand."""
    chosen = settings("siglip", evaluation={"backbone": models["siglip"]})
    adversary = build_adversary(chosen.adversary, device=CPU, seed=chosen.seed)
    assert (adversary.backbone.folder, adversary.backbone.image_size) == (models["siglip"], 32)
    with pytest.raises(UserError, match=r"evaluation\.backbone = .* is a siglip, not a dinov2"):
        build_observer(chosen, adversary, CPU)
    with pytest.raises(UserError, match=r"evaluation\.backbone = .* is a siglip; want a dinov2"):
        start(chosen)


def test_fine_tuning_looks_through_evaluation_backbone_or_refuses_it(settings, models):
    """Nothing else looks through it there: no reward is given and no image is sampled while it trains."""
    looks = {"backbone": models["other"]}
    with pytest.raises(UserError, match=r"evaluation\.backbone = .*/other' would not be looked through.*sft.*metrics"):
        start(settings("sft", evaluated=True, evaluation={**looks, "metrics": ["saturation"]}))
    unevaluated = settings("sft", evaluation={**looks, "metrics": ["dino_similarity"]})
    assert build_observer(unevaluated, None, CPU) is None  # evaluation is off as a whole: no DINO is loaded for nothing


def test_process_0_decides_for_all_how_many_updates_the_head_gets(settings):
    """Means that differ in the last bit, as two types of GPU give, would leave some processes in a sum alone."""
    made, _ = start(settings("pickscore", adversary={"schedule": "when_fooled", "fooled_margin": 0.0}))
    objective = made.trainer.objective
    rollout = objective.rollout(objective.table(0), 0)
    scored = objective.scorer.score(rollout, 0)
    for decided, updates in (([0.7, 0.5, 0.25], made.config.adversary.updates_per_iteration), ([0.5, 0.7, 0.75], 0)):
        objective.distributed.gather_json = lambda value, decided=decided: [decided, value]
        plan, found = objective.train_discriminator(rollout, scored, 0)
        assert (plan.discriminator_updates, found["discriminator_updates"]) == (updates, updates)
        assert found["discriminator_accuracy"] == found["discriminator_paired_accuracy"] == decided[2]
        assert objective.scorer.adversary.bias.item() == pytest.approx(0.6)
    objective.distributed.gather_json = lambda value: [value]
    found = objective.train_discriminator(rollout, scored, 0)[1]
    pairs = paired_accuracy(scored.components["adversary"], scored.reference_rewards, made.config.rollout.group_size)
    assert found["discriminator_accuracy"] == pytest.approx(pairs.item())


def test_what_no_dino_can_see_is_said_once_and_never_guessed(settings):
    made, said = start(settings("siglip", iterations=1))
    assert said.count("monitor:") == 1
    assert "mode_collapse is not judged, reward_hacking sees colours and edges only" in said
    assert "adversary.kind = siglip has no DINO; set evaluation.backbone" in said
    assert made.trainer.objective.scorer.observer is None
    made.train()
    (row,) = rows_of(made)
    assert row["monitor_group_diversity"] is None
    assert "dino_similarity" not in row
    assert "adversary.kind = none" in blind_spots(settings("none"), None)
    assert blind_spots(settings("siglip", monitor={"every": 0}), None) == ""
    assert blind_spots(settings("sft"), None) == ""


def test_a_flag_that_would_end_the_run_but_is_never_judged_is_refused(settings):
    with pytest.raises(
        UserError, match=r"monitor\.stop names mode_collapse, which is not judged.*set evaluation\.back"
    ):
        blind_spots(settings("siglip", monitor={"stop": ["mode_collapse"]}), None)
