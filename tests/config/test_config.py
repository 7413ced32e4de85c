"""Configuration: strict keys, cross-field checks, presets' values, flags over files, one
language of errors.

Bugs planted, each seen red: allow_inf_nan left at pydantic's default; infinity written to JSON as it is; YAML's last
key wins; true taken for 1; flags named without their section; a flag left out of --help.
"""

import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from advgrpo import config
from advgrpo.config.command_line import Source, Start
from advgrpo.config.help import reference_page
from advgrpo.config.reading import nested
from advgrpo.errors import UserError
from advgrpo.runtime.shares import share
from advgrpo.train import parse


def test_presets_load_and_round_trip(tmp_path):
    for name in config.preset_names():
        loaded = config.load(name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(config.dump(loaded))
        assert config.load(file=file) == loaded


def test_paper_preset_holds_the_papers_values():
    paper = config.load("sd35m-dino-paper")
    assert (paper.rollout.num_steps, paper.rollout.guidance_scale, paper.rollout.eta) == (10, 4.5, 0.8)
    assert (paper.rollout.group_size, paper.rollout.prompts_per_iteration) == (16, 48)
    assert paper.rollout.dynamics == "flow_cps"
    assert (paper.model.lora.rank, paper.model.lora.alpha, len(paper.model.lora.targets)) == (32, 64, 8)
    assert (paper.update.learning_rate, paper.update.betas, paper.update.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
    assert (paper.update.ema_decay, paper.update.minibatches, paper.update.clip_range) == (0.9, 2, 1e-5)
    assert paper.adversary.backbone == "facebook/dinov2-large"
    assert paper.adversary.loss_weights == paper.adversary.reward_weights == (0.7, 0.3)
    assert (paper.adversary.schedule, paper.adversary.normalize) == ("when_fooled", "never")
    assert config.eligible_steps(paper.rollout) == [0, 1, 2, 3, 4]


def test_released_preset_differs_where_the_released_code_does():
    released = config.load("sd35m-dino-released")
    assert released.rollout.window.steps == (0, 1)
    assert released.adversary.loss_weights == (1.0, 0.3)
    assert (released.adversary.schedule, released.adversary.normalize) == ("alternate", "reward_only")
    assert released.advantage.std == "global"


@pytest.mark.parametrize("preset", config.preset_names())
def test_any_number_of_processes_shares_a_presets_images(preset):
    """From 1 to 1,024: every micro-batch is dealt once, in order, and nobody has two more than another."""
    settings = config.load(preset)
    for processes in (*range(1, 65), 96, 100, 127, 128, 255, 256, 511, 512, 768, 769, 1000, 1023, 1024):
        dealt = settings.balance(processes)
        assert dealt.total * dealt.images == settings.images_per_iteration
        loads = [0] * processes
        for number in range(dealt.rounds):
            own = [share(dealt.pieces, number, rank=rank, world_size=processes) for rank in range(processes)]
            assert [piece for part in own for piece in part] == list(range(dealt.pieces))
            assert max(map(len, own)) == dealt.most_of_a_round
            loads = [load + len(part) for load, part in zip(loads, own)]
        assert (max(loads), loads.count(0)) == (dealt.most, dealt.idle)
        assert max(loads) - min(loads) <= 1
        assert loads[0] > 0, "process 0 is never idle"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: {grup_size: 4}", "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"),
        ("itterations: 3", "did you mean 'iterations'?"),
        ("rollout: {group_size: 1}", "rollout.group_size = 1: "),
        (
            "adversary: {kind: dinno}",
            "adversary.kind = 'dinno': want one of dino, siglip, pickscore, none; did you mean 'dino'?",
        ),
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
        (
            {"rollout": {"prompts_per_iteration": 3, "micro_batch": 8}},
            "a multiple of 8 x 2 = 16; set rollout.micro_batch = 4, or rollout.prompts_per_iteration = 4",
        ),
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
        config.check(broken)
    assert expected in str(error.value)


def test_flags_override_file_and_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"preset": "tiny", "seed": 5, "iterations": 7}))
    settings, start = parse(["--config", str(file), "--seed", "9", "--no-fast", "--rollout.window.steps", "1", "2"])
    assert (settings.seed, settings.iterations, settings.fast, start.resume) == (9, 7, False, None)
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
        "--rollout.eta",
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--iteration", "3"], "unknown flag --iteration; did you mean --iterations?"),
        (["--learning-rate", "3"], "did you mean --update.learning-rate or --adversary.learning-rate?"),
        (["--rollout.grup-size", "4"], "did you mean --rollout.group-size?"),
        (["--update", "3"], "--update is a group of settings: set one of its fields, such as --update.objective"),
        (["--fast", "true"], "--fast takes no value: write --fast or --no-fast"),
        (["--seed"], "--seed: the value is missing; want a whole number of at least 0"),
        (["iterations=3"], "unexpected argument 'iterations=3'; did you mean --iterations=3?"),
        (["--seed", "3", "5"], "unexpected argument '5'"),
    ],
)
def test_a_flag_that_cannot_be_read_is_an_error_with_a_remedy(flags, expected):
    with pytest.raises(UserError) as error:
        parse(flags)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("update.eps", "inf", "update.eps = inf: not finite; want a number above 0 (--update.eps; default 1e-08)"),
        ("update.eps", "nan", "update.eps = nan: not finite; want a number above 0 (--update.eps; default 1e-08)"),
        (
            "update.max_grad_norm",
            "nan",
            "update.max_grad_norm = nan: want a number above 0, or inf for no limit (--update.max-grad-norm; default",
        ),
        ("rewards.pickscore.gate", "nan", "rewards.pickscore.gate = nan: not finite; want a number or None"),
        ("collective_timeout", "inf", "collective_timeout = inf: not finite; want a number above 0"),
        ("model.lora.blocks", "-1", "model.lora.blocks = -1: want all or a whole number from 1 to 65536"),
        (
            "adversary.kind",
            "dinno",
            "adversary.kind = 'dinno': want one of dino, siglip, pickscore, none; did you mean",
        ),
    ],
)
def test_a_flag_a_file_and_a_preset_give_the_same_error(tmp_path, monkeypatch, name, text, expected):
    """The one line differs only in where the value came from."""
    file = tmp_path / "c.yaml"
    value = float(text) if text in ("inf", "nan", "-1") else text
    file.write_text(yaml.safe_dump(config.nested({name: int(value) if text == "-1" else value})))
    said = []
    for arguments in ([f"--{name}={text}"], ["--config", str(file)]):
        with pytest.raises(UserError) as error:
            parse(arguments)
        said.append(str(error.value).partition(": ")[2])
    monkeypatch.setattr(config.reading, "read_preset", lambda _: config.read_yaml(file))
    with pytest.raises(UserError) as error:
        config.load("tiny")
    said.append(str(error.value).partition(": ")[2])
    assert said[0] == said[1] == said[2]
    assert said[0].startswith(expected)


