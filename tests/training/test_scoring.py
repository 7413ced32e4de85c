"""Rewards in the trainer: composition by known answers, and runs with fixed, mixed and foreign learned rewards.

Bugs planted in a copy, each seen red: the gate gives the mean instead of the lowest; groups normalised over the whole
iteration; the reference budget counts prompts; shared references computed once per prompt; out of memory passed on as
it is; components not logged; references of a reward that compares with them scored, or scored at every use; the
observer names the adversary's field; rewards of references not looked at before the update; an image exactly at the
gate barred; references drawn by the row on a process instead of the image's number; all images copied together for
the statistics, or for no reward.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.adversary.augmentation import Augmentation
from advgrpo.config import RewardSection
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.plan.advice import advice
from advgrpo.rewards import REWARDS, reward_class
from advgrpo.rewards.compose import compose, normalized
from advgrpo.rewards.remote import RemoteReward
from advgrpo.rewards.vlm_judge import VlmJudge
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from advgrpo.training.scoring import ReferenceScores, Scorer
from advgrpo.types import MicroBatch, MicroBatchRollout, Rollout
from tests.vision_models import write_clip


def run(settings, *, resume=False) -> Run:
    made = Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))
    made.train()
    return made


def metrics(settings) -> list[dict]:
    return [json.loads(line) for line in (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()]


def change(settings, **sections):
    return config.build(config.merge(settings.model_dump(), sections), "test")


def test_weighted_sum_is_equation_8():
    rule, similar = torch.tensor([0.0, 1.0, 0.5, 1.0]), torch.tensor([0.2, 0.4, 0.6, 0.8])
    sections = {"rule": RewardSection(weight=0.3), "sim": RewardSection(weight=0.7)}
    total = compose({"rule": rule, "sim": similar}, sections, 2)
    torch.testing.assert_close(total, 0.3 * rule + 0.7 * similar)


def test_normalisation_is_per_group_or_over_the_iteration():
    reward = torch.tensor([1.0, 3.0, 10.0, 30.0])
    torch.testing.assert_close(normalized(reward, "group", 2), torch.tensor([-1.0, 1, -1, 1]), atol=2e-4, rtol=0)
    expected = (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)
    torch.testing.assert_close(normalized(reward, "global", 2), expected)
    assert torch.equal(normalized(torch.full((4,), 7.0), "group", 2), torch.zeros(4))
    assert normalized(reward, "none", 2) is reward


def test_a_gated_image_gets_its_groups_lowest_total_and_nobody_elses():
    """The gate itself passes: a judge's 1.0 is not below a gate of 1.0."""
    quality, bar = torch.tensor([5.0, 1.0, 2.0, 9.0, 3.0, 4.0]), torch.tensor([0.1, 0.9, 0.9, 0.5, 0.9, 0.9])
    sections = {"quality": RewardSection(weight=1.0), "bar": RewardSection(weight=0.0, gate=0.5)}
    assert compose({"quality": quality, "bar": bar}, sections, 3).tolist() == [1.0, 1.0, 2.0, 9.0, 3.0, 4.0]


def test_every_section_fits_its_reward():
    """A field that the reward's constructor does not have would fail only when somebody uses it."""
    import inspect

    sections = config.Config().rewards.sections()
    assert set(sections) - {"adversary"} <= set(REWARDS)
    for name, section in sections.items():
        if name != "adversary":
            assert set(section.arguments()) <= set(inspect.signature(reward_class(name)).parameters), name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adversary": {"kind": "none"}}, "no fixed reward"),
        ({"rewards": {"adversary": {"weight": 0.0}, "rule": {"weight": 1.0}}}, "would learn for nothing"),
        ({"rewards": {"aesthetic": {"weight": 1.0}}}, r"rewards\.aesthetic\.head is empty"),
        ({"rewards": {"remote": {"weight": 1.0}}}, r"rewards\.remote\.url is empty"),
        ({"data": {"references": ""}}, r"adversary\.kind needs references"),
        ({"data": {"style": "somewhere"}}, "both set"),
    ],
)
def test_rewards_that_cannot_work_are_named(unit_config, sections, message):
    with pytest.raises(UserError, match=message):
        config.check(change(unit_config, **sections))


