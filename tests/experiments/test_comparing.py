"""What differences say of claims, and what all claims of the plan say together.

Bugs planted in a copy, each seen red: Holm without its running maximum; seeds of two arms compared crosswise; own best
guidance chosen on the report prompts; a claim that was not run left out of the family; a single seed that is tested.
"""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from advgrpo.errors import UserError
from advgrpo.evaluation.frontier import Resampled, kid
from advgrpo.experiments import figures as experiment_figures
from advgrpo.experiments import pages, report
from advgrpo.experiments import runs as experiment_runs
from advgrpo.experiments.comparing import Evidence, Pair, difference, evidence, level, verdicts
from advgrpo.experiments.earlier import keep_earlier
from advgrpo.experiments.figures import draw_curves, draw_fronts
from advgrpo.experiments.judging import Judged, Judging
from advgrpo.experiments.pages import expectation, index, page
from advgrpo.experiments.plan import ARMS, EXPERIMENTS, Claim, Job
from advgrpo.experiments.results import Results, cost, numbers
from advgrpo.experiments.runs import Plan
from advgrpo.tiny.scenes import STYLE_ARTISTS

PROMPTS = 12
RESAMPLES = 400


def seen(retrieval: float, *, shift: float = 1.0, seed: int = 0, **means: float) -> Judged:
    """What a judge saw of a model: means by metric, spread over prompts alike for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(-0.05, 0.05, PROMPTS, dtype=torch.float64)[torch.randperm(PROMPTS, generator=generator)]
    means = {"diversity": 0.5, "saturation": 0.5, "references_saturation": 0.4, **means}
    values = {name: mean + spread for name, mean in {"retrieval": retrieval, **means}.items()}
    values |= {f"style:{style}": torch.full((PROMPTS,), 0.1).double() for style in STYLE_ARTISTS} | {
        name: value for name, value in values.items() if name.startswith("style:")
    }
    return Judged(torch.full((PROMPTS, PROMPTS), shift / 1000).double(), values)


def changed(metric: str, models: list[Judged], others: list[Judged], **how) -> Resampled:
    return difference(metric, Pair(models, others), resamples=RESAMPLES, **how)


def test_seeds_are_paired():
    """Each seed's gain over the same seed of the other arm is .1: paired, nothing is left to chance but the prompts."""
    levels = (0.2, 0.5, 0.8)
    models, others = [seen(each + 0.1) for each in levels], [seen(each) for each in levels]
    found = changed("retrieval", models, others).interval
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))
    crosswise = changed("retrieval", models, others[::-1]).interval
    assert crosswise.high - crosswise.low > 0.3


def test_every_metric_by_hand():
    models = [seen(0.5, shift=3.0, diversity=0.4, saturation=0.7, pickscore=0.9, **{"style:ink": 0.6}, seed=1)]
    others = [seen(0.4, shift=5.0, diversity=0.5, saturation=0.5, pickscore=0.8, **{"style:ink": 0.2}, seed=1)]
    found = {
        name: changed(name, models, others, style="ink").estimate
        for name in (*EXPERIMENTS["hacking"].metrics, "style_share")
    }
    # saturation: .3 from the references' .4, the other .1
    expected = {
        "retrieval": 0.1,
        "kid": -2.0,
        "diversity": -0.2,
        "saturation_distance": 0.2,
        "pickscore": 0.1,
        "style_share": 0.4,
    }
    assert found == pytest.approx(expected)
    assert kid(models[0].kernel).item() == pytest.approx(3.0)
    assert level("style_share", models, style="ink", resamples=RESAMPLES).estimate == pytest.approx(0.6)
    with pytest.raises(ValueError, match="unknown metric 'beauty'"):
        changed("beauty", models, others)
    with pytest.raises(ValueError, match="1 models against 2"):
        Pair(models, others * 2)


def resampled(low: float, high: float) -> Resampled:
    """Whose interval that is, nearly."""
    return Resampled((low + high) / 2, (high - low) / 4, math.inf, 1000)


