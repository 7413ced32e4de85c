"""Small CLIP and SigLIP models made from configs, and images for them."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from advgrpo.data.references import ReferenceSet
from advgrpo.tiny.architecture import clip_tokenizer
from tests.unit_size import UNIT

PROMPTS = ["a small red star", "a large green ring", "a blue circle"]
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def write_clip(folder: Path) -> str:
    """An untrained CLIP of width 32 with 3 vision layers, at 32 px in patches of 8."""
    tokenizer = clip_tokenizer(UNIT)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": UNIT.clip_tokens, "num_hidden_layers": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


def write_siglip(folder: Path) -> str:
    """An untrained SigLIP of width 32 with 2 vision layers, at 32 px in patches of 8, with both towers."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": 50, "max_position_embeddings": 8, "num_hidden_layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(text_config={**shared, **text}, vision_config={**shared, **vision})).save_pretrained(
        folder
    )
    settings = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def random_images(count: int, height: int = 48, width: int = 48) -> torch.Tensor:
    """Smooth colours of 256 levels, so that PIL and tensors see the same."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).round() / 255


def references_in(folder, prompts: dict[str, torch.Tensor]) -> ReferenceSet:
    index = {}
    for number, (prompt, images) in enumerate(prompts.items()):
        index[prompt] = [f"{number}-{k}.png" for k in range(len(images))]
        for name, image in zip(index[prompt], images):
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / name)
    (folder / "references.json").write_text(json.dumps(index))
    return ReferenceSet.load(folder, list(prompts))
