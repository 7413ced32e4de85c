"""What is trainable in the stock transformer: PEFT's LoRA adapters, or every weight.

Both offer the same: named float32 parameters, the frozen base (`disabled`), and an export that stock diffusers loads.
The fused transformer has adapters of its own (lora.py), with the same names, start and file format.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import LoraSection
from ..errors import UserError
from .lora import check_lora_state, initial_pair

logger = logging.getLogger(__name__)
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"


def target_modules(transformer: SD3Transformer2DModel, lora: LoraSection) -> list[str]:
    """Full names of the linear layers to adapt: the configured suffixes within the configured blocks."""
    count = len(transformer.transformer_blocks)
    if lora.blocks != "all" and lora.blocks > count:
        raise UserError(f"model.lora.blocks = {lora.blocks}: the model has {count} transformer blocks")
    first = 0 if lora.blocks == "all" else count - lora.blocks
    prefixes = tuple(f"transformer_blocks.{i}." for i in range(first, count))
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    unmatched = [t for t in lora.targets if not any(name.endswith(f".{t}") for name in linear)]
    if unmatched:
        raise UserError(f"model.lora.targets: {unmatched} match no linear layer of the model")
    suffixes = tuple(f".{target}" for target in lora.targets)
    return [name for name in linear if name.startswith(prefixes) and name.endswith(suffixes)]


def export_lora(folder: Path, state: Mapping[str, torch.Tensor], metadata: dict) -> None:
    """`pipe.load_lora_weights(folder)` of stock diffusers; the metadata keeps alpha, which the weights lack."""
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=metadata
    )


def read_lora(folder: Path, field: str) -> dict[str, torch.Tensor]:
    """The transformer's adapters of a LoRA folder, by PEFT's names; UserError naming `field` otherwise."""
    path = Path(folder).expanduser() / LORA_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field} = {str(folder)!r}: {path} cannot be read ({error})") from error
    prefix = "transformer."
    return {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}


class LoraAdapters:
    """PEFT LoRA with float32 masters."""

    def __init__(self, transformer: SD3Transformer2DModel, lora: LoraSection, seed: int):
        targets = target_modules(transformer, lora)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws; what it drew is replaced below
            transformer.add_adapter(config, adapter_name=ADAPTER)
        self.transformer = transformer
        with torch.no_grad():
            for _, parameter in self.parameters():
                parameter.data = parameter.data.float()
            for name in targets:
                layer = transformer.get_submodule(name)
                a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                for weight, start in zip((a, b), initial_pair(name, a.shape[1], len(b), lora.rank, lora.init, seed)):
                    weight.copy_(start)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.transformer.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        own = self.state_dict()
        check_lora_state(own, state, source)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def export(self, folder: Path) -> None:
        export_lora(folder, self.state_dict(), self.transformer.peft_config[ADAPTER].to_dict())


class FullWeights:
    """Every transformer weight in float32; the base is kept beside it for the KL term."""

    def __init__(self, transformer: SD3Transformer2DModel):
        if transformer.dtype != torch.float32:
            raise UserError('model.train = "full" needs float32 masters: set model.dtype = "float32"')
        logger.warning(
            "model.train = full: every weight is trained; knowledge outside the prompts is forgotten sooner than with "
            "LoRA. Watch the held-out metrics, or set update.kl_weight."
        )
        self.transformer = transformer.requires_grad_(True)
        self._base = copy.deepcopy(transformer).requires_grad_(False)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.transformer.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        trained = dict(self.transformer.named_parameters())
        masters = {name: p.data for name, p in trained.items()}
        try:
            for name, p in self._base.named_parameters():
                trained[name].data = p.data
            yield
        finally:
            for name, data in masters.items():
                trained[name].data = data

    def export(self, folder: Path) -> None:
        """A transformer folder for `SD3Transformer2DModel.from_pretrained`."""
        self.transformer.save_pretrained(folder)