@pytest.mark.parametrize(
    ("low", "high", "expected", "margin", "word"),
    [
        (0.01, 0.10, "rises", 0, "confirmed"),
        (0.01, 0.10, "falls", 0, "contradicted"),
        (-0.10, -0.01, "falls", 0, "confirmed"),
        (-0.10, -0.01, "rises", 0, "contradicted"),
        (-0.05, 0.10, "rises", 0, "undecided"),
        (-0.04, -0.01, "does not fall", 0.05, "confirmed"),
        (-0.10, -0.06, "does not fall", 0.05, "contradicted"),
        (-0.10, 0.02, "does not fall", 0.05, "undecided"),
        (0.01, 0.04, "does not rise", 0.05, "confirmed"),
        (0.06, 0.10, "does not rise", 0.05, "contradicted"),
        (-0.04, 0.04, "stays", 0.05, "confirmed"),
        (0.06, 0.10, "stays", 0.05, "contradicted"),
        (-0.10, -0.06, "stays", 0.05, "contradicted"),
        (-0.04, 0.10, "stays", 0.05, "undecided"),
        (0.85, 0.95, "reaches", 0.8, "confirmed"),
        (0.10, 0.60, "reaches", 0.8, "contradicted"),
        (0.70, 0.90, "reaches", 0.8, "undecided"),
    ],
)
def test_a_claim_alone_is_judged_by_where_its_interval_lies(low, high, expected, margin, word):
    claim = Claim("dino", "retrieval", expected, margin=margin)
    assert verdicts([evidence(claim, resampled(low, high))])[0].word == word


def test_p_values_are_two_sided_and_never_zero():
    claim = Claim("dino", "retrieval", "rises")
    assert evidence(claim, resampled(0.1, 0.2)).p == pytest.approx(2 / 1001)
    assert evidence(claim, resampled(-1, 1)).p == 1.0
    assert evidence(claim, Resampled(1.0, 1.0, math.inf, 1000)).p == pytest.approx(0.3173, abs=1e-4)
    assert evidence(claim, Resampled(-1.0, 1.0, 2.0, 1000)).p == pytest.approx(0.4226, abs=1e-4)


