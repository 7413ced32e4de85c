"""`python -m advgrpo.evaluate`: scores on the training runs' own noise, pairing, what it writes, and errors in time.

Bugs planted in a copy, each seen red: scores of the second model drawn from other noise; LoRA loaded with alpha = rank;
the image axis mixed up with the prompt axis; options of the file winning over flags; prompts not checked before work;
the LoRA scored as its own base; rule_accuracy not strict; one statistic given for another.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from advgrpo import config, tiny
from advgrpo.errors import UserError
from advgrpo.evaluate import Evaluate, main, metric_options, split_metric_options
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.evaluation.statistics import bootstrap_mean, paired_bootstrap
from advgrpo.monitor.image_statistics import image_statistics
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.rewards import REWARDS, build_reward, reward_class
from tests.parts import evaluator_of


def policy(path, cache, **lora):
    model = config.build({"model": {"path": path, "resolution": 32, "dtype": "float32", "max_sequence_length": 12,
                                    "lora": lora}}, "test").model  # fmt: skip
    return SD3Policy(model, device=torch.device("cpu"), cache_dir=Path(cache), seed=0)


def strong_lora(folder, path, cache, seed):
    made = policy(path, cache, rank=4, alpha=16)
    with torch.no_grad():
        for _, parameter in made.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    made.export(folder)
    return folder


@pytest.fixture(scope="module")
def unit(unit_pipeline, tmp_path_factory):
    """An untrained model, two strong LoRAs for it, three prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(tiny.held_out_prompts_file().read_text().splitlines()[:3]))
    for name, seed in (("one", 1), ("two", 2)):
        strong_lora(folder / name, unit_pipeline, folder / "cache", seed)
    return folder, unit_pipeline


def flags(unit, output, *more):
    folder, pipeline = unit
    small = ["--resolution", "32", "--num-steps", "2", "--guidance-scale", "1", "--max-sequence-length", "12"]
    data = ["--prompts", str(folder / "prompts.txt"), "--references", "tiny", "--cache-dir", str(folder / "cache")]
    sizes = ["--images-per-prompt", "2", "--batch-size", "4", "--grid-prompts", "2", "--device", "cpu"]
    return ["--model", pipeline, "--output", str(output), *data, *sizes, *small, *more]


DINO = ["--metric-options.dino_similarity.path", "tiny", "--metric-options.dino-similarity.image_size=32"]


def test_two_loras_on_the_same_noise(unit, tmp_path, capsys):
    folder, pipeline = unit
    one, two = str(folder / "one"), str(folder / "two")
    output = tmp_path / "scores"
    both = ["--lora", one, "--against", two, "--metrics", "rule,dino_similarity", *DINO]
    assert main(flags(unit, output, *both)) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["models"] == [one, two]
    assert found["settings"]["metric_options"] == {"rule": {}, "dino_similarity": {"path": "tiny", "image_size": 32}}
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["prompts"]) == 3
    scores = {
        model: torch.tensor([row["scores"][model]["dino_similarity"] for row in found["prompts"]])
        for model in (one, two)
    }
    result = found["results"]["dino_similarity"]
    expected = paired_bootstrap(scores[one], scores[two], seed=42)
    assert result["comparison"]["difference"] == pytest.approx(vars(expected.difference))
    assert result["comparison"]["win_rate"] == pytest.approx(vars(expected.win_rate))
    assert result["against"] == pytest.approx(vars(bootstrap_mean(scores[two], seed=42)))
    shown = capsys.readouterr().out
    for part in ("metric", "difference", "win rate", "rule", "dino_similarity", f"{result['model']['mean']:.4f}"):
        assert part in shown
    assert min(Image.open(output / "grid.png").size) > 150

    # the images are those a run's own evaluation draws with this LoRA: same noise, same strength
    settings = config.build({"seed": 42, "evaluation": {"num_steps": 2, "guidance_scale": 1.0}}, "test")
    loaded = policy(pipeline, folder / "cache", rank=4, alpha=16, start_from=two)
    prompts = [row["prompt"] for row in found["prompts"]]
    evaluator = evaluator_of(loaded, settings, prompts)
    metric = build_reward("dino_similarity", path="tiny", image_size=32)
    from advgrpo.data.references import ReferenceSet

    references = ReferenceSet.load(tiny.reference_dir(), prompts)
    for number, prompt in enumerate(prompts):
        images = evaluator.images([prompt] * 2, evaluator.ids(number, 2))
        again = metric.score(images, [prompt] * 2, references)
        assert torch.allclose(again, scores[two][number], atol=1e-4)
    assert (scores[one] - scores[two]).abs().max() > 1e-3


