"""What is trainable in the stock network (MMDiT or UNet): PEFT's LoRA adapters, or every weight.

Both offer the same: named float32 parameters, the frozen base (`disabled`), and an export that stock diffusers loads.
The fused transformer has adapters of its own (lora.py), with the same names, start and file format.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError

from advgrpo.config import LORA_TARGETS, ExportFormat, LoraSection
from advgrpo.errors import UserError
from advgrpo.policy.fused.lora import Pair, check_lora_state, initial_pair
from advgrpo.policy.lora_file import LoraFile, read_lora, write_lora
from advgrpo.runtime.atomic import write_folder_atomically

logger = logging.getLogger(__name__)
ADAPTER = "default"
START = "model.lora.start_from"  # the setting that a LoRA to load comes from unless another is named
_BLOCK = re.compile(r"(?:.+\.)?(?:single_)?transformer_blocks\.\d+")  # FLUX.1 has two kinds
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


# What the default of model.lora.targets, SD3's attention projections, stands for on a UNet: its own.
UNET_LORA_TARGETS = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _PROJECTIONS)


def block_of(module: str) -> tuple[str, str] | None:
    """(transformer block, name within it) of a module's full name; None outside of one."""
    found = re.match(rf"({_BLOCK.pattern})\.(.+)", module)
    return None if found is None else (found[1], found[2])


def modulates(linear: str) -> bool:
    """Whether a linear layer gives shifts, scales and gates, by its name in any family or within a block."""
    return any(part in f".{linear}" for part in (".norm", ".img_mod.", ".txt_mod."))


def component_of(network: ModelMixin) -> str:
    """The folder of a network in its pipeline, which is also the prefix of its names in a LoRA file."""
    return "unet" if isinstance(network, UNet2DConditionModel) else "transformer"


def network_class(
    config: Mapping[str, Any],
    default: type[ModelMixin] = SD3Transformer2DModel,
    source: str = "the transformer's config.json",
) -> type[ModelMixin]:
    """The class of diffusers that a network's config.json names; one that names none is the `default`.

    Raises:
        UserError: naming `source`: a class that this diffusers does not have, or that is no network.
    """
    name = config.get("_class_name")
    if name is None:
        return default
    found = getattr(diffusers, str(name), None)
    if isinstance(found, type) and issubclass(found, ModelMixin):
        return found
    made = config.get("_diffusers_version", "an unnamed version")
    raise UserError(
        f"{source}: _class_name = {name!r} is no network of diffusers {diffusers.__version__}; correct it, or install "
        f"a diffusers that has it (the file is of {made})"
    )


def stored_network(pipeline: Path) -> ModelMixin:
    """The network of a pipeline's folder `without_weights`."""
    component, kind = "transformer", SD3Transformer2DModel
    if (pipeline / "unet").is_dir():
        component, kind = "unet", UNet2DConditionModel
    config = kind.load_config(pipeline / component)
    return without_weights(network_class(config, kind, str(pipeline / component / "config.json")), json.dumps(config))


@functools.lru_cache(maxsize=8)
def without_weights(kind: type[ModelMixin], config: str) -> ModelMixin:
    """The model of that configuration, as JSON, on the meta device: its modules and shapes. All that ask for it get one
    object, which is for reading: a large network takes a second, and a run's checks ask several times."""
    with torch.device("meta"):
        return kind.from_config(json.loads(config))


def stored_blocks(pipeline: Path) -> list[str]:
    """Transformer blocks, in the order of the forward pass, of a pipeline's folder."""
    return block_names(stored_network(pipeline))


def block_names(network: ModelMixin) -> list[str]:
    """Transformer blocks in the order of the forward pass; a UNet registers its up blocks before the middle."""
    names = [name for name, _ in network.named_modules() if _BLOCK.fullmatch(name)]
    return sorted(names, key=lambda name: {"mid_block": 1, "up_blocks": 2}.get(name.split(".")[0], 0))


