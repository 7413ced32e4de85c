"""`python -m advgrpo.generate`: base and LoRA side by side from the same noise, and errors before the model loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from advgrpo import config
from advgrpo.generate import main
from advgrpo.policy.sd3 import SD3Policy

PROMPTS = ["--prompt", "a small fox on blue, left", "--prompt", "a large key on pink"]


@pytest.fixture
def lora(tmp_path) -> Path:
    """A strong random LoRA for the shipped pipeline."""
    settings = config.load("tiny")
    policy = SD3Policy(settings.model, device=torch.device("cpu"), cache_dir=tmp_path, seed=0)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    policy.export(tmp_path / "lora")
    return tmp_path / "lora"


def test_grid_of_base_and_lora(tmp_path, lora):
    output = tmp_path / "grid.png"
    small = ["--images-per-prompt", "2", "--num-steps", "3"]
    assert main([*PROMPTS, "--lora", str(lora), "--base", "--output", str(output), *small]) == 0
    for name, flags in (("base", ["--base"]), ("again", ["--base"]), ("lora", ["--lora", str(lora)])):
        assert main([*PROMPTS, *flags, "--output", str(tmp_path / f"{name}.png"), *small]) == 0
    images = {path.stem: np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in tmp_path.glob("*.png")}
    assert (images["base"] == images["again"]).all()
    assert np.abs(images["base"] - images["lora"]).mean() > 1
    assert images["grid"].shape[0] == images["base"].shape[0] >= 2 * 64
    blocks = slice(0, 120)  # the first block of the grid with both is the base's
    assert (images["grid"][60:, blocks] == images["base"][60:, blocks]).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--prompt: give at least one"),
        (["--prompt", " "], "--prompt: give at least one"),
        (["--prompt", "x", "--lora", "nowhere"], "--lora = 'nowhere/pytorch_lora_weights.safetensors' does not exist"),
        (["--prompt", "x", "--output", "no/such/folder/g.png"], "the folder no/such/folder does not exist"),
        (["--prompt", "x", "--images-per-prompt", "0"], "want a whole number from 1 to 100"),
        (["--prompt", "x", "--model", "/tmp"], "--model = '/tmp'"),
    ],
)
def test_bad_arguments(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_before_the_model_loads(tmp_path, unit_pipeline, lora, capsys):
    """Stock diffusers would load none of it, or fail inside PEFT."""
    arguments = [*PROMPTS, "--lora", str(lora), "--model", unit_pipeline, "--output", str(tmp_path / "g.png")]
    assert main(arguments) == 2
    assert "it is another model's" in capsys.readouterr().err
    weights = {
        "unet.up_blocks.0.to_q.lora_A.weight": torch.ones(1, 4),
        "unet.up_blocks.0.to_q.lora_B.weight": torch.ones(4, 1),
    }
    save_file(weights, lora / "pytorch_lora_weights.safetensors")
    assert main([*PROMPTS, "--lora", str(lora)]) == 2
    assert "adapts a unet, but" in capsys.readouterr().err
    assert not (tmp_path / "g.png").exists()
