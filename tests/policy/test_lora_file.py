"""LoRA files: every loader applies the update that was trained, from the formats that ComfyUI, kohya's scripts and
diffusers read; what comes back is what the file says, whatever alpha the configuration has.

golden/lora_loaders.json holds what the loaders of ComfyUI and of kohya's sd-scripts and musubi-tuner accept, with its
sources.

Bugs planted in a copy, each seen red: alpha not folded; B of a fused q, k, v in the wrong rows; the last block's shift
and scale not exchanged, or those of block 23 whichever is the last; SD3.5-large taken for FLUX.1; `.alpha` of a fused
module left at the rank of its parts; the configuration's alpha used for `start_from`; `.alpha` ignored on reading;
metadata in the library's order; a header that leaves tensors unaligned; mode 0600, of adapters and of full weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from advgrpo.config import LoraSection
from advgrpo.errors import UserError
from advgrpo.export import main as export_command
from advgrpo.plan import known_models
from advgrpo.policy.adapters import UNET_LORA_TARGETS, block_of, target_modules
from advgrpo.policy.lora_file import LORA_FILE, convert, read_lora, write_lora
from advgrpo.policy.sd3 import SD3Policy
from tests.unet_models import SDXL_UNET

LOADERS = json.loads((Path(__file__).parents[1] / "golden" / "lora_loaders.json").read_text())
PROMPTS = ["a small red star on the left of a blue background"]


def expand(ranges: dict) -> dict:
    """{name with #: [[first, last, value], ...]} -> {name of every block: value}."""
    return {
        name.replace("#", str(i)): json.loads(json.dumps(value).replace("#", str(i)))
        for name, found in ranges.items()
        for first, last, value in found
        for i in range(first, last + 1)
    }


FAMILIES = {
    "sd35_medium": known_models.TRANSFORMERS["stabilityai/stable-diffusion-3.5-medium"],
    "sd35_large": known_models.TRANSFORMERS["stabilityai/stable-diffusion-3.5-large"],
    "flux1": known_models.FLUX_TRANSFORMERS["black-forest-labs/FLUX.1-dev"],
    "qwen_image": known_models.QWEN_TRANSFORMERS["Qwen/Qwen-Image"],
}


@dataclass(frozen=True)
class Recorded:
    """A family's linear layers in diffusers, without their weights, and what the loaders know of them."""

    layers: dict[str, torch.nn.Linear]  # of all blocks
    checkpoint: dict[str, list[int]]  # shapes, by the original checkpoint's names
    comfyui: dict[str, list]
    kohya: dict[str, list[int]]

    @classmethod
    def of(cls, family: str) -> Recorded:
        network, found = known_models.meta_transformer(FAMILIES[family]), LOADERS[family]
        linear = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
        return cls(
            {name: module for name, module in linear.items() if block_of(name) is not None},
            expand(found["checkpoint"]["shapes"]),
            expand(found["comfyui"]["keys"]),
            expand(found["kohya"]["keys"]),
        )


@pytest.fixture(scope="module")
def recorded() -> dict[str, Recorded]:
    """Made before the root conftest's poisoned torch.empty, which would allocate weights on the meta device."""
    return {family: Recorded.of(family) for family in FAMILIES}


def random_lora(layers: dict[str, torch.nn.Linear], rank: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator),
            torch.randn(layer.out_features, rank, generator=generator),
        )
        for name, layer in layers.items()
    }


def of_block(names: Iterable[str], number: int) -> list[str]:
    """Of the blocks of that number, of all kinds."""
    return [name for name in names if name.split(".")[1] == str(number)]


def probe(inputs: int) -> torch.Tensor:
    """[K, 3] float64: updates are compared by what they do to it, since whole ones of SD3.5 take half a minute."""
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(inputs, 3, generator=generator, dtype=torch.float64) / inputs**0.5


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


