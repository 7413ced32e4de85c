"""Models of the hub: one is downloaded, one behind a licence says what to do (tests/hub_server.py is the hub)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from advgrpo.errors import UserError
from advgrpo.policy.pipelines import pipeline_class, pipeline_folder
from advgrpo.references.pipeline import _model_folder
from tests.hub_server import TOKEN, Hub, hub_for_this_process, hub_server

NAME = "lab/model"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_for_this_process(monkeypatch) as server:
        yield server


def test_a_model_of_the_hub_is_downloaded_once_and_its_class_needs_one_file(hub, unit_pipeline, monkeypatch):
    hub.hold(NAME, Path(unit_pipeline))
    assert pipeline_class(NAME) == "StableDiffusion3Pipeline"
    assert {each.rpartition("/")[2] for each in hub.requests if "/resolve/" in each} == {"model_index.json"}
    folder = pipeline_folder(NAME)
    held = hub.repositories[NAME]["files"]
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == set(held)
    assert all((folder / path).read_bytes() == content for path, content in held.items())
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pipeline_folder(NAME) == folder
    assert hub.requests == []


@pytest.mark.parametrize("ask", [pipeline_folder, pipeline_class, _model_folder])
@pytest.mark.parametrize(
    ("token", "why"), [("", "there is no token"), (TOKEN, "the account of this machine's token has not")]
)
def test_a_model_behind_a_licence_names_its_page_and_what_to_run(ask, token, why, hub, unit_pipeline, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.hold(NAME, Path(unit_pipeline), gated=set())
    with pytest.raises(UserError, match="behind a licence") as refused:
        ask(NAME)
    said = str(refused.value)
    assert f"'{NAME}' is behind" in said or f"--model {NAME}: is behind" in said
    assert f"accept it at {hub.url}/{NAME} and run `hf auth login`, or set HF_TOKEN" in said
    assert why in said
    assert "\n" not in said


def test_who_has_accepted_a_licence_gets_the_model(hub, unit_pipeline, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.hold(NAME, Path(unit_pipeline), gated={TOKEN})
    assert (pipeline_folder(NAME) / "model_index.json").is_file()


@pytest.mark.weekly
def test_the_trainer_says_so_in_one_line(unit_pipeline, tmp_path):
    """In a process of its own, with the hub in its environment."""
    with hub_server() as hub:
        hub.hold(NAME, Path(unit_pipeline), gated=set())
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path)}
        command = [sys.executable, "-m", "advgrpo.train", "--preset", "tiny", "--model.path", NAME]
        command += ["--output-dir", str(tmp_path / "run"), "--device", "cpu"]
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    said = f"error: model.path = '{NAME}' is behind a licence: accept it at {hub.url}/{NAME} and run"
    assert done.stderr.splitlines()[-1].startswith(said)
