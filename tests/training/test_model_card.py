"""The card beside a LoRA, and its way to the hub, against a stand-in that speaks what huggingface_hub really sends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from advgrpo import config as configuration
from advgrpo.export import main
from advgrpo.policy.lora_file import write_lora
from advgrpo.runtime.atomic import write_atomically
from advgrpo.training.model_card import CARD, MARK, RunFacts, nearest_preset, write_card, write_samples
from tests.hub_server import TOKEN, Hub, hub_for_this_process, hub_server

SUMMARY = {
    "iterations": 150,
    "base": {"dino_similarity": 0.84, "rule_accuracy": 0.65},
    "final": {"dino_similarity": 0.88, "rule_accuracy": 0.78},
    "ci95": {"base": {"dino_similarity": 0.01}, "final": {"dino_similarity": 0.02}},
    "versions": {"torch": "2.13.0"},
    "trained": True,
}


def make_run(folder: Path, preset: str = "tiny", **settings) -> Path:
    """An output folder with the files that a card reads; its lora."""
    lora = folder / "lora"
    lora.mkdir(parents=True)
    write_lora(
        lora, {"transformer_blocks.0.attn.to_q": (torch.randn(4, 8), torch.randn(8, 4))}, "transformer", "comfyui"
    )
    config = configuration.load(preset=preset)
    config.output_dir = str(folder)
    for name, value in settings.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    (folder / "config.yaml").write_text(configuration.dump(config))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "samples").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "samples" / "final.png")
    write_samples(lora, [('a "red" star: № 1', torch.rand(2, 3, 8, 8)), ("a ring", torch.rand(2, 3, 8, 8))])
    return lora


def front_matter(lora: Path) -> dict:
    return ModelCard.load(lora / CARD).data.to_dict()


def text(lora: Path) -> str:
    return (lora / CARD).read_text()


def test_the_hub_reads_the_card(tmp_path):
    lora = make_run(tmp_path / "run", "sd35m-dino-paper")
    assert main([str(lora), "--card"]) == 0
    data = front_matter(lora)
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "text-to-image"} <= set(data["tags"])
    assert data["widget"] == [
        {"text": 'a "red" star: № 1', "output": {"url": "sample-1.png"}},
        {"text": "a ring", "output": {"url": "sample-2.png"}},
    ]
    assert (lora / "samples.png").read_bytes() == (tmp_path / "run" / "samples" / "final.png").read_bytes()


def test_what_the_card_says(tmp_path):
    lora = make_run(tmp_path / "secret" / "night", "sd35m-dino-paper", data__prompts="/home/me/prompts.txt",
                    data__references="hf:owner/references", rollout__micro_batch=4)  # fmt: skip
    assert main([str(lora), "--card"]) == 0
    card = text(lora)
    assert "# night" in card
    assert "| dino_similarity | 0.8400 ± 0.0100 | 0.8800 ± 0.0200 |" in card
    assert "| rule_accuracy | 0.6500 | 0.7800 |" in card
    assert "`sd35m-dino-paper` with `rollout.micro_batch = 4`" in card
    assert "| iterations | 150 |" in card
    assert "| prompts | `prompts.txt` |" in card
    assert "| references | `hf:owner/references` |" in card
    assert "the adversary (dino)" in card
    assert 'from_pretrained("stabilityai/stable-diffusion-3.5-medium"' in card
    assert "pipe.load_lora_weights" in card
    assert "![Samples](samples.png)" in card
    for private in ("/home/me", str(tmp_path), "secret"):
        assert private not in card


@pytest.mark.parametrize(
    ("path", "base_model", "license", "name"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", "", "other", "stabilityai-ai-community"),
        ("stabilityai/stable-diffusion-3.5-large", "", "other", "stabilityai-ai-community"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "", "openrail++", None),
        ("someone/unknown", "", "other", "that-of-the-base-model"),
        ("/data/sd35", "stabilityai/stable-diffusion-3.5-medium", "other", "stabilityai-ai-community"),
        ("/data/sd35", "", "other", "that-of-the-base-model"),
        ("tiny", "", "apache-2.0", None),
    ],
)
def test_the_licence_is_the_base_models_and_no_other(tmp_path, path, base_model, license, name):
    lora = make_run(tmp_path / "run", model__path=path)
    assert main([str(lora), "--card", "--base-model", base_model]) == 0
    data = front_matter(lora)
    assert data["license"] == license
    assert data.get("license_name") == name
    on_hub = base_model or (path if path.count("/") == 1 else None)
    assert data.get("base_model") == on_hub
    if name == "stabilityai-ai-community":
        base = base_model or path
        assert data["license_link"] == f"https://huggingface.co/{base}/blob/main/LICENSE.md"
        assert "Stability AI Community License" in text(lora)
    if name == "that-of-the-base-model":
        assert "under that model's licence" in text(lora)


def test_a_base_models_folder_says_its_licence(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\nlicense_link: LICENSE\n---\n# x\n")
    lora = make_run(tmp_path / "run", model__path=str(base))
    assert main([str(lora), "--card"]) == 0
    assert (front_matter(lora)["license"], front_matter(lora)["license_name"]) == ("other", "house-rules")
    assert "license_link" not in front_matter(lora)
    (base / "README.md").write_text("---\n- [broken\n---\n")
    assert main([str(lora), "--card"]) == 0
    assert front_matter(lora)["license_name"] == "that-of-the-base-model"


def test_somebody_elses_readme_stays(tmp_path, capsys):
    lora = make_run(tmp_path / "run")
    (lora / CARD).write_text("# my own words\n")
    assert main([str(lora), "--card"]) == 0
    assert text(lora) == "# my own words\n"
    assert "is not of this program and stays as it is" in capsys.readouterr().out
    (lora / CARD).write_text(f"{MARK}\nyesterday")
    assert main([str(lora), "--card"]) == 0
    assert "yesterday" not in text(lora)


def test_a_run_that_was_stopped_has_no_metrics(tmp_path):
    config = configuration.load(preset="tiny")
    lora = tmp_path / "lora"
    lora.mkdir()
    assert write_card(lora, RunFacts.of(config, {}, 7)) == lora / CARD
    assert "The run has not ended" in text(lora)
    assert "Held-out metrics" not in text(lora)
    assert "| iterations | 7 |" in text(lora)
    assert yaml.safe_load(text(lora).split("---")[1])["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "preset", ["tiny", "tiny-sft", "tiny-nft-adv", "sd35m-adv-ocr", "sdxl-dino", "sd35m-flow-grpo-original"]
)
def test_every_preset_is_its_own_nearest(preset):
    assert nearest_preset(configuration.load(preset=preset)) == (preset, [])


def test_the_bad_is_refused(tmp_path, capsys):
    lora = make_run(tmp_path / "run")
    (lora / "other.safetensors").write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pytorch_lora_weights.safetensors").write_bytes((lora / "other.safetensors").read_bytes())
    damaged = make_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_text("[")
    for arguments, message in (
        ([lora], "--out is missing: want a file to write, or --card, or --push-to USER/NAME"),
        ([lora, "--private", "--card"], "--private says how --push-to uploads"),
        ([lora, "--push-to", "name"], "--push-to name: want USER/NAME"),
        ([lora, "--push-to", "a/b/c"], "--push-to a/b/c: no name of a repository"),
        ([lora, "--push-to", "a/-b!"], "--push-to a/-b!: no name of a repository"),
        ([lora / "other.safetensors", "--card"], "a card is of a folder with pytorch_lora_weights.safetensors"),
        ([bare, "--card"], "has no config.yaml; give the OUT/lora of a run"),
        ([damaged, "--card"], "summary.json cannot be read"),
    ):
        assert main([str(each) for each in arguments]) == 2
        assert message in capsys.readouterr().err, message


# The hub.


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with hub_for_this_process(monkeypatch, TOKEN) as server:
        yield server


def test_the_loras_files_are_listed_and_uploaded_and_no_others(tmp_path, hub, capsys):
    lora = make_run(tmp_path / "run")
    write_atomically(lora / "private-notes.txt", "no")
    write_atomically(lora / "optimizer.safetensors", b"no")
    assert main([str(lora), "--push-to", "me/my-lora", "--private"]) == 0
    said = capsys.readouterr().out
    stored = hub.repositories["me/my-lora"]
    names = ["README.md", "pytorch_lora_weights.safetensors", "comfyui.safetensors", "samples.png"]
    names += ["sample-1.png", "sample-2.png"]
    assert set(stored["files"]) == set(names)
    assert stored["private"] is True
    assert all(stored["files"][name] == (lora / name).read_bytes() for name in names)
    assert len(hub.objects) == 2  # both weight files by git-lfs
    for name in names:
        assert f"  {name}  {(lora / name).stat().st_size:,} bytes" in said
    assert said.index("sample-2.png") < said.index("uploaded:")
    assert "(private)" in said
    assert f"uploaded: {hub.url}/me/my-lora/commit/abc" in said
    assert hub.requests.index("POST /api/repos/create") < hub.requests.index("POST /api/models/me/my-lora/commit/main")


def test_everything_is_listed_before_the_first_request(tmp_path, hub, capsys, monkeypatch):
    seen = []
    real = huggingface_hub.HfApi.repo_exists
    monkeypatch.setattr(
        huggingface_hub.HfApi, "repo_exists", lambda *a, **k: (seen.append(capsys.readouterr().out), real(*a, **k))[1]
    )
    assert main([str(make_run(tmp_path / "run")), "--push-to", "me/x"]) == 0
    assert "sample-2.png" in seen[0]
    assert hub.repositories["me/x"]["private"] is False


def test_a_second_upload_updates_and_a_public_repository_is_not_called_private(tmp_path, hub, capsys):
    lora = make_run(tmp_path / "run")
    assert main([str(lora), "--push-to", "me/x"]) == 0
    assert main([str(lora), "--push-to", "me/x"]) == 0
    commits = len([each for each in hub.requests if "/commit/" in each])
    assert main([str(lora), "--push-to", "me/x", "--private"]) == 2
    assert "the repository exists and is public" in capsys.readouterr().err
    assert len([each for each in hub.requests if "/commit/" in each]) == commits


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("repos/create", 403, "the hub answered 403: this token may not write there"),
        ("commit/main", 403, "the hub answered 403: this token may not write there"),
        ("preupload", 401, "the hub answered 401: the hub does not know the token: run hf auth login"),
        ("repos/create", 404, "the hub answered 404: no such user"),
        ("commit/main", 413, "the hub answered 413: the files are too large"),
    ],
)
def test_refusals_are_one_line(tmp_path, hub, capsys, where, status, message):
    hub.refuse = (where, status)
    assert main([str(make_run(tmp_path / "run")), "--push-to", "me/x"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: --push-to me/x: ")]) == 1
    assert message in errors[-1]
    assert "Traceback" not in "".join(errors)


def test_a_wrong_token_no_token_and_no_network(tmp_path, hub, capsys, monkeypatch):
    lora = str(make_run(tmp_path / "run"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([lora, "--push-to", "me/x"]) == 2
    assert "the hub answered 401: the hub does not know the token" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main([lora, "--push-to", "me/x"]) == 2
    assert "the hub answered 401" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([lora, "--push-to", "me/x"]) == 2
    error = capsys.readouterr().err
    assert "the hub was not reached (ConnectError" in error
    assert "HF_ENDPOINT" in error


@pytest.mark.weekly
def test_the_command_finds_the_hub_by_its_environment(tmp_path):
    """In a process of its own, as a user runs it."""
    lora = make_run(tmp_path / "run")
    with hub_server() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "advgrpo.export", str(lora), "--push-to", "me/x"]
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "README.md" in hub.repositories["me/x"]["files"]
