"""Serve a discriminator that learns, for another trainer's reward: it scores, collects, trains by the schedule and
keeps checkpoints, from which it goes on when it is started again with the same flags (docs/adversary_service.md).

python -m advgrpo.rewards.serve --adversary dino --references DIR --images 768 --checkpoint OUT
python -m advgrpo.rewards.serve --adversary dino --preset sd35m-style --style DIR --checkpoint OUT --device cuda

--adversary.FIELD sets a field of section adversary (docs/configuration.md), over those of --config and --preset.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from advgrpo import config as configuration
from advgrpo.config import AdversarySection, Config
from advgrpo.data.references import ReferenceSet, read_index
from advgrpo.data.sources import shipped_path
from advgrpo.errors import UserError
from advgrpo.rewards.listening import Listening, tell_address
from advgrpo.rewards.remote import read_token
from advgrpo.runtime.folders import writable
from advgrpo.service.collecting import AdversaryService, Sizes
from advgrpo.service.server import make_adversary_server

_PREFIX = "adversary."


class Learning(configuration.Options):
    """What learns, from what, and where it is kept."""

    adversary: Literal["dino", "siglip", "pickscore"]
    """What discriminates: a head on DINOv2 or SigLIP features, or the last layers of PickScore."""
    references: Annotated[str, Field(min_length=1)] | None = None
    """Folder with reference images and references.json; requests may have its prompts, and no others."""
    style: Path | None = None
    """Folder of images that are the references of every prompt, instead."""
    checkpoint: Path
    """Folder for checkpoints and metrics.jsonl; one that holds a checkpoint is continued."""
    checkpoint_every: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Iterations between checkpoints; one is written at SIGTERM and Ctrl-C in any case."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=2**31 - 1)] = 2
    """How many of the newest checkpoints stay."""
    preset: Annotated[str, Field(min_length=1)] | None = None
    """Sections adversary and monitor of a preset instead of the defaults, and its sizes of an iteration."""
    config: Path | None = None
    """YAML laid over the preset; may name one itself (preset: NAME)."""
    images: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Images of an iteration, over all processes that post them; unset: rollout.prompts_per_iteration x group_size."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Images whose features are computed at once; unset: rollout.micro_batch."""
    optimizer_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """The generator's optimizer steps in an iteration, for schedule ratio; unset: update.minibatches."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Every random draw derives from it; unset: the settings' own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""
    cache_dir: Annotated[str, Field(min_length=1)] | None = None
    """Where features of the references are kept; unset: data.cache_dir."""
    fit: Literal["refuse", "crop", "letterbox", "stretch"] | None = None
    """References that are not square; unset: data.fit."""
    min_reference_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Smallest accepted side of a reference in pixels; unset: data.min_reference_size."""


class ServeAdversary(Listening, Learning):
    """Serve a discriminator that learns."""


class _StopServing(BaseException):
    """Asked to end; no handler of errors may take it for one."""


def serve_adversary(arguments: Sequence[str], program: str) -> int:
    """Answer requests until a signal, then save; the exit code.

    Raises:
        UserError: bad input, before a request is taken.
        FloatingPointError, UserError: the discriminator failed to learn, or to be saved.
    """
    from advgrpo.runtime.libraries import quiet_libraries

    settings, config = read_settings(arguments, program)
    token = read_token(settings.token_file, "--token-file")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    references = load_references(settings, config)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    quiet_libraries()
    _check(config)
    writable(_cache(settings, config), "--cache-dir")
    from advgrpo.service.folder import ServiceFolder

    every, keep = settings.checkpoint_every, settings.keep_checkpoints
    folder = ServiceFolder(settings.checkpoint, every=every, keep=keep, print_line=_print_line)
    with contextlib.closing(folder):
        sizes = sizes_of(settings, config)
        folder.check(sizes.settings(config), references.fingerprint())
        service = build_service(settings, config, references, sizes)
        resumed = folder.resume(service)
        where = f"goes on from {resumed}" if resumed else f"begins in {settings.checkpoint}"
        _print_line(f"iteration {service.iteration} {where}: {service.count} of {service.images} images")
        for note in notes(config):
            _print_line(note)
        server = make_adversary_server(service, **settings.address(), limits=settings.limits(), token=token)
        tell_address(server, service.name)
        with signals_raise(), contextlib.suppress(_StopServing):
            server.serve_forever(poll_interval=0.1)
        server.finish()
        if server.failure is not None:
            raise server.failure
        _print_line(f"stopped; iteration {service.iteration} goes on from {folder.save(service)}")
    return 0


