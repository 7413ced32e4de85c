"""The predictions stand on what is counted, and a session's table says where they were wrong.

Planted bugs that turned this file red: a prediction changed without `--write`; B0's bytes for ours; a misprediction by
30 % that is no finding; a figure that was not measured counted as right; FP8 applied to the whole forward; a
kernel whose registers let half as many programs run; a holes' share that counts the last micro-batch.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import model
from bench.counters import ElementwiseBytes, Launches, on_gpu
from bench.registry import REGISTRY
from bench.step_report import GAINS, IN_FP8, SHARED, SIDES, UNITS, in_precision, predicted_goals, predicted_rates
from bench.workload import SD35_MEDIUM_512, Bench
from tests.training.test_step_time import ROWS

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "structure.json").read_text())
BUDGETS = json.loads((ROOT / "tests/kernels/ahead_of_time/budgets.json").read_text())
ELSEWHERE = {  # others of the same kernel
    *("group_norm/forward_contiguous", "group_norm/forward_fp32", "group_norm/moments_contiguous"),
    *("gaussian_step/ode_unguided", "gaussian_step/philox_fp32", "gaussian_step/noise_given"),
    "gaussian_step/stored_bf16",
    *("gaussian_log_prob/forward_stored_bf16", "gaussian_log_prob/forward_kl_std"),
    *("gaussian_log_prob/forward_normalized_ratio", "gaussian_log_prob/forward_divergence"),
    *("clipped_policy_loss/kl_std", "clipped_policy_loss/kl_std_value"),
    *("clipped_policy_loss/normalized_ratio", "clipped_policy_loss/divergence"),
    *("qk_rms_norm/two_tensors", "qk_rms_norm/image", "qk_rms_norm/backward_image"),
    *("qk_rms_norm/rotary_image", "qk_rms_norm/rotary_half_two_tensors"),
}
# Bound by their instructions, and by how much, as the page says: they write e4m3, half of the bytes and a maximum of
# each row; or a quarter of their lanes is idle.
BY_INSTRUCTIONS = {"ada_layer_norm/fp8": 0.45, "ada_layer_norm/one": 0.79}
BY_BOTH = BY_INSTRUCTIONS | {"ada_layer_norm/fp8": 0.44, "ada_layer_norm/one": 0.68, "gated_residual/dual_fp8": 0.78}
BELOW_A_WAVE = {  # at so few images: launches, not bandwidth
    *("gaussian_step/ode", "gaussian_step/philox_host_seed", "gaussian_step/philox"),
    *("gaussian_log_prob/forward", "gaussian_log_prob/forward_kl", "gaussian_log_prob/backward", "clipped_policy_loss"),
}
UNCOUNTED = {"group_advantages", "merge_lora", "multi_tensor_adamw"}  # read values, or are lists of 191 tensors


class Meta(Bench):
    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def test_predictions_are_the_committed_ones():
    assert json.loads(model.FILE.read_text()) == model.predict(), "python -m bench.model --write, and say why"


def test_every_figure_of_whole_steps_is_predicted():
    in_fp8 = [in_precision(unit, precision) for precision, own in IN_FP8.items() for unit in own]
    named = {f"{unit}.{side}" for unit in (*UNITS, *in_fp8) for side in SIDES}
    shared = [f"{unit}{SHARED}" for unit in (*UNITS, *in_fp8) if unit != "adversary"]
    named |= {f"{unit}.{side}" for unit in (*shared, f"update{SHARED}_eager") for side in ("ours", "b1")}
    rates = {f"step.{name}" for name in named}
    ratios = {
        f"{unit}.over_{side}.ratio" for unit, _, side in (name.rpartition(".") for name in rates) if side != "ours"
    }
    assert rates | ratios <= model.predict().keys()
    assert all(f"step.{goal.unit}.over_{goal.side}.ratio" in ratios for goal in GAINS)
    rows = {name for name in (*model.predict(), *model.UNPREDICTED) if name.startswith("step.waterfall.")}
    assert rows == {f"step.waterfall.{row}" for row in ROWS}


def test_every_case_of_the_kernels_is_predicted_or_says_why_not():
    cases = {name for op in REGISTRY.values() for name in op.cases}
    why_not = {name.removeprefix("kernels.") for name in model.UNPREDICTED if name.startswith("kernels.")}
    assert not model.KERNELS.keys() & why_not
    assert cases == model.KERNELS.keys() | (why_not - {"over_compiled"})


def test_the_page_says_what_is_predicted_of_the_goals():
    """Goals over B1 come first, and a prediction that misses its goal says so."""
    page, rows = (ROOT / "docs" / "performance.md").read_text(), list(predicted_goals(model.predict()))
    assert "\n".join(rows) in page, "\n".join(rows)
    rates = "\n".join(predicted_rates(model.predict()))
    assert rates in page, rates


def test_the_page_says_what_the_updates_graphs_are_predicted_to_give():
    m, page = model.Model(model.H200), (ROOT / "docs" / "performance.md").read_text().replace("\n", " ")
    launched = model.TRAINED.launches * model.CUSTOM * 1e-6
    first, eager = m.trained * 2 / model.ROWS, m.update(shared=True, captured=False)
    gained = eager - m.update(shared=True)
    iteration = 1 + gained / m.iteration(shared=True)
    for said in (
        f"are {model.TRAINED.launches:,} launches, {1e3 * launched:.0f} ms of the host's time",
        f"A step of 16 rows takes the GPU {1e3 * m.trained:.0f} ms",
        f"on one prompt's two rows takes {1e3 * first:.0f} ms, and waits",
        f"is {eager / m.update(shared=True):.2f} times as fast and an iteration {iteration:.2f} times",
        f"`hinge_head_loss` is predicted at {model.predict()['kernels.hinge_head_loss.over_eager']:.2f}x of eager",
    ):
        assert said in page, said
    assert f"{eager / m.update(shared=True):.2f}x for the update" in (ROOT / "docs" / "decisions.md").read_text()


@pytest.mark.parametrize(
    ("case", "name", "work"),
    [
        ("sd35-medium", "merged", model.MERGED),
        ("sd35-medium", "adapted", model.ADAPTED),
        ("sd35-medium", "train", model.TRAINED),
        ("sd35-medium-fp8", "merged", model.MERGED_FP8),
        ("sd35-medium-fp8", "adapted", model.ADAPTED_FP8),
        ("sd35-medium-fp8", "train", model.TRAINED_FP8),
    ],
)
def test_our_work_is_what_the_structure_tests_count(case, name, work):
    golden = GOLDEN[case][name]
    assert (work.flops, work.bytes, work.launches) == tuple(
        golden[k] for k in ("flops", "elementwise_bytes", "launches")
    )


def test_our_decoders_bytes_are_what_the_structure_test_counts():
    golden = GOLDEN["decode"]
    assert golden["elementwise_bytes"] + golden["norm_inputs_bytes"] == 8 * model.DECODED_BYTES


@pytest.mark.parametrize("name", sorted(model.KERNELS.keys() - UNCOUNTED))
def test_the_work_of_a_kernel_and_of_its_baseline_is_counted(name, monkeypatch):
    kernel, build = model.KERNELS[name], next(op.cases[name] for op in REGISTRY.values() if name in op.cases)
    with on_gpu():
        workload = build(Meta(SD35_MEDIUM_512, "meta"))
        with Launches() as launches, ElementwiseBytes() as traffic:
            workload.eager()
    assert (workload.bytes, workload.flops) == (kernel.bytes, kernel.flops)
    assert (launches.count, traffic.total) == (kernel.eager_launches, kernel.eager_bytes)


def test_a_machine_twice_as_fast_halves_what_it_computes():
    machine = model.Machine(2 * model.H200.copy_gb_s, 2 * model.H200.matmul_tflop_s)
    once, twice = model.Model(model.H200), model.Model(machine)
    ours = [f"{name}{precision}" for name in ("merged", "adapted", "trained") for precision in ("", "_fp8")]
    for figure in (*ours, "stock_adapted", "stock_trained"):
        assert getattr(twice, figure) == pytest.approx(getattr(once, figure) / 2)


def test_streaming_kernels_are_bound_by_memory_and_fill_the_chip():
    """The goal is 80 % of the copy at 8 and 16 rows, by the instructions and registers of sm_90's machine code."""
    rows = []
    for name, kernel in model.STREAMING.items():
        budget = BUDGETS[name]
        issued = kernel.by_instructions(model.H200, budget["instructions"])
        waves = [kernel.by_waves(count, budget["registers"] - 8) for count in (8, 16)]  # a budget has eight to spare
        assert issued >= BY_INSTRUCTIONS.get(name, 0.8), name
        assert min(waves) >= 0.8 or name in BELOW_A_WAVE, name
        both = [issued * filled for filled in waves]
        assert min(both) >= BY_BOTH.get(name, 0.8) or name in BELOW_A_WAVE, name
        rows.append(f"| `{name}` | {' | '.join(f'{share:.0%}' for share in (issued, *waves, *both))} |")
    assert "\n".join(rows) in (ROOT / "docs" / "performance.md").read_text(), "\n".join(rows)
    compiled = {name for name, budget in BUDGETS.items() if "instructions" in budget}
    assert compiled - model.STREAMING.keys() == ELSEWHERE