def test_verdicts_are_holms_over_all_claims_and_what_was_not_run_counts():
    strong, weak = Evidence(0.005, 1.0), Evidence(0.02, 1.0)
    assert [v.word for v in verdicts([strong, weak])] == ["confirmed", "confirmed"]  # .01 x 2 and .04 x 1
    found = verdicts([strong, weak, None, None, None])
    assert [v.word for v in found] == ["confirmed", "undecided", "undecided", "undecided", "undecided"]
    assert [v.p for v in found] == pytest.approx([0.05, 0.16, None, None, None])
    assert verdicts([Evidence(1.0, 0.005)])[0].word == "contradicted"


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs that were never trained, over three seeds with chosen numbers; `repair` was not run.

    The tuning prompts find every model best at guidance 2, the report prompts at 3.
    """
    at = {"base": 0.4, "base-preference": 0.4, "flow": 0.2, "adv-preference": 0.6, "dino": 0.3, "eq7": 0.7}
    plan = Plan(tmp_path, 64, Judging({"tuning": "t", "report": "r"}, "w", (1.0, 2.0, 3.0), 2))

    def finished(_plan, job):
        if job.arm not in at:
            return None
        machine = {"platform": "Linux-test", "cpus": 2, "gpu": None}
        summary = {"iterations": 64, "machine": machine, "versions": {"torch": "2"}, "training_seconds": 60.0}
        summary |= {"finished": "2030-01-01T00:00:00Z", "base": {"retrieval": 0.3, "dino_similarity": 0.5}}
        summary |= {"final": {"retrieval": at[job.arm], "dino_similarity": 0.6}}
        return experiment_runs.Finished(summary, plan.config(job))

    def judged(_plan, job):
        lead = {"tuning": {1.0: -0.1, 2.0: 0.1, 3.0: 0.0}, "report": {1.0: -0.1, 2.0: 0.0, 3.0: 0.1}}
        own = at[job.arm] + 0.002 * job.seed
        extra = {"pickscore": 1 - at[job.arm], "saturation": 1 - at[job.arm]}
        return {
            name: {
                scale: seen(own + step, shift=100 * (1 - at[job.arm]), seed=job.seed, **extra)
                for scale, step in steps.items()
            }
            for name, steps in lead.items()
        }

    def rows(results, job):
        slow = 2.0 if job.arm in ("eq7", "adv-preference") else 1.0
        peak = {"eval_retrieval": 0.9, "eval_dino_similarity": 0.55}
        return [
            {"iteration": i, "cpu_seconds": slow, "discriminator_updates": 10, **(peak if i == 31 else {})}
            for i in range(64)
        ]

    monkeypatch.setattr(Plan, "finished", finished)
    monkeypatch.setattr(Plan, "judged", judged)
    monkeypatch.setattr(Results, "_rows", rows)
    return lambda name: Results(name, plan, [0, 1, 2], resamples=4000)


def test_own_best_guidance_is_chosen_on_the_tuning_prompts(made_up):
    """On the report prompts 3 would look best by .1."""
    results = made_up("dino")
    scale, judged = results.at(Job("eq7", 0), "best")
    assert scale == 2.0
    assert judged.values["retrieval"].mean().item() == pytest.approx(0.7)
    assert numbers(results)["arms"]["eq7"]["runs"]["0"]["own_best"] == 2.0


def test_changes_are_from_the_base_and_from_the_same_seed(made_up):
    results = made_up("hacking")
    # seeds 0, 1, 2 add .002 on average
    assert results.change("retrieval", "flow").estimate == pytest.approx(-0.2 + 0.002)
    found = results.change("retrieval", "adv-preference", "flow").interval
    assert (found.low, found.mean, found.high) == pytest.approx((0.4, 0.4, 0.4))
    assert results.change_at("kid", "flow", 3.0).estimate == pytest.approx(20)


def test_the_page_says_what_the_numbers_say(made_up):
    known = {"hacking": numbers(made_up("hacking")), "dino": numbers(made_up("dino"))}
    text = page("hacking", known)
    assert "| retrieval | *base* | 0.300 | 0.400 | 0.500 | 0.400 (at 2) |" in text
    compared = "Adv-GRPO: retrieval is higher than with Flow-GRPO"
    row = next(line for line in text.splitlines() if compared in line)
    adjusted = 2 / 4001 * sum(len(experiment.claims) for experiment in EXPERIMENTS.values())
    assert f"| +0.400 [+0.400, +0.400] | {adjusted:.3f} | CPU 2×, drawn 1×, shown 1× | confirmed |" in row
    differences = text.partition("## Differences between arms")[2].partition("\n## ")[0]
    same = " | +0.400 [+0.400, +0.400]" * 4
    assert f"| retrieval | Adv-GRPO less Flow-GRPO{same} |" in differences
    assert "Linux-test, 2 CPU cores" in text
    assert "run hacking --seeds 0 1 2 --iterations 64 --prompts r --tuning-prompts t\n" in text
    costs = next(line for line in text.splitlines() if line.startswith("| Adv-GRPO | 3 |"))
    # 64 CPU seconds of 128 are the peak's, half way
    assert costs.endswith("| 128 | 2.00 | 0.300 | 0.900 | 0.900 (32, 32, 32) | 0.600 |")


def test_a_contradiction_is_said_plainly(made_up):
    known = {"dino": numbers(made_up("dino"))}
    text = page("dino", known)
    said = "**Contradicts what the paper leads to expect:** default: retrieval rises. Found: -0.098"
    assert said in text
    assert "**contradicted**" in index(known)
    assert "**Not run:** nft, nft-preference, sft," in index(known)


def test_arms_that_were_not_run_are_listed(made_up, tmp_path):
    """Half of an experiment is a page, with what is missing on it."""
    found = numbers(made_up("repair"))
    assert found["arms"]["repair"]["runs"] == {}
    text = page("repair", {"repair": found})
    assert "**Not run:** repaired." in text
    assert "| repaired: KID × 1000 is lower than with hacked | not run | – | – | undecided |" in text
    assert "- repair, seed 1: not made yet" in text
    assert "| retrieval | repaired | not run | not run | not run | not run |" in text
    draw_curves(found, tmp_path / "a.png")
    draw_fronts(found, tmp_path / "b.png", EXPERIMENTS["repair"].metrics)


def test_a_missing_base_leaves_what_does_not_need_it(made_up, monkeypatch, tmp_path):
    finished = Plan.finished
    monkeypatch.setattr(Plan, "finished", lambda plan, job: finished(plan, job) if job.made.trains else None)
    found = numbers(made_up("hacking"))
    text = page("hacking", {"hacking": found})
    assert "| Flow-GRPO: retrieval falls | not run | – | – | undecided |" in text
    assert "- base-preference: not made yet" in text
    assert "Adv-GRPO: retrieval is higher than with Flow-GRPO | +0.400" in text
    draw_fronts(found, tmp_path / "b.png", EXPERIMENTS["hacking"].metrics)


def test_a_single_seed_is_not_tested(made_up):
    results = made_up("dino")
    results.runs = {job: run for job, run in results.runs.items() if job.seed == 1}
    found = numbers(results)
    assert all("found" in claim and "evidence" not in claim for claim in found["claims"])
    assert "Of 7 claims: 7 undecided, 7 of them not tested (1 seed × 64 iterations)" in page("dino", {"dino": found})


def test_claims_of_an_older_plan_are_not_taken_for_todays(made_up):
    found = numbers(made_up("dino"))
    found["claims"] = [claim | {"margin": 0.7} for claim in found["claims"]]
    assert "Of 7 claims: 7 undecided, 7 of them not tested" in page("dino", {"dino": found})


def test_what_a_training_takes(made_up):
    results = made_up("sft")
    config = results.plan.config(Job("sft"))
    run = experiment_runs.Finished({}, config)
    rows = [{"cpu_seconds": 1.5}] * 3
    images = config.images_per_iteration
    assert cost(run, rows) == {"images_drawn": 0, "references_shown": 3 * images, "cpu_seconds": 4.5}
    adversary = replace(run, config=results.plan.config(Job("dino")))
    rows = [{"cpu_seconds": 1.0, "discriminator_updates": 10}] * 2
    batch = min(adversary.config.adversary.batch_size, images)
    assert cost(adversary, rows) == {"images_drawn": 2 * images, "references_shown": 20 * batch, "cpu_seconds": 2.0}
    scouts = replace(run, config=results.plan.config(Job("scouts")))  # two for each one kept, which is drawn once more
    assert cost(scouts, rows)["images_drawn"] == 2 * 3 * images


def test_claims_read_as_sentences():
    every = {expectation(e, claim) for e in EXPERIMENTS.values() for claim in e.claims}
    assert len(every) == sum(len(e.claims) for e in EXPERIMENTS.values())
    assert "100: retrieval equals with all (1,152) (within 0.03)" in every
    assert "ink: share in the artist's style is at least 80%" in every
    assert "default: retrieval rises, each at its own best guidance" in every
    assert "default: diversity does not fall (within 10%)" in every


def entry(labels) -> dict:
    curve = [{"iteration": i, "cpu_seconds": 2.0 * i, "retrieval": 0.1 * i} for i in range(3)]
    front = [{"guidance": g, "kid": g, "retrieval": g} for g in (1.0, 2.0)]
    runs = {"0": {"curve": curve, "front": front}, "1": {"curve": curve, "front": front}}
    return {"arms": {label: {"label": label, "runs": runs} for label in labels}, "base": {"front": front}}


def test_curves_of_different_lengths_are_refused(tmp_path):
    found = entry(["a"])
    found["arms"]["a"]["runs"]["1"] = {"curve": found["arms"]["a"]["runs"]["0"]["curve"][:1]}
    with pytest.raises(ValueError, match="the seeds of 'a' were evaluated at different iterations"):
        draw_curves(found, tmp_path / "x.png")


def test_every_arm_is_drawn(tmp_path, monkeypatch):
    """No experiment has more arms than there are colours; more are refused, not left out."""
    drawn, real = [], experiment_figures._draw_front
    monkeypatch.setattr(experiment_figures, "_draw_front", lambda axes, *a: drawn.append(a[0]) or real(axes, *a))
    largest = max((experiment.arms for experiment in EXPERIMENTS.values()), key=len)
    draw_fronts(entry(largest), tmp_path / "a.png", ("retrieval", "kid"))
    assert drawn == ["base", *largest]
    for draw in (draw_curves, lambda found, path: draw_fronts(found, path, ("retrieval",))):
        with pytest.raises(ValueError, match="9 arms, but"):
            draw(entry("abcdefghi"), tmp_path / "a.png")


def without(found: dict, arm: str) -> dict:
    """As a report that has no run of the arm, whose others have moved."""
    found = json.loads(json.dumps(found))
    found["arms"][arm] |= {"runs": {}, "changes": {}}
    found["missing"] = {f"{arm}, seed 0": "not made yet", "adv-preference, seed 7": "not made yet"}
    for entry in found["claims"]:
        if arm in (entry["arm"], entry["against"]):
            entry.pop("found"), entry.pop("evidence", None)
        else:
            entry["found"]["mean"] += 1
    for entry in found["differences"]:
        entry["changes"] = {}
    return found


def test_an_arm_that_was_not_made_again_keeps_all_that_was_said_of_it(made_up):
    earlier = numbers(made_up("hacking"))
    kept = keep_earlier(without(earlier, "flow"), earlier)
    assert kept["arms"] == earlier["arms"]
    assert list(kept["missing"]) == ["adv-preference, seed 7"]
    assert kept["differences"] == earlier["differences"]  # all are with flow
    for before, entry in zip(earlier["claims"], kept["claims"], strict=True):
        moved = "flow" not in (entry["arm"], entry["against"])
        assert entry["found"]["mean"] == pytest.approx(before["found"]["mean"] + moved)
    again = {**without(earlier, "flow"), "arms": earlier["arms"]}
    assert keep_earlier(again, earlier) is again  # as many runs: today's
    assert keep_earlier(again, None) is again


def test_an_arm_that_is_kept_costs_what_it_would_on_todays_machine(made_up):
    """Today's is four times as fast, by the arm that was made on both."""
    earlier = numbers(made_up("hacking"))
    found = without(earlier, "flow")
    for run in found["arms"]["adv-preference"]["runs"].values():
        run["cpu_seconds"] /= 4
    kept = keep_earlier(found, earlier)
    for seed, run in kept["arms"]["flow"]["runs"].items():
        before = earlier["arms"]["flow"]["runs"][seed]
        assert (run["cpu_seconds"], run["cpu_scale"]) == (before["cpu_seconds"] / 4, 0.25)
        assert [point["cpu_seconds"] for point in run["curve"]] == [p["cpu_seconds"] / 4 for p in before["curve"]]
        assert run["front"] == before["front"]
    assert "by how much an arm that was run on both took on each: times 0.25 for Flow-GRPO." in pages._costs(kept)
    assert "times" not in pages._costs(earlier)
    again = without(kept, "flow")
    for run in again["arms"]["adv-preference"]["runs"].values():
        run["cpu_seconds"] *= 2
    twice = keep_earlier(again, kept)["arms"]["flow"]["runs"]["0"]
    assert (twice["cpu_scale"], twice["cpu_seconds"]) == (0.5, earlier["arms"]["flow"]["runs"]["0"]["cpu_seconds"] / 2)
    other = without(earlier, "flow")
    other["arms"]["adv-preference"] |= {"overrides": {"update": {"kl_weight": 1.0}}}
    strange = keep_earlier(other, earlier)
    assert strange["arms"]["flow"]["runs"]["0"]["cpu_seconds"] == earlier["arms"]["flow"]["runs"]["0"]["cpu_seconds"]
    assert "CPU seconds of Flow-GRPO are of another report, and cannot be compared." in pages._costs(strange)
    spent = {"kept": kept, "made": found}
    minutes = {
        name: sum(run["cpu_seconds"] for arm in each["arms"].values() for run in arm["runs"].values()) / 60
        for name, each in (spent | {"earlier": earlier}).items()
    }
    of_flow = sum(run["cpu_seconds"] for run in earlier["arms"]["flow"]["runs"].values()) / 60
    assert f"{minutes['made'] + of_flow:.1f} CPU minutes" in pages._how("hacking", kept), "what was spent"