def on_probe(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.double() @ (down.double() @ probe(down.shape[1]))


def applied_by_comfyui(known: Recorded, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{weight of the checkpoint: its update on the probe}; fails for a key that ComfyUI does not know."""
    updates, used = {}, set()
    for name, (weight, rows, swap) in known.comfyui.items():
        parts = {f"{name}.{part}" for part in ("lora_B.weight", "lora_A.weight", "alpha")} & tensors.keys()
        if not parts:
            continue
        used |= parts
        up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        alpha = tensors.get(f"{name}.alpha")
        update = (1.0 if alpha is None else alpha.item() / len(down)) * on_probe(up, down)
        weight = weight.removeprefix("diffusion_model.")
        whole = updates.setdefault(weight, torch.zeros(known.checkpoint[weight][0], 3, dtype=torch.float64))
        if swap:
            update = update.roll(len(update) // 2, 0)
        start, count = (0, len(whole)) if rows is None else rows[1:]
        whole[start : start + count] += update
    assert used == set(tensors)
    return updates


def applied_by_kohya(known: Recorded, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by kohya's names; every module needs its alpha."""
    original = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in known.checkpoint}
    updates = {}
    for module in dict.fromkeys(name.split(".")[0] for name in tensors):
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert known.kohya[module] == [len(up), down.shape[1]]
        alpha = tensors[f"{module}.alpha"]
        assert alpha.shape == ()
        updates[original[module]] = alpha.item() / len(down) * on_probe(up, down)
    assert len(tensors) == 3 * len(updates)
    return updates


@pytest.mark.parametrize(
    ("family", "count"),
    [("sd35_medium", 385), ("sd35_large", 37 * 14 + 11), ("flux1", 19 * 14 + 38 * 6), ("qwen_image", 60 * 14)],
)
@pytest.mark.parametrize("export_format", ["diffusers", "comfyui", "kohya"])
def test_every_key_is_one_of_the_loaders(recorded, family, count, export_format):
    """All linear layers of all blocks, of which the default targets are a part."""
    known = recorded[family]
    assert len(known.layers) == len(known.comfyui) == count
    tensors, _ = convert(random_lora(known.layers, 1), "transformer", export_format)
    modules = {name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in tensors}
    assert modules == set(known.kohya if export_format == "kohya" else known.comfyui)
    assert any(name.endswith(".alpha") for name in tensors) == (export_format != "diffusers")


@pytest.mark.parametrize(
    ("family", "number"),
    [
        *[("sd35_medium", number) for number in (0, 13, 23)],  # with a second attention, without, and the last
        *[("sd35_large", number) for number in (36, 37)],
        *[("flux1", number) for number in (0, 37)],  # a block of two streams and one of one; the last
        ("qwen_image", 59),
    ],
)
def test_both_loaders_apply_the_update_that_was_trained(recorded, family, number):
    known, scale = recorded[family], 1.3  # not a power of two: folding it rounds
    modules = random_lora({name: known.layers[name] for name in of_block(known.layers, number)}, 2)
    folded = {name: (a, b * scale) for name, (a, b) in modules.items()}
    by_comfyui = applied_by_comfyui(known, convert(folded, "transformer", "comfyui")[0])
    for name, (a, b) in modules.items():
        weight, rows, swap = known.comfyui[f"transformer.{name}"]
        update = by_comfyui[weight.removeprefix("diffusion_model.")]
        update = update if rows is None else update[rows[1] : rows[1] + rows[2]]
        expected = scale * on_probe(b, a)
        assert close(update.roll(len(update) // 2, 0) if swap else update, expected)
    diffusers_file, _ = convert(folded, "transformer", "diffusers")  # ComfyUI reads that too, with no alpha at all
    kohya_file, _ = convert(folded, "transformer", "kohya")
    for found in (applied_by_comfyui(known, diffusers_file), applied_by_kohya(known, kohya_file)):
        assert found.keys() == by_comfyui.keys()
        assert all(close(found[name], by_comfyui[name]) for name in found)


@pytest.mark.parametrize(
    ("family", "module", "weight"),
    [
        ("sd35_medium", "transformer_blocks.3.attn.to_k", "joint_blocks.3.x_block.attn.qkv.weight"),
        ("sd35_large", "transformer_blocks.36.attn.add_v_proj", "joint_blocks.36.context_block.attn.qkv.weight"),
        ("flux1", "transformer_blocks.3.attn.add_k_proj", "double_blocks.3.txt_attn.qkv.weight"),
        ("flux1", "single_transformer_blocks.3.attn.to_k", "single_blocks.3.linear1.weight"),
    ],
)
def test_a_part_of_q_k_v_alone_leaves_the_others_as_they_are(recorded, family, module, weight):
    known = recorded[family]
    modules = random_lora({module: known.layers[module]}, 4)
    kohya = applied_by_kohya(known, convert(modules, "transformer", "kohya")[0])
    assert torch.equal(kohya[weight], applied_by_comfyui(known, convert(modules, "transformer", "comfyui")[0])[weight])
    assert (kohya[weight] != 0).any(1).sum() == known.layers[module].out_features


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("export_format", ["comfyui", "kohya"])
def test_every_key_is_one_of_the_loaders_for_a_unet(monkeypatch, kind, export_format):
    monkeypatch.undo()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET) if kind == "sdxl" else UNet2DConditionModel(cross_attention_dim=768)
    known = {
        f"lora_unet_{prefix}.{i}.{linear}".replace(".", "_")
        for prefix, (_, count) in LOADERS["unet"][kind].items()
        for i in range(count)
        for linear in LOADERS["unet"]["linears"]
    }
    names = target_modules(unet, LoraSection(targets=(*UNET_LORA_TARGETS, "ff.net.0.proj", "ff.net.2")))
    modules = random_lora({name: unet.get_submodule(name) for name in names}, 1)
    tensors, _ = convert(modules, "unet", export_format)
    assert {name.split(".")[0] for name in tensors} == known
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


def load(settings, **lora) -> SD3Policy:
    changed = LoraSection(**{**settings.model.lora.model_dump(), **lora})
    model = settings.model.model_copy(update={"lora": changed})
    cache = Path(settings.data.cache_dir)
    return SD3Policy(model, device=torch.device("cpu"), cache_dir=cache, seed=0, fused=True)


@pytest.fixture
def trained(unit_config) -> SD3Policy:
    policy = load(unit_config, rank=4, alpha=16)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return policy


def velocity(policy: SD3Policy) -> torch.Tensor:
    latents = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([500.0]), guidance=1.0)
    return policy.predict(latents, torch.tensor([0]), prepared)[0].detach()


@pytest.mark.parametrize("header", ["as written", "lost"])
def test_stock_diffusers_at_strength_one_is_the_trained_policy(trained, unit_pipeline, tmp_path, header):
    """Also where a loader does not read the header, which is all that said alpha before."""
    trained.export(tmp_path / "lora")
    if header == "lost":
        save_file(load_file(tmp_path / "lora" / LORA_FILE), tmp_path / "lora" / LORA_FILE)
    pipe = StableDiffusion3Pipeline.from_pretrained(unit_pipeline)
    expected, base = velocity(trained), stock_velocity(pipe, trained)
    pipe.load_lora_weights(tmp_path / "lora")
    assert (expected - base).abs().max() > 0.05
    assert (stock_velocity(pipe, trained) - expected).abs().max() <= 1e-5


@torch.no_grad()
def stock_velocity(pipe, policy) -> torch.Tensor:
    encoded = policy.encode(PROMPTS)
    latents = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))
    return pipe.transformer(
        latents, timestep=torch.tensor([500.0]), encoder_hidden_states=encoded.text, pooled_projections=encoded.pooled
    ).sample