def test_an_unknown_metric_names_the_nearest(unit_config):
    settings = change(unit_config, evaluation={"metrics": ["dino_similarty"]})
    with pytest.raises(UserError, match="did you mean 'dino_similarity'"):
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def flow_grpo(unit_config):
    return change(
        unit_config,
        adversary={"kind": "none"},
        rewards={"rule": {"weight": 1.0}},
        evaluation={"metrics": ["rule_accuracy", "saturation"]},
        data={"references": ""},
    )


def test_flow_grpo_runs_without_adversary_or_references_and_resumes_exactly(unit_config, tmp_path):
    settings = change(flow_grpo(unit_config), iterations=3)
    run(settings)
    rows = metrics(settings)
    assert all(
        "reward_rule" in row and "discriminator_loss" not in row and "reward_reference" not in row for row in rows
    )
    assert all(row["reward_generated"] == pytest.approx(row["reward_rule"]) for row in rows)
    assert all(row["log_prob_mismatch_max"] == 0 for row in rows)
    assert {"rule_accuracy", "saturation"} == set(json.loads((tmp_path / "run" / "summary.json").read_text())["final"])
    part = change(settings, iterations=2, output_dir=str(tmp_path / "part"))
    run(part)
    resumed = run(change(part, iterations=3), resume=True)
    whole = Run(change(settings, iterations=4), Distributed.start("cpu"), resume=True, console=Console(quiet=True))
    for name, tensor in resumed.trainer.state()[0].items():
        assert torch.equal(tensor, whole.trainer.state()[0][name]), name


def test_a_mix_logs_every_component(unit_config):
    settings = change(
        unit_config,
        rewards={"adversary": {"weight": 0.5, "normalize": "group"}, "rule": {"weight": 0.5}},
        adversary={"warmup_iterations": 0},
    )
    made = run(settings)
    rows = metrics(settings)
    assert all({"reward_adversary", "reward_rule", "reward_reference", "dino_similarity"} <= set(row) for row in rows)
    # the normalised adversary's mean is 0
    assert rows[0]["reward_generated"] == pytest.approx(0.5 * rows[0]["reward_rule"], abs=1e-5)
    assert list(made.trainer.objective.scorer.rewards) == ["rule"]


def test_a_style_folder_serves_every_prompt_and_its_features_are_computed_once(unit_config, tmp_path, monkeypatch):
    from PIL import Image

    style = tmp_path / "style"
    style.mkdir()
    for number in range(5):
        image = Image.new("RGB", (32, 32), (40 * number, 90, 200))
        image.paste("white", (8, 8, 24, 24))
        image.save(style / f"{number}.png")
    settings = change(unit_config, data={"references": "", "style": str(style)})
    made = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    features = made.trainer.objective.scorer.reference_features
    computed, real = [], features._compute
    monkeypatch.setattr(features, "_compute", lambda prompt: computed.append(prompt) or real(prompt))
    made.train()
    assert len(computed) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no image"):
        Sources.read(change(unit_config, data={"references": "", "style": str(empty)}))


def test_a_reference_budget_keeps_whole_prompts(unit_config):
    everything = Sources.read(unit_config)
    per_prompt = len(everything.references.files(everything.prompts[0]))
    half = Sources.read(change(unit_config, data={"reference_count": 3 * per_prompt}))
    assert len(half.prompts) == 3
    assert set(half.prompts) < set(everything.prompts)
    assert half.held_out == everything.held_out
    with pytest.raises(UserError, match="0 takes all"):
        Sources.read(change(unit_config, data={"reference_count": 10**6}))


