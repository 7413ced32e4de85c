"""OUT/report.html: what it says of a run, that it needs nothing else and stays small, and that it works in a browser.

Planted bugs that turn it red (tests/mutants/report-*): whole means joined with those of first images; a flag's last
iteration off by one; a picture without a bound; text that is not escaped.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advgrpo.errors import UserError
from advgrpo.report import pictures
from advgrpo.report.__main__ import main
from advgrpo.report.charts import MOST_POINTS, Chart, Line, Scale, draw
from advgrpo.report.page import MOST_PAGE_BYTES, render, write_report
from advgrpo.report.run_files import RunFiles
from advgrpo.reporting.tracking import metrics_line
from advgrpo.runtime.fingerprint import file_digest
from tests.browser import Browser, needs_browser
from tests.report.made import make_run

VOID = {"meta", "link", "input", "img", "br"}
INLINE = {"code", "strong", "i", "a"}


class Outline(HTMLParser):
    """Elements with their attributes, and whether all that was opened is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.text += [] if tag in INLINE else [" "]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    @property
    def said(self) -> str:
        return " ".join("".join(self.text).split())


def test_a_page_says_what_differs_what_rose_which_flags_were_up_and_what_to_turn(tmp_path):
    run = make_run(tmp_path / "run", changes={"adversary": {"fooled_margin": 0.5}, "update": {"kl_weight": 0.01}})
    page = write_report(run).read_text()
    outline = Outline(page)
    assert not outline.open
    assert "iteration 40 of 40 · preset tiny, 3 settings changed · seed 1" in outline.said
    assert "adversary.fooled_margin 0.0 0.5" in outline.said
    assert "update.kl_weight 0.0 0.01" in outline.said
    assert "Iterations 11 to 20." in outline.said  # as they are counted in the display
    assert "Iterations 32 to 40." in outline.said
    assert "What to turn: Let the head keep up: raise adversary.updates_per_iteration (now 10)" in outline.said
    assert "dead groups (up)" in outline.said
    assert "reward collapse (up)" not in outline.said
    assert "pickscore against dino similarity" in outline.said
    assert "0 min 40 s in 40 iterations" in outline.said
    assert "rest 10%" in outline.said
    images = [attributes for tag, attributes in outline.found if tag == "img"]
    assert [each["data-name"] for each in images] == [
        "base model", "iteration 10", "iteration 20", "iteration 30", "iteration 40, the end",
    ]  # fmt: skip
    assert all(each["alt"] for each in images)
    assert ["hidden" in each for each in images] == [True] * 4 + [False]


def test_curves_join_evaluations_of_equally_many_images(tmp_path):
    """Those at the ends have more: their means over the first ones are what can be compared."""
    held_out = RunFiles.read(make_run(tmp_path / "run")).held_out()
    assert [point.iteration for point in held_out["dino_similarity"]] == [0, 10, 20, 30, 40]
    assert all(point.value < 0.9 for point in held_out["dino_similarity"])
    assert {point.half for point in held_out["dino_similarity"][1:-1]} == {0.02}


def test_a_page_asks_for_nothing(tmp_path):
    outline = Outline(write_report(make_run(tmp_path / "run")).read_text())
    addresses = [v for _, attributes in outline.found for n, v in attributes.items() if n in ("src", "href")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_a_run_that_is_under_way_and_one_of_an_older_program_have_reports(tmp_path):
    assert "not ended yet" in write_report(make_run(tmp_path / "under-way", ended=False)).read_text()
    old = make_run(tmp_path / "old")
    lines = [json.loads(line) for line in (old / "evaluations.jsonl").read_text().splitlines()]
    (old / "evaluations.jsonl").unlink()
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:-1]:
        rows[line["iteration"] - 1] |= line["means"]
    for row in rows:
        row.pop("metrics_version")
    (old / "metrics.jsonl").write_text("".join(metrics_line(row) for row in rows))
    summary = json.loads((old / "summary.json").read_text())
    summary |= {"base": {"dino_similarity": 0.8}, "final": {"dino_similarity": 0.85}}
    (old / "summary.json").write_text(json.dumps(summary | {"ci95": {"base": {"dino_similarity": 0.01}}}))
    points = RunFiles.read(old).held_out()["dino_similarity"]
    assert [(p.iteration, p.half) for p in points] == [(0, 0.01), (10, 0.02), (20, 0.02), (30, 0.02), (40, None)]
    assert "dino similarity" in write_report(old).read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((old / "config.yaml").read_text())
    assert "iteration 0 of 40" in Outline(write_report(bare).read_text()).said


