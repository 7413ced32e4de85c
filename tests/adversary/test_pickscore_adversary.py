"""PickScore as an adversary, SigLIP as its other backbone, and DINO similarity: small models made from configs.

Bugs planted in a copy, each seen red: one layer more frozen than trained; the layer norm before the projection left
out; references as negatives; means over local images instead of the total; the binary loss on logits that were not
divided by 26; the pairwise loss on scores that were; the cache blind to the prompt; trainable layers kept in bfloat16;
gradients in new storage; ImageNet's mean for SigLIP; its first patch for the pooled feature; DINO similarity of the
first patch.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, SiglipModel

from advgrpo.adversary.base import WEIGHT, Adversary
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.pickscore import PickScoreAdversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.dino_similarity import DinoSimilarity
from advgrpo.rewards.pickscore import SCALE, PickScore
from advgrpo.types import Features
from advgrpo.vision.dino import DinoBackbone
from advgrpo.vision.siglip import SiglipBackbone
from tests.vision_models import PROMPTS, random_images, references_in, write_clip, write_siglip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> str:
    return write_siglip(tmp_path_factory.mktemp("models") / "siglip")


def pickscore(folder: str, *, section: dict | None = None, **changes) -> PickScoreAdversary:
    config = AdversarySection(**{"replay_capacity": 0, "batch_size": 8, **(section or {})})
    return PickScoreAdversary(config, seed=0, path=folder, **changes)


def rows(features: Features, *index: int) -> Features:
    return features.rows(torch.tensor(index, dtype=torch.long))


def whole_model(folder: str, layers: int, images: torch.Tensor, prompts: list[str]):
    """Stock CLIPModel with its last vision layers trainable, and its logits of image and own prompt."""
    model = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    model.vision_model.encoder.layers[-layers:].requires_grad_(True)
    reward = PickScore(path=folder)
    tokens = reward.clip.tokenizer(prompts, padding=True, return_tensors="pt")
    return model, model(pixel_values=reward.clip.preprocess(images), **tokens).logits_per_image.diagonal()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("objective", ["binary", "pairwise"])
def test_scores_losses_and_gradients_are_those_of_the_whole_model(clip_folder, layers, objective):
    images, prompts = random_images(6), [*PROMPTS, *PROMPTS]
    model, logits = whole_model(clip_folder, layers, images, prompts)
    if objective == "binary":
        target = torch.tensor([1.0] * 3 + [0.0] * 3)
        expected = F.binary_cross_entropy_with_logits(logits / 26 - 0.1, target)
    else:
        pairs = logits.view(2, 3).T
        expected = F.cross_entropy(pairs, torch.zeros(3, dtype=torch.long))
    expected.backward()

    adversary = pickscore(clip_folder, trainable_layers=layers, objective=objective)
    adversary.centre(0.3, -0.1)
    features = adversary.features(images, prompts)
    assert not features["hidden"].requires_grad
    score = adversary.score(features, torch.arange(6), purpose="reward", iteration=0).reward
    torch.testing.assert_close(score, logits.detach() / 26)
    torch.testing.assert_close(score, PickScore(path=clip_folder).score(images, prompts, None))
    part = adversary.training_features(features, torch.arange(6), 0)
    result = adversary.loss(rows(part, 0, 1, 2), rows(part, 3, 4, 5))
    torch.testing.assert_close(result.loss, expected)
    assert result.accuracy is None
    result.loss.backward()
    theirs = dict(model.vision_model.encoder.layers[-layers:].named_parameters())
    ours = dict(adversary.tail.named_parameters())
    assert ours.keys() == theirs.keys()
    assert any(p.grad.abs().max() > 1e-5 for p in theirs.values())
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("objective", ["binary", "pairwise"])
def test_shares_of_a_batch_add_up_to_the_whole(clip_folder, objective):
    """Three processes, one of which holds no image: losses and gradients are sums."""
    adversary = pickscore(clip_folder, objective=objective)
    storage = [p.grad.data_ptr() for p in adversary.parameters()]  # a captured graph writes where it did at first
    real, fake = (adversary.features(random_images(n), PROMPTS) for n in (3, 3))
    fake["hidden"].add_(0.3 * torch.randn(fake["hidden"].shape))
    whole = adversary.loss(real, fake)
    whole.loss.backward()
    expected = [p.grad.clone() for p in adversary.parameters()]
    adversary.optimizer.zero_grad(set_to_none=False)
    loss = 0.0
    for share in ((0,), (), (1, 2)):
        part = adversary.loss(rows(real, *share), rows(fake, *share), total=3)
        part.loss.backward()
        loss += part.loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    for parameter, gradient in zip(adversary.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert storage == [p.grad.data_ptr() for p in adversary.parameters()]


def image_embeddings(adversary, features) -> torch.Tensor:
    """[B, E], read off the scores that unit vectors get in place of a text."""
    size = features["text"].shape[1]
    cosines = []
    for axis in torch.eye(size):
        probe = Features({**features.tensors, "text": axis.expand(len(features), size)})
        cosines.append(adversary.score(probe, torch.arange(len(features)), purpose="reward", iteration=0).reward)
    return torch.stack(cosines, 1) * SCALE / adversary.clip.logit_scale


def test_no_update_is_spent_on_the_level_that_all_scores_share(clip_folder):
    """Advantages cannot see it; with a threshold at 0, PickScore's positive scores all fall together at first."""
    moved = {}
    for centred in (True, False):
        adversary = pickscore(clip_folder, learning_rate=2e-4)
        sides = {
            "generated": adversary.features(1 - random_images(6), [*PROMPTS, *PROMPTS]),
            "reference": adversary.features(random_images(6), [*PROMPTS, *PROMPTS]),
        }
        batch = DiscriminatorBatch(torch.arange(6), **sides, total=6)
        shared = F.normalize(torch.stack([image_embeddings(adversary, f) for f in sides.values()]).mean((0, 1)), dim=0)
        other = F.normalize(torch.randn(shared.shape, generator=torch.Generator().manual_seed(0)), dim=0)
        for features in sides.values():  # a text that is a little like every image: scores far from 0, beside their
            features.tensors["text"] = F.normalize(shared + 2 * other, dim=0).expand(6, -1)  # spread, as real ones are
        adversary.clip.logit_scale *= 7

        def scores(adversary=adversary, sides=sides, batch=batch) -> torch.Tensor:
            of = [adversary.score(f, batch.image_ids, purpose="reward", iteration=0).reward for f in sides.values()]
            return torch.stack(of)

        before = scores()
        if centred:
            adversary.centre(*before.mean(1).tolist())
            assert adversary.bias.item() == pytest.approx(before.mean().item())
        DiscriminatorTrainer(adversary, reduce=lambda tensors: None, rank=0, world_size=1).train(batch, 0, 10)
        change = scores() - before
        moved[centred] = abs(change.mean().item()), (change[1] - change[0]).mean().item()
    level, lead = moved[True]
    assert lead > 0
    assert level < 0.5 * lead
    assert moved[False][0] > 2 * moved[False][1]


