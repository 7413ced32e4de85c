"""CLIP's rewards on small models made from configs: preprocessing, loading, PickScore, similarities, aesthetics.

Bugs planted in a copy, each seen red: no antialiasing in the resize; crop from the corner; short side taken for the
long one; mean left out; text embedding of the previous prompt cached under the next; embeddings not normalised;
PickScore not divided by 26; missing weights let through; max for mean over the references; references of the first
prompt used for all; bias of the aesthetic head dropped; non-finite scores let through.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from advgrpo.errors import UserError
from advgrpo.rewards.aesthetic import Aesthetic
from advgrpo.rewards.clip_similarity import ClipReferenceSimilarity, ClipSimilarity
from advgrpo.rewards.pickscore import PickScore
from advgrpo.rewards.reference_similarity import reference_cosine
from advgrpo.vision.clip import ClipModel
from advgrpo.vision.preprocess import ImagePreprocess
from tests.vision_models import PROCESSOR, PROMPTS, random_images, references_in, write_clip


@pytest.fixture(scope="session")
def unit_clip(tmp_path_factory) -> str:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.mark.parametrize("size", [(40, 48), (48, 40), (32, 32), (24, 31), (129, 64)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_preprocessing_is_transformers_own_within_its_rounding(tmp_path, size, kind):
    """PIL rounds to 256 levels between the resize's passes and after it; no image here reaches black or white."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    settings = PROCESSOR
    if kind == "siglip":
        settings = {**PROCESSOR, "size": {"height": 32, "width": 32}, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = ((0.2 + 0.6 * random_images(2, *size)) * 255).round() / 255
    theirs = (CLIPImageProcessor if kind == "clip" else SiglipImageProcessor).from_pretrained(tmp_path)
    pil = [Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in images]
    expected = torch.from_numpy(np.stack(theirs(pil, return_tensors="np")["pixel_values"]))
    result = ImagePreprocess.load(str(tmp_path), field="path")(images)
    assert result.shape == expected.shape == (2, 3, 32, 32)
    std = torch.tensor(PROCESSOR["image_std"]).view(3, 1, 1)
    assert ((result - expected).abs() * std).max() <= 1.1 / 255
    assert ((result - expected).abs() * std).mean() <= 0.4 / 255


def test_preprocessor_settings_of_every_age_are_read(tmp_path):
    def read(settings: dict, name: str = "preprocessor_config.json") -> str:
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_text(json.dumps(settings))
        return ImagePreprocess.load(str(tmp_path), field="path").settings

    expected = read(PROCESSOR)
    assert read({**PROCESSOR, "size": 32, "crop_size": 32}) == expected  # the first CLIP repositories
    assert read({"image_processor": PROCESSOR}, "processor_config.json") == expected  # transformers 5's processors
    assert read({**PROCESSOR, "resample": 2}) != expected
    assert read({**PROCESSOR, "do_normalize": False}) != expected
    for broken in ({"size": {"longest_edge": 3}}, {"resample": 1}, {"rescale_factor": 1.0}, {"image_mean": "grey"}):
        with pytest.raises(UserError, match=r"path = .*not an image processor of CLIP's or SigLIP's kind"):
            read({**PROCESSOR, **broken})


def test_preprocessing_refuses_other_shapes():
    preprocess = ImagePreprocess(short_side=8, crop=(16, 16))
    with pytest.raises(ValueError, match="want float images"):
        preprocess(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="want float images"):
        preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="smaller than the crop"):
        preprocess(torch.zeros(1, 3, 20, 20))


def test_embeddings_are_the_models_own(unit_clip):
    clip, model = ClipModel(unit_clip), CLIPModel.from_pretrained(unit_clip).eval()
    images = random_images(3)
    tokens = clip.tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=clip.preprocess(images), **tokens)
    torch.testing.assert_close(clip.image_embeddings(images), expected.image_embeds)
    torch.testing.assert_close(clip.text_embeddings(PROMPTS), expected.text_embeds)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())
    scaled = clip.logit_scale * clip.image_embeddings(images) @ clip.text_embeddings(PROMPTS).T
    torch.testing.assert_close(scaled, expected.logits_per_image)