UNLIMITED = {"update.max_grad_norm", "update.clip_range", "update.importance_cap"}


def test_only_where_it_means_no_limit_is_infinity_a_value():
    floats = [name for name, field in config.leaves(config.Config).items() if field.annotation is float]
    assert set(floats) > UNLIMITED
    for name in floats:
        settings = config.nested({name: math.inf})
        if name in UNLIMITED:
            assert config.build(settings, "test")
            continue
        with pytest.raises(UserError, match=rf"{re.escape(name)} = inf: not finite"):
            config.build(settings, "test")


def test_every_number_has_a_limit():
    """Beyond it a slip would allocate, wait or overflow before anything says so."""
    for name, field in config.leaves(config.Config).items():
        if field.annotation in (int, float) and name not in UNLIMITED:
            with pytest.raises(UserError, match=rf"{re.escape(name)} = "):
                config.build(config.nested({name: 10**31}), "test")


def test_infinity_survives_yaml_and_a_checkpoints_json(tmp_path):
    named = ("max_grad_norm", "clip_range", "importance_cap")
    settings, _ = parse([each for name in named for each in (f"--update.{name}", "inf")])
    file = tmp_path / "c.yaml"
    file.write_text(config.dump(settings))
    stored = json.loads(json.dumps(settings.model_dump(mode="json"), allow_nan=False))
    for back in (config.load(file=file), config.build(stored, "checkpoint")):
        assert back == settings
        assert all(math.isinf(getattr(back.update, name)) for name in named)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' stands twice; leave one out (line 2, column 1)"),
        ("update: {eps: 1.0, eps: 2.0}", "the key 'eps' stands twice"),
        ("update: 3", "update = 3: want a mapping of settings (objective, "),
        ("fast: 2", "fast = 2: want true or false"),
        ("iterations: true", "iterations = True: true and false are no values for it; want a whole number"),
        ('output_dir: "a\\0b"', "it holds a NUL character"),
        ("seed: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("a: " + "[" * 5000, "cannot be read: it is nested too deeply"),
        ("learning_rate: 1.0", "did you mean 'update.learning_rate' or 'adversary.learning_rate'?"),
    ],
)
def test_a_file_that_yaml_would_take_is_refused(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(file=file)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_help_is_short_and_nothing_in_it_is_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse([flag])
        printed[flag] = capsys.readouterr().out.splitlines()
    assert len(printed["--help"]) < 230
    assert max(len(line) for line in printed["--help"]) <= 80
    words = set(" ".join(printed["--help"]).split())
    assert {f"--{name.replace('_', '-')}" for name in config.leaves(config.Config)} <= words
    assert "  python -m advgrpo.train --resume runs/tiny   # as if never stopped" in printed["--help"]
    text = " ".join(" ".join(printed["--help-all"]).split())
    for field in config.leaves(config.Config).values():
        assert " ".join(field.description.split()) in text


def test_the_page_of_settings_is_up_to_date():
    """python -m advgrpo.config > docs/configuration.md"""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference_page(config.Config) + "\n"


def test_resume_excludes_preset_and_wants_a_run(tmp_path):
    for flag in ("--resume", "--resume-from"):
        with pytest.raises(UserError, match="leave out --preset"):
            parse([flag, str(tmp_path), "--preset", "tiny"])
    with pytest.raises(UserError, match="is missing"):
        parse(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match="exclude each other"):
        parse(["--resume", "auto", "--resume-from", str(tmp_path)])
    with pytest.raises(UserError, match=r"--accept-changed says .* give --resume"):
        parse(["--accept-changed", "base"])
    with pytest.raises(UserError, match=r"--accept-changed \['bases'\].*prompts, held_out_prompts, references, base"):
        parse(["--resume", "auto", "--accept-changed", "bases"])
    said = Start.model_fields["accept_changed"].description
    assert [name for name in get_args(Source) if f" {name}" not in said] == [], "--help names what can be accepted"


def test_resume_auto_takes_the_flags_of_a_start(tmp_path, monkeypatch):
    settings, start = parse(["--resume", "auto", "--preset", "tiny-sft", "--accept-changed", "base", "prompts"])
    assert (settings.update.objective, start.resume, start.accept_changed) == ("sft", "auto", ("base", "prompts"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "auto").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):  # a folder of that name
        parse(["--resume", "./auto"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fast": False, "rollout": {"precision": "fp8"}}, r"rollout\.precision = 'fp8' needs --fast"),
        ({"fast": False, "model": {"base_precision": "fp8"}}, r"model\.base_precision = 'fp8' needs --fast"),
        ({"model": {"train": "full"}, "rollout": {"window_forward": "merged"}}, r"rollout\.window_forward = 'merged'"),
        ({"rollout": {"window_forward": "merged"}}, r"set update\.old_log_prob to recompute"),
        ({"model": {"lora": {"start_from": "/nowhere"}}}, r"model\.lora\.start_from = '/nowhere' does not exist"),
    ],
)
def test_precision_settings_that_cannot_work_are_named(change, message):
    settings = config.build(config.merge(config.read_preset("tiny"), change), "test")
    with pytest.raises(UserError, match=message):
        config.check(settings)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!float ''", "!!timestamp soon"])
def test_a_value_that_is_not_what_its_tag_says_is_a_line(value, tmp_path):
    """PyYAML raises KeyError, IndexError and AttributeError of these."""
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: {value}")
    with pytest.raises(UserError, match=r"run\.yaml cannot be read: a value is not what its tag"):
        config.read_yaml(file)
    with pytest.raises(UserError, match=rf"rewards\.custom.* = .*{re.escape(value)}"):
        parse(["--preset", "tiny", "--rewards.custom", value])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("monitor.log_prob_drift", "monitor.log_prob_mismatch"),
        ("rollout.noise_level", "rollout.eta"),
        ("update.max_log_prob_drift", "update.max_log_prob_mismatch"),
        ("update.optimizer_windows", "update.minibatches"),
    ],
)
def test_a_setting_that_was_renamed_is_told_by_its_new_name(old, new):
    with pytest.raises(UserError, match=re.escape(new)):
        config.build(config.merge(config.read_preset("tiny"), nested({old: 1})), "old.yaml")