def stored(folder: Path, tensors: dict[str, torch.Tensor], header: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    metadata = None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file(tensors, folder / LORA_FILE, metadata=metadata)
    return folder


def unfolded(trained: SD3Policy) -> dict[str, torch.Tensor]:
    """Tensors as earlier versions and other trainers write them: B without alpha / rank."""
    return {f"transformer.{name}": tensor.clone() for name, tensor in trained.network.lora.state_dict().items()}


@pytest.mark.parametrize("where", ["folded", "header", "tensors", "both"])
@pytest.mark.parametrize("alpha", [4, 16, 64])
def test_start_from_has_the_strength_of_the_file_whatever_alpha_the_configuration_says(
    unit_config, trained, tmp_path, where, alpha
):
    if where == "folded":
        trained.export(tmp_path / "lora")
    else:
        tensors = unfolded(trained)
        header = {"transformer.r": 4, "transformer.lora_alpha": 16} if where != "tensors" else None
        if where != "header":
            modules = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")}
            tensors |= {f"{name}.alpha": torch.tensor(16.0) for name in modules}
        stored(tmp_path / "lora", tensors, header)
    again = load(unit_config, rank=4, alpha=alpha, start_from=str(tmp_path / "lora"))
    assert (velocity(again) - velocity(trained)).abs().max() <= 1e-5


def test_a_file_without_any_alpha_means_the_rank_as_in_diffusers(unit_config, trained, tmp_path):
    stored(tmp_path / "lora", unfolded(trained))
    quarter = load(unit_config, rank=4, alpha=4)
    quarter.network.lora.load_state_dict(trained.network.lora.state_dict(), "test")
    again = load(unit_config, rank=4, alpha=64, start_from=str(tmp_path / "lora"))
    assert (velocity(again) - velocity(quarter)).abs().max() <= 1e-5


def test_peft_scales_are_understood(tmp_path):
    a, b = torch.randn(4, 6), torch.randn(5, 4)
    names = ("blocks.0.to_q", "blocks.1.to_q", "blocks.1.to_k")
    tensors = {f"unet.{n}.lora_{x}.weight": t.clone() for n in names for x, t in (("A", a), ("B", b))}
    header = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"^blocks.1.to_q": 2, "to_k": 1}}
    found = read_lora(stored(tmp_path / "p", tensors, header), "x").modules
    for name, scale in zip(names, (2, 0.5, 0.25)):
        assert torch.equal(found[name][1], b * scale)
    header = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    assert torch.equal(read_lora(stored(tmp_path / "p", tensors, header), "x").modules[names[0]][1], b * 4)


