"""LoRA files: diffusers' format, which this program reads and writes, and those that ComfyUI and kohya's scripts read.

Everything between the formats is an update `B @ A` of a module's weight, with nothing left to multiply by: alpha / rank
is folded into B (in float32) on reading and on writing, so alpha is the rank in every file written here. Loaders
disagree on where alpha is: diffusers keeps it in the header, ComfyUI and kohya's scripts in a tensor beside the
weights, and each takes alpha = rank where it finds none. Folded, a LoRA is equally strong in all of them.

    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight     header: r, lora_alpha = r
    comfyui     the same and ….to_q.alpha; a UNet's file is kohya's
    kohya       lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight   ….alpha; SD3's and FLUX.1's q, k, v are one
                Qwen-Image's keep diffusers' names, which are its original checkpoint's (musubi-tuner's files)

Shapes: A [r, K] and B [n, r] of a linear layer with K inputs and n outputs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from advgrpo.config import ExportFormat
from advgrpo.errors import UserError
from advgrpo.policy.fused.lora import Pair
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.fingerprint import file_digest

LORA_FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = ("transformer", "unet")
_METADATA = "lora_adapter_metadata"  # diffusers' key of the header
_TENSOR = re.compile(r"(\w+)\.(.+)\.(lora_A\.weight|lora_B\.weight|alpha)")

# Modules of a block: diffusers' name -> (name in the original checkpoint, part of those that are stored as one), by the
# kind of block, and what that is called there.
_Table = dict[str, dict[str, tuple[str, int | None]]]
_SD3_BLOCKS = {"transformer_blocks": "joint_blocks"}
_SD3_ORIGINAL: _Table = {
    "transformer_blocks": {
        **{f"attn.to_{p}": ("x_block.attn.qkv", part) for part, p in enumerate("qkv")},
        **{f"attn.add_{p}_proj": ("context_block.attn.qkv", part) for part, p in enumerate("qkv")},
        **{f"attn2.to_{p}": ("x_block.attn2.qkv", part) for part, p in enumerate("qkv")},
        "attn.to_out.0": ("x_block.attn.proj", None),
        "attn.to_add_out": ("context_block.attn.proj", None),
        "attn2.to_out.0": ("x_block.attn2.proj", None),
        "ff.net.0.proj": ("x_block.mlp.fc1", None),
        "ff.net.2": ("x_block.mlp.fc2", None),
        "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
        "ff_context.net.2": ("context_block.mlp.fc2", None),
        "norm1.linear": ("x_block.adaLN_modulation.1", None),
        "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
    }
}
_FLUX_WIDTH = 3072
_FLUX_TWO_STREAMS = 19  # blocks; Qwen-Image, as wide, has 60
_FLUX_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_FLUX_ORIGINAL: _Table = {
    "transformer_blocks": {
        **{f"attn.to_{p}": ("img_attn.qkv", part) for part, p in enumerate("qkv")},
        **{f"attn.add_{p}_proj": ("txt_attn.qkv", part) for part, p in enumerate("qkv")},
        "attn.to_out.0": ("img_attn.proj", None),
        "attn.to_add_out": ("txt_attn.proj", None),
        "ff.net.0.proj": ("img_mlp.0", None),
        "ff.net.2": ("img_mlp.2", None),
        "ff_context.net.0.proj": ("txt_mlp.0", None),
        "ff_context.net.2": ("txt_mlp.2", None),
        "norm1.linear": ("img_mod.lin", None),
        "norm1_context.linear": ("txt_mod.lin", None),
    },
    "single_transformer_blocks": {
        **{f"attn.to_{p}": ("linear1", part) for part, p in enumerate("qkv")},
        "proj_mlp": ("linear1", 3),
        "proj_out": ("linear2", None),
        "norm.linear": ("modulation.lin", None),
    },
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of one network: module name -> (A, B) in float32 with alpha / rank folded into B."""

    path: Path
    component: str  # "transformer" or "unet"
    modules: dict[str, Pair]

    def state_dict(self, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """PEFT's names without a prefix, for adapters whose update is `scale * B @ A`."""
        return _state({name: (a, b / scale) for name, (a, b) in self.modules.items()})


def lora_path(path: Path) -> Path:
    """The file that is meant by a folder of an export, or by the file itself."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / LORA_FILE


def lora_digest(path: Path) -> str:
    """Hash of the file's content (`file_digest`), which tells which LoRA it is; "" where there is none.

    Args:
        path: as of `lora_path`.
    """
    file = lora_path(path)
    return file_digest(file) if file.is_file() else ""


def read_lora(path: Path, field: str) -> LoraFile:
    """Read a LoRA in diffusers' format, or one with `.alpha` tensors beside such names.

    The scale of a module is alpha / rank (alpha / sqrt(rank) with PEFT's use_rslora): of its `.alpha` tensor, else of
    the header that diffusers writes, else 1.

    Args:
        path: a folder that holds pytorch_lora_weights.safetensors, or a file.
        field: the setting or flag that named it, for errors.

    Raises:
        UserError: no such file, another format or kind of adapter, several networks, an alpha that the header and a
            tensor disagree on, or numbers that are not finite.
    """
    path = lora_path(path)
    source = f"{field} = {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{source} does not exist; pass a folder that holds {LORA_FILE}, such as OUT/lora")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source} cannot be read as a LoRA ({error})") from error
    component, parts = _split_names(tensors, source)
    alphas = _HeaderAlphas.read(header, component, source)
    modules = {}
    for name, found in parts.items():
        a, b = found.get("lora_A.weight"), found.get("lora_B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(f"{source}: {name} needs lora_A.weight [r, K] and lora_B.weight [n, r] of a linear layer")
        modules[name] = (a.float(), b.float() * alphas.scale(name, len(a), found.get("alpha"), source))
        if not all(bool(t.isfinite().all()) for t in modules[name]):
            raise UserError(f"{source}: {name} holds numbers that are not finite; the LoRA is damaged")
    return LoraFile(path, component, modules)


def _split_names(tensors: Mapping[str, torch.Tensor], source: str) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """The one network that is adapted, and its tensors: {module: {"lora_A.weight" | "lora_B.weight" | "alpha": …}}."""
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise UserError(
                f"{source} holds {name}, as files of other programs do; want diffusers' format, "
                f"{COMPONENTS[0]}.MODULE.lora_A.weight and lora_B.weight"
            )
        component, module, part = found.groups()
        parts.setdefault(component, {}).setdefault(module, {})[part] = tensor
    foreign = sorted(set(parts).difference(COMPONENTS))
    if foreign or len(parts) != 1:
        names = ", ".join(sorted(parts)) or "nothing"
        raise UserError(f"{source} adapts {names}; want diffusers' format with one of {' or '.join(COMPONENTS)}")
    return parts.popitem()


@dataclass(frozen=True)
class _HeaderAlphas:
    """What the header says of alpha; `alpha` is None where it says nothing."""

    alpha: float | None = None
    pattern: Mapping[str, float] | None = None  # PEFT's alpha_pattern
    square_root: bool = False

    @classmethod
    def read(cls, header: Mapping[str, str], component: str, source: str) -> _HeaderAlphas:
        if _METADATA not in header:
            return cls()
        try:
            stored = json.loads(header[_METADATA])
            own = {key.removeprefix(f"{component}."): value for key, value in stored.items()}
            pattern = {key.removeprefix("^"): float(value) for key, value in (own.get("alpha_pattern") or {}).items()}
            alpha = None if own.get("lora_alpha") is None else float(own["lora_alpha"])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{source}: its header's {_METADATA} cannot be understood ({error})") from None
        if own.get("use_dora") or own.get("lora_bias"):
            raise UserError(f"{source} is a DoRA or adapts biases, which cannot be loaded here; want a plain LoRA")
        strange = [key for key in pattern if not re.fullmatch(r"[\w.]+", key)]
        if strange:
            raise UserError(f"{source}: its header's alpha_pattern {strange[0]!r} is no module name; write it out")
        return cls(alpha, pattern, bool(own.get("use_rslora")))

    def scale(self, name: str, rank: int, tensor: torch.Tensor | None, source: str) -> float:
        """What multiplies `B @ A` of the module `name`, whose `.alpha` is `tensor`."""
        alpha = self.alpha
        for key, value in (self.pattern or {}).items():  # the first that is the name or its end, as PEFT does
            if f".{name}".endswith(f".{key}"):
                alpha = value
                break
        if tensor is not None:
            beside = tensor.double().item() if tensor.numel() == 1 else math.nan
            if alpha is not None and not math.isclose(alpha, beside, rel_tol=1e-3):  # float16 files round it
                raise UserError(f"{source}: alpha of {name} is {beside:g} in a tensor but {alpha:g} in the header")
            alpha = beside
        alpha = float(rank) if alpha is None else alpha
        if not (math.isfinite(alpha) and alpha > 0):
            raise UserError(f"{source}: alpha of {name} is {alpha:g}; want a positive number")
        return alpha / (math.sqrt(rank) if self.square_root else rank)


def write_lora(
    folder: Path,
    modules: Mapping[str, Pair],
    component: str,
    export_format: ExportFormat,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write `folder`/pytorch_lora_weights.safetensors for diffusers, and FORMAT.safetensors beside it for another.

    The files hold float32 and depend on nothing but the arguments, to the byte. Each is written aside and renamed.

    Args:
        modules: name -> (A, B) whose update is `B @ A`.
        component: "transformer" or "unet", the network's folder in its pipeline.
        notes: more keys of the files' headers, which loaders pass over.

    Raises:
        UserError: the folder cannot be written, or kohya's format has no name for a module.
    """
    tensors, metadata = convert(modules, component, "diffusers")
    files = {LORA_FILE: (tensors, metadata)}
    if export_format != "diffusers":
        files[f"{export_format}.safetensors"] = convert(modules, component, export_format)
    for name, (tensors, metadata) in files.items():
        write_safetensors(Path(folder) / name, tensors, {**metadata, **(notes or {})})


def convert(
    modules: Mapping[str, Pair], component: str, export_format: ExportFormat
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) of a LoRA file in a format; arguments as `write_lora`."""
    if export_format == "kohya" or (export_format == "comfyui" and component == "unet"):
        return _kohya(modules, component)
    tensors = {f"{component}.{name}": tensor for name, tensor in _state(modules).items()}
    ranks = {name: len(a) for name, (a, _) in modules.items()}
    common = max(ranks.values())
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != common}
    config = {"r": common, "lora_alpha": common, "target_modules": sorted(modules)}
    config |= {"rank_pattern": other, "alpha_pattern": other} if other else {}
    if export_format == "comfyui":  # stock diffusers refuses a file with such tensors
        tensors |= {f"{component}.{name}.alpha": torch.tensor(float(rank)) for name, rank in ranks.items()}
    packed = {f"{component}.{key}": value for key, value in config.items()}
    return tensors, {"format": "pt", _METADATA: json.dumps(packed, indent=2, sort_keys=True)}


def _state(modules: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (a, b) in modules.items():
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return state


def _kohya(modules: Mapping[str, Pair], component: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Names of the original SD3, FLUX.1 or Qwen-Image checkpoint, or diffusers' of a UNet, with underscores."""
    qwen = component == "transformer" and _is_qwen(modules)
    own = _original(modules) if component == "transformer" and not qwen else modules
    tensors = {}
    for name, (down, up) in own.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
    rank = str(max(len(a) for a, _ in modules.values()))
    family = "lora_qwen_image" if qwen else "lora_flux" if _is_flux(modules) else "lora_sd3"
    network = f"networks.{family}" if component == "transformer" else "networks.lora"
    return tensors, {
        "format": "pt",
        "ss_network_module": network,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }


def _original(modules: Mapping[str, Pair]) -> dict[str, Pair]:
    """A LoRA by the modules of SD3's or FLUX.1's original checkpoint.

    q, k and v are one module there, with FLUX.1's blocks of one stream also the first linear of the feed-forward: A's
    are stacked, and B is zero but for the blocks on its diagonal. SD3's last block's context norm has shift before
    scale there, and the other way round in diffusers.
    """
    table, blocks = (_FLUX_ORIGINAL, _FLUX_BLOCKS) if _is_flux(modules) else (_SD3_ORIGINAL, _SD3_BLOCKS)
    fused: dict[str, dict[int, Pair]] = {}
    result: dict[str, Pair] = {}
    for name, (a, b) in modules.items():
        found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
        kind = "" if found is None else found[1]
        own = table.get(kind, {}).get(found[3]) if found else None
        if found is None or own is None:
            raise UserError(f"model.lora.export_format = 'kohya' has no name for {name}; use diffusers or comfyui")
        original, part = f"{blocks[kind]}.{found[2]}.{own[0]}", own[1]
        if part is not None:
            fused.setdefault(original, {})[part] = (a, b)
        elif own[0] == "context_block.adaLN_modulation.1" and len(b) == 2 * a.shape[1]:  # the last block: 2 of 6
            result[original] = (a, b.roll(len(b) // 2, dims=0))
        else:
            result[original] = (a, b)
    return result | {name: _on_diagonal(pairs, name.endswith("linear1")) for name, pairs in fused.items()}


def _on_diagonal(pairs: Mapping[int, Pair], with_mlp: bool) -> Pair:
    """One pair of q, k and v and, with_mlp, a fourth part four times as wide; parts without an adapter stay zero."""
    width = next(len(b) // (4 if part == 3 else 1) for part, (_, b) in pairs.items())
    rows = width * (7 if with_mlp else 3)
    down, up = [], []
    for part, (a, b) in sorted(pairs.items()):
        whole = b.new_zeros(rows, b.shape[1])
        whole[part * width : part * width + len(b)] = b
        down.append(a)
        up.append(whole)
    return torch.cat(down), torch.cat(up, dim=1)


def _is_flux(modules: Mapping[str, Pair]) -> bool:
    """By what SD3, 1,536 or 2,432 wide, does not have: blocks of one stream, or layers of 3,072 or 12,288 inputs."""
    widths = (_FLUX_WIDTH, 4 * _FLUX_WIDTH)
    return any(name.startswith("single_") or a.shape[1] in widths for name, (a, _) in modules.items())


def _is_qwen(modules: Mapping[str, Pair]) -> bool:
    """By its feed-forwards' names, or by a block of FLUX.1's width that FLUX.1 does not have: LoRAs of few blocks are
    of the last ones here."""
    if any("_mlp." in name or "_mod." in name for name in modules):
        return True
    wide = (name for name, (a, _) in modules.items() if a.shape[1] == _FLUX_WIDTH)
    blocks = (re.match(r"transformer_blocks\.(\d+)\.", name) for name in wide)
    return any(found and int(found[1]) >= _FLUX_TWO_STREAMS for found in blocks)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes depend on its content alone, readable to whom the umask lets.

    The library orders the header's metadata by a hash that differs from call to call, and makes its files readable to
    their owner only.

    Raises:
        UserError: it cannot be written.
    """
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in tensors.items()}
    raw = safetensors.torch.save(stored, metadata)
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns tensors to eight bytes
    try:
        write_atomically(path, b"".join([len(header).to_bytes(8, "little"), header, memoryview(raw)[8 + size :]]))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space or choose another folder") from error
