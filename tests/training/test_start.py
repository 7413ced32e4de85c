"""What the processes of a job look at when it starts, with caches that are full: no pass of each over all files.

Bugs planted in a copy, each seen red: every process checks all references; every process hashes them; the headers of
cached text embeddings read; every process lists every folder of a cache that all see.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advgrpo import config, tiny
from tests import zygote
from tests.conftest import make_unit_config
from tests.start_worker import _FOLDERS
from tests.training.test_run import environment

pytestmark = [pytest.mark.slow, pytest.mark.weekly]
PROMPTS = {"few": 8, "many": 32}
PROCESSES = 2


def save_references(folder: Path, prompts: list[str], side: int) -> None:
    """An image of its own for each prompt."""
    folder.mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (len(prompts), side, side, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    index = {prompt: [f"{number:03d}.png"] for number, prompt in enumerate(prompts)}
    (folder / "references.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def looks(unit_pipeline, unit_backbone, tmp_path_factory) -> dict[str, list[dict[str, list[str]]]]:
    """What each process has opened and listed of a run's folder, its models apart, by how many prompts there are."""
    folder = tmp_path_factory.mktemp("start")
    for name, count in PROMPTS.items():
        own = folder / name
        own.mkdir()
        settings = make_unit_config(unit_pipeline, unit_backbone, own)
        prompts = tiny.prompts_file().read_text().splitlines()[:count]
        Path(settings.data.prompts).write_text("\n".join(prompts))
        save_references(own / "references", prompts, settings.model.resolution)
        data = {"references": str(own / "references"), "held_out_prompts": ""}
        settings = config.build(config.merge(settings.model_dump(), {"data": data}), name)
        (folder / f"{name}.yaml").write_text(config.dump(settings))
    done = zygote.run(
        "tests.start_worker:main", [folder, *PROMPTS], processes=PROCESSES, environment=environment(), merged=True
    )
    assert done.returncode == 0, done.stdout
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(PROCESSES)]
        for name in PROMPTS
    }


def images(paths: list[str], name: str) -> list[str]:
    return sorted(path.removeprefix(f"{name}/references/") for path in paths if path.endswith(".png"))


def files(count: int, start: int = 0, step: int = 1) -> list[str]:
    return [f"{number:03d}.png" for number in range(start, count, step)]


@pytest.mark.parametrize("name", PROMPTS)
def test_each_process_checks_its_share_of_the_references_and_one_reads_them_all(name, looks):
    """Whether all prompts have one and the same image is known once two of them differ, the first two here."""
    first, second = (images(found["opened"], name) for found in looks[name])
    assert second == sorted(files(PROMPTS[name], 1, PROCESSES) + files(2))
    assert first == sorted(files(PROMPTS[name], 0, PROCESSES) + files(PROMPTS[name])), "its share, and all for the hash"


def test_what_else_a_process_opens_does_not_grow_with_the_prompts(looks):
    for rank in range(PROCESSES):
        others = [
            sorted(path.removeprefix(f"{name}/") for path in looks[name][rank]["opened"] if not path.endswith(".png"))
            for name in PROMPTS
        ]
        assert not [path for path in others[0] if path.startswith("cache/text/") and path.endswith(".safetensors")]
        assert len(others[0]) == len(others[1]), others
        assert "prompts.txt" in others[0], "what is opened is heard of"


def test_a_cache_that_all_see_is_listed_once_by_its_folders(looks):
    for name in PROMPTS:
        listed = [[path for path in found["listed"] if path.startswith(f"{name}/cache/text/")] for found in looks[name]]
        assert {path for each in listed for path in each} == {
            f"{name}/cache/text/{number:02d}" for number in range(_FOLDERS)
        }
        assert max(len(each) for each in listed) <= _FOLDERS // PROCESSES + 1, "a folder may be of two shares"
