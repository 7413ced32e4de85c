"""Pipelines as the hub stores them: weights whole and in shards, plain and as a variant, for each family.

Bugs planted in a copy, each seen red (tests/mutants): a variant taken though the plain files are there.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from advgrpo.errors import UserError
from advgrpo.policy.loading import load_policy
from advgrpo.policy.model_files import pipeline_variant
from advgrpo.sampling.stock import open_stock
from advgrpo.training.preflight import check_model
from tests import flux2_models, flux_models, qwen_models, unet_models
from tests.families import PROMPTS
from tests.parts import some_weekly

NETWORK = "diffusion_pytorch_model"
SAVE = {
    "flux": flux_models.save_pipeline,
    "qwen": qwen_models.save_pipeline,
    "flux2": flux2_models.save_pipeline,
    "sd15": partial(unet_models.save_pipeline, xl=False),
    "sdxl": partial(unet_models.save_pipeline, xl=True),
}
WHOLE, SHARDS = "10GB", "100KB"
LAYOUTS = {f"{family}-{size}": (family, size) for family in ("sd3", *SAVE) for size in ("whole", "shards")}
IN_CI = {"sd3-whole", "flux-shards", "sdxl-whole"}


@pytest.fixture(scope="module")
def made(unit_pipeline, tmp_path_factory):
    """(family, whole or shards) -> folders of its plain files and of the same weights as a variant."""
    folder, known = tmp_path_factory.mktemp("layouts"), {}

    def folders(family: str, size: str) -> tuple[Path, Path]:
        if (family, size) not in known:
            saved = SAVE[family](folder / f"{family}-{size}-made") if family in SAVE else unit_pipeline
            pipe = DiffusionPipeline.from_pretrained(saved, dtype=torch.float16)
            shard = WHOLE if size == "whole" else SHARDS
            plain, variant = folder / f"{family}-{size}", folder / f"{family}-{size}-fp16"
            pipe.save_pretrained(plain, max_shard_size=shard)
            pipe.save_pretrained(variant, max_shard_size=shard, variant="fp16")
            known[family, size] = plain, variant
        return known[family, size]

    return folders


def seen(folder: Path, unit_config) -> list[torch.Tensor]:
    """Text, velocity and image of the policy of a pipeline's folder."""
    check_model(str(folder), "model.path")
    model = unit_config.model.model_copy(update={"path": str(folder), "max_sequence_length": 16})
    cache = Path(unit_config.data.cache_dir) / folder.name
    policy = load_policy(model, device=torch.device("cpu"), cache_dir=cache, seed=0)
    latents = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    text = policy.encode(PROMPTS)
    prepared = policy.prepare(text, torch.tensor([900.0, 500.0]), guidance=1.0)
    with torch.no_grad():
        return [text.text, policy.predict(latents, torch.tensor([1]), prepared)[0], policy.decode(latents)]


@pytest.mark.parametrize("layout", some_weekly(LAYOUTS, LAYOUTS.keys() - IN_CI))
def test_weights_that_are_there_as_a_variant_are_read(layout, made, unit_config):
    """What the hub has as diffusion_pytorch_model.fp16.safetensors, or as its shards and their index."""
    plain, variant = made(*LAYOUTS[layout])
    component = "unet" if (variant / "unet").is_dir() else "transformer"
    index = variant / component / f"{NETWORK}.safetensors.index.fp16.json"
    assert index.is_file() == layout.endswith("shards")
    assert index.is_file() or (variant / component / f"{NETWORK}.fp16.safetensors").is_file()
    for found, expected in zip(seen(variant, unit_config), seen(plain, unit_config), strict=True):
        assert torch.equal(found, expected)


def test_plain_files_are_taken_where_they_are(made, unit_config, tmp_path):
    plain, variant = made("sd3", "whole")
    both = tmp_path / "both"
    shutil.copytree(plain, both)
    other = f"transformer/{NETWORK}.fp16.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(variant / other).items()}, both / other)
    assert pipeline_variant(both, "model.path") is None
    assert torch.equal(seen(both, unit_config)[1], seen(plain, unit_config)[1])


def test_parts_without_the_variant_are_read_by_their_plain_files(made, unit_config, tmp_path):
    """As diffusers reads them, by the whole pipeline or by part."""
    plain, variant = made("sd3", "whole")
    mixed = tmp_path / "mixed"
    shutil.copytree(variant, mixed)
    for part, stem in (("vae", NETWORK), ("text_encoder", "model")):
        shutil.copy(plain / part / f"{stem}.safetensors", mixed / part)
        (mixed / part / f"{stem}.fp16.safetensors").unlink()
    assert all(map(torch.equal, seen(mixed, unit_config), seen(plain, unit_config)))
    assert type(open_stock(mixed, "cpu", torch.float32, "--model")).__name__ == "StableDiffusion3Pipeline"


def renamed(file: Path, name: str) -> None:
    file.rename(file.with_name(name))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: shutil.copy(f / f"vae/{NETWORK}.fp16.safetensors", f / f"vae/{NETWORK}.bf16.safetensors"), ""),
        (
            lambda f: renamed(f / f"vae/{NETWORK}.fp16.safetensors", f"{NETWORK}.bf16.safetensors"),
            "variants alone, and not as one that can be chosen (",
        ),
        (
            lambda f: renamed(f / f"vae/{NETWORK}.fp16.safetensors", f"{NETWORK}.fp16.bin"),
            f"vae has its weights in {NETWORK}.fp16.bin only, a pickle",
        ),
        (
            lambda f: renamed(f / f"vae/{NETWORK}.fp16.safetensors", f"{NETWORK}-00001-of-00002.bin"),
            f"vae has its weights in {NETWORK}-00001-of-00002.bin only, a pickle",
        ),
        (
            lambda f: renamed(f / "text_encoder/model.fp16.safetensors", "pytorch_model.bin"),
            "text_encoder has its weights in pytorch_model.bin only, a pickle",
        ),
        (lambda f: (f / f"transformer/{NETWORK}.fp16.safetensors").write_bytes(b"cut"), "is no whole safetensors file"),
    ],
)
def test_a_variant_that_cannot_be_read_is_refused_with_a_remedy(damage, expected, made, tmp_path):
    """One that some part has beside the common one is no doubt; pickles are none of the variants."""
    folder = tmp_path / "damaged"
    shutil.copytree(made("sd3", "whole")[1], folder)
    damage(folder)
    if not expected:
        assert check_model(str(folder), "model.path") == folder
        return
    with pytest.raises(UserError) as error:
        check_model(str(folder), "model.path")
    assert expected in str(error.value)
    assert f"model.path = {str(folder)!r}" in str(error.value)


def test_a_shard_of_a_variant_that_is_missing_is_named(made, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(made("flux", "shards")[1], folder)
    index = json.loads((folder / f"transformer/{NETWORK}.safetensors.index.fp16.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (folder / "transformer" / shard).unlink()
    with pytest.raises(UserError, match=rf"{shard} is missing; complete the folder"):
        check_model(str(folder), "model.path")
