"""What judges images, in the plan: networks by name, what is loaded of them and when, and counts by hand.

Bugs planted in a copy, each seen red: CLIP's text tower left out; PickScore's last layers left in its frozen part too;
their gradient, one of Adam's moments or their copy forgotten; an update that saves nothing, whose graphs' pool is gone
after scoring, or that has the whole batch on each process; one side alone evaluated; hidden states in float32; the pool
without graphs; a fixed reward by micro-batch, or without its copy of the images; embeddings of prompts forgotten; all
patches of SigLIP's references kept, or its rows of an update forgotten; attention's matrix kept; metrics loaded without
held-out prompts, or shared with training; workers' models here; the adversary's own DINO twice; the observer's weights
forgotten, or there where nothing is drawn; an unknown observer or a reward of one's own not named; encoding halved, for
every objective, or with attention's matrix.
"""

import json

import pytest
import torch

from advgrpo import config as configuration
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.pickscore import PickScoreAdversary
from advgrpo.errors import UserError
from advgrpo.plan.activations import encode_bytes
from advgrpo.plan.estimate import Estimate, Knobs
from advgrpo.plan.judges import Judges
from advgrpo.plan.known_judges import CLIP, DINO, SIGLIP, known_network
from advgrpo.plan.known_models import VideoVae
from advgrpo.plan.memory import plan_as_configured
from advgrpo.policy.fused.decoder import SD3_DECODER

SO400M = "google/siglip-so400m-patch14-384"
KNOBS = Knobs(8, False)
LAYER = 12 * 1280**2 + 13 * 1280  # parameters of a vision layer of CLIP-H/14
TOKENS = 257 * 1280  # numbers of an image in it, of a class token and 16 by 16 patches


def test_counts_are_the_known_totals():
    known = {
        (CLIP, "yuvalkirstain/PickScore_v1"): 986_109_441,
        (CLIP, "openai/clip-vit-large-patch14"): 427_616_513,
        (DINO, "facebook/dinov2-base"): 86_580_480,
        (DINO, "facebook/dinov2-large"): 304_368_640,
        (SIGLIP, SO400M): 428_225_600,
        (SIGLIP, "google/siglip-base-patch16-224"): 92_884_224,
    }
    for (kind, path), count in known.items():
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            network = known_network(kind, path, side=518, dtype=dtype)
            assert network is not None
            assert network.weights == size * count, path


@pytest.mark.parametrize("preset", configuration.preset_names())
def test_every_judge_of_a_shipped_preset_is_counted(preset):
    """With its metrics. OCR and rules run on the CPU; a vision-language model is behind HTTP."""
    config = configuration.load(preset)
    for held_out in ("", "prompts.txt"):
        config.data.held_out_prompts = held_out
        assert Judges(config, 8, graphs=True).uncounted == ()


def of_medium(images: int) -> dict[str, float]:
    """Bytes in each phase of SD3.5-medium without anything that judges, from shapes alone, as in test_memory.py: 8
    images and their unconditional halves at once, 1,024 + 205 tokens, two window steps."""
    lora, token = 18_776_064, 16 * 1229 * 1536 * 2
    always = 2 * (2_243_171_520 + 191 * 1536**2 + 147_456 * 1536 + 49_545_475) + 4 * (83_819_683 + lora)
    moving = always + 4 * 4 * lora
    pool = 13.3 * token + 10 * 16 * 499_200 * 2 + 2 * lora
    pictures = images * 4 * (3 * 512**2 + 2 * 2 * 16 * 64**2)
    learning = moving + 4 * 4 * lora + pool + pictures
    saved = 24 * 11 * token + 13 * 16 * 1024 * 1536 * 2 * 4 + 7 * token + 2 * lora
    return {
        "encode": always + 2 * (123_650_304 + 694_659_840 + 4_762_310_656),
        "sample": moving + pool,
        "decode": moving + pool + pictures + 8 * 2 * 3 * 256 * 512**2,
        "score": learning,
        "update": learning + saved,
    }


def with_pickscore_adversary(images: int, processes: int) -> dict[str, float]:
    """Bytes by phase of two last layers that learn, float32, and the rest of PickScore in bfloat16, beside the DINOv2-B
    of the statistics.

    An update of 64 references and 64 generations, of which a process of eight has 8 and six standard deviations more,
    saves of a layer and a number of TOKENS: both norms' inputs in float32, what q, k, v and the first linear layer
    read in bfloat16, q, k and v, attention's output, and GELU's input and output; and the backward is at GELU.
    """
    hidden, rows = 2 * TOKENS + 4 * 1024, 2 * (64 if processes == 1 else 25)
    always = 2 * (986_109_441 - 2 * LAYER) + 4 * 1280 * 1026 + 2 * 86_580_480 + 2 * LAYER * 4 * 2
    update = rows * (hidden + 2 * TOKENS * (2 * (4 + 4 + 3 + 1 + 8) + 6)) + 2 * LAYER * 2 * 2
    later = always + 2 * LAYER * 4 * 2 + 65_536 * 4 * 1024 + rows * hidden + update
    kept = later + 2 * LAYER * 4 * 3 + 2 * images * hidden + 512 * 8 * hidden
    before_learning = 2 * images * (hidden + 2 * TOKENS * (1 + 2 + 1 + 4 + 4))  # both sides, at GELU
    scoring = kept + images * hidden + max(before_learning, update + rows * hidden)
    return {"encode": always, "sample": later, "decode": later, "score": scoring, "update": kept}