def test_running_out_of_memory_names_the_knob(unit_config, monkeypatch):
    made = Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail():
        raise error

    monkeypatch.setattr(made.trainer, "iterate", fail)
    with pytest.raises(UserError, match=r"rollout\.micro_batch|gradient_checkpointing"):
        made.train()
    assert "2.00 GiB" in advice(error, unit_config)


def test_the_observer_names_its_own_field(unit_config):
    """Not that of the reward of the same name."""
    settings = change(unit_config, adversary={"kind": "none"}, rewards={"rule": {"weight": 1.0}})
    settings.evaluation.backbone, settings.evaluation.backbone_image_size = unit_config.adversary.backbone, 33
    with pytest.raises(UserError, match=r"evaluation\.backbone_image_size = 33 is not a multiple"):
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def share(ids: list[int], prompts: list[str], group_size: int) -> Rollout:
    """What a process holds that drew these images, two to a micro-batch."""
    micro_batches = []
    for start in range(0, len(ids), 2):
        image_ids = torch.tensor(ids[start : start + 2])
        groups, row = (image_ids // group_size).unique(return_inverse=True)
        micro_batch = MicroBatch(image_ids, [prompts[group] for group in groups.tolist()], groups, row, minibatch=0)
        micro_batches.append(
            MicroBatchRollout(micro_batch, conditioning=None, steps=[], images=torch.zeros(len(image_ids), 3, 8, 8))
        )
    return Rollout(micro_batches)


@pytest.mark.parametrize("choice", ["random", "in_turn"])
def test_an_image_meets_the_same_reference_whoever_holds_it(unit_config, choice):
    settings = change(unit_config, adversary={"reference_choice": choice})
    sources = Sources.read(settings)
    scorer = Scorer(
        rollout=settings.rollout,
        seed=settings.seed,
        adversary=SimpleNamespace(config=settings.adversary, backbone=None),
        reference_features=None,
        rewards={},
        weights={},
        references=sources.references,
        observer=None,
        distributed=Distributed.start("cpu"),
    )
    of_everything = share(list(range(8)), sources.prompts[:2], settings.rollout.group_size)
    whole = scorer._reference_draws(of_everything, iteration=3)
    assert whole.shape == (8,)
    assert 0 <= whole.min() < whole.max() < 1
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 2, 4, 6], [7, 1, 5, 3]):
        held = share(ids, sources.prompts[:2], settings.rollout.group_size)
        assert torch.equal(scorer._reference_draws(held, iteration=3), whole[ids])
    again = scorer._reference_draws(of_everything, iteration=4)
    assert torch.equal(again, whole) == (choice == "in_turn")


@pytest.mark.parametrize("sees", [{"augment": "crop_flip"}, {"feature_layers": (1, 2)}])
def test_who_measures_sees_whole_images_through_the_last_layer_whatever_the_adversary_sees(unit_config, sees):
    """Also where both look through one network."""
    settings = change(unit_config, adversary=sees, data={"held_out_prompts": ""})
    trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    scorer, seen = trainer.objective.scorer, []
    backbone = scorer.adversary.backbone
    assert scorer.observer.backbone.model is backbone.model
    rollout = trainer.objective.rollout(trainer.objective.table(1), 1)
    scored = scorer.score(rollout, 1)
    images = torch.cat([micro_batch.images for micro_batch in rollout.micro_batches])
    torch.testing.assert_close(scored.embeddings, backbone.of_last_layer().features(images)["cls"])
    crops = Augmentation(settings.adversary.augment, settings.seed).generated(images, rollout.image_ids, 1)
    torch.testing.assert_close(scored.generated["cls"], backbone.features(crops)["cls"])
    scorer.adversary.features = lambda images, prompts: seen.append(images.shape) or scored.generated
    scorer._features(rollout, 2)
    side = settings.model.resolution * (7 if "augment" in sees else 8) // 8
    assert {shape[-2:] for shape in seen} == {(side, side)}


