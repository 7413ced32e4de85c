"""What a run's settings ask of its models, checked on their folders before any weight is read.

Loading SD3.5 and its text encoders takes minutes; whatever their small files can refute is refused here, in a second.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin
from pydantic import ValidationError

from advgrpo.config import (
    AdversarySection,
    Config,
    LoraSection,
    ModelSection,
    RewardEntry,
    RewardSection,
    RewardsSection,
    shown,
    wanted,
)
from advgrpo.errors import UserError
from advgrpo.plan.known_models import BACKBONES, KNOWN, known_pipeline
from advgrpo.policy.adapters import START, component_of, read_lora_for, stored_network, target_modules, without_weights
from advgrpo.policy.diffusers_policy import DiffusersPolicy, TransformerPolicy
from advgrpo.policy.fused.lora import check_lora_state
from advgrpo.policy.fused.transformer import TransformerConfig
from advgrpo.policy.loading import POLICIES
from advgrpo.policy.model_files import check_pipeline, check_tokenizer, check_vision_model, local_folder, read_json
from advgrpo.policy.pipelines import PREDICTION_TYPES, local_pipeline, pipeline_index
from advgrpo.policy.sdxl import ddim_scheduler
from advgrpo.reporting.trackers import check_installed, choose
from advgrpo.rewards.pool import workers
from advgrpo.runtime.folders import writable
from advgrpo.sampling.dynamics import check_dynamics, check_objective
from advgrpo.training.optimizer import APEX
from advgrpo.vision.clip import preference_folder
from advgrpo.vision.dino import backbone_folder, check_layers
from advgrpo.vision.loading import expanded, model_config

_CLIP_REWARDS = ("pickscore", "clip_similarity", "clip_reference_similarity", "aesthetic")


def preflight(config: Config) -> None:
    """UserError for settings that the models' folders refute, or for folders that are not whole."""
    writable(Path(config.data.cache_dir).expanduser(), "data.cache_dir")
    _check_installed(config)
    _check_generator(config)
    _check_judges(config, network=True)


def check_without_network(config: Config) -> None:
    """What of `preflight` needs no network: folders by their files, models of the hub by their names.

    Raises:
        UserError: as `preflight`, but not for what is missing on this machine.
    """
    if local_pipeline(config.model.path) is not None:
        _check_generator(config)
    elif config.model.path in KNOWN:
        check_dynamics("flow_prediction", config.rollout.dynamics)  # all of them are rectified flows
        _check_known_size(config.model)
    _check_judges(config, network=False)


def _check_judges(config: Config, *, network: bool) -> None:
    """Of the adversary, the rewards and the observer; without `network` those of the hub as far as they are known."""
    if config.learns_adversary:
        check_adversary(config.adversary, network)
    entries = config.rewards.entries()
    for name in config.used_rewards:
        entry = entries[name]
        if entry.kind == "custom":
            check_import(entry)
        else:
            check_reward(entry.kind, entry.section.arguments(), entry.owner, network=network)
    observer, evaluation = config.observer, config.evaluation
    if observer is not None and (evaluation.backbone or "dino_similarity" in evaluation.metrics):
        _check_dino(observer.backbone, observer.image_size, observer.fields, network)


