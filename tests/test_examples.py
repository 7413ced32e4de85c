"""What stands in examples/ works as it stands there."""

import importlib.util
import json
import os
import shlex
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from advgrpo.tiny import held_out_prompts_file
from advgrpo.train import main as train
from tests import small_models

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    """The module that an example is."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FEW = {  # for CI: what the first cell says of the run, and on which prompts
    '"iterations": 5, "adversary.warmup_iterations": 1': '"iterations": 1, "data.held_out_prompts": "few.txt"',
    "prompts_per_iteration, config.rollout.micro_batch = 4, 16": (
        "prompts_per_iteration, config.rollout.micro_batch = 2, 8"
    ),
    'other.iterations = "runs/notebook-eta", 0.5, 2': 'other.iterations = "runs/notebook-eta", 0.5, 1',
    "images_per_prompt=1, output": 'images_per_prompt=2, prompts="few.txt", output',
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [pytest.param(each, marks=pytest.mark.weekly) for each in (FEW, {})], ids=["short", "as it stands"]
)
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, changes):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    root = str(EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, f"{root}/kernels"]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    few = held_out_prompts_file().read_text().splitlines()[:2]
    (tmp_path / "few.txt").write_text("\n".join(few))
    source = (EXAMPLES / "train_in_a_notebook.ipynb").read_text()
    for old, new in ((json.dumps(old)[1:-1], json.dumps(new)[1:-1]) for old, new in changes.items()):
        assert source.count(old) == 1
        source = source.replace(old, new)
    notebook = nbformat.reads(source, as_version=4)
    done = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [key for cell in cells for output in cell.outputs for key in output.get("data", {})]
    assert shown.count("image/png") >= 2  # the curves and the grid
    assert (tmp_path / "runs/notebook/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.weekly), {"rollout.initial_noise": "per_image", "rollout.guidance_scale": 1.0}],
)
def test_the_method_in_one_file_gives_the_trainers_numbers_to_the_last_bit(tmp_path, changes):
    """Warm-up, discriminator updates, and the generator's, on the shipped world."""
    from rich.console import Console

    from advgrpo import Config
    from advgrpo.runtime.distributed import Distributed
    from advgrpo.training.run import Run

    minimal = load("adv_grpo_minimal")
    settings = {
        **minimal.SETTINGS,
        "iterations": 3,
        "output_dir": str(tmp_path / "run"),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.held_out_prompts": "",
        "evaluation.metrics": [],
        "rollout.prompts_per_iteration": 4,
        "rollout.group_size": 4,
        "rollout.micro_batch": 4,
        "rollout.num_steps": 6,
        "adversary.warmup_iterations": 1,
        "adversary.warmup_updates": 3,
        "adversary.schedule": "always",
        "adversary.updates_per_iteration": 2,
        "adversary.batch_size": 6,
        **changes,
    }
    config = Config.load("tiny", settings)
    run = Run(config, Distributed.start("cpu"), console=Console(quiet=True))
    expected = [run.trainer.iterate() for _ in range(3)]
    run.close()
    own = minimal.AdvGRPO(config, torch.device("cpu"))
    for iteration, row in enumerate(expected):
        found = own.iterate(iteration)
        assert ("policy_loss" in found) == (iteration > 0)
        assert found == {name: row[name] for name in found}


def test_the_method_in_one_file_is_one_page():
    assert len((EXAMPLES / "adv_grpo_minimal.py").read_text().splitlines()) <= 150


@pytest.mark.weekly
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_a_small_model_of_a_family_is_written_and_trains_by_the_command_that_it_prints(family, tmp_path, capsys):
    folder = tmp_path / "model"
    small_models.main([family, str(folder)])
    command = shlex.split(capsys.readouterr().out)
    assert command[:3] == ["python", "-m", "advgrpo.train"]
    with chdir(EXAMPLES.parent):
        assert train(command[3:]) == 0
    assert (tmp_path / "model-run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_small_model_is_not_written_over_another(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        small_models.main(["flux1", str(tmp_path)])
    assert f"{tmp_path} is there already: name another folder, or delete it" in capsys.readouterr().err