def test_what_an_arm_that_is_kept_lacked_is_still_said(made_up):
    earlier = numbers(made_up("hacking"))
    found = without(earlier, "flow")
    earlier["missing"] = {"flow, seed 9": "it diverged", "adv-preference, seed 8": "it diverged"}
    assert keep_earlier(found, earlier)["missing"] == {
        "adv-preference, seed 7": "not made yet",
        "flow, seed 9": "it diverged",
    }


@pytest.mark.parametrize(
    "change", [{"overrides": {"update": {"kl_weight": 1.0}}}, {"teacher": "dino"}, {"iterations": 200}]
)
def test_an_arm_of_other_settings_is_not_kept(made_up, change):
    earlier = numbers(made_up("hacking"))
    found = without(earlier, "flow")
    found["arms"]["flow"] |= change
    assert keep_earlier(found, earlier) is found
    found = without(earlier, "flow")
    for name in ("teacher", "iterations"):
        del earlier["arms"]["flow"][name]
    assert keep_earlier(found, earlier) is not found, "an older report says neither"


def test_an_arm_is_not_kept_beside_runs_of_another_length(made_up):
    earlier = numbers(made_up("hacking"))
    with pytest.raises(UserError, match="--keep: flow of the earlier report had iterations 64, and it is 60 now: make"):
        keep_earlier({**without(earlier, "flow"), "iterations": 60}, earlier)