def with_pickscore_reward(images: int, processes: int) -> dict[str, float]:
    """Bytes by phase of a whole PickScore, which gets all images at once, in a copy: at GELU an image has 12 numbers of
    TOKENS alive."""
    always = 2 * 986_109_441
    later = always + 65_536 * 4 * 1024
    scoring = later + images * (4 * 3 * 512**2 + 2 * (12 * TOKENS + 3 * 224**2))
    return {"encode": always, "sample": later, "decode": later, "score": scoring, "update": later}


def with_siglip(images: int, processes: int) -> dict[str, float]:
    """Bytes by phase of a SigLIP's vision model at 518 pixels, of whose 1,369 patches a reference keeps 256."""
    always, of_image = 2 * 428_225_600, 4 * 1370 * 1152
    kept = always + images * (of_image + 4 * 257 * 1152) + 512 * 8 * 257 * 1152 * 2
    forward = 8 * 1369 * (2 * (4 * 1152 + 2 * 4304) - 1152 * 2)
    scoring = kept + images * of_image + 64 * of_image + forward
    return {"encode": always, "sample": always, "decode": always, "score": scoring, "update": kept}


def siglip():
    config = configuration.load("sd35m-dino-paper")
    config.adversary.kind, config.adversary.backbone = "siglip", SO400M
    return config


@pytest.mark.parametrize(("processes", "images"), [(8, 96), (1, 768)])
@pytest.mark.parametrize(
    ("load", "judges"),
    [
        (lambda: configuration.load("sd35m-adv-pickscore-paper"), with_pickscore_adversary),
        (lambda: configuration.load("sd35m-flow-grpo-pickscore"), with_pickscore_reward),
        (siglip, with_siglip),
    ],
    ids=["PickScore learns", "PickScore is fixed", "SigLIP"],
)
def test_every_phase_is_within_5_percent_of_a_count_by_hand(load, judges, processes, images):
    """And what judges, which the transformer would hide, within 5 % where it is most."""
    config = load()
    planned = plan_as_configured(config, 141, processes=processes)
    assert planned.uncounted == ()
    others, own = of_medium(images), judges(images, processes)
    by_hand = {phase: 1.2 + 1.05 * (others[phase] + own[phase]) / 1e9 for phase in others}
    assert {phase: planned.phase_gb(phase) for phase in others} == pytest.approx(by_hand, rel=0.05)
    counted = list(Judges(config, processes, graphs=True).components(8, images))
    held = {phase: sum(c.bytes for c in counted if phase in c.phases) for phase in others}
    assert held == pytest.approx(own, rel=0.05)


def names(config, processes: int = 8) -> dict[str, int]:
    return {c.name: c.bytes for c in Judges(config, processes, graphs=True).components(8, 96)}


def test_metrics_of_held_out_prompts_are_loaded_besides(paper):
    """Once more where the same reward is trained on: training/build.py builds both."""
    paper.evaluation.metrics = ("pickscore",)
    assert "reward pickscore, of evaluation" not in names(paper)
    paper.data.held_out_prompts = "prompts.txt"
    assert names(paper)["reward pickscore, of evaluation"] == 2 * 986_109_441
    paper.rewards.pickscore.weight = 1.0
    assert {"reward pickscore", "reward pickscore, of evaluation"} < set(names(paper))


@pytest.mark.parametrize(
    ("reward", "parameters", "reads"),
    [
        ("pickscore", 986_109_441, True),
        ("clip_similarity", 427_616_513, True),
        ("clip_reference_similarity", 427_616_513, False),
        ("aesthetic", 427_616_513, False),
        ("dino_similarity", 86_580_480, False),
        ("ocr", 0, False),
        ("rule", 0, False),
        ("remote", 0, False),
        ("vlm_judge", 0, False),
    ],
)
def test_every_reward_looks_through_its_own_network(reward, parameters, reads, paper):
    before = names(paper)
    getattr(paper.rewards, reward).weight = 1.0
    paper.adversary.dtype = "float32"
    found = names(paper)
    assert found.get(f"reward {reward}", 0) == 4 * parameters
    assert (f"prompts as reward {reward} reads them, at most" in found) == reads
    assert Judges(paper, 8, graphs=True).uncounted == ()
    assert f"reward {reward}" not in before