@pytest.mark.parametrize(
    ("field", "old", "new"),
    [
        ("model.path", "tiny:emoji", "tiny"),
        ("data.prompts", "tiny:emoji", "tiny"),
        ("data.held_out_prompts", "tiny:emoji:tuning", "tiny:tuning"),
        ("data.style", "tiny:emoji:ink", "tiny:ink"),
        ("rewards.dino_similarity.path", "tiny:emoji", "tiny"),
    ],
)
def test_a_shipped_name_of_before_is_answered_with_that_of_now(field, old, new):
    with pytest.raises(UserError, match=rf"{re.escape(field)} = '{old}': it is called '{new}' now"):
        config.build(config.merge(config.read_preset("tiny"), nested({field: old})), "old.yaml")


@pytest.mark.parametrize(("old", "new"), config.renamed.PRESETS.items())
def test_a_preset_of_before_is_answered_with_that_of_now(old, new):
    assert new in config.preset_names()
    with pytest.raises(UserError, match=f"the preset '{old}' is called '{new}' now"):
        config.load(old)


@pytest.mark.parametrize("dynamics", ["flow_cps", "ddim"])
def test_the_strongest_noise_can_be_set(dynamics):
    """eta = 1: fresh noise at every step of the window, as DDPM has it."""
    settings = {"rollout": {"dynamics": dynamics, "eta": 1.0, "likelihood": "squared_error"}}
    settings["update"] = {"kl_variance": "step"}
    built = config.build(config.merge(config.read_preset("tiny"), settings), "test")
    config.check(built, with_data=False)
    with pytest.raises(UserError, match=r"rollout\.eta = 1\.01: .* wants at most 1"):
        config.check(built.model_copy(update={"rollout": built.rollout.model_copy(update={"eta": 1.01})}))
