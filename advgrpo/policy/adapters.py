"""What is trainable on top of the frozen transformer: LoRA adapters, or every weight.

Both offer the same four things: named float32 parameters, the frozen base (`disabled`), merged weights for steps that
need no likelihood, and an export that stock diffusers loads.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict

from .. import rng
from ..config import LoraSection
from ..errors import UserError

logger = logging.getLogger(__name__)
ADAPTER = "default"


def _target_modules(transformer: SD3Transformer2DModel, lora: LoraSection) -> list[str]:
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


class LoraAdapters:
    """PEFT LoRA with float32 masters; merged weights live in a twin that shares every other tensor."""

    def __init__(self, transformer: SD3Transformer2DModel, lora: LoraSection, seed: int):
        targets = _target_modules(transformer, lora)
        self.scale = lora.alpha / lora.rank
        self.merged_transformer = _twin(transformer, targets)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):  # the same adapters on every rank and after a resume
            torch.manual_seed(rng.derive_seed(seed, "lora_init"))
            transformer.add_adapter(config, adapter_name=ADAPTER)
        self.transformer = transformer
        for _, parameter in self.parameters():
            parameter.data = parameter.data.float()
        self._pairs = [(transformer.get_submodule(n), self.merged_transformer.get_submodule(n)) for n in targets]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.transformer.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    @torch.no_grad()
    def merge(self) -> None:
        """W + (alpha / r) B A in float32 from the pristine base every time, rounded once, in place."""
        for adapted, merged in self._pairs:
            a, b = adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight
            merged.weight.copy_(torch.addmm(adapted.base_layer.weight.float(), b, a, alpha=self.scale))

    def export(self, folder: Path) -> None:
        """`pipe.load_lora_weights(folder)` of stock diffusers; the metadata keeps alpha, which the weights lack."""
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER),
            **_collate_lora_metadata({"transformer": self.transformer}),
        )


class FullWeights:
    """Every transformer weight in float32; the base is kept beside it for the KL term."""

    def __init__(self, transformer: SD3Transformer2DModel):
        if transformer.dtype != torch.float32:
            raise UserError('model.train = "full" needs float32 masters: set model.dtype = "float32"')
        logger.warning(
            "model.train = full: every weight is trained; knowledge outside the prompts is forgotten sooner than with "
            "LoRA. Watch the held-out metrics, or set update.kl_weight."
        )
        self.transformer = self.merged_transformer = transformer.requires_grad_(True)
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

    def merge(self) -> None:
        """Nothing to merge: sampling and training share the weights."""

    def export(self, folder: Path) -> None:
        """A transformer folder for `SD3Transformer2DModel.from_pretrained`."""
        self.transformer.save_pretrained(folder)


def _twin(transformer: SD3Transformer2DModel, own_weights: list[str]) -> SD3Transformer2DModel:
    """A second module tree over the same tensors, but for the weights of the named layers, which are its own."""
    shared = {id(t): t for t in [*transformer.parameters(), *transformer.buffers()]}
    twin = copy.deepcopy(transformer, memo=shared)
    for name in own_weights:
        layer = twin.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return twin