WRONG = {
    "other names": ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, None, "want diffusers' format"),
    "text encoders too": (
        {"text_encoder.x.lora_A.weight": torch.ones(2, 2), "unet.x.lora_A.weight": torch.ones(2, 2)},
        None,
        "adapts text_encoder, unet",
    ),
    "half a pair": ({"unet.x.lora_A.weight": torch.ones(2, 2)}, None, "x needs lora_A.weight .* and lora_B.weight"),
    "a convolution": (
        {"unet.x.lora_A.weight": torch.ones(2, 2, 1, 1), "unet.x.lora_B.weight": torch.ones(2, 2, 1, 1)},
        None,
        "of a linear layer",
    ),
    "no numbers": (
        {"unet.x.lora_A.weight": torch.full((2, 2), torch.nan), "unet.x.lora_B.weight": torch.ones(2, 2)},
        None,
        "x holds numbers that are not finite",
    ),
}
PAIR = {"unet.x.lora_A.weight": torch.ones(2, 2), "unet.x.lora_B.weight": torch.ones(2, 2)}
WRONG |= {
    f"header {header}": (PAIR, header, expected)
    for header, expected in [
        ({"unet.lora_alpha": "much"}, "cannot be understood"),
        (["alpha"], "cannot be understood"),
        ({"unet.lora_alpha": 0}, "alpha of x is 0; want a positive number"),
        ({"unet.lora_alpha": float("inf")}, "alpha of x is inf"),
        ({"unet.use_dora": True}, "is a DoRA"),
        ({"unet.alpha_pattern": {".*to_q": 3}}, "is no module name"),
    ]
}
WRONG["two alphas"] = ({**PAIR, "unet.x.alpha": torch.tensor(1.0)}, {"unet.lora_alpha": 2}, "1 in a tensor but 2 in")
WRONG["alpha of two numbers"] = ({**PAIR, "unet.x.alpha": torch.ones(2)}, None, "alpha of x is nan")


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_plain_lora_of_one_network_is_refused(name, tmp_path):
    tensors, header, expected = WRONG[name]
    with pytest.raises(UserError, match=r"model\.lora\.start_from = .*" + expected):
        read_lora(stored(tmp_path / "x", tensors, header), "model.lora.start_from")


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"{}" * 100])
def test_a_file_that_is_no_safetensors_is_refused(content, tmp_path):
    (tmp_path / LORA_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"--lora = .* cannot be read as a LoRA"):
        read_lora(tmp_path, "--lora")