def test_base_against_itself_is_a_tie_and_repeats(unit, tmp_path):
    folder, pipeline = unit
    zero = policy(pipeline, folder / "cache", rank=2, alpha=2)  # B is zero: the LoRA changes nothing
    zero.export(tmp_path / "zero")
    arguments = ["--lora", str(tmp_path / "zero"), "--against", "base", "--metrics", "rule"]
    results = []
    for name in ("a", "b"):
        assert main(flags(unit, tmp_path / name, *arguments)) == 0
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text())["results"])
    assert results[0] == results[1]
    assert results[0]["rule"]["comparison"]["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert results[0]["rule"]["comparison"]["win_rate"]["mean"] == 0.5


def test_base_beside_a_lora_is_the_base_alone(unit, tmp_path):
    dino = ["--metrics", "dino_similarity", *DINO]
    assert main(flags(unit, tmp_path / "alone", *dino)) == 0
    found = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert found["models"] == ["base"]
    assert found["results"]["dino_similarity"]["comparison"] is None
    alone = torch.tensor([row["scores"]["base"]["dino_similarity"] for row in found["prompts"]])
    assert alone.shape == (3, 2)
    lora = str(unit[0] / "one")
    assert main(flags(unit, tmp_path / "beside", "--lora", lora, "--against", "base", *dino)) == 0
    rows = json.loads((tmp_path / "beside" / "evaluation.json").read_text())["prompts"]
    beside = torch.tensor([row["scores"]["base"]["dino_similarity"] for row in rows])
    adapted = torch.tensor([row["scores"][lora]["dino_similarity"] for row in rows])
    assert torch.allclose(beside, alone, atol=1e-4)
    assert (adapted - alone).abs().max() > 1e-3


def test_a_lora_without_metadata_has_alpha_equal_to_rank(unit, tmp_path):
    from advgrpo.training.models import lora_section

    folder, pipeline = unit
    section = lora_section(folder / "one", Path(pipeline))
    assert (section.rank, section.alpha, section.blocks) == (4, 4, "all")  # trained with 16, folded on export
    assert set(section.targets) == set(config.LORA_TARGETS)
    weights = load_file(folder / "one" / "pytorch_lora_weights.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(weights, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    assert lora_section(tmp_path / "bare", Path(pipeline)).alpha == 4
    last = {name: t for name, t in weights.items() if "transformer_blocks.1." in name}
    save_file(last, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    assert lora_section(tmp_path / "bare", Path(pipeline)).blocks == 1
    first = {name: t for name, t in weights.items() if "transformer_blocks.0." in name}
    save_file(first, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match=r"adapts blocks \[0\] of 2"):
        lora_section(tmp_path / "bare", Path(pipeline))
    save_file({"lora_unet.down": torch.zeros(2, 2)}, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="want diffusers' format"):
        lora_section(tmp_path / "bare", Path(pipeline))


def test_statistics_and_the_strict_judge_are_what_they_are_in_training(unit, tmp_path):
    """Of the same images, drawn again from the same noise."""
    folder, pipeline = unit
    names = ["saturation", "dark_share", "edge_density", "rule_accuracy"]
    assert main(flags(unit, tmp_path, "--metrics", ",".join(names))) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["prompts"]
    settings = config.build({"seed": 42, "evaluation": {"num_steps": 2, "guidance_scale": 1.0}}, "test")
    prompts = [row["prompt"] for row in found]
    base = evaluator_of(policy(pipeline, folder / "cache"), settings, prompts).base()
    judge = build_reward("rule", strict=True)
    for number, row in enumerate(found):
        images = base.images([row["prompt"]] * 2, base.ids(number, 2))
        expected = {**image_statistics(images), "rule_accuracy": judge.score(images, [row["prompt"]] * 2)}
        for name in names:
            assert row["scores"]["base"][name] == pytest.approx(expected[name].tolist(), abs=1e-5), name
    saturation = [value for row in found for value in row["scores"]["base"]["saturation"]]
    assert len(set(saturation)) > 1


def test_what_a_tiny_world_is_measured_with_by_default_is_shipped():
    """Nothing stands for a model that is not there."""
    for model in tiny.WORLDS:
        options = Evaluate(model=model, metrics=",".join(REWARDS), output=Path("out"))
        for metric, given in metric_options(options, {}).items():
            shipped = tiny.BACKBONES if metric == "dino_similarity" else tiny.PREFERENCE_MODELS
            assert given.get("path") in (None, *shipped), (model, metric)
        assert "path" in metric_options(options, {})["dino_similarity"]


def test_options_of_metrics_come_from_defaults_file_and_flags(tmp_path):
    rest, given = split_metric_options(
        ["--seed", "3", "--metric-options.rule.strict", "true", "--metric-options.pickscore.path=here"]
    )
    assert rest == ["--seed", "3"]
    assert given == {"rule": {"strict": True}, "pickscore": {"path": "here"}}
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"rule": {"strict": False}, "dino_similarity": {"reduction": "max"}}))
    options = Evaluate(metrics="rule, pickscore,dino_similarity", output=tmp_path, metric_options_file=file)
    assert metric_options(options, given) == {
        "rule": {"strict": True},
        "pickscore": {"path": "here"},
        "dino_similarity": {"path": "tiny", "image_size": 32, "reduction": "max"},
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metrics", ","], "--metrics is empty"),
        (["--metrics", "pickscor"], "unknown metric 'pickscor'; did you mean 'pickscore'?"),
        (["--metrics", "aesthetic"], "--metrics aesthetic: reward aesthetic needs the option head"),
        (["--metrics", "rule", "--metric-options.rule.strickt", "1"], "no option 'strickt'; it has strict"),
        (["--metrics", "rule", "--metric-options.ocr.workers", "1"], "metric 'ocr', which --metrics rule lacks"),
        (["--metrics", "rule", "--metric-options.rule"], "want --metric-options.METRIC.OPTION VALUE"),
        (["--metrics", "rule", "--metric-options.rule.strict"], "the value is missing"),
        (
            ["--metrics", "rule", "--lora", "nowhere"],
            "--lora = 'nowhere/pytorch_lora_weights.safetensors' does not exist",
        ),
        (
            ["--metrics", "rule", "--lora", "{folder}/one", "--against", "x"],
            "--against = 'x/pytorch_lora_weights.safetensors' does not exist",
        ),
        (["--metrics", "rule", "--against", "base"], "compares the base model with itself"),
        (
            ["--metrics", "rule", "--images-per-prompt", "0"],
            "--images-per-prompt 0: want a whole number from 1 to 1000",
        ),
        (["--metrics", "rule", "--confidence", "95"], "--confidence 95: want a number above 0 and below 1"),
        (["--metrics", "rule", "--model", "m", "--prompts", ""], "--prompts is empty"),
        (["--metrics", "dino_similarity", "--references", ""], "compares with references"),
        (
            ["--metrics", "rule", "--prompts", "{folder}/cats.txt", "--references", ""],
            "judges the tiny world's drawings only",
        ),
        (["--metrics", "rule", "--num-steps", "-1"], "--num-steps -1: want a whole number from 0 to 1000"),
        (["--metrics", "rule", "--output", "{folder}/prompts.txt"], "is not writable"),
    ],
)
def test_bad_input_is_found_before_an_image_is_drawn(arguments, expected, unit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Evaluator, "images", lambda *_: pytest.fail("an image was drawn"))
    (unit[0] / "cats.txt").write_text("a cat\n")
    given = [part.replace("{folder}", str(unit[0])) for part in arguments]
    assert main(flags(unit, tmp_path / "out", *given)) == 2
    assert expected in capsys.readouterr().err


