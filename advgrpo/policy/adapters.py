"""What is trainable in the stock network (MMDiT or UNet): PEFT's LoRA adapters, or every weight.

Both offer the same: named float32 parameters, the frozen base (`disabled`), and an export that stock diffusers loads.
The fused transformer has adapters of its own (lora.py), with the same names, start and file format.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import (
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import LORA_TARGETS, LoraSection
from ..errors import UserError
from .lora import check_lora_state, initial_pair

logger = logging.getLogger(__name__)
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


# What the default of model.lora.targets, SD3's attention projections, stands for on a UNet: its own.
UNET_LORA_TARGETS = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _PROJECTIONS)
_WRITERS = {"transformer": StableDiffusion3Pipeline, "unet": StableDiffusionPipeline}  # SDXL's files are SD1.5's


def component_of(network: ModelMixin) -> str:
    """The folder of a network in its pipeline, which is also the prefix of its names in a LoRA file."""
    return "unet" if isinstance(network, UNet2DConditionModel) else "transformer"


def stored_blocks(pipeline: Path) -> tuple[str, list[str]]:
    """Component and transformer blocks, in the order of the forward pass, of a pipeline's folder; loads no weights."""
    component, kind = "transformer", SD3Transformer2DModel
    if (pipeline / "unet").is_dir():
        component, kind = "unet", UNet2DConditionModel
    with torch.device("meta"):
        return component, _block_names(kind.from_config(kind.load_config(pipeline / component)))


def _block_names(network: ModelMixin) -> list[str]:
    """Transformer blocks in the order of the forward pass; a UNet registers its up blocks before the middle."""
    names = [name for name, _ in network.named_modules() if re.search(r"(^|\.)transformer_blocks\.\d+$", name)]
    return sorted(names, key=lambda name: {"mid_block": 1, "up_blocks": 2}.get(name.split(".")[0], 0))


def target_modules(network: ModelMixin, lora: LoraSection) -> list[str]:
    """Full names of the linear layers to adapt: the configured suffixes within the configured blocks."""
    blocks = _block_names(network)
    if lora.blocks != "all" and lora.blocks > len(blocks):
        raise UserError(f"model.lora.blocks = {lora.blocks}: the model has {len(blocks)} transformer blocks")
    chosen = blocks if lora.blocks == "all" else blocks[-lora.blocks :]
    targets = lora.targets
    if component_of(network) == "unet" and targets == LORA_TARGETS:
        targets = UNET_LORA_TARGETS
    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    unmatched = [t for t in targets if not any(name.endswith(f".{t}") for name in linear)]
    if unmatched:
        raise UserError(f"model.lora.targets: {unmatched} match no linear layer of the model")
    prefixes, suffixes = tuple(f"{block}." for block in chosen), tuple(f".{target}" for target in targets)
    return [name for name in linear if name.startswith(prefixes) and name.endswith(suffixes)]


def export_lora(folder: Path, state: Mapping[str, torch.Tensor], metadata: dict, component: str) -> None:
    """`pipe.load_lora_weights(folder)` of stock diffusers; the metadata keeps alpha, which the weights lack."""
    named = {f"{component}_lora_layers": dict(state), f"{component}_lora_adapter_metadata": metadata}
    _WRITERS[component].save_lora_weights(folder, **named)


def read_lora(folder: Path, field: str, component: str) -> dict[str, torch.Tensor]:
    """The adapters of a LoRA folder for one component, by PEFT's names; UserError naming `field` otherwise."""
    path = Path(folder).expanduser() / LORA_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field} = {str(folder)!r}: {path} cannot be read ({error})") from error
    prefix = f"{component}."
    return {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}


class LoraAdapters:
    """PEFT LoRA with float32 masters."""

    def __init__(self, network: ModelMixin, lora: LoraSection, seed: int):
        targets = target_modules(network, lora)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws; what it drew is replaced below
            network.add_adapter(config, adapter_name=ADAPTER)
        self.network = network
        with torch.no_grad():
            for _, parameter in self.parameters():
                parameter.data = parameter.data.float()
            for name in targets:
                layer = network.get_submodule(name)
                a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                for weight, start in zip((a, b), initial_pair(name, a.shape[1], len(b), lora.rank, lora.init, seed)):
                    weight.copy_(start)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.network.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.network, adapter_name=ADAPTER)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        own = self.state_dict()
        check_lora_state(own, state, source)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def export(self, folder: Path) -> None:
        metadata = self.network.peft_config[ADAPTER].to_dict()
        export_lora(folder, self.state_dict(), metadata, component_of(self.network))


class FullWeights:
    """Every weight of the network in float32; the base is kept beside it for the KL term."""

    def __init__(self, network: ModelMixin):
        if network.dtype != torch.float32:
            raise UserError('model.train = "full" needs float32 masters: set model.dtype = "float32"')
        logger.warning(
            "model.train = full: every weight is trained; knowledge outside the prompts is forgotten sooner than with "
            "LoRA. Watch the held-out metrics, or set update.kl_weight."
        )
        self.network = network.requires_grad_(True)
        self._base = copy.deepcopy(network).requires_grad_(False)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.network.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        trained = dict(self.network.named_parameters())
        masters = {name: p.data for name, p in trained.items()}
        try:
            for name, p in self._base.named_parameters():
                trained[name].data = p.data
            yield
        finally:
            for name, data in masters.items():
                trained[name].data = data

    def export(self, folder: Path) -> None:
        """A folder for `from_pretrained` of the network's class."""
        self.network.save_pretrained(folder)