@pytest.mark.parametrize("export_format", ["diffusers", "comfyui", "kohya"])
def test_files_are_equal_to_the_byte_and_readable_as_the_umask_lets(trained, tmp_path, export_format):
    modules = trained.network.lora.modules()
    old = os.umask(0o022)
    try:
        for number in range(6):  # the library's own order of two entries repeats by chance half of the time
            write_lora(tmp_path / str(number), modules, "transformer", export_format)
        os.umask(0o027)
        write_lora(tmp_path / "group", modules, "transformer", export_format)
    finally:
        os.umask(old)
    names = {LORA_FILE} | ({f"{export_format}.safetensors"} if export_format != "diffusers" else set())
    assert {path.name for path in (tmp_path / "0").iterdir()} == names
    for name in names:
        contents = {(tmp_path / str(number) / name).read_bytes() for number in range(6)}
        assert len(contents) == 1
        assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0  # tensors stay aligned
        assert (tmp_path / "0" / name).stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "group" / name).stat().st_mode & 0o777 == 0o640


def test_the_setting_adds_a_file_and_keeps_diffusers(unit_config, unit_pipeline, tmp_path):
    load(unit_config, rank=4, export_format="kohya").export(tmp_path / "lora")
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha" in load_file(tmp_path / "lora" / "kohya.safetensors")
    StableDiffusion3Pipeline.from_pretrained(unit_pipeline).load_lora_weights(tmp_path / "lora")


def test_an_older_export_is_converted_by_the_command(trained, tmp_path, capsys):
    folder = stored(tmp_path / "old", unfolded(trained), {"transformer.r": 4, "transformer.lora_alpha": 16})
    out = tmp_path / "new.safetensors"
    assert export_command([str(folder), "--format", "comfyui", "--out", str(out)]) == 0
    tensors, old = load_file(out), unfolded(trained)
    name = "transformer.transformer_blocks.1.attn.to_v"
    assert tensors[f"{name}.alpha"] == 4
    assert torch.equal(tensors[f"{name}.lora_B.weight"], 4 * old[f"{name}.lora_B.weight"])
    for arguments, expected in [
        ([str(folder), "--out", str(tmp_path / "x.bin")], "ends in .safetensors"),
        ([str(folder), "--out", str(folder / LORA_FILE)], "is the LoRA itself"),
        (["nowhere", "--out", str(out)], "LORA = 'nowhere/"),
        ([str(folder), "--out", "/dev/null/x.safetensors"], "cannot be written"),
    ]:
        assert export_command(arguments) == 2
        assert expected in capsys.readouterr().err


def test_full_weights_are_readable_too(unit_config, tmp_path):
    model = unit_config.model.model_copy(update={"train": "full"})
    policy = SD3Policy(model, device=torch.device("cpu"), cache_dir=Path(unit_config.data.cache_dir), seed=0)
    policy.export(tmp_path / "transformer")
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "transformer" / "config.json").stat().st_mode