def judged(run, *, digest: str) -> None:
    """OUT/frontier as the command leaves it, of a LoRA with that digest."""
    found = {
        "accuracy": {"mean": 0.24, "low": 0.125, "high": 0.355},
        "kid": {"mean": -64.0, "low": -96.0, "high": -32.0},
        "diversity_ratio": {"mean": 1.1, "low": 1.0, "high": 1.2},
    }
    numbers = {
        "settings": {"prompts": "/home/me/secret/report.txt", "judge": "retrieval", "images_per_prompt": 2},
        "digests": [digest],
        "equal": [{"guidance": [2.0, 2.0], **found}],
        "best": {"guidance": [3.0, 2.0], **found},
    }
    (run / "frontier").mkdir()
    (run / "frontier" / "frontier.json").write_text(json.dumps(numbers))
    Image.new("RGB", (60, 40)).save(run / "frontier" / "frontier.png")


def test_the_independent_judges_verdict_on_this_lora_is_shown_and_that_on_another_is_not(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    judged(run, digest=file_digest(run / "lora" / "pytorch_lora_weights.safetensors"))
    outline = Outline(write_report(run).read_text())
    assert not outline.open
    row = "+0.240 [+0.125, +0.355] −64.0 [−96.0, −32.0] 1.10 [1.00, 1.20]"
    assert f"2 {row}" in outline.said
    assert f"each its own best: 3, base 2 {row}" in outline.said
    assert "less its base on report.txt" in outline.said
    assert "secret" not in outline.said
    assert any("distance to the references" in attributes.get("alt", "") for _, attributes in outline.found)
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"trained on")
    assert "independent judge" not in write_report(run).read_text()


@pytest.mark.parametrize("equal", ["3", '[{"guidance": []}]'])
def test_a_damaged_verdict_is_named(equal, tmp_path):
    run = make_run(tmp_path / "run")
    judged(run, digest="")
    (run / "frontier" / "frontier.json").write_text(f'{{"digests": [""], "equal": {equal}}}')
    with pytest.raises(UserError, match=r"frontier\.json cannot be read"):
        write_report(run)


def test_names_are_text_and_paths_are_not_told(tmp_path):
    run = make_run(
        tmp_path / "<script>alert(1)</script>".replace("/", "-"),
        changes={
            "data": {"prompts": "/home/me/secret/prompts.txt"},
            "rewards": {"vlm_judge": {"question": "<b>&</b>"}},
        },
    )
    outline = Outline(write_report(run).read_text())
    assert [tag for tag, _ in outline.found].count("script") == 1
    assert "b" not in [tag for tag, _ in outline.found]
    assert "data.prompts tiny prompts.txt" in outline.said
    assert "secret" not in outline.said


@pytest.mark.weekly
def test_a_page_is_small_however_long_the_run(tmp_path):
    """Noise is what no picture format makes small; half of these pictures would be too large at full size."""
    run = make_run(tmp_path / "run", iterations=3000, every=150, side=(60, 60))
    noise = np.random.default_rng(0).integers(0, 255, (700, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "samples" / "final.png")
    for file in (run / "samples").glob("iteration-*.png"):
        file.write_bytes((run / "samples" / "final.png").read_bytes())
    page = write_report(run).read_bytes()
    assert len(page) < MOST_PAGE_BYTES
    assert page.count(b"<img") == pictures.MOST_PICTURES
    assert page.count(b"data:image/webp") == pictures.MOST_PICTURES
    largest = max(len(each) for each in re.findall(rb"base64,([^\"]+)", page))
    assert largest <= pictures.MOST_BYTES * 4 / 3 + 4


def test_long_lines_are_thinned_to_means_and_short_ones_are_not():
    line = Line("a", range(1000), [float(i % 2) for i in range(1000)]).thinned()
    assert len(line.xs) == 250
    assert MOST_POINTS >= 250
    assert set(line.ys) == {0.5}
    assert "mean of 4" in line.name
    short = Line("a", range(300), range(300))
    assert short.thinned() is short


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.812, 0.823), (-3, 17), (5, 5), (0, 0), (1e-9, 3e-9), (-2e7, 1e8)])
def test_ticks_are_round_inside_and_told_apart(low, high):
    scale = Scale(low, high, 0, 100)
    texts = [scale.text(tick) for tick in scale.ticks]
    assert 2 <= len(texts) <= 8
    assert len(set(texts)) == len(texts)
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks)


