"""Every preset is a run that passes all checks once it has data; paper and released differ as docs/method.md says.

Bugs planted in a copy, each seen red: no KL in the -kl preset; two released layers; the mean as the released partner;
sft that is not; another learning rate for one job; an output folder of another name.
"""

import pytest
import yaml

from advgrpo import config
from advgrpo.config import reading
from advgrpo.errors import UserError
from advgrpo.tiny import WORLDS


def with_data(name: str, tmp_path):
    """The preset with whatever its first lines ask for."""
    settings = config.load(name)
    if settings.data.prompts not in WORLDS:
        settings.data.prompts, settings.data.held_out_prompts = "prompts.txt", "held_out.txt"
        needed = config.needs_references(settings)
        settings.data.style = "images" if needed and name.endswith("style") else ""
        settings.data.references = "references" if needed and not settings.data.style else ""
    if name.endswith("repair"):
        settings.model.lora.start_from = str(tmp_path)
    if name.endswith("distill"):
        settings.update.teacher = str(tmp_path)
    return settings


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_passes_all_checks_with_data_alone(name, tmp_path):
    settings = with_data(name, tmp_path)
    config.check(settings)
    assert settings.output_dir == f"runs/{name}"
    assert config.read_yaml(preset_file(name)).get("preset", "") in ["", *config.preset_names()]


def preset_file(name: str):
    from importlib import resources
    from pathlib import Path

    return Path(str(resources.files("advgrpo") / "presets" / f"{name}.yaml"))


@pytest.mark.parametrize("name", [name for name in config.preset_names() if not name.startswith("tiny")])
def test_a_full_size_preset_says_what_it_needs_and_asks_for_it(name):
    text = preset_file(name).read_text()
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    settings = config.load(name)
    with pytest.raises(UserError):
        config.check(settings)
    assert "data.prompts" in comment
    assert "https://github.com/showlab/Adv-GRPO/tree/main/dataset/" in comment or "sd35m-dino-paper" in comment
    if config.needs_references(settings):
        assert "data.references" in comment or "data.style" in comment


OF_PAPER = ("sd35m-dino-paper", "sd35m-dino-fast", "sd35m-adv-pickscore-paper", "sd35m-adv-pickscore-fast")
RELEASED = ("sd35m-dino-released", "sd35m-adv-pickscore-released")