def test_a_folder_of_ones_own_is_read(paper, tmp_path):
    """A SigLIP's whole or of its vision model alone."""
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, config in (("whole", {"vision_config": vision, "text_config": {}}), ("alone", vision)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        paper.adversary.kind, paper.adversary.backbone = "siglip", str(tmp_path / name)
        paper.adversary.image_size = 512
        found = names(paper)
        assert 0 < found["SigLIP backbone"] < 2e6
        assert found["features of an iteration's images"] == 96 * 4 * (32 * 32 + 1) * 64
    (tmp_path / "alone" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        names(paper)


def test_workers_of_a_reward_keep_nothing_here(paper):
    paper.rewards.pickscore.weight = 1.0
    with_model = names(paper)
    paper.rewards.pools = (configuration.PoolSection(reward="pickscore", device="cuda:1"),)
    assert not any("pickscore" in name for name in names(paper))
    assert "reward pickscore of all images, in one piece" in with_model
    assert names(paper)["images in one piece, for fixed rewards"] == 96 * 4 * 3 * 512**2


def test_a_reward_of_the_users_own_is_named(paper):
    own = {"name": "red", "import": "red.py:red", "weight": 1.0}
    paper.rewards.custom = (configuration.CustomReward.model_validate(own),)
    assert Judges(paper, 8, graphs=True).uncounted == ("rewards.custom[0]",)


def test_the_adversarys_own_dino_is_not_counted_twice(paper):
    looks = "DINO that looks at images"
    assert looks not in names(paper)
    paper.evaluation.backbone, paper.evaluation.backbone_image_size = paper.adversary.backbone, 518
    assert looks not in names(paper)
    paper.evaluation.backbone_image_size = 224
    assert names(paper)[looks] == 2 * 304_368_640
    paper.evaluation.backbone = "someone/dino"
    assert Judges(paper, 8, graphs=True).uncounted == ("evaluation.backbone = someone/dino",)
    paper.evaluation.backbone, paper.update.objective = "facebook/dinov2-base", "sft"  # draws nothing while it trains
    assert names(paper) == {}
    paper.evaluation.metrics, paper.data.held_out_prompts = ("dino_similarity",), "prompts.txt"
    assert names(paper)[looks] == 2 * 86_580_480


def test_a_discriminator_update_that_is_no_graph_is_gone_afterwards():
    config = configuration.load("sd35m-adv-pickscore-paper")
    pool = "a discriminator update, in the CUDA graphs' pool"
    assert pool in {c.name for c in Estimate(config, 8).components(KNOBS)}
    config.fast = False
    assert pool not in {c.name for c in Estimate(config, 8).components(KNOBS)}


def test_a_pickscore_adversary_has_what_is_planned():
    """Of the shipped one, on the CPU: its tensors, and what it makes of an image."""
    section = configuration.load("tiny-adv-pickscore").adversary
    config = configuration.load("tiny-adv-pickscore")
    built = build_adversary(section, device=torch.device("cpu"), seed=1)
    assert isinstance(built, PickScoreAdversary)
    loaded = [*built.clip.model.parameters(), *built.tail.parameters()]
    loaded += [*built._norm.parameters(), *built._projection.parameters(), *(p.grad for p in built.parameters())]
    planned = names(config, 1)
    weights = planned["PickScore, frozen"] + planned["PickScore's last layers and gradient, float32"]
    assert weights == sum(tensor.nbytes for tensor in loaded)
    of_two = built.features(torch.zeros(2, 3, 64, 64), ["a", "b"])
    assert planned["features of an iteration's images"] == 96 * sum(t.nbytes for t in of_two.tensors.values()) // 2
    assert planned["Adam's moments of these layers, float32"] == 2 * sum(p.nbytes for p in built.parameters())


def test_encoding_references_is_counted(paper):
    """One image at a time, as training/supervised.py does: at its largest five tensors of the first blocks' 128
    channels in float32."""
    paper.update.objective = "sft"
    sizes = {c.name: c for c in Estimate(paper, 8).components(KNOBS)}
    assert sizes["encoding a reference"].phases == ("update",)
    assert sizes["encoding a reference"].bytes == pytest.approx(5 * 4 * 128 * 512**2, rel=0.05)
    assert encode_bytes(SD3_DECODER, 2048) == pytest.approx(16 * encode_bytes(SD3_DECODER, 512), rel=0.05), "no matrix"
    assert encode_bytes(VideoVae(), 512) > 4 * 96 * 512**2
    paper.update.objective = "nft"
    assert "encoding a reference" not in {c.name for c in Estimate(paper, 8).components(KNOBS)}


def test_a_dino_that_is_not_known_is_refused(paper):
    paper.adversary.backbone = "someone/unknown"
    with pytest.raises(UserError, match=r"adversary.backbone = 'someone/unknown' is not known without a network"):
        Judges(paper, 8, graphs=True)