def test_text_embeddings_are_computed_once_per_prompt_and_alone(unit_clip):
    clip = ClipModel(unit_clip)
    alone = {prompt: ClipModel(unit_clip).text_embeddings([prompt])[0] for prompt in PROMPTS}
    together = clip.text_embeddings([*PROMPTS, PROMPTS[0]])
    assert torch.equal(together, torch.stack([*alone.values(), alone[PROMPTS[0]]]))
    clip.model.text_model = None
    assert torch.equal(clip.text_embeddings(PROMPTS[::-1]), together[:3].flip(0))
    with pytest.raises(TypeError):
        clip.text_embeddings(["another prompt"])


def test_long_prompts_are_cut_at_the_models_length(unit_clip):
    long = "a small red star " * 10
    clip = ClipModel(unit_clip)
    assert torch.equal(clip.text_embeddings([long])[0], clip.text_embeddings([long + "blue"])[0])


def test_pickscore_is_the_scaled_logit_over_26(unit_clip):
    reward = PickScore(path=unit_clip)
    images = random_images(3)
    model = CLIPModel.from_pretrained(unit_clip).eval()
    tokens = reward.clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=reward.clip.preprocess(images), **tokens).logits_per_image
    score = reward.score(images, PROMPTS, None)
    torch.testing.assert_close(score, logits.diagonal() / 26)
    assert score.dtype == torch.float32
    assert reward.score(images.half(), PROMPTS, None).dtype == torch.float32
    torch.testing.assert_close(reward.score(images[1:2], PROMPTS[1:2], None), score[1:2])


