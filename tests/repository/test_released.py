"""docs/released.md is what the presets hold, row by row, and every difference from the released code is listed there.

With ADVGRPO_PEERS=FOLDER, which holds checkouts Adv-GRPO and flow_grpo at the commits the page names, every fragment it
quotes must stand on the line it names.

Planted in a copy, each seen red: a discriminator batch of 96; betas of 0.9; steps 0 and 2; a departure's mark left out;
a row left out, of a setting that the preset writes or of one at its default; a departure misnumbered; a line number off
by one; a gate on the reward and gradient checkpointing, of which no row speaks.
"""

import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from advgrpo import config
from advgrpo.adversary.trainer import plan_updates

PAGE = Path(__file__).parents[2] / "docs" / "released.md"
CHECKOUTS = {"Adv-GRPO": "8287f90", "flow_grpo": "ac4c86e"}
ROW = re.compile(r"\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+?) \|$")
QUOTE = re.compile(r"\b([A-Z]{1,2}):(\d+)(?:-\d+)? `([^`]+)`")
MARK = re.compile(r"^(.*?)(?: \[(\d+)\]\(#departures\))?$")


def rows() -> list[tuple[str, str, str, str, str]]:
    """(preset, setting, released, where, here) of every table."""
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        presets = re.findall(r"`(sd35m-[\w-]+)`", section.splitlines()[0])
        found += [
            (preset, *match.groups()) for preset in presets for match in map(ROW.match, section.splitlines()) if match
        ]
    return found


def value(text: str):
    read = yaml.safe_load(text)
    return sorted(read) if isinstance(read, list) and isinstance(read[0], str) else read


# What neither code has, or has for its machine alone: no row is needed while the value is the default.
OURS = (
    *("device", "fast", "collective_timeout", "global_steps", "data.*", "output.*", "monitor.*"),
    *("model.lora.blocks", "model.lora.start_from", "model.lora.export_format", "model.gradient_checkpointing"),
    *("model.attention", "model.base_precision", "model.shard_base", "model.offload"),
    "model.sequence_parallel",
    *("rollout.precision", "rollout.window_forward", "rollout.decode_stream"),
    *("update.objective", "update.optimizer", "update.max_log_prob_mismatch", "evaluation.grid_prompts"),
    *("update.trust_region", "update.max_divergence", "update.step_weights"),  # other articles' (jobs/objectives.md)
    *("rollout.tail_*", "rollout.scout*", "update.informative_share", "update.skip_dead_groups"),  # method 10
    *("update.graphs", "rollout.window.branching", "rollout.engine.*", "rollout.noise"),
    *("update.policy_weight", "update.kl_to", "update.teacher", "update.kl_space"),
    *("evaluation.keep_best", "evaluation.stop_after"),
    *("evaluation.backbone", "evaluation.backbone_image_size", "rewards.*.normalize", "rewards.*.gate"),
    *("adversary.reward_ema", "adversary.gradient_penalty", "adversary.spectral_norm", "adversary.feature_layers"),
    *("adversary.heads", "adversary.reset_every", "adversary.augment"),
)
OF_HEADS = ("image_size", "hidden_size", "num_patches", "patch_sampling", "reward_weights", "loss_weights", "normalize")
OF_PICKSCORE = ("processor", "trainable_layers", "objective")
OF_SCHEDULES = {"alternate_period": "alternate", "ratio": "ratio", "fooled_margin": "fooled"}


def leaves(values: dict, prefix: str = "") -> dict:
    """{"section.name": value} of nested settings."""
    found = {}
    for name, held in values.items():
        found |= leaves(held, f"{prefix}{name}.") if isinstance(held, dict) else {prefix + name: held}
    return found


def looked_at(settings: config.Config, name: str) -> bool:
    """Whether a run of these settings uses the one of this name."""
    section, _, field = name.partition(".")
    adversary, rollout, update = settings.adversary, settings.rollout, settings.update
    if section == "adversary" and field != "kind":
        conditional = {
            **dict.fromkeys((*OF_HEADS, "cached_patches"), adversary.kind in ("dino", "siglip")),
            **dict.fromkeys(OF_PICKSCORE, adversary.kind == "pickscore"),
            **{setting: word in adversary.schedule for setting, word in OF_SCHEDULES.items()},
            "warmup_updates": adversary.warmup_iterations > 0,
            "replay_share": adversary.replay_capacity > 0,
        }
        return adversary.kind != "none" and conditional.get(field, True)
    if section == "rewards":
        reward = field.split(".")[0]
        if reward in ("custom", "remotes", "pools"):  # lists of the user's own, which no preset has
            return bool(getattr(settings.rewards, reward))
        used = adversary.kind != "none" if reward == "adversary" else settings.rewards.sections()[reward].used
        measured = reward in settings.evaluation.metrics and reward != "dino_similarity"
        return used or (measured and not field.endswith("weight"))
    if section in ("nft", "awm"):
        return settings.objective.forward_process == section
    windows = ("size", "noise_range", "slide_every", "slide_by", "steps")
    if field in {f"window.{setting}" for setting in windows}:
        return (field == "window.steps") == (rollout.window.chosen_order == "fixed")
    unused = {"kl_variance": not update.kl_weight, "importance_cap": update.old_log_prob != "truncated_importance"}
    return name != "output_dir" and not (section == "update" and unused.get(field, False))


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in rows()}))
def test_every_setting_that_the_run_uses_has_a_row(preset):
    """Or is one of ours, at its default. So no row can vanish, and no value that the page does not know can come in."""
    settings, listed = config.load(preset), {setting for of, setting, *_ in rows() if of == preset}
    defaults = leaves(config.Config().model_dump(mode="json"))
    silent = {
        name
        for name, held in leaves(settings.model_dump(mode="json")).items()
        if looked_at(settings, name)
        and name not in listed
        and not (held == defaults[name] and any(fnmatch(name, pattern) for pattern in OURS))
    }
    assert not silent