@pytest.mark.parametrize("objective", ["binary", "pairwise"])
def test_images_of_weight_0_fill_a_batch_up_and_change_nothing(clip_folder, objective):
    adversary = pickscore(clip_folder, objective=objective)
    sides = [adversary.features(random_images(n), PROMPTS[:2] * 2) for n in (4, 4)]
    filled = [Features({**side.tensors, WEIGHT: torch.tensor([1.0, 1.0, 0.0, 0.0])}) for side in sides]
    losses = [adversary.loss(*given, total=4).loss for given in (filled, [rows(side, 0, 1) for side in sides])]
    torch.testing.assert_close(*losses)
    of_layers = [torch.autograd.grad(loss, adversary.parameters()) for loss in losses]
    for one, other in zip(*of_layers):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_threshold_is_part_of_the_head_and_older_heads_lack_it(clip_folder):
    adversary, other = pickscore(clip_folder), pickscore(clip_folder)
    storage = adversary.bias.data_ptr()
    adversary.centre(0.7, 0.9)
    other.load_state_dict({name: t.clone() for name, t in adversary.state_dict().items()})
    assert other.bias.item() == pytest.approx(0.8)
    assert adversary.bias.data_ptr() == storage  # a captured graph reads it there
    old = {name: t for name, t in adversary.state_dict().items() if name != "bias"}
    other.load_state_dict(old)
    pairwise = pickscore(clip_folder, objective="pairwise")
    pairwise.centre(0.7, 0.9)
    assert pairwise.bias.item() == 0


def test_replayed_negatives_may_outnumber_references(clip_folder):
    adversary = pickscore(clip_folder, section={"replay_capacity": 16})
    features = adversary.features(random_images(3), PROMPTS)
    score = adversary.score(features, torch.arange(3), purpose="reward", iteration=0).reward
    expected = (F.softplus(-score[:1]).mean() + F.softplus(score[1:]).mean()) / 2
    torch.testing.assert_close(adversary.loss(rows(features, 0), rows(features, 1, 2)).loss, expected)