def test_the_steps_time_by_its_instructions_is_what_the_machine_code_has():
    """Of 128 images, as bench.kernels times it."""
    issued = 128 * 16 * 64 * 64 * BUDGETS["gaussian_step/philox"]["instructions"] / (32 * model.SMS * model.ISSUE)
    assert model.KERNELS["gaussian_step"].issue_us == pytest.approx(1e6 * issued, rel=0.02)


def test_the_products_whose_last_waves_are_counted_are_the_forwards():
    flops = sum(2 * rows * columns * reduction * count for rows, columns, reduction, count in model.PRODUCTS)
    assert flops == pytest.approx(model.MERGED.flops - model.MERGED.attention, rel=1e-3)  # the rest are embedders


def test_a_side_stream_hides_no_more_than_is_idle_and_than_there_is_to_decode():
    m = model.Model(model.H200)
    assert [model.idle_share(tiles) for tiles in (132, 133, 66)] == [0.0, 1 - 133 / 264, 0.5]
    decoded = (1 - model.MICRO / model.IMAGES) * model.IMAGES * m.decode(model.CONVOLUTION, model.DECODED_BYTES)
    assert 2 * m.hidden() == m.hidden(1.0) < decoded == pytest.approx(m.hidden(100.0))
    said = (ROOT / "docs" / "performance.md").read_text()
    shares = m.hidden() / m.iteration(), m.hidden(1.0) / m.iteration()
    assert f"{100 * shares[0]:.1f} %, and at most {100 * shares[1]:.1f} %" in said