def departures() -> list[int]:
    return [
        int(number) for number in re.findall(r"^(\d+)\. ", PAGE.read_text().split("## Departures")[1], re.MULTILINE)
    ]


@pytest.mark.parametrize(("preset", "setting", "released", "where", "here"), rows())
def test_the_preset_holds_what_the_page_says_and_agrees_unless_marked(preset, setting, released, where, here):
    held = config.load(preset).model_dump(mode="json")
    for name in setting.split("."):
        held = held[name]
    ours, number = MARK.match(here).groups()
    assert value(yaml.safe_dump(held)) == value(ours)
    if number is None:
        assert value(released) == value(ours)
    else:
        assert value(released) != value(ours)
        assert int(number) in departures()
    assert QUOTE.search(where)


def test_the_points_in_which_the_presets_once_differed_are_in_the_tables():
    """Noise, schedule, discriminator batch, betas, average, length, patches and references were not the released
    code's."""
    listed = {preset: set() for preset, *_ in rows()}
    for preset, setting, *_ in rows():
        listed[preset].add(setting)
    assert set(listed) == {"sd35m-dino-released", "sd35m-adv-pickscore-released", "sd35m-flow-grpo-original"}
    wanted = {"rollout.initial_noise", "update.ema_rule", "iterations", "rollout.window.steps", "update.kl_weight"}
    learned = {"adversary.schedule", "adversary.betas", "adversary.batch_size", "adversary.reference_choice"}
    assert all(wanted <= settings for settings in listed.values())
    assert learned <= listed["sd35m-dino-released"] & listed["sd35m-adv-pickscore-released"]
    assert {"adversary.patch_sampling", "adversary.cached_patches"} <= listed["sd35m-dino-released"]
    assert departures() == list(range(1, len(departures()) + 1))


def test_a_settings_row_names_no_departure_that_the_list_lacks():
    cited = {int(number) for number in re.findall(r"\[(\d+)\]\(#departures\)", PAGE.read_text())}
    assert cited <= set(departures())


def test_the_dino_runs_length_is_that_of_the_released_loop():
    """910 iterations: 819 discriminator updates, 91 generator iterations of two optimizer steps, 1001 global steps."""
    settings = config.load("sd35m-dino-released")
    step = generator = iteration = 0
    while step < settings.global_steps:
        plan = plan_updates(settings.adversary, iteration, 0.0, 0.0, settings.update.minibatches)
        assert plan.discriminator_updates == (0 if plan.generator else 1)
        generator += plan.generator
        step += settings.update.minibatches if plan.generator else 1
        iteration += 1
    assert (iteration, generator, step) == (settings.iterations, 91, 1001) == (910, 91, 1001)


def test_the_head_sees_every_image_of_the_iteration():
    for name in ("sd35m-dino-released", "sd35m-adv-pickscore-released"):
        settings = config.load(name)
        assert settings.adversary.batch_size == settings.images_per_iteration == 8 * 12 * 8


@pytest.mark.skipif("ADVGRPO_PEERS" not in os.environ, reason="ADVGRPO_PEERS names no folder with the peers' checkouts")
def test_every_quoted_fragment_stands_on_its_line():
    text, peers = PAGE.read_text(), Path(os.environ["ADVGRPO_PEERS"])
    for name, commit in CHECKOUTS.items():
        at = subprocess.run(
            ["git", "-C", peers / name, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert at.stdout.startswith(commit), name
    files = dict(re.findall(r"\b([A-Z]{1,2})\s`([\w./]+\.py)`", text))
    quotes = QUOTE.findall(text)
    assert len(quotes) > 120
    for letters, line, fragment in quotes:
        folder = peers / ("flow_grpo" if len(letters) == 2 else "Adv-GRPO")
        found = (folder / files[letters]).read_text().splitlines()[int(line) - 1]
        assert fragment in found, (letters, line, fragment, found)
