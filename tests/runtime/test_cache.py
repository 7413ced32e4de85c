"""Caches and their keys: nothing of another network, and nothing damaged, is ever handed out.

Bugs planted in a copy, each seen red: only the first parameter hashed; buffers, configuration or preprocessing left out
of a key; files hashed at their ends only; a tokenizer's merges left out; stamps by size alone; no checksum written, or
none compared; the key left out of the checksum; a damaged file kept; the proof of the first cached entry left out, or
repeated for each; features that are not finite stored.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.adversary.pickscore import PickScoreAdversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.runtime import fingerprint
from advgrpo.runtime.cache import TensorCache
from advgrpo.runtime.fingerprint import FileStamps, file_digest, folder_fingerprint, tensors_digest
from advgrpo.vision.dino import DinoBackbone
from advgrpo.vision.siglip import SiglipBackbone
from tests.vision_models import PROMPTS, random_images, references_in, write_clip, write_siglip

CPU = torch.device("cpu")
STORED = {"text": torch.arange(12.0).view(3, 4), "pooled": torch.tensor([1.0, -2.0]).bfloat16(), "none": torch.zeros(0)}


def edited(folder: str, out: Path, edit) -> str:
    """A copy of a model whose tensors `edit` has changed in place."""
    shutil.copytree(folder, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return str(out)


def other_layers(tensors: dict[str, torch.Tensor]) -> None:
    """Another network with the same class token, positions and patch embedding, as a fine-tuned DINO may have."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".layer." in name and tensor.dim() == 2:
            tensor.copy_(tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor))


def dino(folder: str, **changes) -> DinoBackbone:
    return DinoBackbone(folder, **{"image_size": 32, "dtype": "float32", "device": CPU, **changes})


def adversary(folder: str, **changes) -> FeatureHeadAdversary:
    settings = {"image_size": 32, "dtype": "float32", "hidden_size": 16, "num_patches": 8, **changes}
    return build_adversary(AdversarySection(backbone=folder, **settings), device=CPU, seed=0)


def test_references_and_generations_are_judged_by_one_network_though_another_filled_the_cache(unit_backbone, tmp_path):
    """The other network shares the class token, and images, prompts and sizes are the same."""
    references = references_in(tmp_path, {PROMPTS[0]: random_images(3)})
    networks = [adversary(unit_backbone), adversary(edited(unit_backbone, tmp_path / "other", other_layers))]
    images = references.load_images(references.files(PROMPTS[0]))
    fresh = [network.features(images, PROMPTS[:1] * 3)["cls"] for network in networks]
    assert (fresh[0] - fresh[1]).norm() > 0.1 * fresh[0].norm()
    for _ in range(2):  # filled, then read
        for network, expected in zip(networks, fresh):
            cached = ReferenceFeatures(references, network, tmp_path / "cache").prompt(PROMPTS[0])
            assert torch.equal(cached["cls"], expected)


def test_every_weight_the_configuration_and_the_preprocessing_are_in_a_backbones_key(unit_backbone, tmp_path):
    def last_weight(tensors):
        tensors["layernorm.bias"][-1] += 1e-3

    plain = dino(unit_backbone)
    assert dino(shutil.copytree(unit_backbone, tmp_path / "elsewhere")).cache_key == plain.cache_key
    changed = shutil.copytree(unit_backbone, tmp_path / "eps")
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": 1e-3}))
    others = [
        dino(edited(unit_backbone, tmp_path / "last", last_weight)),
        dino(str(changed)),
        dino(unit_backbone, image_size=64),
        dino(unit_backbone, dtype="bfloat16"),
    ]
    with_buffer = dino(unit_backbone)
    with_buffer.model.register_buffer("scale", torch.ones(1))
    others.append(with_buffer)
    folder = write_siglip(tmp_path / "siglip")
    siglip = SiglipBackbone(folder, image_size=32, dtype="float32", device=CPU)
    process = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps({**process, "image_mean": [0.4] * 3}))
    others += [siglip, SiglipBackbone(folder, image_size=32, dtype="float32", device=CPU)]
    assert len({plain.cache_key, *(other.cache_key for other in others)}) == 1 + len(others)


