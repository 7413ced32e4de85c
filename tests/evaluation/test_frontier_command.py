"""`python -m advgrpo.frontier` on the shipped tiny world: what it writes, and errors before any work."""

import json

import pytest
import torch
from safetensors.torch import save_file

from advgrpo import tiny
from advgrpo.frontier import main
from advgrpo.runtime.fingerprint import file_digest


@pytest.fixture
def lora(tmp_path):
    """One adapted product of the last block, strong enough to be seen."""
    draw = torch.Generator().manual_seed(0)
    name, width = "transformer.transformer_blocks.5.attn.to_v.lora_{}.weight", 128
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file({name.format(x): torch.randn(shape, generator=draw) for x, shape in
               (("A", (4, width)), ("B", (width, 4)))}, file)  # fmt: skip
    return file


def flags(tmp_path, lora) -> list[str]:
    for name, prompts in (("report", tiny.report_prompts_file()), ("tuning", tiny.held_out_prompts_file())):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts.read_text().splitlines()[:3]))
    small = ["--prompts", str(tmp_path / "report.txt"), "--tuning-prompts", str(tmp_path / "tuning.txt")]
    return ["--loras", str(lora.parent), "--output", str(tmp_path / "front"), "--num-steps", "2", *small]


@pytest.mark.weekly
def test_what_it_writes(tmp_path, lora, capsys):
    assert main([*flags(tmp_path, lora), "--guidance-scales", "1", "2"]) == 0
    numbers = json.loads((tmp_path / "front" / "frontier.json").read_text())
    assert numbers["digests"] == [file_digest(lora)]
    assert [each["guidance"] for each in numbers["equal"]] == [[1.0, 1.0], [2.0, 2.0]]
    (own,) = numbers["models"].values()
    assert [row["kid"] for row in own] != [row["kid"] for row in numbers["base"]]
    for k, difference in enumerate(numbers["equal"]):
        assert difference["kid"]["mean"] == pytest.approx(own[k]["kid"] - numbers["base"][k]["kid"])
    said = capsys.readouterr().out
    assert "1 LoRA less base" in said
    assert (tmp_path / "front" / "frontier.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--guidance-scales", "0.5"], "--guidance-scales (0.5,): want one or more, each at least 1"),
        (["--model", "elsewhere"], "only tiny has an independent judge"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path, lora, capsys, more, said):
    assert main([*flags(tmp_path, lora), *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "front").exists()