def target_modules(network: ModelMixin, lora: LoraSection) -> list[str]:
    """Full names of the linear layers to adapt: the configured suffixes within the configured blocks."""
    blocks = block_names(network)
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


def read_lora_for(pipeline: Path, path: Path, field: str) -> LoraFile:
    """A LoRA file, checked against the network of a pipeline's folder; loads none of its weights.

    Raises:
        UserError: as `read_lora`, or a LoRA of another network: names the first module that differs.
    """
    file, network = read_lora(path, field), stored_network(pipeline)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    source = f"{field} = {str(file.path)!r}"
    if file.component != component_of(network):
        raise UserError(f"{source} adapts a {file.component}, but {pipeline} has a {component_of(network)}")
    for name, (a, b) in file.modules.items():
        if name not in linear:
            raise UserError(f"{source} adapts {name}, which {pipeline} does not have; it is another model's")
        here, there = (linear[name].out_features, linear[name].in_features), (len(b), a.shape[1])
        if here != there:
            raise UserError(f"{source}: {name} is {list(there)}, but {list(here)} in {pipeline}; it is another model's")
    return file


def start_state(folder: Path, component: str, scale: float, field: str) -> dict[str, torch.Tensor]:
    """Adapters of a setting's LoRA by PEFT's names, for `scale * B @ A`: the file's update, whatever its alpha.

    Raises:
        UserError: as `read_lora`, or a LoRA of another kind of network.
    """
    file = read_lora(folder, field)
    if file.component != component:
        raise UserError(f"{field} = {str(folder)!r} adapts a {file.component}, but the model has a {component}")
    return file.state_dict(scale)


def export_lora(
    folder: Path,
    modules: Mapping[str, Pair],
    scale: float,
    component: str,
    export_format: ExportFormat,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write adapters whose update is `scale * B @ A`, so that all loaders apply that update at strength 1."""
    folded = {name: (a.float(), b.float() * scale) for name, (a, b) in modules.items()}
    write_lora(folder, folded, component, export_format, notes)


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
        self.network, self.lora, self.targets = network, lora, targets
        with torch.no_grad():
            for _, parameter in self.parameters():
                parameter.data = parameter.data.float()
            for name, (a, b) in self.modules().items():
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

    def modules(self) -> dict[str, Pair]:
        """Module name -> (A [r, K], B [n, r]): the parameters themselves."""
        layers = {name: self.network.get_submodule(name) for name in self.targets}
        return {name: (x.lora_A[ADAPTER].weight, x.lora_B[ADAPTER].weight) for name, x in layers.items()}

    @property
    def scale(self) -> float:
        return self.lora.alpha / self.lora.rank

    def load_lora(self, folder: Path, field: str = START) -> None:
        self.load_state_dict(start_state(folder, component_of(self.network), self.scale, field), str(folder))

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        component, kind = component_of(self.network), self.lora.export_format
        export_lora(folder, self.modules(), self.scale, component, kind, notes)


class FullWeights:
    """Every weight of the network in float32; the base is kept beside it for the KL term."""

    def __init__(self, network: ModelMixin):
        if network.dtype != torch.float32:
            raise ValueError(f"every weight of a network is trained in float32 only, not in {network.dtype}")
        logger.warning(
            "model.train = full: every weight is trained; knowledge outside the prompts is forgotten sooner than with "
            "LoRA. Watch the held-out metrics, or set update.kl_weight."
        )
        self.network = network.requires_grad_(True)

    @functools.cached_property
    def _base(self) -> ModelMixin:
        return copy.deepcopy(self.network).requires_grad_(False)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        _ = self._base  # before anybody can train them
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

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """A folder for `from_pretrained` of the network's class; UserError where it cannot be written."""
        save_network(self.network, folder)


def save_network(network: ModelMixin, folder: Path) -> None:
    """A folder for `from_pretrained` of the network's class; UserError where it cannot be written."""
    try:
        write_folder_atomically(folder, network.save_pretrained)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({error}); free space or choose another folder") from error