def test_the_tokenizer_is_in_the_key_of_features_that_depend_on_the_text(tmp_path):
    folder = write_clip(tmp_path / "clip")

    def key() -> str:
        return PickScoreAdversary(AdversarySection(replay_capacity=0), seed=0, path=folder).cache_key

    before = key()
    assert before == key()
    file = tmp_path / "clip" / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    assert len(merges) > 2
    content["model"]["merges"] = [*merges[1:], merges[0]]
    file.write_text(json.dumps(content))
    assert key() != before


def test_a_bit_in_the_middle_of_an_encoder_changes_the_text_caches_key(unit_config, unit_pipeline, tmp_path):
    def key(folder, **settings) -> str:
        model = unit_config.model.model_copy(update={"path": str(folder), **settings})
        return SD3Policy(model, device=CPU, cache_dir=tmp_path / "cache", seed=0).text_cache.key("a prompt")

    copy = Path(shutil.copytree(unit_pipeline, tmp_path / "copy"))
    before = key(unit_pipeline)
    assert key(copy) == before
    assert key(copy, max_sequence_length=unit_config.model.max_sequence_length + 1) != before, "texts are cut later"
    assert key(copy, dtype="bfloat16") != before
    file = next((copy / "text_encoder").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert key(copy) != before


def test_large_files_are_hashed_whole_and_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_CHUNK", 100)
    file, digests = tmp_path / "weights", set()
    for position in (None, 0, 99, 100, 555, 999):
        content = bytearray(1000)
        if position is not None:
            content[position] = 1
        file.write_bytes(content)
        digests.add(file_digest(file))
    file.write_bytes(bytes(900))
    assert len(digests | {file_digest(file)}) == 7
    monkeypatch.setattr(fingerprint, "_THREADS", 1)
    file.write_bytes(bytes(1000))
    assert file_digest(file) in digests


def test_files_are_read_again_only_when_they_changed(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(b"1234")
        os.utime(folder / name, (1e9, 1e9))
    read, real = [], fingerprint.file_digest
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 0.05)

    def look() -> tuple[str, list[str]]:
        time.sleep(0.1)
        read.clear()
        return folder_fingerprint(folder, (".",), FileStamps(tmp_path / "stamps", folder)), list(read)

    first, reads = look()
    assert reads == ["a", "b"]
    assert look() == (first, [])
    (folder / "a").write_bytes(b"4321")
    os.utime(folder / "a", (1e9, 1e9))  # as a copy that keeps times: size and time of change are those of before
    second, reads = look()
    assert (second != first, reads) == (True, ["a"])
    (stamps,) = (tmp_path / "stamps").iterdir()
    stamps.write_text(stamps.read_text()[:-5])
    assert look() == (second, ["a", "b"])
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 3600.0)
    stamps.unlink()
    assert look()[1] == look()[1] == ["a", "b"]  # just written: it could change again without a trace


@pytest.fixture
def cache(tmp_path) -> TensorCache:
    return TensorCache(tmp_path, in_memory=0)


def assert_stored(found: dict[str, torch.Tensor] | None) -> None:
    assert found.keys() == STORED.keys()
    for name, tensor in STORED.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_stored_comes_back(cache, tmp_path):
    assert cache.load("ab") is None
    assert_stored(cache.store("ab", STORED))
    assert_stored(TensorCache(tmp_path, in_memory=4).load("ab"))
    assert cache.path("ab").stat().st_mode & 0o777 == 0o644
    assert [file.name for file in cache.path("ab").parent.iterdir()] == ["ab.safetensors"]


def test_a_flipped_bit_anywhere_is_refused_and_named_once(cache, caplog):
    cache.store("ab", STORED)
    path = cache.path("ab")
    sound, refused = path.read_bytes(), 0
    header = 8 + int.from_bytes(sound[:8], "little")
    for position in [*range(0, header, 7), *range(header, len(sound))]:
        for bit in (0, 6):
            content = bytearray(sound)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = cache.load("ab")
            if found is not None:  # such as the case of a letter in the checksum's own name: nothing was changed
                assert_stored(found)
                continue
            refused += 1
            (record,) = caplog.records
            assert str(path) in record.getMessage()
            assert not path.exists()
            assert cache.load("ab") is None
    assert refused >= 2 * (len(sound) - header) + 40