def test_references_in_turn_are_seen_alike_and_go_by_the_place_in_the_group(unit_config, monkeypatch):
    """As in the released code, whose batches of 8 images meet the 8 references of their prompt one by one."""
    settings = change(unit_config, adversary={"reference_choice": "in_turn"}, rollout={"group_size": 16})
    settings.data.held_out_prompts = ""
    trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    features, paired = trainer.objective.scorer.reference_features, []
    real = features.pick
    monkeypatch.setattr(
        features, "pick", lambda prompts, draws: paired.append((prompts, real(prompts, draws))) or paired[-1][1]
    )
    trainer.iterate()
    prompts, reference = paired[0]
    assert len(prompts) == 32
    for start in (0, 16):
        own = features.prompt(prompts[start])["cls"]
        assert 1 < len(own) < 16
        assert torch.equal(reference["cls"][start : start + 16], own[torch.arange(16) % len(own)])


def test_an_iteration_trains_the_reward_if_it_is_fooled_and_else_the_generator(unit_config):
    """Schedule fooled_or_generator: with a margin of a million every reward is, without one the first head is not."""
    settings = change(unit_config, adversary={"schedule": "fooled_or_generator", "fooled_margin": 1e6})
    settings.data.held_out_prompts = ""
    trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    for margin in (1e6, 0.0, 1e6, 0.0):
        settings.adversary.fooled_margin = margin
        weights = [p.detach().clone() for _, p in trainer.policy.trainable_parameters()]
        adversary = trainer.objective.scorer.adversary
        head = {name: tensor.clone() for name, tensor in adversary.state_dict().items()}
        row = trainer.iterate()
        fooled = row["reward_generated"] > row["reward_reference"] - margin
        assert fooled == (margin > 0)
        assert row["discriminator_updates"] == (2 if fooled else 0)
        assert (row["policy_loss"] is None) == fooled
        after = [p for _, p in trainer.policy.trainable_parameters()]
        assert all(torch.equal(*pair) for pair in zip(weights, after)) == fooled
        assert all(torch.equal(head[name], t) for name, t in adversary.state_dict().items()) == (not fooled)


LEARNED = {"none": {"kind": "none"}, "dino": {}, "pickscore": {"kind": "pickscore", "processor": None}}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_process_without_images_has_columns_and_features_of_the_others_names_and_widths(unit_config, tmp_path, kind):
    """What is gathered, and what the head's updates are made of, must not depend on who has images."""
    backbone, clip = unit_config.adversary.backbone, write_clip(tmp_path / "clip")
    learned = {**LEARNED[kind], **({"backbone": clip} if kind == "pickscore" else {})}
    looks = {"backbone": backbone, "backbone_image_size": unit_config.adversary.image_size, "metrics": ["saturation"]}
    rewards = {"rule": {"weight": 0.5}}
    settings = change(unit_config, adversary=learned, rewards=rewards, evaluation=looks, data={"held_out_prompts": ""})
    objective = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer.objective
    scorer, some, none = objective.scorer, objective.rollout(objective.table(0), 0), Rollout([])
    of_some, of_none = [], []
    for rollout, found in ((some, of_some), (none, of_none)):
        features = (None, None) if scorer.adversary is None else scorer._features(rollout, 0)
        columns, embeddings = scorer._columns(rollout, *features, 0)
        found += columns.described().items()
        found += [("embeddings", embeddings)]
        found += [(name, tensor) for side in features if side is not None for name, tensor in side.tensors.items()]
    assert len(of_some) > 3
    for (name, one), (same, other) in zip(of_some, of_none, strict=True):
        assert (name, one.float().dtype, one.shape[1:], 0) == (same, other.dtype, other.shape[1:], len(other))
    assert scorer.totals([], 0, 4).shape == (0,)