@pytest.mark.parametrize("objective", ["binary", "pairwise"])
def test_head_training_separates_references_from_generations(clip_folder, objective):
    """Through DiscriminatorTrainer, as a run does; only the trainable layers move, and score and loss move together."""
    adversary = pickscore(clip_folder, objective=objective, learning_rate=2e-3)
    assert isinstance(adversary, Adversary)
    prompts = [*PROMPTS, *PROMPTS]
    reference = adversary.features(random_images(6), prompts)
    generated = adversary.features(1 - random_images(6), prompts)
    frozen = {name: p.clone() for name, p in adversary.clip.model.named_parameters()}
    before = {name: t.clone() for name, t in adversary.state_dict().items()}
    trainer = DiscriminatorTrainer(adversary, reduce=lambda tensors: None, rank=0, world_size=1)
    batch = DiscriminatorBatch(torch.arange(6), generated=generated, reference=reference, total=6)
    first = trainer.evaluate(batch, 0)
    losses = trainer.train(batch, 0, 40)
    last = trainer.evaluate(batch, 1)
    assert float(losses[0]) == pytest.approx(first[0], rel=1e-4)
    assert last[0] < 0.7 * first[0]
    assert first[1] is last[1] is None
    real, fake = (
        adversary.score(f, batch.image_ids, purpose="reward", iteration=0).reward for f in (reference, generated)
    )
    assert (real > fake).all()
    assert all(torch.equal(p, frozen[name]) for name, p in adversary.clip.model.named_parameters())
    trained = {
        name: t for name, t in adversary.tail.named_parameters() if "k_proj.bias" not in name
    }  # softmax is blind to it
    assert all(not torch.equal(t, before[name]) for name, t in trained.items())

    resumed = pickscore(clip_folder, objective=objective)
    resumed.load_state_dict(adversary.state_dict())
    again = resumed.score(reference, batch.image_ids, purpose="reward", iteration=0).reward
    torch.testing.assert_close(again, real, rtol=1e-6, atol=1e-6)


def test_low_precision_keeps_float32_masters(clip_folder):
    """A step of 5e-6 is lost on a bfloat16 weight, whose neighbours are 4e-3 apart at 1."""
    exact, low = pickscore(clip_folder), pickscore(clip_folder, dtype=torch.bfloat16)
    images = random_images(3)
    features = low.features(images, PROMPTS)
    assert features["hidden"].dtype == torch.bfloat16
    scores = [
        a.score(a.features(images, PROMPTS), torch.arange(3), purpose="reward", iteration=0).reward
        for a in (exact, low)
    ]
    assert scores[1].dtype == torch.float32
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0.02)
    before = {name: t.clone() for name, t in low.state_dict().items()}
    low.loss(rows(features, 0), rows(features, 1, 2)).loss.backward()
    low.step()
    for name, tensor in low.state_dict().items():
        assert tensor.dtype == torch.float32
        if "k_proj.bias" not in name and name != "bias":  # softmax does not see the first
            assert (tensor != before[name]).float().mean() > 0.9


def test_reference_features_are_cached_by_prompt(clip_folder, tmp_path):
    """The same image under two prompts has two texts; a second run computes one entry, as a proof."""
    same = random_images(2)
    references = references_in(tmp_path, {PROMPTS[0]: same, PROMPTS[1]: same})
    adversary = pickscore(clip_folder)
    cached = ReferenceFeatures(references, adversary, tmp_path / "cache")
    first, second = cached.prompt(PROMPTS[0]), cached.prompt(PROMPTS[1])
    assert torch.equal(first["hidden"], second["hidden"])
    assert torch.equal(second["text"], adversary.clip.text_embeddings([PROMPTS[1]] * 2))
    stored = ReferenceFeatures(references, pickscore(clip_folder), tmp_path / "cache")
    stored.prompt(PROMPTS[0])
    stored.adversary.features = None
    assert torch.equal(stored.prompt(PROMPTS[1])["text"], second["text"])
    keys = [pickscore(clip_folder, **c).cache_key for c in ({}, {"trainable_layers": 1}, {"dtype": torch.bfloat16})]
    assert len({adversary.cache_key, *keys}) == 3