@pytest.mark.parametrize("fault", ["truncated", "another entry", "no checksum", "empty"])
def test_files_that_are_not_what_was_written_are_refused(cache, caplog, fault):
    cache.store("ab", STORED)
    path = cache.path("ab")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif fault == "another entry":
        cache.store("abc", STORED)
        shutil.copy(cache.path("abc"), path)
    elif fault == "no checksum":
        save_file(STORED, path)
    else:
        path.write_bytes(b"")
    assert cache.load("ab") is None
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    cache.store("ab", STORED)
    assert_stored(cache.load("ab"))


def test_a_cache_that_cannot_be_written_names_its_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*data\.cache_dir"):
        TensorCache(tmp_path / "file", in_memory=1).store("ab", STORED)
    assert tensors_digest(STORED) != tensors_digest({**STORED, "none": torch.zeros(1, 0)})


def test_a_damaged_reference_entry_is_computed_again(unit_backbone, tmp_path, caplog):
    references = references_in(tmp_path, {PROMPTS[0]: random_images(3)})
    first = ReferenceFeatures(references, adversary(unit_backbone), tmp_path / "cache")
    expected = first.prompt(PROMPTS[0])
    path = first.tensors.path(first._key(PROMPTS[0]))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = ReferenceFeatures(references, adversary(unit_backbone), tmp_path / "cache").prompt(PROMPTS[0])
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.tensors.items())
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert path.read_bytes()[-1] == content[-1] ^ 1


def test_the_first_entry_of_another_process_is_proven_and_no_other(unit_backbone, tmp_path):
    references = references_in(tmp_path, {prompt: random_images(2 + n) for n, prompt in enumerate(PROMPTS)})
    ReferenceFeatures(references, adversary(unit_backbone), tmp_path / "cache").prompt(PROMPTS[0])
    ReferenceFeatures(references, adversary(unit_backbone), tmp_path / "cache").prompt(PROMPTS[1])

    class Claims(FeatureHeadAdversary):
        """Computes other features under the same key, as a key with a hole in it would allow."""

        cache_key = adversary(unit_backbone).cache_key
        calls = 0

        def features(self, images, prompts):
            self.calls += 1
            return super().features(images, prompts)

    def reader(folder: str) -> ReferenceFeatures:
        section = adversary(folder).config
        return ReferenceFeatures(references, Claims(section, dino(folder), seed=0), tmp_path / "cache")

    honest = reader(unit_backbone)
    for prompt, calls in ((PROMPTS[2], 1), (PROMPTS[2], 1), (PROMPTS[0], 2), (PROMPTS[1], 2), (PROMPTS[0], 2)):
        honest.prompt(prompt)  # its own, then the first of another process, then no more
        assert honest.adversary.calls == calls
    foreign = reader(edited(unit_backbone, tmp_path / "other", other_layers))
    file = foreign.tensors.path(foreign._key(PROMPTS[1]))
    with pytest.raises(UserError, match=rf"{file} holds features .* does not give.*remove .*data\.cache_dir"):
        foreign.prompt(PROMPTS[1])


def test_features_that_are_not_finite_are_named_and_not_kept(unit_backbone, tmp_path):
    references = references_in(tmp_path, {PROMPTS[0]: random_images(3)})
    broken = adversary(unit_backbone)
    with torch.no_grad():
        broken.backbone.model.layernorm.bias[3] = torch.inf  # one number of many
    features = ReferenceFeatures(references, broken, tmp_path / "cache")
    with pytest.raises(FloatingPointError, match=rf"features \(cls\) of the references of prompt '{PROMPTS[0]}'"):
        features.prompt(PROMPTS[0])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_was_used_last_stays_in_memory_and_the_rest_is_read_again(tmp_path):
    cache = TensorCache(tmp_path, in_memory=2)
    for key in ("first", "second"):
        cache.store(key, STORED)
    assert cache.load("first") is not None, "used after the second"
    cache.store("third", STORED)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert [key for key in ("first", "second", "third") if cache.load(key) is not None] == ["first", "third"]
