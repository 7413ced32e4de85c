"""Configuration: strict keys, cross-field checks, presets with METHOD section 8's values, flags over files."""

import pytest
import yaml

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.train import parse


def test_presets_load_and_round_trip(tmp_path):
    for name in config.preset_names():
        loaded = config.load(name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(config.dump(loaded))
        assert config.load(file=file) == loaded


def test_paper_preset_holds_the_papers_values():
    paper = config.load("sd35m-dino-paper")
    assert (paper.rollout.num_steps, paper.rollout.guidance_scale, paper.rollout.noise_level) == (10, 4.5, 0.8)
    assert (paper.rollout.group_size, paper.rollout.prompts_per_iteration) == (16, 48)
    assert paper.rollout.dynamics == "flow_cps"
    assert (paper.model.lora.rank, paper.model.lora.alpha, len(paper.model.lora.targets)) == (32, 64, 8)
    assert (paper.update.learning_rate, paper.update.betas, paper.update.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
    assert (paper.update.ema_decay, paper.update.optimizer_windows, paper.update.clip_range) == (0.9, 2, 1e-5)
    assert paper.adversary.backbone == "facebook/dinov2-large"
    assert paper.adversary.loss_weights == paper.adversary.reward_weights == (0.7, 0.3)
    assert (paper.adversary.schedule, paper.adversary.normalize) == ("when_fooled", "never")
    assert config.eligible_steps(paper) == [0, 1, 2, 3, 4]


def test_released_preset_differs_where_the_released_code_does():
    released = config.load("sd35m-dino-released")
    assert released.rollout.window.steps == (0, 1)
    assert released.adversary.loss_weights == (1.0, 0.3)
    assert (released.adversary.schedule, released.adversary.normalize) == ("alternate", "reward_only")
    assert released.advantage.std == "global"


@pytest.mark.parametrize("preset", ["sd35m-dino-paper", "sd35m-dino-released"])
@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_full_size_presets_divide_over_gpus(preset, world_size):
    settings = config.load(preset)
    settings.data.prompts, settings.data.references = "p.txt", "refs"
    if world_size == 64:
        with pytest.raises(UserError, match="multiple of 1024"):
            config.check(settings, world_size)
        settings.rollout.prompts_per_iteration = 64
    config.check(settings, world_size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: {grup_size: 4}", "unknown key 'rollout.grup_size'; did you mean 'group_size'?"),
        ("itterations: 3", "did you mean 'iterations'?"),
        ("rollout: {group_size: 1}", "rollout.group_size = 1: "),
        ("adversary: {kind: dinno}", "adversary.kind = 'dinno': Input should be 'dino'"),
        ("adversary: {schedule: sometimes}", "adversary.schedule = 'sometimes'"),
        ("update: {learning_rate: fast}", "update.learning_rate = 'fast'"),
        ("preset: tinny", "unknown preset 'tinny'; did you mean 'tiny'?"),
        ("[1, 2]", "want a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_names_the_field_the_value_and_the_nearest_key(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(file=file)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rollout": {"group_size": 10, "micro_batch": 4}}, "rollout.group_size = 10 is not divisible by"),
        ({"rollout": {"prompts_per_iteration": 3, "micro_batch": 8}}, "multiple of 16"),
        (
            {"rollout": {"window": {"steps": [0, 10]}}},
            "rollout.window.steps = [0, 10]: want distinct steps within 0..8",
        ),
        ({"rollout": {"window": {"steps": [9]}}}, "within 0..8"),  # flow_cps adds no noise on the last step
        ({"rollout": {"window": {"steps": []}}}, "rollout.window.steps = []"),
        ({"rollout": {"window": {"size": 3, "noise_range": [0.9, 1.0]}}}, "widen noise_range"),
        ({"data": {"references": ""}}, "data.references is empty"),
        ({"model": {"resolution": 30}}, "model.resolution = 30"),
    ],
)
def test_checks_across_fields_name_the_field_to_change(change, expected):
    broken = config.build(config.merge(config.read_preset("tiny"), change), "test")
    with pytest.raises(UserError) as error:
        config.check(broken, world_size=1)
    assert expected in str(error.value)


def test_flags_override_file_and_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"preset": "tiny", "seed": 5, "iterations": 7}))
    settings, resume = parse(["--config", str(file), "--seed", "9", "--no-fast", "--rollout.window.steps", "1", "2"])
    assert (settings.seed, settings.iterations, settings.fast, resume) == (9, 7, False, False)
    assert settings.rollout.window.steps == (1, 2)
    assert settings.model.path == "tiny"


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in (
        "--preset",
        "--config",
        "--resume",
        "--iterations",
        "--rollout.noise-level",
        "--adversary.replay-share",
    ):
        assert flag in shown


def test_every_field_says_what_it_is():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert not list(undocumented(config.Config))


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--iteration", "3"])
    assert stop.value.code == 2
    assert "--iterations" in capsys.readouterr().err + capsys.readouterr().out


def test_resume_excludes_preset_and_wants_a_run(tmp_path):
    with pytest.raises(UserError, match="leave out --preset"):
        parse(["--resume", str(tmp_path), "--preset", "tiny"])
    with pytest.raises(UserError, match="is missing"):
        parse(["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fast": False, "rollout": {"precision": "fp8"}}, r"rollout\.precision = 'fp8' needs --fast"),
        ({"fast": False, "model": {"base_precision": "fp8"}}, r"model\.base_precision = 'fp8' needs --fast"),
        ({"model": {"train": "full"}, "rollout": {"window_forward": "merged"}}, r"rollout\.window_forward = 'merged'"),
        ({"rollout": {"window_forward": "merged"}}, r"set update\.old_log_prob to recompute"),
        ({"model": {"lora": {"start_from": "/nowhere"}}}, r"model\.lora\.start_from = '/nowhere' is not a folder"),
    ],
)
def test_precision_settings_that_cannot_work_are_named(change, message):
    settings = config.build(config.merge(config.read_preset("tiny"), change), "test")
    with pytest.raises(UserError, match=message):
        config.check(settings, 1)
