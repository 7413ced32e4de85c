"""What README.md, docs/tiny.md and docs/jobs say that the default run gains is what docs/figures recorded.

Every row of the tables and every figure of the prose below them is made from the JSON files anew, so that a page and
its record cannot part. Bugs planted, each seen red: a base's share of another guidance, an interval's end that is off
by .001, a row left out, a second judge whose interval holds no zero, the gain of a longer run for `make train`'s.
"""

import json
import statistics
from pathlib import Path

import pytest

from advgrpo.reporting.evaluations import Evaluated, gains

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
ROWS = {"tiny_frontier": "report", "tiny_frontier_names": "names"}  # file -> the prompts' list
MINUS = str.maketrans("-", "−")


def read(name: str) -> dict:
    return json.loads((FIGURES / f"{name}.json").read_text())


def page(path: str) -> str:
    """Its text with every run of white space as one space."""
    return " ".join((ROOT / path).read_text().split())


def share(value: float, sign: str = "") -> str:
    """.193, or with a sign +.195."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1).translate(MINUS)


def whole(value: float, sign: str = "") -> str:
    return f"{value:{sign}.0f}".translate(MINUS)


def interval(found: dict, text) -> str:
    """mean [low, high]."""
    return f"{text(found['mean'], '+')} [{text(found['low'], '+')}, {text(found['high'], '+')}]"


def gain(found: dict, text) -> str:
    """The same, bold where it holds no zero."""
    bold = "**" if found["low"] * found["high"] > 0 else ""
    return f"{bold}{interval(found, text)}{bold}"


def ratio(found: dict) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def ends(record: dict, what: str, guidance: list[float]) -> tuple[float, float]:
    """(the base's, the mean of the LoRAs'), at `guidance` [the LoRAs', the base's]."""
    at = lambda front, scale: next(point[what] for point in front if point["guidance"] == scale)  # noqa: E731
    trained = statistics.fmean(at(front, guidance[0]) for front in record["models"].values())
    return at(record["base"], guidance[1]), trained


def cells(record: dict, row: dict) -> list[str]:
    """retrieval, gain, KID x 1000 and difference of a row."""
    found, distance = (ends(record, what, row["guidance"]) for what in ("accuracy", "kid"))
    return [
        " → ".join(map(share, found)),
        gain(row["accuracy"], share),
        " → ".join(map(whole, distance)),
        gain(row["kid"], whole),
    ]


def at(record: dict, guidance: float) -> dict:
    return next(row for row in record["equal"] if row["guidance"] == [guidance, guidance])


def rows_below(text: str, header: str) -> list[list[str]]:
    """Of every table with that header: its rows as they stand in the page."""
    tables, lines = [], iter(text.splitlines())
    for line in lines:
        if line == header:
            next(lines)
            tables.append([row for row in iter(lambda: next(lines, ""), "") if row.startswith("|")])
    return tables


def test_the_tables_of_the_tiny_world_are_the_recorded_ones():
    header = "| guidance | retrieval | gain | KID × 1000 | difference | diversity, ratio |"
    expected = []
    for name in ROWS:
        record = read(name)
        lora, base = record["best"]["guidance"]
        labelled = [(f"{row['guidance'][0]:g}", row) for row in record["equal"]]
        labelled = [(f"{label}, as trained" if label == "2" else label, row) for label, row in labelled]
        labelled.append((f"own best: base {base:g}, LoRAs {lora:g}", record["best"]))
        expected.append(
            [
                "| " + " | ".join([label, *cells(record, row), ratio(row["diversity_ratio"])]) + " |"
                for label, row in labelled
            ]
        )
    assert rows_below((ROOT / "docs" / "tiny.md").read_text(), header) == expected


def test_the_readmes_table_is_the_recorded_one():
    report, names = map(read, ROWS)
    trained, found_elsewhere = at(report, 2), at(names, 2)
    labelled = [
        ("`tiny:report`, on which nothing was chosen, guidance 2 as trained", report, trained),
        ("the same, each model at its own best guidance of 1 to 3", report, report["best"]),
        ("`tiny:names`, 16 things that no prompt of the runs names, guidance 2", names, found_elsewhere),
    ]
    expected = ["| " + " | ".join([label, *cells(record, row)]) + " |" for label, record, row in labelled]
    header = "| prompts | retrieval | gain | KID × 1000 | difference |"
    assert rows_below((ROOT / "README.md").read_text(), header) == [expected]
    assert f"Diversity is {ratio(trained['diversity_ratio'])} of the base's at guidance 2." in page("README.md")
    base, mean = ends(report, "accuracy", [2, 2])
    near, nearer = ends(report, "kid", [2, 2])
    said = f"goes from {share(base)} to {share(mean)}, {interval(trained['accuracy'], share)} over five seeds"
    assert said in page("docs/jobs/adv-grpo-dino.md")
    assert f"from {whole(near)} to {whole(nearer)} ([all figures]" in page("docs/jobs/adv-grpo-dino.md")


@pytest.mark.parametrize("name", ROWS)
def test_records_are_of_the_prompts_and_seeds_that_the_tables_name(name):
    settings = read(name)["settings"]
    assert settings["prompts"] == f"tiny:{ROWS[name]}"
    assert settings["tuning_prompts"] == "tiny:tuning"
    assert settings["images_per_prompt"] == 2
    assert [Path(lora).parent.name for lora in settings["loras"]] == [f"seed-{seed}" for seed in range(5)]


def test_a_record_that_names_no_lora_is_said_to():
    """Files of LoRAs are hashed in `digests`; older records have none, and both pages say which."""
    records = sorted(file.stem for file in FIGURES.glob("tiny_frontier*.json"))
    without = [name for name in records if "digests" not in read(name)]
    assert without == list(ROWS), "say in README.md and docs/tiny.md which records name no LoRAs"
    said = "older than the hashes that `frontier` writes of LoRA files, so"
    assert said in page("README.md")
    assert said in page("docs/tiny.md")
    for name in set(records) - set(without):
        record = read(name)
        assert len(record["digests"]) == len(record["settings"]["loras"]) == 3


def test_what_the_second_judge_says_is_what_it_said():
    record = read("tiny_frontier_second_judge")
    assert record["settings"]["judge"] == "classifier_accuracy"
    tiny = page("docs/tiny.md")
    forms = {2: "names {} of the base's pictures as their prompts do and {} of the LoRAs', **{}**;"}
    forms[3] = "at guidance 3 {} and {}, {} ("
    for guidance, form in forms.items():
        found, row = ends(record, "accuracy", [guidance, guidance]), at(record, guidance)["accuracy"]
        assert form.format(*map(share, found), interval(row, share)) in tiny
    base, mean = ends(record, "accuracy", [2, 2])
    row = at(record, 2)["accuracy"]
    assert row["low"] < 0 < row["high"], "the pages call it not sure"
    said = f"names {share(mean)} of the pictures rightly where it named {share(base)} of the base's: "
    assert said + f"{interval(row, share)}, [not sure]" in page("README.md")


def test_the_five_nearest_and_the_background_are_the_recorded_ones():
    report, names = read("tiny_frontier_top5"), read("tiny_frontier_top5_names")
    found = [" → ".join(map(share, ends(record, "accuracy", [2, 2]))) for record in (report, names)]
    changed = [interval(at(record, 2)["accuracy"], share) for record in (report, names)]
    assert (
        f"among the five nearest in {found[0]} of the pictures, {changed[0]}, and of `tiny:names` in {found[1]}, "
        f"{changed[1]} (`--judge retrieval_top5`" in page("docs/tiny.md")
    )
    for name in ("tiny_frontier_background", "tiny_frontier_background_names"):
        assert ends(read(name), "accuracy", [2, 2]) == (1, 1)
    assert "the background has its colour in all pictures, the base's as well" in page("docs/tiny.md")


def test_make_trains_own_gain_is_what_it_left():
    record = read("make_train")
    lines = [Evaluated.read(line) for line in record["evaluations"]]
    assert [(line.stage, line.iteration) for line in lines] == [("base", 0), ("final", record["iterations"])]
    base, final = (statistics.fmean(line.scores_of_all["retrieval"]) for line in lines)
    found, judged = vars(gains(lines)["retrieval"]), at(record["frontier"], 2)
    assert record["frontier"]["settings"]["prompts"] == "tiny:report"
    assert (
        f"`make train` is another seed, {record['seed']}, and prints its own: held-out retrieval {share(base)} → "
        f"{share(final)}, {interval(found, share)}, then the judge's {interval(judged['accuracy'], share)} on "
        f"`tiny:report` at guidance 2 and KID {interval(judged['kid'], whole)}, intervals over prompts "
        in page("README.md")
    )
    assert round(record["seconds"]["make train"] / 60) == 3
    assert "(three minutes on two cores of a Zen 5 with the installation there" in page("README.md")