def test_a_forward_in_fp8_pays_for_norms_that_write_it():
    """Their share of the copy is what the machine code's instructions leave of it."""
    name = "gated_residual/dual_fp8"
    share = model.STREAMING[name].by_instructions(model.H200, BUDGETS[name]["instructions"])
    assert pytest.approx(share, abs=0.01) == model.FUSED_FP8
    own = model.STREAMING["gelu/fp8"].by_instructions(model.H200, BUDGETS["gelu/fp8"]["instructions"])
    assert model.FUSED_FP8 < own < model.FUSED_FP8 + 0.05
    assert f"{model.RESIDUAL / 1e9:.1f} GB is the residual stream" in (ROOT / "docs" / "performance.md").read_text()
    assert 0.8 < model.RESIDUAL_FP8 / model.RESIDUAL < 0.9


def test_the_page_says_what_fp8_moves_and_takes():
    m, page = model.Model(model.H200), (ROOT / "docs" / "performance.md").read_text().replace("\n", " ")
    pairs = ((model.MERGED, model.MERGED_FP8), (model.ADAPTED, model.ADAPTED_FP8), (model.TRAINED, model.TRAINED_FP8))
    for plain, fp8 in pairs:
        told = (f"{work.launches:,} / {work.bytes / 1e9:.1f} GB" for work in (plain, fp8))
        assert f"| {' | '.join(told)} |" in page
    steps = (m.merged_fp8, m.merged, m.adapted_fp8, m.adapted, m.trained_fp8, m.trained)
    said = "forward takes {} ms instead of {}, one with LoRA {} instead of {}, a training step {} instead of {}"
    assert said.format(*(round(1e3 * each) for each in steps)) in page
    more = [(fp8.bytes - plain.bytes) / (model.STREAM * m.bytes) for plain, fp8 in pairs]
    assert "{:.1f}, {:.1f} and {:.1f} ms of these".format(*(1e3 * each for each in more)) in page
    inner = model.LAYERS - 2  # blocks whose image and text are quantised; of the text's last block nothing is
    tokens = model.ROWS * model.WIDTH * inner * model.JOINT
    both = 2 * (4 * tokens + 2 * tokens + model.ROWS * model.WIDTH * model.IMAGE * (model.DUAL - 1))
    assert f"{both / 1e9:.1f} GB less, {1e3 * both / (model.STREAM * m.bytes):.1f} ms" in page
    assert f"{1e3 * 4 * 4 * tokens / (model.STREAM * m.bytes):.1f} ms of a forward of" in page