def _check_installed(config: Config) -> None:
    """Packages that only some settings need, before hours of work lead to them."""
    for number, pool in enumerate(config.rewards.pools):
        workers.check_installed(pool.kind, f"rewards.pools[{number}].kind")
    for tracker in choose(config.output):
        check_installed(tracker)
    apex = f"NVIDIA Apex (not PyPI's apex: {APEX})"
    if config.update.optimizer == "apex" and not _found("apex.optimizers"):
        raise UserError(
            f"update.optimizer = apex needs {apex}, which is not installed; install it, or --update.optimizer auto"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


# The generator.


def check_model(path: str, field: str) -> Path | None:
    """The folder of a pipeline that can be trained and is whole; None for a hub id.

    Raises:
        UserError: naming `field`: no such pipeline, or a file in it that is missing or damaged.
    """
    index = pipeline_index(path, field)  # a hub id is asked for its model_index.json here
    folder = local_pipeline(path)
    if folder is None:
        return None
    source = f"{field} = {path!r}"
    weights = check_pipeline(folder, index, source)
    network = _network(folder, source)
    component = component_of(network)
    found = weights.get(component)
    if found is not None:
        _check_weights(network, found, f"{source}: {component}")
    return folder


def _network(folder: Path, source: str) -> ModelMixin:
    """The network without weights; UserError for a config.json that does not describe one."""
    try:
        return stored_network(folder)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # constructors fail in their own ways
        raise UserError(
            f"{source}: its transformer's or UNet's config.json describes no such network ({error})"
        ) from error


def _check_weights(network: ModelMixin, found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """diffusers would fill what is missing with random numbers."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    absent = sorted(own.keys() - found.keys())
    wrong = sorted(name for name in own.keys() & found.keys() if own[name] != found[name])
    if absent or wrong:
        first = absent[0] if absent else f"{wrong[0]} ({list(found[wrong[0]])} for {list(own[wrong[0]])})"
        raise UserError(
            f"{source}'s weights lack or contradict {len(absent) + len(wrong)} tensors of its config.json, first "
            f"{first}; download the model again"
        )


def check_size(folder: Path, resolution: int, *, model_field: str, field: str) -> None:
    """UserError naming `field` for a resolution that this pipeline does not draw."""
    index, network = pipeline_index(str(folder), model_field), stored_network(folder)
    family = POLICIES[index["_class_name"]]
    vae = _vae(family, folder, f"{model_field} = {str(folder)!r}")
    family.check_resolution(resolution, network.config, vae.config, field)


def _vae(family: type[DiffusersPolicy], folder: Path, source: str) -> ModelMixin:
    kind = family.vae_class
    try:
        return without_weights(kind, json.dumps(kind.load_config(folder / "vae")))
    except Exception as error:  # constructors fail in their own ways
        raise UserError(f"{source}: its vae/config.json describes no {kind.__name__} ({error})") from error


def _check_told_guidance(config: Config, source: str) -> None:
    """A network that is told its guidance is fitted at 1 by an objective that fits its velocity: it is drawn alike."""
    scales = {"evaluation": config.evaluation.guidance_scale}
    if config.objective.samples_images:
        scales["rollout"] = config.rollout.guidance_scale
    for section, scale in scales.items():
        if scale != 1:
            raise UserError(
                f"{section}.guidance_scale = {scale:g}: {source} is told its guidance, and update.objective = "
                f"{config.update.objective} fits it at 1; set --{section}.guidance-scale 1"
            )


def _check_generator(config: Config) -> None:
    model = config.model
    folder = check_model(model.path, "model.path")
    index = pipeline_index(model.path, "model.path")
    prediction_type = PREDICTION_TYPES[index["_class_name"]]
    check_dynamics(prediction_type, config.rollout.dynamics)
    check_objective(prediction_type, config.update.objective)
    if model.shard_base != "none" and not issubclass(POLICIES[index["_class_name"]], TransformerPolicy):
        raise UserError(
            f"model.shard_base = {model.shard_base!r} shares out the blocks of a transformer, but {model.path} has a "
            "UNet; set model.shard_base = none"
        )
    if folder is None:
        _check_known_size(model)
        return
    source, network = f"model.path = {model.path!r}", stored_network(folder)
    family = POLICIES[index["_class_name"]]
    vae = _vae(family, folder, source)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = read_json(scheduler, source)
    family.check_parts(model, index, network.config, vae.config, schedule)
    _check_shares(model, network.config, family.pixels_of_latent(vae.config))
    if config.objective.fits_velocity and getattr(network.config, "guidance_embeds", False):
        _check_told_guidance(config, source)
    trained = None
    if prediction_type == "epsilon":
        trained = ddim_scheduler(scheduler, model.path).config.num_train_timesteps
    _check_num_steps(config, fewest=2 if schedule.get("shift_terminal") else 1, trained=trained)
    if model.train == "lora":
        check_adapters(folder, network, model.lora, config.update.teacher)


def _check_shares(model: ModelSection, network: Mapping[str, Any], pixels_of_latent: int) -> None:
    """Of a transformer of that configuration; others have no forward that shares out tokens (fast.py says so)."""
    members = model.sequence_parallel
    if members == 1 or "num_attention_heads" not in network or "patch_size" not in network:
        return
    asked, heads = f"model.sequence_parallel = {members}", network["num_attention_heads"]
    if heads % members:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{asked} shares out the {heads} heads of {model.path}'s attention; want one of {fitting}")
    of_side = model.resolution // pixels_of_latent // TransformerConfig.from_stock(network).patch_size
    for field, tokens in (
        (f"model.resolution = {model.resolution}", of_side**2),
        (f"model.max_sequence_length = {model.max_sequence_length}", model.max_sequence_length),
    ):
        if tokens < members:
            raise UserError(f"{asked} is more than the {tokens} tokens of {field}; set it to {tokens} or less")


def _check_num_steps(config: Config, *, fewest: int, trained: int | None) -> None:
    for section, steps in (("rollout", config.rollout.num_steps), ("evaluation", config.evaluation.num_steps)):
        field = f"{section}.num_steps = {steps}"
        if steps < fewest:
            raise UserError(f"{field}: its schedule has no single step; want at least {fewest}")
        if trained is not None and steps >= trained:
            raise UserError(f"{field}: this model was trained on {trained} timesteps; want fewer")


def _check_known_size(model: ModelSection) -> None:
    """Of a model of the hub that is not here yet."""
    if model.path in KNOWN:
        pipeline = known_pipeline(model.path)
        network = SimpleNamespace(**pipeline.transformer)
        POLICIES[pipeline.kind].check_resolution(model.resolution, network, pipeline.decoder)
        _check_shares(model, pipeline.transformer, pipeline.decoder.scale)


def check_adapters(folder: Path, network: ModelMixin, lora: LoraSection, teacher: str = "") -> None:
    """UserError for targets or blocks that the network lacks, or a start_from or teacher of another shape."""
    targets = target_modules(network, lora)
    named = {START: lora.start_from, "update.teacher": teacher}
    files = {field: read_lora_for(folder, Path(path), field) for field, path in named.items() if path}
    if not files:
        return
    own = {}
    for name in targets:
        layer = network.get_submodule(name)
        own[f"{name}.lora_A.weight"] = torch.empty(lora.rank, layer.in_features, device="meta")
        own[f"{name}.lora_B.weight"] = torch.empty(layer.out_features, lora.rank, device="meta")
    for field, file in files.items():
        check_lora_state(own, file.state_dict(), f"{field} = {named[field]!r}")


# What judges.


def check_adversary(section: AdversarySection, network: bool) -> None:
    """UserError for settings of the adversary that its model's folder refutes, or for one that is not whole."""
    if section.kind == "dino":
        config = _check_dino(
            section.backbone, section.image_size, ("adversary.backbone", "adversary.image_size"), network
        )
        if config is not None and section.feature_layers:
            check_layers(section.feature_layers, config.get("num_hidden_layers", 12), section.backbone)
    elif section.kind == "siglip":
        _check_siglip(section.backbone, section.image_size, network)
    elif section.kind == "pickscore":
        fields = ("adversary.backbone", "adversary.processor")
        clip = _check_clip(section.backbone, section.processor, fields, network)
        layers = _part(clip, "vision_config").get("num_hidden_layers", section.trainable_layers) if clip else None
        if layers is not None and section.trainable_layers > layers:
            raise UserError(
                f"adversary.trainable_layers = {section.trainable_layers}: adversary.backbone = {section.backbone!r} "
                f"has {layers} vision layers; want at most that"
            )


def check_reward(name: str, options: Mapping[str, Any], owner: str, *, network: bool = True) -> None:
    """UserError for options of a fixed reward of the wrong kind, or that its model's folder refutes.

    Options that only the reward's constructor knows are left to it. They are called `owner`.OPTION.
    """
    name = {"clip": "clip_similarity"}.get(name, name)  # its short name
    _check_kinds(name, options, owner)
    if name in RewardsSection.model_fields:
        options = {**RewardsSection.model_fields[name].annotation().arguments(), **options}
    path = options.get("path")
    if name == "aesthetic" and not options["head"]:
        return  # which its constructor asks for
    if name == "dino_similarity" and path:
        _check_dino(path, options["image_size"], (f"{owner}.path", f"{owner}.image_size"), network)
    elif name in _CLIP_REWARDS and path:
        clip = _check_clip(path, options.get("processor"), (f"{owner}.path", f"{owner}.processor"), network)
        if name == "aesthetic":
            _check_head(options["head"], clip, owner)


def check_import(entry: RewardEntry) -> None:
    """UserError for a custom reward that cannot be imported; its file is run, and nothing built."""
    from advgrpo.rewards.custom import load_object

    load_object(getattr(entry.section, "import"), entry.owner)


def _check_kinds(name: str, options: Mapping[str, Any], owner: str) -> None:
    """The values are what the settings of section rewards.`name` take."""
    entry = RewardsSection.model_fields.get(name)
    fields = entry.annotation.model_fields if entry else {}
    for option, value in options.items():
        field = fields.get(option)
        if field is None or option in RewardSection.model_fields:
            continue
        try:
            entry.annotation.model_validate({option: value})
        except ValidationError:
            raise UserError(
                f"{owner}.{option} = {shown(value)}: want {wanted(field.annotation, field.metadata)}"
            ) from None


def _check_head(head: str, clip: Mapping[str, Any] | None, owner: str) -> None:
    from advgrpo.rewards.aesthetic import load_head

    width = load_head(head, f"{owner}.head")[0][0].shape[1]
    made = clip.get("projection_dim", 512) if clip else width
    if width != made:
        raise UserError(
            f"{owner}.head = {head!r} reads embeddings of {width} numbers, but {owner}.path makes {made}; use the CLIP "
            "that the head was fitted on"
        )


def _model_config(
    path: str, kinds: tuple[str, ...], field: str, model_class: str, network: bool
) -> Mapping[str, Any] | None:
    """config.json of a folder, whose weights are looked at, or of a hub id; None where that needs a network."""
    folder = local_folder(path)
    if folder is not None:
        return check_vision_model(folder, kinds, field, path)
    if network:
        return model_config(path, model_types=kinds, field=field, model_class=model_class)
    return BACKBONES.get(path)


def _check_dino(path: str, image_size: int, fields: tuple[str, str], network: bool) -> Mapping[str, Any] | None:
    """config.json; None for a hub id that is not looked up."""
    config = _model_config(backbone_folder(path), ("dinov2",), fields[0], "Dinov2Model", network)
    if config is not None:
        _check_patches(image_size, config.get("patch_size", 14), fields[1])
    return config


def _check_siglip(path: str, image_size: int, network: bool) -> None:
    field = "adversary.backbone"
    if path == "tiny":
        raise UserError(f"{field} = 'tiny': no SigLIP is shipped; pass a folder or a hub id")
    config = _model_config(path, ("siglip", "siglip_vision_model"), field, "SiglipVisionModel", network)
    if config is not None:
        _check_patches(image_size, _part(config, "vision_config").get("patch_size", 16), "adversary.image_size")
    _check_preprocessor(path, field, network)


def _check_clip(path: str, processor: str | None, fields: tuple[str, str], network: bool) -> Mapping[str, Any] | None:
    """config.json of a CLIP with tokenizer and preprocessor; None for a hub id that is not looked up."""
    folder = preference_folder(path)
    config = _model_config(folder, ("clip",), fields[0], "CLIPModel", network)
    beside, field = (folder, fields[0]) if processor is None else (processor, fields[1])
    _check_preprocessor(beside, field, network)
    there = local_folder(beside)
    if there is not None:
        check_tokenizer(there, f"{field} = {beside!r}")
    return config


def _check_preprocessor(path: str, field: str, network: bool) -> None:
    from advgrpo.vision.preprocess import ImagePreprocess

    if network or local_folder(path) is not None:
        ImagePreprocess.load(expanded(path), field=field)


def _check_patches(image_size: int, patch: Any, field: str) -> None:
    if isinstance(patch, int) and patch > 0 and image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        raise UserError(f"{field} = {image_size} is not a multiple of the backbone's patch size {patch}; use {near}")


def _part(config: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """A nested configuration, or the whole where it is not nested."""
    inner = (config or {}).get(name)
    return inner if isinstance(inner, dict) else config or {}