# Other articles' losses, on Flow-GRPO's own run: docs/jobs/objectives.md.
OTHER_LOSSES = {
    "grpo-guard": {"trust_region": "normalized_ratio", "step_weights": "inverse_length"},
    "flow-dppo": {"trust_region": "divergence"},
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
@pytest.mark.parametrize(("size", "base"), [("tiny", "tiny"), ("sd35m", "sd35m-flow-grpo-original")])
def test_another_loss_changes_nothing_else(size, base, name):
    ours, theirs = config.load(f"{size}-{name}").model_dump(), config.load(base).model_dump()
    assert {section for section in ours if ours[section] != theirs[section]} == {"output_dir", "update"}
    bounds = {"clip_range", "max_divergence"}
    changed = {field: value for field, value in ours["update"].items() if value != theirs["update"][field]}
    assert {field: value for field, value in changed.items() if field not in bounds} == OTHER_LOSSES[name]


ON_FLOW_GRPO = (
    "sd35m-flow-grpo-original",
    "sd35m-tempflow",
    "sd35m-mixgrpo",
    "sd35m-mixgrpo-flash",
    *(f"sd35m-{name}" for name in OTHER_LOSSES),
)


@pytest.mark.parametrize(
    ("name", "base"),
    [("tiny-distill", "tiny-flow-grpo-pickscore"), ("sd35m-distill", "sd35m-flow-grpo-pickscore")],
)
def test_distillation_learns_from_the_teacher_alone(name, base):
    ours, theirs = config.load(name).model_dump(), config.load(base).model_dump()
    assert {section for section in ours if ours[section] != theirs[section]} == {"output_dir", "update"}
    update = config.load(name).update
    assert (update.policy_weight, update.kl_to, update.teacher) == (0, "teacher", "")
    assert update.kl_weight > 0


@pytest.mark.parametrize("name", ["tiny-gdpo", "sd35m-gdpo"])
def test_gdpo_normalises_every_reward_by_itself_and_their_sum_over_the_iteration(name):
    settings = config.load(name)
    used = [section for section in settings.rewards.sections().values() if section.used]
    assert len(used) == 2
    assert {section.normalize for section in used} == {"group"}
    assert settings.advantage.std == "global"


@pytest.mark.parametrize(("name", "base"), [("tiny-mixgrpo", "tiny"), ("sd35m-mixgrpo", "sd35m-flow-grpo-original")])
def test_mixgrpo_slides_its_window_and_changes_no_loss(name, base):
    settings, theirs = config.load(name), config.load(base)
    assert settings.rollout.window.chosen_order == "sliding"
    assert settings.update == theirs.update
    assert settings.rollout.model_copy(update={"window": None, "num_steps": 0}) == theirs.rollout.model_copy(
        update={"window": None, "num_steps": 0}
    )


@pytest.mark.parametrize("name", ["tiny-mixgrpo-flash", "sd35m-mixgrpo-flash"])
def test_mixgrpo_flash_shortens_the_tail_and_nothing_else(name):
    settings, whole = config.load(name), config.load(name.removesuffix("-flash"))
    assert settings.rollout.tail_solver == "dpm2"
    plain = settings.rollout.model_copy(update={"tail_steps": 0, "tail_solver": "euler"})
    assert (plain, settings.update) == (whole.rollout, whole.update)


@pytest.mark.parametrize(("name", "steps"), [("tiny-tempflow", (1, 2, 3, 4)), ("sd35m-tempflow", tuple(range(9)))])
def test_tempflow_branches_off_one_trajectory_at_every_step_and_weighs_it(name, steps):
    settings = config.load(name)
    rollout = settings.rollout
    assert (rollout.initial_noise, rollout.window.branching, rollout.window.steps) == ("shared", True, steps)
    assert settings.update.step_weights == "noise"
    assert (settings.trained_steps, rollout.prompts_per_iteration % len(steps)) == (1, 0)
    assert rollout.images == {"tiny-tempflow": 64, "sd35m-tempflow": 32 * 9 * 6}[name]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in config.preset_names()
        if name.startswith("sd35m") and name not in ON_FLOW_GRPO and "-nft-" not in name and name != "sd35m-awm"
    ],
)
def test_what_paper_and_released_have_in_common(name):
    """docs/method.md section 8, for every job."""
    settings = config.load(name)
    model, rollout, update, evaluation = settings.model, settings.rollout, settings.update, settings.evaluation
    assert model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert (model.resolution, model.dtype, model.lora.init, model.lora.blocks) == (512, "bfloat16", "gaussian", "all")
    assert (model.lora.rank, model.lora.alpha, model.lora.targets) == (32, 64, config.LORA_TARGETS)
    assert (rollout.dynamics, rollout.eta, rollout.likelihood) == ("flow_cps", 0.8, "squared_error")
    assert (rollout.num_steps, rollout.guidance_scale) == (10, 4.5)
    assert (rollout.prompts_per_iteration, rollout.group_size) == (48, 16)
    assert (evaluation.num_steps, evaluation.guidance_scale) == (40, 4.5)
    assert (update.minibatches, update.learning_rate, update.betas) == (2, 3e-4, (0.9, 0.999))
    assert (update.weight_decay, update.ema_decay) == (1e-4, 0.9)
    assert settings.seed == 42
    released = name in (*RELEASED, "sd35m-adv-ocr-dino")
    assert settings.global_steps == (1000 if released else 0)
    assert settings.update.ema_rule == ("mini_batch" if released else "optimizer_step")
    assert settings.rollout.window.chosen_order == ("fixed" if released else "contiguous")
    assert (rollout.initial_noise == "shared") == name.endswith("-fast")
    assert (settings.adversary.replay_capacity > 0) == name.endswith("-fast")