def test_lines_stand_where_their_values_are():
    svg = draw(Chart("c", [Line("a", [0, 10], [1.0, 2.0])], floor=0.0))
    (path,) = re.findall(r'<path class="line c0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    x0, y0, x1, y1 = map(float, path)
    assert (x0, x1) == (52.0, 428.0)
    assert 220 - y1 == pytest.approx(2 * (220 - y0), abs=0.2)  # from a floor of 0, twice as high


def test_the_command_writes_it_and_names_what_is_wrong(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert (run / "report.html").exists()
    assert main([str(tmp_path)]) == 2
    assert "has no config.yaml: want the output folder of a run" in capsys.readouterr().err
    (run / "evaluations.jsonl").write_text('{"version": 1}\n')
    with pytest.raises(UserError, match=r"evaluations\.jsonl, line 1 is no evaluation"):
        render(RunFiles.read(run))


@needs_browser
def test_in_a_browser_the_slider_moves_values_are_read_and_nothing_is_wider_than_the_screen(tmp_path):
    file = write_report(make_run(tmp_path / "a-run", changes={"adversary": {"fooled_margin": 0.5}}))
    with Browser() as browser:
        for width, height, scheme in ((1280, 800, "light"), (390, 844, "dark"), (320, 568, "light")):
            page = browser.open(file, width, height, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            seen = (
                "[...document.querySelectorAll('.samples img')].filter(i => !i.hidden && i.offsetWidth).map(i => i.alt)"
            )
            (last,) = page.evaluate(seen)
            assert "iteration 40, the end" in last
            page.evaluate("document.getElementById('slider').focus()")
            page.press("ArrowLeft")
            (before,) = page.evaluate(seen)
            assert "iteration 30" in before
            assert page.evaluate("document.getElementById('frame').textContent") == "iteration 30"
            page.press("Home")
            assert "base model" in page.evaluate(seen)[0]
            page.click("#ends")
            assert page.evaluate(seen) == [last]
            page.click("#large")
            assert page.evaluate("document.documentElement.scrollWidth") == width  # the picture scrolls, not the page
            page.evaluate("document.querySelector('#curves svg').focus()")
            page.press("Home")
            read = "document.querySelector('#curves .read').textContent"
            assert page.evaluate(read).startswith("iteration 0: dino similarity 0.8")
            page.press("ArrowRight")
            assert page.evaluate(read).startswith("iteration 10: dino similarity 0.8")
            assert "± 0.02" in page.evaluate(read)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(20, 23, 26)" if scheme == "dark" else "rgb(251, 250, 247)"
            )
            assert page.errors == []
            assert page.requests == [page.address]
            page.close()


def test_a_run_writes_it_at_evaluations_and_goes_on_without_it(unit_config, monkeypatch):
    from tests.training.test_run import run

    unit_config.evaluation.every = 1
    wrote, real = [], write_report

    def watched(folder: Path) -> Path:
        file = real(folder)
        wrote.append(re.search(r"iteration \d of \d", file.read_text())[0])
        raise OSError("full")

    monkeypatch.setattr("advgrpo.training.run.write_report", watched)
    made = run(unit_config)
    assert made.trainer.finished
    assert wrote == ["iteration 1 of 2", "iteration 2 of 2"]
    stages = [json.loads(line)["stage"] for line in (made.folder / "evaluations.jsonl").read_text().splitlines()]
    assert stages == ["base", "during", "final"]