def test_a_processor_elsewhere_is_used(unit_clip, tmp_path):
    """As PickScore_v1's, whose tokenizer and image processor are LAION's."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(f"{unit_clip}/{name}")
    images = random_images(3)
    score = PickScore(path=str(tmp_path), processor=unit_clip).score(images, PROMPTS, None)
    assert torch.equal(score, PickScore(path=unit_clip).score(images, PROMPTS, None))
    with pytest.raises(UserError, match=r"pickscore.path = .* has no preprocessor_config.json"):
        PickScore(path=str(tmp_path))


def test_clip_similarity_is_a_cosine(unit_clip):
    clip = ClipModel(unit_clip)
    images = random_images(3)
    cosine = ClipSimilarity(clip=clip).score(images, PROMPTS, None)
    torch.testing.assert_close(cosine * clip.logit_scale / 26, PickScore(path=unit_clip).score(images, PROMPTS, None))
    with torch.no_grad():  # an image embedding that points where the text does
        clip.image_embeddings = lambda images: 1.0 * clip.text_embeddings(PROMPTS)
    torch.testing.assert_close(ClipSimilarity(clip=clip).score(images, PROMPTS, None), torch.ones(3))


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_similarity_to_references_is_of_the_prompts_own(unit_clip, tmp_path, reduction):
    reward = ClipReferenceSimilarity(path=unit_clip, reduction=reduction)
    own = {prompt: random_images(2 + number) for number, prompt in enumerate(PROMPTS)}
    references = references_in(tmp_path, own)
    images = torch.stack([own[p][1] for p in PROMPTS])
    score = reward.score(images, PROMPTS, references)
    if reduction == "max":
        torch.testing.assert_close(score, torch.ones(3))
    else:
        embedded = {p: reward.clip.image_embeddings(own[p]) for p in PROMPTS}
        expected = torch.stack([torch.stack([r @ embedded[p][1] for r in embedded[p]]).mean() for p in PROMPTS])
        torch.testing.assert_close(score, expected)
        assert (score < 1).all()
    shuffled = reward.score(images[[2, 0, 1, 0]], [PROMPTS[i] for i in (2, 0, 1, 0)], references)
    torch.testing.assert_close(shuffled, score[[2, 0, 1, 0]])
    seen = []
    reward.of_references.embed = seen.append
    reward.score(images, PROMPTS, references)
    assert not seen  # references are embedded once
    with pytest.raises(UserError, match="reward clip_reference_similarity compares with reference images"):
        reward.score(images, PROMPTS, None)
    with pytest.raises(UserError, match="no references were loaded for prompt 'a dog'"):
        reward.score(images[:1], ["a dog"], references)


def test_reference_cosine_on_known_angles():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    own = {"x": torch.tensor([[5.0, 0.0], [0.0, 1.0]]), "y": torch.tensor([[0.0, -2.0]])}
    half = 0.5**0.5
    mean = reference_cosine(images, ["x", "y", "x"], own.__getitem__)
    torch.testing.assert_close(mean, torch.tensor([0.5, -1.0, half]))
    largest = reference_cosine(images, ["x", "y", "x"], own.__getitem__, "max")
    torch.testing.assert_close(largest, torch.tensor([1.0, -1.0, half]))


def linear_layers(*widths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7, 10), itertools.pairwise(widths)):
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


def test_aesthetic_reads_both_layouts(unit_clip, tmp_path):
    clip, images = ClipModel(unit_clip), random_images(3)
    embedding = clip.image_embeddings(images)
    tensors = linear_layers(24, 12, 6, 5, 2, 1, 1)  # six layers, so that layer 10 must follow layer 7
    save_file(tensors, tmp_path / "mlp.safetensors")
    expected = embedding
    for number in (0, 2, 4, 6, 7, 10):
        expected = expected @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    score = Aesthetic(head=str(tmp_path / "mlp.safetensors"), clip=clip).score(images, PROMPTS, None)
    torch.testing.assert_close(score, expected[:, 0])

    plain = {"weight": torch.randn(1, 24), "bias": torch.tensor([5.0])}
    save_file(plain, tmp_path / "plain.safetensors")
    score = Aesthetic(head=str(tmp_path / "plain.safetensors"), path=unit_clip).score(images, PROMPTS, None)
    torch.testing.assert_close(score, embedding @ plain["weight"][0] + 5)


def test_bad_aesthetic_heads_are_named(unit_clip, tmp_path):
    clip = ClipModel(unit_clip)

    def refused(tensors: dict[str, torch.Tensor] | None, expected: str, name: str = "head.safetensors") -> None:
        if tensors is not None:
            save_file(tensors, tmp_path / name)
        with pytest.raises(UserError, match=expected):
            Aesthetic(head=str(tmp_path / name), clip=clip)

    refused(None, "head.safetensors' does not exist")
    torch.save(linear_layers(24, 1), tmp_path / "head.pth")
    refused(None, "pickles are never read here; convert it once", "head.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    refused(None, "not a readable safetensors file", "cut.safetensors")
    refused(linear_layers(23, 1), "reads embeddings of 23 numbers, but .* makes 24")
    refused(linear_layers(24, 2), r"not a chain of linear layers down to one score.*layers.0.bias \[2\]")
    refused({**linear_layers(24, 8), "layers.2.weight": torch.zeros(1, 9), "layers.2.bias": torch.zeros(1)}, "chain")
    refused({"weight": torch.zeros(1, 24)}, "not a chain of linear layers")
    refused({"weight": torch.full((1, 24), torch.inf), "bias": torch.zeros(1)}, "not finite")


def test_models_that_cannot_be_are_named(unit_clip, unit_backbone, tmp_path):
    with pytest.raises(UserError, match=r"pickscore.path = 'no/such/model' cannot be loaded as a CLIPModel"):
        PickScore(path="no/such/model")
    with pytest.raises(UserError, match="is a dinov2, not a clip"):
        PickScore(path=unit_backbone)
    weights = load_file(f"{unit_clip}/model.safetensors")
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(f"{unit_clip}/{name}")
    absent = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({k: v for k, v in weights.items() if k != absent}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights of a CLIPModel .*first {absent}"):
        PickScore(path=str(tmp_path))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    PickScore(path=str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    other = {**PROCESSOR, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"makes images of \(16, 16\), but the model looks at 32x32"):
        PickScore(path=str(tmp_path))


def test_bad_batches_and_scores_are_named(unit_clip):
    reward, images = PickScore(path=unit_clip), random_images(3)
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        reward.score(images, PROMPTS[:2], None)
    with pytest.raises(ValueError, match="want float images"):
        reward.score((images * 255).byte(), PROMPTS, None)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"cannot score the image of prompt 'a large green ring'"):
        reward.score(images, PROMPTS, None)
    reward.clip.logit_scale = float("inf")
    with pytest.raises(FloatingPointError, match=r"'a small red star' is .*inf .the image is finite"):
        reward.score(random_images(3), PROMPTS, None)