def test_the_picture_of_arms_that_are_kept_stays_above_those_it_lacks(made_up, monkeypatch, tmp_path):
    def rows(_results, arms):
        return [("a prompt", [(arm, torch.rand(1, 3, 64, 64)) for arm in ("base", *arms)])]

    monkeypatch.setattr(report, "sample_rows", rows)
    results, file, old = made_up("hacking"), tmp_path / "hacking-samples.png", tmp_path / "old.png"
    both = {arm: {"runs": {"0": arm}} for arm in ("flow", "adv-preference")}

    def drawn(reported: dict, earlier: dict) -> tuple[int, bool]:
        """The picture's height, in those of the one that was there; whether that one stands in it."""
        report._draw_samples(results, both, {}, old)
        shutil.copy(old, file)
        report._draw_samples(results, reported, earlier, file)
        with Image.open(file) as now, Image.open(old) as before:
            kept = now.crop((0, 0, *before.size)).tobytes() == before.tobytes()
            return now.height // before.height, kept

    assert drawn(both, {"flow": both["flow"]}) == (1, False)  # all have their runs: drawn anew
    kept = {"repair": {"runs": {"0": "earlier"}}}
    assert drawn(both | kept, both | kept) == (1, True)  # nothing is new
    assert drawn(both | kept, kept) == (2, True)
    assert drawn(both | kept, both | kept | {"flow": {"runs": {"0": "other"}}}) == (2, True)
    file.unlink()
    report._draw_samples(results, both | kept, both | kept, file)
    assert file.is_file()


def test_numbers_are_json(made_up):
    found = numbers(made_up("hacking"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {
        asdict(claim).items() <= entry.items() for claim, entry in zip(EXPERIMENTS["hacking"].claims, found["claims"])
    } == {True}
    assert set(found["arms"]) == set(EXPERIMENTS["hacking"].arms) <= set(ARMS)
    assert (found["laid_over"], found["laid_over_settings"]) == ("", {})


def test_what_was_laid_over_all_runs_stands_on_the_page(made_up, tmp_path):
    results = made_up("sft")
    file = tmp_path / "more.yaml"
    file.write_text("evaluation: {every: 10}")
    found = numbers(Results("sft", replace(results.plan, file=file), [0, 1, 2], resamples=100))
    text = page("sft", {"sft": found})
    assert "--config more.yaml" in text
    assert '`more.yaml`, laid over each: `{"evaluation": {"every": 10}}`' in text