def test_settings_that_cannot_be_are_named(clip_folder):
    with pytest.raises(UserError, match=r"trainable_layers = 4 of the PickScore adversary: .* has 3 vision layers"):
        pickscore(clip_folder, trainable_layers=4)
    with pytest.raises(UserError, match=r"replay_capacity = 16 does not go with the pairwise objective.*set it to 0"):
        pickscore(clip_folder, objective="pairwise", section={"replay_capacity": 16})
    with pytest.raises(ValueError, match="objective 'hinge'"):
        pickscore(clip_folder, objective="hinge")
    with pytest.raises(UserError, match=r"adversary.backbone = 'no/such/model'"):
        pickscore("no/such/model")
    adversary = pickscore(clip_folder, objective="pairwise")
    features = adversary.features(random_images(3), PROMPTS)
    with pytest.raises(ValueError, match="3 references but 2 generations"):
        adversary.loss(features, rows(features, 0, 1))


def test_siglip_features_are_the_models_own(siglip_folder):
    backbone = SiglipBackbone(siglip_folder, image_size=32, dtype="float32", device=CPU)
    images = random_images(3)
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    resized = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=resized * 2 - 1)
    features = backbone.features(images)
    torch.testing.assert_close(features["cls"], expected.pooler_output)
    torch.testing.assert_close(features["patches"], expected.last_hidden_state)
    assert features["patches"].shape == (3, backbone.num_patches, backbone.width) == (3, 16, 32)
    larger = SiglipBackbone(siglip_folder, image_size=48, dtype="float32", device=CPU)
    assert larger.features(images)["patches"].shape == (3, 36, 32)
    assert larger.cache_key != backbone.cache_key


def siglip_section(folder: str, **changes) -> AdversarySection:
    settings = {"kind": "siglip", "backbone": folder, "image_size": 32, "dtype": "float32", "hidden_size": 16}
    return AdversarySection(**{**settings, "num_patches": 4, "learning_rate": 1e-2, "replay_capacity": 0, **changes})


def test_siglip_head_learns(siglip_folder):
    adversary = build_adversary(siglip_section(siglip_folder), device=CPU, seed=0)
    assert isinstance(adversary, Adversary)
    images, prompts = random_images(6), [*PROMPTS, *PROMPTS]
    reference, generated = adversary.features(images, prompts), adversary.features(1 - images, prompts)
    batch = DiscriminatorBatch(torch.arange(6), generated=generated, reference=reference, total=6)
    trainer = DiscriminatorTrainer(adversary, reduce=lambda tensors: None, rank=0, world_size=1)
    before = trainer.evaluate(batch, 0)
    trainer.train(batch, 0, 100)
    after = trainer.evaluate(batch, 0)
    assert after[0] < 0.3 * before[0]
    assert after[1] == 1.0


def test_backbones_that_are_not_siglip_are_named(siglip_folder, unit_backbone):
    for section, expected in (
        (siglip_section(unit_backbone), "is a dinov2, not a siglip or siglip_vision_model"),
        (
            siglip_section(siglip_folder, image_size=30),
            "image_size = 30 is not a multiple of the backbone's patch size 8",
        ),
        (siglip_section("no/such/model"), "adversary.backbone = 'no/such/model' cannot be loaded"),
    ):
        with pytest.raises(UserError, match=expected):
            build_adversary(section, device=CPU, seed=0)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_dino_similarity_is_of_the_prompts_own_references(unit_backbone, tmp_path, reduction):
    """An identical image has similarity 1; the mean is evaluation's, from the same formula."""
    own = {prompt: random_images(2 + number) for number, prompt in enumerate(PROMPTS)}
    references = references_in(tmp_path, own)
    reward = DinoSimilarity(path=unit_backbone, image_size=32, reduction=reduction)
    assert isinstance(reward, Reward)
    images = torch.stack([own[p][1] for p in PROMPTS])
    score = reward.score(images, PROMPTS, references)
    backbone = DinoBackbone(unit_backbone, image_size=32, dtype="float32", device=CPU)
    cosines = [
        F.cosine_similarity(backbone.features(image[None])["cls"], backbone.features(own[p])["cls"])
        for image, p in zip(images, PROMPTS)
    ]
    expected = torch.stack([c.mean() if reduction == "mean" else c.max() for c in cosines])
    torch.testing.assert_close(score, expected)
    if reduction == "max":
        torch.testing.assert_close(score, torch.ones(3))
    shared = DinoSimilarity(backbone=backbone, reduction=reduction)
    torch.testing.assert_close(shared.score(images, PROMPTS, references), score)
    with pytest.raises(UserError, match="reward dino_similarity compares with reference images"):
        reward.score(images, PROMPTS, None)
    with pytest.raises(ValueError, match="reduction 'median'"):
        DinoSimilarity(backbone=backbone, reduction="median")