@pytest.mark.parametrize("name", OF_PAPER)
def test_what_the_article_says_and_the_released_code_does_not(name):
    settings = config.load(name)
    assert (settings.iterations, settings.global_steps) == (1000, 0)
    assert (settings.rollout.window.size, settings.rollout.window.noise_range) == (2, (0.5, 1.0))
    assert settings.advantage.std == "group"
    assert settings.adversary.patch_sampling == "without_replacement"
    assert (settings.adversary.schedule, settings.adversary.updates_per_iteration) == ("when_fooled", 10)


@pytest.mark.parametrize("job", ["dino", "adv-pickscore"])
def test_fast_presets_differ_from_the_papers_in_shared_noise_and_replay_and_say_that_they_are_ours(job):
    ours, paper = (config.load(f"sd35m-{job}-{of}").model_dump() for of in ("fast", "paper"))
    assert ours["rollout"] == {**paper["rollout"], "initial_noise": "shared"}
    assert ours["adversary"] == {**paper["adversary"], "replay_capacity": 1024}
    assert {name for name in ours if ours[name] != paper[name]} == {"output_dir", "rollout", "adversary"}
    assert preset_file(f"sd35m-{job}-fast").read_text().startswith("# Ours, not the authors'")


def test_pickscore_of_the_paper_and_of_the_released_code():
    paper, released = (config.load(f"sd35m-adv-pickscore-{of}") for of in ("paper", "released"))
    for settings in (paper, released):
        assert (settings.adversary.kind, settings.adversary.learning_rate) == ("pickscore", 5e-6)
        assert settings.adversary.backbone == settings.rewards.pickscore.path == "yuvalkirstain/PickScore_v1"
        assert settings.rewards.fixed() == {}  # the adversary is the only reward
    assert (paper.adversary.trainable_layers, paper.adversary.objective) == (2, "binary")
    assert (released.adversary.trainable_layers, released.adversary.objective) == (1, "pairwise")


def test_dino_backbones_and_head_updates():
    paper, released = (config.load(f"sd35m-dino-{of}") for of in ("paper", "released"))
    assert (paper.adversary.updates_per_iteration, paper.adversary.learning_rate) == (10, 1e-4)
    assert paper.adversary.betas == released.adversary.betas == (0.5, 0.999)
    assert released.adversary.backbone == "facebook/dinov2-base"
    assert released.adversary.reward_weights == (0.7, 0.3)
    assert released.adversary.alternate_period == 10  # nine of ten train the head alone


def test_ocr_and_its_partners():
    """Equation 8: half the text, half the likeness to a reference."""
    paper, released = config.load("sd35m-adv-ocr").rewards, config.load("sd35m-adv-ocr-dino").rewards
    assert {name: r.weight for name, r in paper.fixed().items()} == {"ocr": 0.5, "clip_reference_similarity": 0.5}
    assert {name: r.weight for name, r in released.fixed().items()} == {"ocr": 0.5, "dino_similarity": 0.5}
    assert released.dino_similarity.reduction == "max"
    assert (paper.ocr.gate, released.ocr.gate) == (None, None)


