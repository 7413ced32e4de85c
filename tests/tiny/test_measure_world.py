"""What the world leaves to gain: the ceiling, the gates, and that the page has what was measured.

Bugs planted in a copy, each seen red: a ceiling by a gallery with the artist's own drawings; the base at the guidance
where the report prompts find it best; a gate that nothing misses; a page with other figures.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from advgrpo.tiny import judge as tiny_judge
from advgrpo.tiny.judge import GALLERY_ARTISTS
from advgrpo.tiny.scenes import NAMES, Scene, render
from tools.tiny import measure_world
from tools.tiny.measure_world import Galleries, gates, passed

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "advgrpo" / "tiny" / "assets" / measure_world.RECORD).read_text())
SCENES = [Scene(name, "small", "left", "blue") for name in NAMES[:16]]


@pytest.fixture
def galleries(tmp_path, monkeypatch) -> Galleries:
    """Of pixels, which know a drawing that they hold and hardly any other artist's."""
    monkeypatch.setattr(tiny_judge, "_network", lambda: None)
    monkeypatch.setattr(
        tiny_judge.Judge, "features", lambda _, images, scenes: F.adaptive_avg_pool2d(images, 12).flatten(1)
    )
    return Galleries(tmp_path)


def test_an_artist_of_the_gallery_is_judged_without_their_own_drawings(galleries):
    found = galleries.ceiling(SCENES, torch.Generator().manual_seed(0))
    assert list(found) == list(GALLERY_ARTISTS)
    assert max(found.values()) < 0.9
    own = render(SCENES, [GALLERY_ARTISTS[0]] * len(SCENES))
    shares = galleries.shares(own, SCENES)
    assert shares["retrieval"] == 1
    assert 0.75 < shares["without_one"] < 1, "three of four galleries hold them"


def figures(references: float, base: dict[str, tuple[float, float]]) -> dict:
    """Of both lists alike, with a ceiling of .8; base: guidance -> shares on (tuning, report)."""
    both = lambda share: {"retrieval": share, "without_one": share}  # noqa: E731
    return {
        name: {
            "ceiling": dict(zip(GALLERY_ARTISTS, (0.7, 0.9, 0.75, 0.85))),
            "references": both(references),
            "base": {scale: both(shares[number]) for scale, shares in base.items()},
        }
        for number, name in enumerate(measure_world.LISTS)
    }


def test_gates_are_of_the_ceiling_at_the_guidance_that_the_tuning_prompts_choose():
    found = gates(figures(0.73, {"1": (0.16, 0.4), "2": (0.4, 0.16)}))
    assert {name: gate["found"] for name, gate in found.items()} == pytest.approx(
        {"tuning: references": 0.9125, "tuning: base": 0.5, "report: references": 0.9125, "report: base": 0.2}
    )
    assert found["report: base"]["guidance"] == 2
    assert [name for name, gate in found.items() if not passed(gate)] == ["report: base"]
    for references, base in ((0.71, 0.4), (0.8, 0.19), (0.8, 0.53)):
        assert not all(map(passed, gates(figures(references, {"2": (base, base)})).values()))


def test_the_record_is_of_its_own_figures():
    assert RECORD["gates"] == gates(RECORD["figures"])


def test_the_page_has_what_was_measured():
    page = " ".join((ROOT / "docs" / "tiny.md").read_text().split())
    listed = lambda values: ", ".join(f"{value:.3f}"[1:] for value in values)  # noqa: E731
    for name in measure_world.LISTS:
        part, gate = RECORD["figures"][name], RECORD["gates"]
        ceiling = list(part["ceiling"].values())
        cells = [
            listed([sum(ceiling) / 4]) + f" ({listed(ceiling)})",
            listed([part["references"]["retrieval"]]),
            listed(shares["retrieval"] for shares in part["base"].values()),
            *(
                f"{gate[f'{name}: {who}']['found']:.2f}".removeprefix("0")
                + ("" if passed(gate[f"{name}: {who}"]) else ", **missed**")
                for who in ("references", "base")
            ),
        ]
        assert f"| `tiny:{name}` | {' | '.join(cells)} |" in page


@pytest.mark.weekly
def test_the_recorded_shares_of_the_references_are_found_again(tmp_path):
    texts = measure_world.prompts_of("report")
    scenes = [Scene.parse(text) for text in texts for _ in range(measure_world.EACH)]
    found = Galleries(tmp_path).shares(measure_world.references_of(texts), scenes)
    assert found == pytest.approx(RECORD["figures"]["report"]["references"], abs=0.02)


@pytest.mark.weekly
def test_the_command_measures_what_a_pipeline_draws(galleries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_world, "Galleries", lambda _: galleries)
    monkeypatch.setattr(measure_world, "SCALES", (1.0, 2.0))
    real = measure_world.prompts_of
    monkeypatch.setattr(measure_world, "prompts_of", lambda name: real(name)[:3])
    pipeline = ROOT / "advgrpo" / "tiny" / "assets" / "pipeline"
    measure_world.main(["--pipeline", str(pipeline), "--output", str(tmp_path), "--cache-dir", str(tmp_path / "cache")])
    record = json.loads((tmp_path / measure_world.RECORD).read_text())
    assert record["gates"] == gates(copy.deepcopy(record["figures"]))
    assert list(record["figures"]["report"]["base"]) == ["1", "2"]
    assert capsys.readouterr().out.count("of the ceiling") == 4