def test_the_page_says_what_lora_as_more_columns_would_save():
    """Times of today's arrangement are the model's; an iteration's saving is that of its steps."""
    m, page = model.Model(model.H200), (ROOT / "docs" / "performance.md").read_text()
    found = {}
    for name, own in (("a forward", m.adapted), ("a training step, forward and backward", m.trained)):
        row = re.search(rf"^\| {name} \| ([\d.]+) ms \| ([\d.]+) ms \|$", page, re.MULTILINE)
        assert float(row[1]) == round(1e3 * own, 1)
        found[name] = (float(row[1]) - float(row[2])) * 1e-3
    saved = model.IMAGES / model.MICRO * 2 * sum(found.values())  # both steps of the window, drawn and trained
    whole = m.iteration()
    assert f"| an iteration, a noise per image | {whole:.2f} s | {whole - saved:.2f} s |" in page
    assert f"So {saved / whole:.1%} of an iteration".replace("%", " %") in page


def test_orders_that_must_hold():
    m = model.Model(model.H200)
    assert m.update(shared=True) < m.update(shared=True, captured=False) < m.update()
    assert m.update(captured=False) == m.update()  # a step of all images hides the host
    assert m.iteration("everywhere") < m.iteration("sampling") < m.iteration()
    assert m.update("everywhere") < m.update("sampling") == m.update()
    assert m.merged_fp8 < m.adapted_fp8 < m.merged < m.adapted < m.stock_adapted
    assert m.trained_fp8 < m.trained
    assert m.branching() < m.adapted / 4
    assert m.products(model.MERGED.flops, model.FP8_GEMM) < m.merged_fp8  # attention and the ends stay in bf16
    assert m.trained < m.stock_trained
    assert m.merged < m.compiled_merged < m.compiled_adapted < m.stock_adapted
    assert m.iteration(shared=True) < m.iteration() < m.b1_iteration < m.stock_iteration


REPORTS = {
    "step": {
        "sampler": {"ours": 11.0, "over_b0": {"ratio": 1.2}},
        "calibration": {"copy_gb_s": 4300.0},
        "waterfall": [{"step": "B0", "images_per_second": 6.0}, {"step": "graph", "images_per_second": None}],
    },
    "kernels": {
        "entries": [{"case": "gelu", "ours_us": {"median": 50.0}, "over_eager": {"ratio": 2.0}, "share_of_limit": 0.8}]
    },
    "profile": {"trajectory": {"kernels": 4446, "host_syncs": 3}},
    "train": {"random": {"rows": [{"seconds": s} for s in (60.0, 9.0, 5.0, 3.7, 3.8, 3.6)]}},
}


def test_what_is_off_by_more_than_a_quarter_is_a_finding():
    rows = {row.name: row for row in model.compare(model.predict(), REPORTS)}
    assert rows["step.calibration.copy_gb_s"].ratio == 1
    assert not rows["step.sampler.ours"].finding
    assert rows["step.sampler.over_b0.ratio"].finding
    assert rows["step.waterfall.B0"].measured == 6.0
    assert rows["step.waterfall.graph"].measured is rows["step.waterfall.FP8"].measured is None
    assert rows["kernels.gelu.ours_us"].measured == 50.0
    assert rows["kernels.gelu.ours_us"].finding
    assert rows["kernels.gelu.share_of_limit"].measured == 0.8
    assert rows["profile.trajectory.host_syncs"].finding  # none were predicted
    assert rows["train.random.seconds"].measured == 3.7  # not those that capture and compile
    unmeasured = rows["step.update.over_b1.ratio"]
    assert (unmeasured.measured, unmeasured.ratio, unmeasured.finding) == (None, None, False)
    text = "\n".join(model.lines(list(rows.values())))
    assert "| step.update.over_b1.ratio | " in text
    assert text.count("**explain**") == sum(row.finding for row in rows.values())
    assert replace(unmeasured, measured=unmeasured.predicted * 1.26).finding