def test_nft_on_pickscore_is_the_released_codes():
    """sd3_pickscore of NVlabs/DiffusionNFT 24af555, config/nft.py and config/base.py; with DINO the adversary is the
    paper's."""
    pickscore, dino, paper = (config.load(f"sd35m-{job}") for job in ("nft-pickscore", "nft-dino", "dino-paper"))
    for settings in (pickscore, dino):
        model, rollout, update = settings.model, settings.rollout, settings.update
        assert model.path == "stabilityai/stable-diffusion-3.5-medium"
        assert (model.resolution, model.lora.rank, model.lora.alpha, model.lora.init) == (512, 32, 64, "gaussian")
        assert (rollout.prompts_per_iteration, rollout.group_size, rollout.num_steps) == (48, 24, 10)
        assert (rollout.guidance_scale, settings.evaluation.guidance_scale) == (1, 1)
        assert (settings.advantage.std, settings.advantage.clip, settings.advantage.eps) == ("global", 5, 1e-4)
        assert (update.objective, update.minibatches, update.kl_weight, update.ema_decay) == ("nft", 1, 1e-4, 0.9)
        assert (update.learning_rate, update.weight_decay, update.max_grad_norm) == (3e-4, 1e-4, 1)
        nft = settings.nft
        assert (nft.beta, nft.old_decay_start, nft.old_decay_rate, nft.old_decay_max) == (1, 0, 0.001, 0.5)
        assert nft.trained_of(rollout.num_steps) == 9
    assert dino.adversary == paper.adversary
    assert pickscore.rewards == config.load("sd35m-flow-grpo-original").rewards
    assert (pickscore.adversary.kind, dino.rewards.fixed()) == ("none", {})


def test_a_preset_that_was_read_is_nobodys_to_change_and_says_what_any_reader_of_yaml_reads():
    changed = config.read_preset("tiny")
    changed["rollout"]["group_size"] = -1
    assert config.read_preset("tiny")["rollout"]["group_size"] > 0
    for name in config.preset_names():
        file = preset_file(name)
        assert reading.read_yaml(file) == yaml.load(file.read_text(), reading._Loader), name


def test_a_key_that_stands_twice_is_an_error_of_either_parser(tmp_path):
    text = "seed: 1\nseed: 2\n"
    for loader in (reading._Quick, reading._Loader):
        with pytest.raises(yaml.constructor.ConstructorError, match="'seed' stands twice"):
            yaml.load(text, loader)
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(UserError, match=r"'seed' stands twice; leave one out \(line 2, column 1\)"):
        reading.read_yaml(tmp_path / "twice.yaml")


def test_awm_on_pickscore_is_the_public_codes():
    """X-GenGroup/Flow-Factory a0b2bc5, examples/awm/lora/sd3_5/default.yaml."""
    settings = config.load("sd35m-awm")
    model, rollout, update, awm = settings.model, settings.rollout, settings.update, settings.awm
    assert (model.path, model.resolution) == ("stabilityai/stable-diffusion-3.5-medium", 512)
    assert (model.lora.rank, model.lora.alpha) == (32, 64)
    assert (rollout.prompts_per_iteration, rollout.group_size, rollout.num_steps) == (48, 16, 14)
    assert (rollout.guidance_scale, settings.evaluation.guidance_scale, settings.evaluation.num_steps) == (1, 1, 40)
    assert (settings.advantage.std, settings.advantage.clip) == ("global", 1)
    assert (update.objective, update.minibatches, update.clip_range, update.ema_decay) == ("awm", 1, 1, 0.3)
    assert (update.kl_to, update.kl_weight, update.learning_rate, update.weight_decay) == ("ema", 1, 3e-4, 1e-4)
    assert (awm.weighting, awm.huber_power, awm.trained_of(rollout.num_steps)) == ("generalized_huber", 0.25, 6)
    assert (settings.evaluation.every, settings.adversary.kind) == (20, "none")


