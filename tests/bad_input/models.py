"""Model folders, rewards and adversaries, LoRAs to start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.case import Bench, Case, changed, flagged

_MODEL, _JUDGES, _LORA = "model folder", "rewards, adversary", "LoRA to start from"
_NETWORK = "transformer/diffusion_pytorch_model.safetensors"
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
Damage = Callable[[Path], object]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def text(content: str) -> Damage:
    return lambda file: file.write_text(content)


def replaced(**values: object) -> Damage:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


def pickled(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def without_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[5])
    save_file(tensors, file)


def _model(part: str, damage: Damage, *expect: str, name: str = "", loading: bool = False) -> Case:
    def make(bench: Bench) -> list[str]:
        folder = bench.copy(bench.world.pipeline, "pipeline")
        damage(folder / part)
        return bench.train("--model.path", str(folder))

    return Case(_MODEL, name or f"{part} {expect[0][:20]}", ("model.path = ", *expect), make, loading=loading)


def _unet(part: str, *expect: str, **values: object) -> Case:
    def make(bench: Bench) -> list[str]:
        folder = bench.copy(bench.world.unet, "unet")
        replaced(**values)(folder / part)
        return bench.train("--model.path", str(folder), "--rollout.dynamics", "ddim")

    return Case(_MODEL, f"UNet {part} {sorted(values)}", ("model.path = ", *expect), make)


MODELS = [
    flagged(_MODEL, "--model.path nowhere/pipeline", "model.path = 'nowhere/pipeline' is neither a folder nor a hub model"),
    Case(_MODEL, "a file", ("is a file; want a diffusers pipeline folder",), lambda b: b.train("--model.path", b.write("m.safetensors", ""))),
    Case(_MODEL, "empty folder", ("model_index.json is missing",), lambda b: b.train("--model.path", str(b.folder))),
    Case(_MODEL, "a backbone", ("model_index.json is missing",), lambda b: b.train("--model.path", str(b.world.backbone))),
    _model("model_index.json", text("[]"), "holds a list, not an object"),
    _model("model_index.json", text("{"), "is not JSON"),
    _model("model_index.json", text(_POINTER), "git-lfs pointer"),
    _model("model_index.json", replaced(_class_name="PixArtSigmaPipeline"), "holds a PixArtSigmaPipeline; want one of"),
    _model("model_index.json", replaced(vae=["diffusers"]), "want [library, class]"),
    _model("transformer", shutil.rmtree, "transformer is missing, but model_index.json lists it"),
    _model("vae", shutil.rmtree, "vae is missing"),
    _model("tokenizer", shutil.rmtree, "tokenizer is missing"),
    _model("tokenizer_3/tokenizer.json", Path.unlink, "has no tokenizer"),
    _model("tokenizer/tokenizer.json", cut, "is not JSON"),
    _model("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json is missing"),
    _model("scheduler/scheduler_config.json", replaced(use_dynamic_shifting=True), "use_dynamic_shifting"),
    _model("transformer/config.json", text("null"), "holds a NoneType"),
    _model("transformer/config.json", replaced(num_attention_heads=8), "contradict"),
    _model("transformer/config.json", replaced(_class_name="SD4Transformer2DModel"), "transformer/config.json: _class_name = 'SD4Transformer2DModel'", "install a diffusers that has it", name="a network of another diffusers"),
    _model("transformer/config.json", replaced(patch_size="two"), "describes no such network"),
    _model("vae/config.json", replaced(block_out_channels=[]), "vae"),
    _model(_NETWORK, Path.unlink, "is missing; complete the folder"),
    _model(_NETWORK, text(_POINTER), "git-lfs pointer"),
    _model(_NETWORK, cut, "is no whole safetensors file"),
    _model(_NETWORK, pickled, "weights in diffusion_pytorch_model.bin only, a pickle"),
    _model(_NETWORK, without_tensor, "lack or contradict 1 tensors"),
    _model("text_encoder_3/model.safetensors", cut, "text_encoder_3", "is no whole safetensors file"),
    _unet("unet/config.json", "contradict", in_channels=9),
    _unet("scheduler/scheduler_config.json", "prediction_type = 'v_prediction'", prediction_type="v_prediction"),
    Case(_MODEL, "UNet to be shared out", ("model.shard_base = 'blocks'", "has a UNet; set model.shard_base = none"), lambda b: b.train("--model.path", str(b.world.unet), "--rollout.dynamics", "ddim", "--model.shard_base", "blocks")),
    Case(_MODEL, "UNet with a flow's dynamics", ("set rollout.dynamics = 'ddim'",), lambda b: b.train("--model.path", str(b.world.unet))),
    flagged(_MODEL, "--model.train full --model.dtype bfloat16", "model.train = full needs float32 weights", "model.dtype = bfloat16"),
    flagged(_MODEL, "--model.resolution 1024", "model.resolution = 1024: this model wants a multiple of", "at most"),
]  # fmt: skip


def _backbone(damage: Damage, part: str, *expect: str) -> Case:
    def make(bench: Bench) -> list[str]:
        folder = bench.copy(bench.world.backbone, "backbone")
        damage(folder / part)
        return bench.train("--adversary.backbone", str(folder))

    return Case(_JUDGES, f"backbone {part} {expect[0][:20]}", ("adversary.backbone = ", *expect), make)


def _clip(damage: Damage, part: str, *expect: str, loading: bool = False) -> Case:
    def make(bench: Bench) -> list[str]:
        folder = bench.copy(bench.world.clip, "clip")
        damage(folder / part)
        return bench.train("--rewards.pickscore.weight", "1", "--rewards.pickscore.path", str(folder))

    return Case(_JUDGES, f"clip {part} {expect[0][:20]}", ("rewards.pickscore.path = ", *expect), make, loading=loading)


def _head(name: str, tensors: dict[str, torch.Tensor] | str, *expect: str) -> Case:
    def make(bench: Bench) -> list[str]:
        file = bench.folder / name
        file.write_text(tensors) if isinstance(tensors, str) else save_file(tensors, file)
        flags = ["--rewards.aesthetic.weight", "1", "--rewards.aesthetic.head", str(file)]
        return bench.train(*flags, "--rewards.aesthetic.path", str(bench.world.clip))

    return Case(_JUDGES, f"head {name}", ("rewards.aesthetic.head = ", *expect), make)


JUDGES = [
    flagged(_JUDGES, "--adversary.kind dinno", "want one of dino, siglip, pickscore, none; did you mean 'dino'?"),
    flagged(_JUDGES, "--adversary.backbone nowhere/dino", "adversary.backbone = 'nowhere/dino' cannot be loaded as a Dinov2Model"),
    flagged(_JUDGES, "--adversary.kind siglip --adversary.backbone nowhere/siglip", "adversary.backbone = 'nowhere/siglip' cannot be loaded"),
    flagged(_JUDGES, "--adversary.kind siglip --adversary.backbone tiny", "adversary.backbone = 'tiny': no SigLIP is shipped"),
    flagged(_JUDGES, "--evaluation.backbone nowhere/dino", "evaluation.backbone = 'nowhere/dino' cannot be loaded as a Dinov2Model"),
    flagged(_JUDGES, "--rewards.dino_similarity.weight 1 --rewards.dino_similarity.path nowhere/dino", "rewards.dino_similarity.path = 'nowhere/dino'"),
    Case(_JUDGES, "processor nowhere", ("rewards.pickscore.processor = 'nowhere/processor' has no preprocessor_config.json",),
         lambda b: b.train("--rewards.pickscore.weight", "1", "--rewards.pickscore.path", str(b.world.clip), "--rewards.pickscore.processor", "nowhere/processor")),
    flagged(_JUDGES, "--adversary.image_size 33", "adversary.image_size = 33 is not a multiple of the backbone's patch size"),
    flagged(_JUDGES, "--adversary.reward_weights 0 0", "adversary.reward_weights = [0, 0]: nothing would be rewarded"),
    flagged(_JUDGES, "--adversary.reward_weights -1 0", "adversary.reward_weights = [-1, 0]: want 2 values, each a number of at least 0"),
    flagged(_JUDGES, "--adversary.loss_weights 0 0", "adversary.loss_weights = [0, 0]"),
    flagged(_JUDGES, "--adversary.schedule never", "the head would stay random"),
    flagged(_JUDGES, "--adversary.schedule sometimes", "adversary.schedule = 'sometimes'"),
    flagged(_JUDGES, "--adversary.alternate_period 1", "adversary.alternate_period = 1"),
    flagged(_JUDGES, "--adversary.replay_share 2", "adversary.replay_share = 2: want a number from 0 to 1"),
    flagged(_JUDGES, "--adversary.replay_capacity 2147483647", "adversary.replay_capacity = 2147483647: want a whole number from 0 to 65536"),
    flagged(_JUDGES, "--adversary.num_patches 0", "adversary.num_patches = 0"),
    flagged(_JUDGES, "--adversary.reward_ema 1", "adversary.reward_ema = 1: want a number from 0 to below 1"),
    flagged(_JUDGES, "--adversary.gradient_penalty -1", "adversary.gradient_penalty = -1: want a number of at least 0"),
    flagged(_JUDGES, "--adversary.reset_every -1", "adversary.reset_every = -1: want a whole number of at least 0"),
    flagged(_JUDGES, "--adversary.heads 0", "adversary.heads = 0: want a whole number from 1 to 64"),
    flagged(_JUDGES, "--adversary.feature_layers 2 9", "adversary.feature_layers = [2, 9]", "has 2 layers; want numbers from 1 to 2"),
    flagged(_JUDGES, "--adversary.feature_layers 2 1", "adversary.feature_layers = [2, 1]: want different layers in ascending order; use [1, 2]"),
    flagged(_JUDGES, "--adversary.kind siglip --adversary.feature_layers 1", "adversary.feature_layers = [1] are layers of a DINOv2"),
    changed(_JUDGES, {"adversary": {"spectral_norm": 2}}, "adversary.spectral_norm = 2"),
    flagged(_JUDGES, "--adversary.augment flip", "adversary.augment = 'flip': want one of none, crop, crop_flip"),
    Case(_JUDGES, "an averaged PickScore", ("adversary.reward_ema = 0.9 is of a head on frozen features", "adversary.kind = pickscore"),
         lambda b: b.train("--adversary.kind", "pickscore", "--adversary.backbone", str(b.world.clip), "--adversary.reward_ema", "0.9")),
    flagged(_JUDGES, "--rewards.rule.weight -1", "rewards.rule.weight = -1: want a number of at least 0"),
    flagged(_JUDGES, "--rewards.mine.weight 1", "unknown flag --rewards.mine.weight"),
    changed(_JUDGES, {"rewards": {"mine": {"weight": 1}}}, "unknown key 'rewards.mine'"),
    flagged(_JUDGES, "--rewards.remote.weight 1", "rewards.remote.url is empty, but rewards.remote needs it"),
    flagged(_JUDGES, "--rewards.aesthetic.weight 1", "rewards.aesthetic.head is empty, but rewards.aesthetic needs it"),
    flagged(_JUDGES, "--rewards.ocr.weight 1 --rewards.ocr.workers 0", "rewards.ocr.workers = 0"),
    flagged(_JUDGES, "--rewards.pickscore.weight 1 --rewards.pickscore.path nowhere/clip", "rewards.pickscore.path = 'nowhere/clip' cannot be loaded as a CLIPModel"),
    Case(_JUDGES, "a CLIP for DINO", ("adversary.backbone = ", "is a clip; want a dinov2"), lambda b: b.train("--adversary.backbone", str(b.world.clip))),
    Case(_JUDGES, "a DINO for CLIP", ("rewards.clip_similarity.path = ", "is a dinov2; want a clip"),
         lambda b: b.train("--rewards.clip_similarity.weight", "1", "--rewards.clip_similarity.path", str(b.world.backbone))),
    Case(_JUDGES, "a SigLIP for PickScore", ("adversary.backbone = ", "is a siglip; want a clip"),
         lambda b: b.train("--adversary.kind", "pickscore", "--adversary.backbone", str(b.world.siglip))),
    Case(_JUDGES, "too many trained layers", ("adversary.trainable_layers = 9", "3 vision layers"),
         lambda b: b.train("--adversary.kind", "pickscore", "--adversary.backbone", str(b.world.clip), "--adversary.trainable_layers", "9")),
    Case(_JUDGES, "pairs with a replay buffer", ("adversary.replay_capacity = 8 does not go with adversary.objective = pairwise",),
         lambda b: b.train("--adversary.kind", "pickscore", "--adversary.backbone", str(b.world.clip), "--adversary.objective", "pairwise")),
    _backbone(Path.unlink, "config.json", "config.json is missing"),
    _backbone(text("{"), "config.json", "is not JSON"),
    _backbone(replaced(model_type="vit"), "config.json", "is a vit; want a dinov2"),
    _backbone(Path.unlink, "model.safetensors", "is missing"),
    _backbone(cut, "model.safetensors", "is no whole safetensors file"),
    _backbone(text(_POINTER), "model.safetensors", "git-lfs pointer"),
    _clip(Path.unlink, "preprocessor_config.json", "has no preprocessor_config.json"),
    _clip(Path.unlink, "tokenizer.json", "has no tokenizer"),
    _clip(without_tensor, "model.safetensors", "lacks 1 weights", loading=True),
    _head("head.pth", "no tensors", "is not safetensors"),
    _head("text.safetensors", "no tensors", "is not a readable safetensors file"),
    _head("wide.safetensors", {"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, "reads embeddings of 7 numbers"),
    _head("two.safetensors", {"weight": torch.zeros(2, 24), "bias": torch.zeros(2)}, "not a chain of linear layers"),
    _head("nan.safetensors", {"weight": torch.full((1, 24), float("nan")), "bias": torch.zeros(1)}, "not finite"),
]  # fmt: skip


def _start(name: str, damage: Damage, *expect: str) -> Case:
    """A run that starts from a damaged copy of a good LoRA; `damage` gets the file."""

    def make(bench: Bench) -> list[str]:
        folder = bench.copy(bench.world.lora, "lora")
        damage(folder / "pytorch_lora_weights.safetensors")
        return bench.train("--model.lora.start_from", str(folder))

    return Case(_LORA, name, ("model.lora.start_from = ", *expect), make)


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(file: Path) -> None:
        save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)

    return damage


def _renamed(old: str, new: str) -> Damage:
    return _tensors(lambda tensors: {name.replace(old, new): t for name, t in tensors.items()})


def _first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    return {**tensors, name: change(tensors[name])}


def _with(flags: str, *expect: str) -> Case:
    return Case(
        _LORA, flags, ("model.lora.start_from = ", *expect),
        lambda b: b.train("--model.lora.start_from", str(b.world.lora), *flags.split()),
    )  # fmt: skip


LORAS = [
    flagged(_LORA, "--model.lora.start_from nowhere", "model.lora.start_from = 'nowhere' does not exist"),
    Case(_LORA, "empty folder", ("model.lora.start_from = ", "does not exist; pass a folder that holds"), lambda b: b.train("--model.lora.start_from", str(b.folder))),
    Case(_LORA, "the run, not its lora", ("model.lora.start_from = ", "does not exist; pass a folder that holds"), lambda b: b.train("--model.lora.start_from", str(b.world.run))),
    _start("text", text("no tensors"), "cannot be read as a LoRA"),
    _start("cut", cut, "cannot be read as a LoRA"),
    _start("git-lfs pointer", text(_POINTER), "cannot be read as a LoRA"),
    _start("empty file", text(""), "cannot be read as a LoRA"),
    _start("no tensors", _tensors(lambda _: {}), "adapts nothing"),
    _start("kohya's names", _renamed("transformer.", "lora_unet_"), "want diffusers' format"),
    _start("of a UNet", _renamed("transformer.t", "unet.t"), "adapts a unet"),
    _start("of the text encoder", _renamed("transformer.t", "text_encoder.t"), "adapts text_encoder"),
    _start("foreign block", _renamed("blocks.0", "blocks.17"), "it is another model's"),
    _start("not finite", _tensors(lambda t: _first(t, lambda x: x * float("nan"))), "not finite"),
    _start("half a pair", _tensors(lambda t: dict(sorted(t.items())[1:])), "needs lora_A.weight"),
    _start("another width", _tensors(lambda t: _first(t, lambda x: x[:, :-1])), "it is another model's"),
    _start("conv", _tensors(lambda t: _first(t, lambda x: x[..., None])), "of a linear layer"),
    _with("--model.lora.rank 8", "model.lora.rank"),
    _with("--model.lora.targets attn.to_q", "set model.lora.targets"),
    _with("--model.lora.blocks 1", "set model.lora.targets"),
]  # fmt: skip

CASES = [*MODELS, *JUDGES, *LORAS]