def read_settings(arguments: Sequence[str], program: str) -> tuple[ServeAdversary, Config]:
    """Flags over the file's settings over the preset's over the defaults.

    Raises:
        UserError: an unknown flag, a value of the wrong kind, a preset or file with another adversary.
        SystemExit: --help, which is printed.
    """
    if any(each in ("--help", "-h", "--help-all") for each in arguments):
        configuration.parse_options(ServeAdversary, ["--help"], program=program, about=__doc__)
    if any(each.partition("=")[0] == "--reward" for each in arguments):
        raise UserError("--reward and --adversary exclude each other: a server has one of them")
    own, section = configuration.leaves(ServeAdversary), _section_fields()
    flags = configuration.read_flags(arguments, {**own, **section})
    given = {name: flags.pop(name) for name in own if name in flags}
    try:
        settings = ServeAdversary.model_validate(given)
    except ValidationError as error:
        raise UserError(configuration.explain(error, ServeAdversary, given, dotted=False)) from error
    return settings, _config(settings, configuration.nested(flags))


def _section_fields() -> Mapping[str, FieldInfo]:
    return {name: f for name, f in configuration.leaves(AdversarySection, _PREFIX).items() if name != f"{_PREFIX}kind"}


def _config(settings: ServeAdversary, flags: Mapping[str, Any]) -> Config:
    file = configuration.read_yaml(settings.config) if settings.config else {}
    named = file.pop("preset", None)
    named = settings.preset or named
    base = configuration.merge(configuration.read_preset(named) if named else {}, file)
    source = str(settings.config) if settings.config else f"preset {named}"
    kind = configuration.build(base, source).adversary.kind
    if base and kind != settings.adversary:
        raise UserError(
            f"--adversary {settings.adversary}, but {source} has adversary.kind = {kind}; choose one that has it, or "
            "leave it out"
        )
    update = {"adversary": {"kind": settings.adversary}, "update": {"objective": "policy"}}
    merged = configuration.merge(configuration.merge(base, update), flags)
    if settings.seed is not None:
        merged["seed"] = settings.seed
    return configuration.build(merged, "command line")


def _cache(settings: ServeAdversary, config: Config) -> Path:
    return Path(settings.cache_dir or config.data.cache_dir).expanduser()


def _check(config: Config) -> None:
    """UserError for settings that contradict each other, or that the model's folder refutes."""
    from advgrpo.training.preflight import check_adversary

    configuration.check_learning(config)
    check_adversary(config.adversary, network=True)


def load_references(settings: ServeAdversary, config: Config) -> ReferenceSet:
    """UserError for no references, two kinds of them, or a bad one."""
    if (settings.references is None) == (settings.style is None):
        raise UserError("--references DIR (with references.json) or --style DIR (without): give one of them")
    rules: dict[str, Any] = {
        "min_size": settings.min_reference_size or config.data.min_reference_size,
        "fit": settings.fit or config.data.fit,
    }
    if settings.style is not None:
        return ReferenceSet.shared(settings.style, None, **rules)
    folder = Path(shipped_path("references", settings.references))
    if not folder.is_dir():
        raise UserError(f"--references {settings.references} is no folder; it must hold images and references.json")
    prompts = [prompt for prompt, names in read_index(folder / "references.json").items() if names]
    if not prompts:
        raise UserError(f"--references {settings.references}: references.json has no prompt with images")
    return ReferenceSet.load(folder, prompts, **rules)


def sizes_of(settings: ServeAdversary, config: Config) -> Sizes:
    """Of an iteration, by flags or else by the settings of a run."""
    return Sizes(
        images=settings.images or config.images_per_iteration,
        batch_size=settings.batch_size or config.rollout.micro_batch,
        optimizer_steps=settings.optimizer_steps or config.update.minibatches,
    )


def build_service(settings: ServeAdversary, config: Config, references: ReferenceSet, sizes: Sizes) -> AdversaryService:
    """The service of these settings, its model loaded."""
    from advgrpo.adversary.build import build_adversary
    from advgrpo.adversary.reference_features import ReferenceFeatures

    cache = _cache(settings, config)
    adversary = build_adversary(config.adversary, device=torch.device(settings.device), seed=config.seed)
    features = ReferenceFeatures(references, adversary, cache)
    return AdversaryService(config, adversary, references, features, sizes)


def notes(config: Config) -> list[str]:
    """What the other trainer has to know of these settings, a line each."""
    adversary, lines = config.adversary, []
    if adversary.warmup_iterations:
        lines.append(
            f"note: the first {adversary.warmup_iterations} iterations are warm-up (adversary.warmup_iterations): "
            "their scores are not worth training on; GET /status says train_generator = 0"
        )
    if adversary.schedule in ("alternate", "fooled_or_generator"):
        lines.append(
            f"note: adversary.schedule = {adversary.schedule} trains the generator in some iterations only; GET "
            "/status says in train_generator whether the newest was one"
        )
    return lines


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, the first SIGTERM, SIGINT or SIGHUP raises `_StopServing`; a second one does what it always does."""

    def stop(_number: int, _frame: object) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise _StopServing

    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, *hangup)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_line(line: str) -> None:
    print(line, flush=True)