@pytest.mark.parametrize("broken", ["adversary", "fixed"])
def test_a_reference_without_a_finite_reward_is_named_before_anything_is_trained(unit_config, monkeypatch, broken):
    settings = change(unit_config, rewards={"rule": {"weight": 0.5}}, adversary={"schedule": "always"})
    made = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    trainer, scorer = made.trainer, made.trainer.objective.scorer
    if broken == "adversary":
        real, what = scorer.adversary.score, "the reward adversary of the references of 1 images is not finite"

        def score(features, ids, *, purpose, iteration):
            found = real(features, ids, purpose=purpose, iteration=iteration)
            if purpose == "reference":
                found.reward[5] = torch.nan
            return found

        monkeypatch.setattr(scorer.adversary, "score", score)
    else:
        real, what = scorer._of_references.columns, "the reward rule of the references of 1 images is not"

        def columns(prompts, size):
            found = real(prompts, size)
            found["rule"][5] = torch.inf
            return found

        monkeypatch.setattr(scorer._of_references, "columns", columns)
    before = {name: t.clone() for name, t in trainer.state()[0].items()}
    prompt = trainer.objective.micro_batches.prompts_of(0)[1]  # of image 5, in the second group of four
    with pytest.raises(FloatingPointError, match=rf"{what}.*prompt '{prompt}' \(image 5\)"):
        trainer.iterate()
    after = trainer.state()[0]
    assert all(torch.equal(before[name], t) for name, t in after.items())


class Brightness:
    """A reward with known answers that counts its calls."""

    name = "brightness"

    def __init__(self):
        self.calls = 0

    def score(self, images, prompts, references):
        self.calls += 1
        return images.mean((1, 2, 3)) + len(prompts[0])


def test_fixed_rewards_of_the_references_are_taken_once_per_prompt(unit_config):
    sources, reward = Sources.read(unit_config), Brightness()
    slow = Brightness()
    slow.scores_references = False
    assert not RemoteReward.scores_references
    assert not VlmJudge.scores_references
    rewards = {"brightness": reward, "dino_similarity": reward, "clip_reference_similarity": reward, "slow": slow}
    scores = ReferenceScores(rewards, sources.references, torch.device("cpu"))
    first, second = sources.prompts[:2]
    for _ in range(2):
        columns = scores.columns([first, second, first], (32, 32))
    assert list(columns) == ["brightness"]  # the others compare with references, or are someone else's time
    assert reward.calls == 2
    for prompt, value in zip([first, second, first], columns["brightness"].tolist()):
        images = sources.references.load_images(sources.references.files(prompt)[:4], size=(32, 32))
        assert value == pytest.approx(images.mean().item() + len(prompt), rel=1e-6)


@pytest.mark.parametrize(("rewards", "copies"), [({}, 0), ({"rule": {"weight": 0.5}}, 1)])
def test_all_images_are_copied_together_only_for_fixed_rewards(unit_config, monkeypatch, rewards, copies):
    """Such a copy is 0.3 GB on each of eight GPUs in the paper's runs."""
    settings = change(unit_config, rewards=rewards, rollout={"prompts_per_iteration": 4})  # 8 are a prompt's references
    trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    whole, made, real = (settings.images_per_iteration, 3, 32, 32), [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    row = trainer.iterate()
    assert [tuple(tensor.shape) for tensor in made].count(whole) == copies
    assert row["monitor_saturation"] > 0


def test_what_references_would_get_is_logged_beside_the_reward(unit_config):
    """The judge gives crisp references full marks; without a monitor nobody asks it to."""
    evaluation = {"metrics": ["rule_accuracy"]}
    settings = change(unit_config, adversary={"kind": "none"}, rewards={"rule": {"weight": 1.0}}, evaluation=evaluation)
    run(settings)
    for row in metrics(settings):
        assert row["reward_rule_of_references"] > 0.9 > row["reward_rule"]
    off = change(settings, output_dir=settings.output_dir + "-off", monitor={"every": 0})
    run(off)
    assert not [name for row in metrics(off) for name in row if name.endswith("_of_references")]
