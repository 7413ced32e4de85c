"""Prompts that are cut: counted by tokenizer, with what is lost, printed before training and kept in summary.json.

Bugs planted in a copy, each seen red: the limit off by one in either direction; the loss begun one token late; a T5
judged by CLIP's limit, or where no encoder reads it; held-out prompts forgotten; nothing said of prompts that an
iteration repeats; a command that draws says nothing; a T5's limit of `references generate` not asked for.
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.data.prompt_lengths import cut_prompts
from advgrpo.data.sources import Sources, shipped_path
from advgrpo.evaluate import main as evaluate
from advgrpo.generate import main as generate
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.references.__main__ import main as references
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

LONG = "a small red star on the left of a blue background with a green ring beside it"
SHORT = "a small red star"


def test_what_is_lost_is_what_the_encoders_never_see(unit_config, unit_pipeline):
    """The embedding of a cut prompt is that of the prompt without its end, for each tokenizer's own end."""
    found = cut_prompts(Path(unit_pipeline), [SHORT, LONG], 200)
    assert [cut.tokenizers for cut in found] == [("tokenizer", "tokenizer_2")]  # the T5 reads 200 tokens
    assert found[0].prompts == (LONG,)
    policy = SD3Policy(
        unit_config.model, device=torch.device("cpu"), cache_dir=Path(unit_config.data.cache_dir), seed=0
    )
    kept = LONG.removesuffix(found[0].lost).strip()
    assert found[0].lost
    pooled = policy.encode([LONG, kept, kept.rsplit(" ", 1)[0]]).pooled
    assert torch.equal(pooled[0], pooled[1])
    assert not torch.equal(pooled[1], pooled[2])
    assert cut_prompts(Path(unit_pipeline), [kept, SHORT], 200) == []
    assert [cut.lost for cut in cut_prompts(Path(unit_pipeline), [f"{kept} a"], 200)] == ["a"]


def test_a_t5_has_the_configured_limit(unit_config, unit_pipeline):
    limits = {cut.kind: cut for cut in cut_prompts(Path(unit_pipeline), [LONG], 12)}
    assert set(limits) == {"CLIPTokenizer", "T5Tokenizer"}
    assert limits["T5Tokenizer"].limit == 12
    kept = LONG.removesuffix(limits["T5Tokenizer"].lost).strip()
    assert [cut.limit for cut in cut_prompts(Path(unit_pipeline), [kept], 12)] in ([], [13])


def test_a_pipeline_without_a_t5_is_not_judged_by_one(unit_pipeline, tmp_path):
    index = json.loads((Path(unit_pipeline) / "model_index.json").read_text())
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part).symlink_to(Path(unit_pipeline) / part)
    for absent in ({"tokenizer_3": [None, None]}, {"text_encoder_3": [None, None]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index | absent))
        assert [cut.kind for cut in cut_prompts(tmp_path, [LONG], 2)] == ["CLIPTokenizer"]


def test_a_run_says_which_prompts_are_cut_and_its_summary_too(unit_config, tmp_path):
    shipped = Path(unit_config.data.prompts).read_text().splitlines()
    held_out = Path(unit_config.data.held_out_prompts)
    held_out.write_text("\n".join([LONG, *held_out.read_text().splitlines()[:1]]))
    there = Path(shipped_path("references", unit_config.data.references))
    index = json.loads((there / "references.json").read_text())
    index[LONG] = index[shipped[0]]
    own = tmp_path / "references"
    own.mkdir()
    for name in {name for names in index.values() for name in names}:
        (own / name).symlink_to(there / name)
    (own / "references.json").write_text(json.dumps(index))
    changes = {"iterations": 1, "data": {"references": str(own)}, "evaluation": {"metrics": ["saturation"]}}
    settings = config.build(config.merge(unit_config.model_dump(), changes), "test")
    console = Console(record=True, width=200)
    run = Run(settings, Distributed.start("cpu"), resume=False, console=console)
    printed = console.export_text(clear=False)
    assert f"note: 1 of {len(shipped) + 2} prompts are longer than the 13 tokens of CLIPTokenizer" in printed
    assert "(tokenizer, tokenizer_2), which does not read the rest; the first, 'a small red star on the left" in printed
    run.train()
    summary = json.loads((Path(settings.output_dir) / "summary.json").read_text())
    assert summary["prompts_cut_by"]["tokenizer"] == summary["prompts_cut_by"]["tokenizer_2"] == 1


def test_a_tokenizer_of_another_family_is_not_judged(unit_pipeline, tmp_path):
    """Their pipelines cut where only their code says; nor need transformers have it."""
    index = json.loads((Path(unit_pipeline) / "model_index.json").read_text())
    others = {part: [index[part][0], "ChatGLMTokenizer"] for part in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **others}))
    assert cut_prompts(tmp_path, [LONG], 2) == []


def test_commands_that_draw_say_which_prompts_are_cut(unit_pipeline, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\n{SHORT}\n")
    model = ["--model", unit_pipeline, "--num-steps", "1", "--device", "cpu"]
    one = ["--images-per-prompt", "1", "--resolution", "32"]
    scored = ["--metrics", "saturation", "--output", str(tmp_path / "scores"), "--cache-dir", str(tmp_path / "cache")]
    drawn = ["--out", str(tmp_path / "set"), "--per-prompt", "1", "--height", "32", "--width", "32"]
    image = ["--output", str(tmp_path / "grid.png")]
    commands = {
        "generate": lambda: generate(["--prompt", LONG, "--prompt", SHORT, *model, *one, *image]),
        "evaluate": lambda: evaluate(["--prompts", str(prompts), *model, *one, *scored]),
        "references": lambda: references(["generate", "--prompts", str(prompts), *model, *drawn]),
    }
    for name, command in commands.items():
        assert command() == 0, name
        said = capsys.readouterr().out
        assert "note: 1 of 2 prompts are longer than the 13 tokens of CLIPTokenizer (tokenizer, tokenizer_2)" in said, (
            name
        )
        assert "T5" not in said, name
    short = ["--arguments", '{"max_sequence_length": 5}']
    assert (
        references(["generate", "--prompts", str(prompts), *model, *drawn, "--out", str(tmp_path / "5"), *short]) == 0
    )
    assert "the 5 tokens of T5Tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(("wanted", "expected"), [(6, []), (8, "1 or 2 times"), (12, "them 2 times")])
def test_an_iteration_that_repeats_prompts_is_said(unit_config, wanted, expected):
    unit_config.rollout.prompts_per_iteration = wanted
    notes = Sources([str(number) for number in range(6)], [], None).notes(unit_config)
    if not expected:
        assert notes == []
    else:
        assert f"prompts_per_iteration = {wanted}, but there are 6 training prompts" in notes[0]
        assert expected in notes[0]