def test_every_registered_reward_exists():
    for name in REWARDS:
        kind = reward_class(name)
        assert callable(kind.score)
        assert name in (getattr(kind, "name", "remote"), "clip")
    with pytest.raises(UserError, match=r"unknown reward 'zzz'; known: aesthetic, clip"):
        reward_class("zzz")
    assert build_reward("rule", device="cpu", dtype=torch.float32, strict=True).strict
    assert build_reward("remote", url="http://127.0.0.1:1/", name="geneval").name == "geneval"  # an option called name


def test_metrics_of_one_s_own_by_an_import(unit, tmp_path, capsys):
    """An example's function, with an option; the file that does not exist is found before an image is drawn."""
    source = Path(__file__).parents[1] / "examples" / "custom_reward.py"
    own = ["--metric-options.red.import", f"{source}:redness", "--metric-options.red.strength", "2.0"]
    assert main(flags(unit, tmp_path / "out", "--metrics", "rule,red", *own)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["results"]["red"]["model"]["mean"] < 0
    assert main(flags(unit, tmp_path / "no", "--metrics", "red", "--metric-options.red.import", "nowhere.py:f")) == 2
    assert "--metric-options.red.import = 'nowhere.py:f': nowhere.py does not exist" in capsys.readouterr().err
    assert main(flags(unit, tmp_path / "no", "--metrics", "far", "--metric-options.far.url", "ftp://host")) == 2
    assert "--metric-options.far.url = 'ftp://host'" in capsys.readouterr().err
