"""Section `rollout.engine`: which server draws for a run, and what it must not be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from advgrpo.config.base import Section
from advgrpo.errors import UserError

if TYPE_CHECKING:
    from advgrpo.config.config import Config

_VLLM_OMNI = (
    "rollout.engine.kind = 'vllm_omni': its released HTTP interface (/v1/images/generations) returns pictures and no "
    "latents, and the RL interface that is proposed for it (vllm-project/vllm-omni#6304) hands latents over in "
    "shared memory of its own machine; neither lets this program check what was drawn. Set rollout.engine.kind = sglang"
)


class EngineSection(Section):
    """A server that takes ODE steps of the rollout, so that this run's GPUs do not (docs/rollout_engines.md). It draws
    nothing before the checksums of its weights, the number of modules they are bound to and a probe agree."""

    kind: Literal["none", "sglang", "vllm_omni"] = "none"
    """none, or SGLang-Diffusion's server; vllm_omni is refused, with the reason."""
    urls: tuple[str, ...] = ()
    """Addresses of its servers, such as http://host:30000, each one engine and no router: process r draws at the one
    with number r modulo their count."""
    weights_dir: str = ""
    """Folder of this run alone, by the same absolute path here and on the engines' machines, that each iteration's LoRA
    is written to; empty: OUTPUT_DIR/engine."""
    requests_at_once: Annotated[int, Field(ge=1, le=1024)] = 4
    """Requests under way at a time, each of one prompt's images in a micro-batch."""
    probe_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative error of one step of the probe; 0: what rounding in model.dtype explains."""
    timeout: Annotated[float, Field(ge=0.001, le=86400)] = 600.0
    """Seconds a request may take."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """Further attempts after a lost connection, a time-out or a server error."""
    backoff: Annotated[float, Field(ge=0.001, le=30)] = 1.0
    """Seconds before the first of them; doubles each time, up to 30."""
    wait: Annotated[float, Field(ge=0, le=604800)] = 300.0
    """Seconds that an engine which is down (nobody listens; status 502, 503, 504) is waited for; 0: only `retries`."""
    token_file: str = ""
    """File with the engine's admin API key; empty: that of environment variable ADVGRPO_ENGINE_TOKEN, or none."""

    @property
    def draws(self) -> bool:
        """Whether an engine draws for the run."""
        return self.kind != "none"


def check_engine(config: Config) -> None:
    """UserError for settings that an engine cannot serve, or that would not be looked at without one."""
    rollout, engine = config.rollout, config.rollout.engine
    if not engine.draws:
        if engine.urls:
            raise UserError(
                f"rollout.engine.urls = {list(engine.urls)} would not be looked at: rollout.engine.kind = none; set "
                "rollout.engine.kind = sglang"
            )
        return
    if engine.kind == "vllm_omni":
        raise UserError(_VLLM_OMNI)
    asked = f"rollout.engine.kind = {engine.kind!r}"
    if not engine.urls:
        raise UserError(f"rollout.engine.urls is empty, but {asked}: pass --rollout.engine.urls http://host:30000")
    if len(set(engine.urls)) < len(engine.urls):
        raise UserError(f"rollout.engine.urls = {list(engine.urls)}: want different addresses")
    if not config.objective.samples_images:
        raise UserError(f"{asked}: update.objective = {config.update.objective} draws nothing; set it to none")
    if config.model.train != "lora":
        raise UserError(
            f"{asked} is sent a LoRA, whose every tensor is checked, but model.train = {config.model.train}; set "
            "model.train = lora, or rollout.engine.kind = none"
        )
    if config.model.shard_base != "none":
        raise UserError(
            f"{asked} is probed by one process's forward, but model.shard_base = {config.model.shard_base!r} has all "
            "processes run each together; set one of them to none"
        )
    if config.model.sequence_parallel > 1:
        raise UserError(
            f"{asked} is probed by one process's forward, but model.sequence_parallel = "
            f"{config.model.sequence_parallel} has several compute each together; set rollout.engine.kind = none, or "
            "model.sequence_parallel = 1"
        )
    if rollout.noise == "philox":
        raise UserError(
            f"{asked} draws its initial noise with torch and takes no latents, but rollout.noise = philox is drawn "
            "here alone; set rollout.noise = torch_bfloat16, or torch_float32 for an engine in float32"
        )
    if rollout.scouts > 1:
        raise UserError(
            f"rollout.scouts = {rollout.scouts}: a scout has the noise of the window's steps, which an engine does not "
            f"draw, so it would be another image than the one kept; set rollout.scouts = 1, or {asked} to none"
        )
    if rollout.precision != "model" and not config.objective.has_window:
        raise UserError(
            f"rollout.precision = {rollout.precision} would not be looked at: {asked} takes all steps of "
            f"update.objective = {config.update.objective}; set rollout.precision = model"
        )
    window = rollout.window
    if config.objective.has_window and window.one_for_all and 0 in (window.steps or ()):
        raise UserError(
            f"{asked} takes the ODE steps before the window, but rollout.window.steps = {list(window.steps or ())} "
            "begins with the first; choose later steps, or set rollout.engine.kind = none"
        )