def assert_as_flow_grpo_runs_pickscore(settings, *, evaluated_steps: int) -> None:
    """What its configurations for FLUX.1 and Qwen-Image have in common, in config/grpo.py and config/base.py."""
    model, rollout, update, evaluation = settings.model, settings.rollout, settings.update, settings.evaluation
    assert (model.resolution, model.lora.rank, model.lora.alpha, model.lora.init) == (512, 64, 128, "gaussian")
    assert (rollout.dynamics, rollout.likelihood, rollout.initial_noise) == ("flow_sde", "gaussian", "per_image")
    assert (settings.advantage.std, settings.advantage.clip) == ("global", 5)
    assert (update.objective, update.kl_weight, update.minibatches, update.clip_range) == ("policy", 0, 2, 1e-4)
    assert (update.learning_rate, update.betas, update.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
    assert (evaluation.every, evaluation.num_steps) == (30, evaluated_steps)
    assert evaluation.guidance_scale == rollout.guidance_scale
    assert {name: reward.weight for name, reward in settings.rewards.fixed().items()} == {"pickscore": 1}
    assert settings.adversary.kind == "none"


def test_pickscore_on_flux1_is_the_public_codes():
    """yifan123/flow_grpo 54809b5, config/grpo.py: pickscore_flux; 74db691, scripts/train_flux.py: adapters and text."""
    settings = config.load("flux1-flow-grpo-pickscore")
    assert_as_flow_grpo_runs_pickscore(settings, evaluated_steps=28)
    model, rollout, update = settings.model, settings.rollout, settings.update
    feed_forwards = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    assert (model.path, model.max_sequence_length) == ("black-forest-labs/FLUX.1-dev", 128)
    assert set(model.lora.targets) == {*config.LORA_TARGETS, *feed_forwards}
    assert (rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch) == (48, 24, 3)
    assert (rollout.num_steps, rollout.guidance_scale, rollout.eta) == (6, 3.5, 0.9)
    assert (rollout.window.steps, settings.trained_steps) == ((0, 1, 2, 3, 4, 5), 5)
    assert (update.ema_decay, update.ema_rule) == (0.9, "mini_batch")


def test_pickscore_on_qwen_image_is_the_public_codes():
    """zhtmike/flow_grpo a1f47c5, config/grpo.py: pickscore_qwenimage; 27b6ef8, scripts/train_qwenimage.py: adapters and
    text."""
    settings = config.load("qwen-image-flow-grpo-pickscore")
    assert_as_flow_grpo_runs_pickscore(settings, evaluated_steps=50)
    model, rollout = settings.model, settings.rollout
    feed_forwards = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert (model.path, model.max_sequence_length) == ("Qwen/Qwen-Image", 256)
    assert set(model.lora.targets) == {*config.LORA_TARGETS, *feed_forwards}
    assert (rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch) == (32, 16, 4)
    assert (rollout.num_steps, rollout.guidance_scale, rollout.eta) == (10, 4, 1.2)
    window = rollout.window
    assert (window.chosen_order, window.size, window.noise_range) == ("contiguous", 2, (0.5, 1.0))  # steps 0 to 4
    assert (settings.trained_steps, settings.update.ema_decay) == (2, 0)


def test_jobs_differ_from_their_base_in_the_job_only():
    for job, base, fields in (
        ("sd35m-flow-grpo-pickscore-kl", "sd35m-flow-grpo-pickscore", {"update"}),
        ("sd35m-sft", "sd35m-dino-paper", {"update"}),
        ("sd35m-style", "sd35m-dino-paper", set()),
        ("sd35m-repair", "sd35m-dino-paper", set()),
        ("flux1-style", "flux1-dino", set()),
        ("qwen-image-style", "qwen-image-dino", set()),
        ("flux1-adv-ocr-dino", "flux1-dino", {"adversary", "rewards", "evaluation"}),
        ("qwen-image-adv-ocr-dino", "qwen-image-dino", {"adversary", "rewards", "evaluation"}),
        ("tiny-sft", "tiny", {"update"}),
        ("tiny-nft", "tiny-flow-grpo-pickscore", {"update", "rollout"}),
        ("tiny-nft-adv", "tiny", {"update", "rollout"}),
        ("tiny-awm", "tiny-flow-grpo-pickscore", {"update", "rollout", "advantage", "awm"}),
        ("tiny-repair", "tiny", set()),
    ):
        ours, theirs = config.load(job).model_dump(), config.load(base).model_dump()
        assert {name for name in ours if ours[name] != theirs[name]} == {"output_dir", *fields}
    assert config.load("sd35m-flow-grpo-pickscore").update.kl_weight == 0
    assert config.load("sd35m-flow-grpo-pickscore-kl").update.kl_weight > 0
    assert config.load("sd35m-sft").update.objective == "sft"
    assert config.load("sd35m-flow-grpo-pickscore").rewards.pickscore.weight == 1
