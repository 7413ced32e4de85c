"""Curves and grids show what they were given, where it belongs.

Bugs planted in a copy, each seen red: the accuracy over pairs not drawn; one accuracy drawn twice.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.reporting import plots
from advgrpo.reporting.plots import draw_curves, draw_grid

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def record(i, **more):
    return {
        "iteration": i,
        "reward_generated": float(i),
        "reward_reference": 2.0,
        "discriminator_updates": 10 * (i % 2),
        **more,
    }


def panels(metrics, held_out=None):
    return {axes.get_title(): axes for axes in plots._curves_figure(metrics, held_out).axes}


def held_out(at, half):
    """Values of an evaluation of metric "judge": over all images, and over the first of every prompt."""
    return {"eval_judge": at, "eval_judge_ci95": half, "eval_judge_first": at + 0.1, "eval_judge_first_ci95": 2 * half}


def test_rewards_in_one_panel_with_the_adversary_marked():
    axes = panels([record(i, reward_std=0.5) for i in range(6)])["Adversarial reward: generated against references"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["generated (r_gen)"] == [[i, i] for i in range(6)]
    assert lines["references (r_ref)"] == [[i, 2] for i in range(6)]
    assert [x for x, _ in lines["adversary trained"]] == [1, 3, 5]
    assert axes.get_ylabel()
    assert axes.get_xlabel() == "iteration"
    assert axes.get_legend() is not None


def test_a_panel_per_quantity_that_has_values():
    metrics = [record(i, grad_norm=0.1, discriminator_accuracy=None, discriminator_loss=float("nan")) for i in range(4)]
    metrics[0] |= {"eval_dino_similarity": 0.5}
    metrics[3] |= {"eval_dino_similarity": 0.75, "eval_judge_accuracy": 0.5}
    found = panels(metrics)
    assert sorted(found) == [
        "Adversarial reward: generated against references",
        "Held-out prompts: dino similarity",
        "Held-out prompts: judge accuracy",
        "Policy gradient norm",
    ]
    assert found["Held-out prompts: dino similarity"].lines[0].get_xydata().tolist() == [[1, 0.5], [4, 0.75]]


def test_an_evaluation_stands_after_its_iteration_and_only_equal_numbers_of_images_are_joined():
    metrics = [record(i) for i in range(6)]
    metrics[2] |= {"eval_judge": 0.55, "eval_judge_ci95": 0.2}  # made after three iterations
    ends = plots.HeldOut(held_out(0.4, 0.05), held_out(0.5, 0.06), during_images=1, end_images=8)
    axes = panels(metrics, ends)["Held-out prompts: judge"]
    line, bars = axes.containers[0][0], axes.containers[0][2][0].get_segments()
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.5], [3, 0.55], [6, 0.6]])
    np.testing.assert_allclose([segment[:, 1] for segment in bars], [[0.4, 0.6], [0.35, 0.75], [0.48, 0.72]])
    points = axes.containers[1][0]
    assert points.get_xydata().tolist() == [[0, 0.4], [6, 0.5]]
    assert points.get_linewidth() == 0
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["1 image per prompt, 95 % interval", "8 images per prompt, 95 % interval"]


def test_ends_of_as_many_images_belong_to_the_line():
    ends = plots.HeldOut(held_out(0.4, 0.05), held_out(0.5, 0.06), during_images=4, end_images=4)
    axes = panels([record(i) for i in range(3)], ends)["Held-out prompts: judge"]
    assert [container[0].get_xydata().tolist() for container in axes.containers] == [[[0, 0.4], [3, 0.5]]]


def test_a_run_that_was_stopped_has_its_base_but_no_end():
    stopped = plots.HeldOut(held_out(0.4, 0.05), {}, during_images=1, end_images=8)
    axes = panels([record(0)], stopped)["Held-out prompts: judge"]
    assert [container[0].get_xydata().tolist() for container in axes.containers] == [[[0, 0.5]], [[0, 0.4]]]


def test_a_tiny_change_does_not_fill_the_axis():
    metrics = [record(i, eval_judge=0.5 + 0.00025 * i) for i in range(2)]
    low, high = panels(metrics)["Held-out prompts: judge"].get_ylim()
    assert high - low >= 0.01
    assert low < 0.5 < high


def test_what_the_update_did_has_panels():
    found = panels([record(i, policy_loss=-0.1, kl=0.0, ratio_mean=1.0, clip_fraction=0.25) for i in range(3)])
    assert {"Policy loss", "KL to the base model", "Likelihood ratio", "Clipped ratios"} <= set(found)
    assert found["Clipped ratios"].get_ylim()[0] == 0
    assert found["Likelihood ratio"].lines[1].get_ydata()[0] == 1


def test_accuracy_over_pairs_stands_beside_that_by_the_heads_own_threshold():
    """Two different things for a head with a threshold; PickScore has none, and both of its keys are of pairs."""
    two = [record(i, discriminator_paired_accuracy=0.9, discriminator_accuracy=0.75 + 0.01 * i) for i in range(3)]
    one = [record(i, discriminator_paired_accuracy=0.9, discriminator_accuracy=0.9) for i in range(3)]
    pairs, chance = ("pairs of a prompt", [0.9] * 3), ("chance: fully fooled", [0.5, 0.5])
    for metrics, expected in ((two, [pairs, ("own threshold", [0.75, 0.76, 0.77]), chance]), (one, [pairs, chance])):
        axes = panels(metrics)["Adversary accuracy"]
        assert [(line.get_label(), list(line.get_ydata())) for line in axes.lines] == expected
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [label for label, _ in expected]


def test_a_fixed_reward_stands_beside_what_the_references_get():
    own = {"reward_pickscore": 0.4, "reward_pickscore_of_references": 0.5, "reward_rule": 1.0, "reward_adversary": 2.0}
    found = panels([{"iteration": i, "reward_generated": float(i), "reward_std": 0.1, **own} for i in range(3)])
    assert sorted(found) == ["Fixed reward: pickscore", "Fixed reward: rule", "Reward of the generated images"]
    learned = found["Reward of the generated images"].lines[0]  # of a mix: the adversary's own, as the references' is
    assert learned.get_ydata().tolist() == [2, 2, 2]
    lines = {line.get_label(): line.get_ydata()[0] for line in found["Fixed reward: pickscore"].lines}
    assert lines == {"generated": 0.4, "references": 0.5}
    assert [line.get_label() for line in found["Fixed reward: rule"].lines] == ["generated"]


def test_all_panels_are_saved_as_a_readable_png(tmp_path):
    every = {"discriminator_loss": 1.0, "discriminator_accuracy": 0.5, "grad_norm": 0.0, "log_prob_mismatch_max": 0.0}
    draw_curves([record(i, **every, pre_update_clip_fraction=0.0) for i in range(3)], tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.width > 1200
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_curves([{"iteration": 0, "reward_generated": float("nan")}], tmp_path / "curves.png")


def solid(n, colour, height=32, width=32):
    return torch.tensor(colour).float().div(255).view(1, 3, 1, 1).expand(n, 3, height, width)


def count(path, colour):
    return int((np.array(Image.open(path)) == colour).all(axis=-1).sum())


def columns_of(path, colour):
    return np.flatnonzero((np.array(Image.open(path)) == colour).all(axis=-1).any(axis=0))


def test_blocks_stand_side_by_side_and_small_images_grow(tmp_path):
    path = tmp_path / "grid.png"
    row = [("base", solid(2, RED)), ("final", solid(1, GREEN)), ("references", solid(3, BLUE, 64, 64))]
    draw_grid([("a red star", row), ("a blue star", row)], path)
    assert [count(path, colour) for colour in (RED, GREEN, BLUE)] == [2 * n * 64 * 64 for n in (2, 1, 3)]
    assert columns_of(path, RED).max() < columns_of(path, GREEN).min()
    assert columns_of(path, GREEN).max() < columns_of(path, BLUE).min()


def test_enlarging_keeps_hard_pixels_and_reducing_keeps_the_ratio(tmp_path):
    path = tmp_path / "grid.png"
    checks = torch.zeros(1, 3, 24, 24)
    checks[:, 0, ::2] = 1
    checks[:, 1, 1::2] = 1
    draw_grid([("stripes", [("one", checks)])], path)
    assert count(path, RED) == count(path, GREEN) == 72 * 72 // 2  # factor 3, the first to reach 64
    draw_grid([("large", [("one", solid(1, RED, 400, 800))])], path, max_size=200)
    assert count(path, RED) == 100 * 200


def test_values_outside_the_range_are_clipped(tmp_path):
    draw_grid([("x", [("one", solid(1, RED) * 3 - 1)])], tmp_path / "grid.png")
    assert count(tmp_path / "grid.png", RED) == 64 * 64


def test_long_captions_are_wrapped_inside_the_image_and_end_after_three_lines(tmp_path):
    row = [("one", solid(1, RED))]
    heights = []
    for text in ("", "a star", "a star " * 30, "a star " * 700):
        draw_grid([(text, row)], tmp_path / "grid.png")
        heights.append(Image.open(tmp_path / "grid.png").height)
    line = heights[1] - heights[0]
    assert line > 10
    assert heights == [heights[0] + n * line for n in (0, 1, 3, 3)]


def test_a_header_says_what_the_images_are(tmp_path):
    row = [("one", solid(1, RED))]
    sizes = []
    for header in ("", "tiny · iteration 60 of 150 · seed 42 · guidance 1 · judge 0.66 -> 0.75 · " * 2):
        draw_grid([("a star", row)], tmp_path / "grid.png", header=header)
        sizes.append(Image.open(tmp_path / "grid.png").size)
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] > sizes[0][1] + 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        (
            [("a", [("x", torch.zeros(1, 3, 8, 8))]), ("b", [("y", torch.zeros(1, 3, 8, 8))])],
            r"row 'b' has blocks \['y'\]",
        ),
        ([("a", [("x", torch.zeros(3, 8, 8))])], r"row 'a', block 'x': expected float \[n, 3, H, W\]"),
        ([("a", [("x", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))])], "expected float"),
        ([("a", [("x", torch.zeros(0, 3, 8, 8))])], "expected float"),
        ([("a", [("x", torch.full((1, 3, 8, 8), float("nan")))])], "not finite"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        draw_grid(rows, tmp_path / "grid.png")
