"""SGLang-Diffusion over HTTP: its routes, what a request for images says, and what an answer must hold.

Written against sgl-project/sglang's python/sglang/multimodal_gen/runtime as it was read in public copies of its main
branch, which are of single files: entrypoints/post_training/rollout_api.py at 078e5e2, io_struct.py at 00e1106,
weights_api.py and entrypoints/openai/common_api.py at 0730031, pipelines_core/lora/pipeline.py at 013aa62,
layers/lora/linear.py at 012f278, post_training/scheduler_rl_mixin.py at 1e7c586, rollout_denoising_mixin.py at 0470d4f,
tensor_update_checker.py at 08f335d. None of it has been run here: it wants a GPU.

    GET  /health                                is anybody there
    GET  /v1/models                             {"data": [{"dit_precision": "bf16", "pipeline_class": ..., ...}]}
    POST /v1/set_lora                           {"lora_nickname", "lora_path", "target", "strength", "merge_mode"}
    GET  /v1/list_loras                         {"active": {"transformer": [{"nickname", "path", "merged", ...}]}}
    POST /update_weights_from_tensor_checker    {"target_module", "expected_named_tensors_sha256"}: 400 unless each of
                                                the module's live tensors of these names has that SHA-256
    POST /rollout/generate                      images of one prompt, whose seeds follow each other: MessagePack

What is asked for is `rollout_sde_type: ode` with `rollout_return_dit_trajectory`: all steps are taken, and the latents
before the steps `rollout_return_step_indices` (the number of steps: the image's) come back. The request has no field
for latents, none for noise levels, and none that ends early: an engine always goes from its own noise to the image.

What its code does without saying so, and what of it is guarded here:

- set_lora with a nickname and a path that it has loaded before loads nothing, whatever lies there now: every file has a
  path of its own (weights.py).
- Adapters of layers that it has not are left out with a line in its log: the checker is asked for every tensor.
- Started anew it has no adapter: `active` is asked after every draw.
- A negative prompt that is left out is its own, a long one: it is sent where the model is guided by one.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from advgrpo.config import EngineSection
from advgrpo.errors import UserError
from advgrpo.policy.packing import PATCH, unpack
from advgrpo.rewards.judge_client import JudgeClient, Refused, excerpt, parse_json, read_token

TOKEN_VARIABLE = "ADVGRPO_ENGINE_TOKEN"
NICKNAME = "advgrpo"
MODULE = "transformer"
# Pipeline classes that are served: the request's field that is our guidance scale, and whether that is of two rows, one
# of them of a negative prompt.
SERVED = {
    "StableDiffusion3Pipeline": ("guidance_scale", True),
    "FluxPipeline": ("guidance_scale", False),
    "QwenImagePipeline": ("true_cfg_scale", True),
}
# Of Qwen-Image it joins these in one layer, and its table of names has no LoRA for that.
QWEN_JOINED = ("add_q_proj", "add_k_proj", "add_v_proj")
PRECISIONS = {"float32": ("fp32", "float32"), "bfloat16": ("bf16", "bfloat16")}
_COUNTED = re.compile(r"for (\d+) tensor\(s\)")
_Tell = Callable[..., None]


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: what is the same for all of a run.

    Args:
        shape: (C, H, W) of an image's latents, as the policy has them.
        sigmas: [T+1] noise levels of the policy's schedule.
    """

    pipeline: str  # a key of `SERVED`
    num_steps: int
    guidance_scale: float
    negative_prompt: str
    resolution: int
    shape: tuple[int, int, int]
    sigmas: tuple[float, ...]

    def fields(self) -> dict[str, Any]:
        """Of the request."""
        scale, by_rows = SERVED[self.pipeline]
        guidance = {scale: self.guidance_scale}
        if by_rows:
            guidance["negative_prompt"] = self.negative_prompt
        return {"width": self.resolution, "height": self.resolution, "num_inference_steps": self.num_steps, **guidance}


@dataclass(frozen=True)
class Request:
    """Images of one prompt whose seeds follow each other, and the steps before which their latents are wanted."""

    prompt: str
    seed: int
    count: int
    steps: tuple[int, ...]  # ascending; the number of steps stands for the image

    @property
    def what(self) -> str:
        images = "an image" if self.count == 1 else f"{self.count} images"
        seeds = f"seed {self.seed}" if self.count == 1 else f"seeds {self.seed} to {self.seed + self.count - 1}"
        return f"{images} of prompt {self.prompt!r} ({seeds})"


class SGLangDiffusion:
    """One engine. Its methods raise `RunFailure` where it does not answer as the protocol says.

    Args:
        url: of the server, without a path.
        section: patience and token.
        max_answer_bytes: of an answer with images.

    Raises:
        UserError: a URL that is not http(s) with a host, an unusable token file, or MessagePack is not installed.
    """

    def __init__(self, url: str, section: EngineSection, *, max_answer_bytes: int):
        _messagepack()
        self.url = url.rstrip("/")
        self.owner = f"rollout engine sglang at {self.url}"
        token = read_token(section.token_file, "rollout.engine.token_file =", TOKEN_VARIABLE)
        self._client = partial(
            JudgeClient,
            name="engine",
            timeout=section.timeout,
            retries=section.retries,
            backoff=section.backoff,
            wait=section.wait,
            token=token,
            url_field="rollout.engine.urls",
        )
        self._client(url, owner=self.owner)  # an address that is none is named as it was given
        self._at_once = section.requests_at_once
        kind = "application/msgpack"
        self._generate = self._route("/rollout/generate", answer_type=kind, limit=max_answer_bytes, about="request")
        self._models = self._route("/v1/models", method="GET")
        self._loras = self._route("/v1/list_loras", method="GET")
        self._set_lora = self._route("/v1/set_lora")
        self._checker = self._route("/update_weights_from_tensor_checker")

    def _route(self, path: str, *, limit: int = 4_000_000, **more: Any) -> JudgeClient:
        return self._client(f"{self.url}{path}", owner="rollout engine sglang", max_answer_bytes=limit, **more)

    def model(self, tell: _Tell) -> dict[str, Any]:
        """What the engine says of the model it serves."""

        def read(answer: bytes) -> dict[str, Any]:
            listed = _object(answer).get("data")
            if not (isinstance(listed, list) and listed and isinstance(listed[0], dict)):
                raise Refused(f"the answer lists no model: {excerpt(answer)}; is it SGLang-Diffusion's server?")
            return listed[0]

        return self._models.ask(b"", read, [], tell=tell)

    def install(self, path: str, tell: _Tell) -> None:
        """Have it load the LoRA of the file and draw with that alone."""
        body = {
            "lora_nickname": NICKNAME,
            "lora_path": path,
            "target": MODULE,
            "strength": 1.0,
            "merge_mode": "dynamic",
        }
        self._set_lora.ask(json.dumps(body).encode(), _object, [], tell=tell)

    def active(self, tell: _Tell) -> list[dict[str, Any]]:
        """The adapters it says that it draws with, of every network."""

        def read(answer: bytes) -> list[dict[str, Any]]:
            active = _object(answer).get("active")
            if not isinstance(active, dict):
                raise Refused(f'the answer has no object "active": {excerpt(answer)}')
            found = [{**each, "module": module} for module, listed in active.items() for each in listed or ()]
            return found

        return self._loras.ask(b"", read, [], tell=tell)

    def verified(self, checksums: Mapping[str, str], tell: _Tell) -> int:
        """How many tensors it has compared with these SHA-256; `RunFailure` names those that are absent or others."""

        def read(answer: bytes) -> int:
            record = _object(answer)
            counted = _COUNTED.search(str(record.get("message")))
            if record.get("success") is not True or counted is None:
                raise Refused(f"it does not say how many tensors it has verified: {excerpt(answer)}")
            return int(counted[1])

        body = {"target_module": MODULE, "expected_named_tensors_sha256": dict(checksums)}
        return self._checker.ask(json.dumps(body).encode(), read, [], tell=tell)

    def draw(self, requests: Sequence[Request], drawing: Drawing, tell: _Tell) -> list[torch.Tensor]:
        """Latents [count, steps, C, H, W] float32 on the host for every request, in their order."""
        bodies = [(request.what, self._body(request, drawing)) for request in requests]
        answers = self._generate.ask_all(bodies, _rows, at_once=self._at_once, tell=tell)
        return [_latents(rows, request, drawing) for rows, request in zip(answers, requests)]

    @staticmethod
    def _body(request: Request, drawing: Drawing) -> bytes:
        fields = {
            "prompt": request.prompt,
            "seed": request.seed,
            "num_outputs_per_prompt": request.count,
            "generator_device": "cpu",
            "rollout": True,
            "rollout_sde_type": "ode",
            "rollout_log_prob_no_const": True,
            "rollout_debug_mode": False,
            "rollout_return_dit_trajectory": True,
            "rollout_return_step_indices": list(request.steps),
            "suppress_logs": True,
            **drawing.fields(),
        }
        return json.dumps(fields).encode()


def _messagepack() -> ModuleType:
    try:
        import msgpack
    except ImportError as error:
        raise UserError(
            f'rollout.engine.kind = sglang needs msgpack ({error}): pip install "advgrpo[engine]", or set it to none'
        ) from error
    return msgpack


def _object(answer: bytes) -> dict[str, Any]:
    record = parse_json(answer)
    if not isinstance(record, dict):
        raise Refused(f"the answer is no object: {excerpt(answer)}")
    return record


def _rows(answer: bytes) -> list[dict[str, Any]]:
    """The images of an answer, in its order."""
    try:
        rows = _messagepack().unpackb(answer)
    except ValueError as error:  # of all its kinds: not whole, more than one value, nested too deep, text that is none
        raise Refused(f"the answer is not MessagePack ({str(error) or type(error).__name__})") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise Refused("the answer is no list of images")
    return rows


class Mismatch(Exception):
    """An answer is of another request than was made: what, and the remedy."""


def _latents(rows: list[dict[str, Any]], request: Request, drawing: Drawing) -> torch.Tensor:
    """`SGLangDiffusion.draw`'s of one request; `Mismatch` says what is wrong with it."""
    try:
        if len(rows) != request.count:
            raise Mismatch(f"it gave {len(rows)} of them")
        found = []
        for row in rows:
            if row.get("prompt") != request.prompt or row.get("seed") != request.seed:
                raise Mismatch(f"it gave images of prompt {row.get('prompt')!r}, seed {row.get('seed')!r}")
            trajectory = row.get("dit_trajectory")
            if not isinstance(trajectory, dict):
                raise Mismatch("it gave no trajectory: it wants a version with /rollout/generate's dit_trajectory")
            _check_sigmas(_tensor(trajectory.get("sigmas"), "sigmas"), drawing)
            found.append(_trajectory(_tensor(trajectory.get("latents"), "latents"), request, drawing))
        return torch.stack(found)
    except Mismatch as error:
        raise Mismatch(f"{request.what}: {error}") from None


def _tensor(packed: Any, name: str) -> torch.Tensor:
    """A tensor as the engine packs one: base64 of a safetensors file with the tensor "t"."""
    if not (isinstance(packed, dict) and isinstance(packed.get("data"), str)):
        raise Mismatch(f"its trajectory has no tensor {name!r}")
    try:
        tensor = safetensors.torch.load(base64.b64decode(packed["data"], validate=True))["t"]
    except Exception as error:  # safetensors' own kinds, base64's, a missing name
        raise Mismatch(f"its {name} cannot be read ({error})") from None
    if not torch.isfinite(tensor.float()).all():
        raise Mismatch(f"its {name} are not finite")
    return tensor


def _check_sigmas(sigmas: torch.Tensor, drawing: Drawing) -> None:
    """The engine's schedule is float32 of ours: a few of its roundings, where another shift or number of steps is off
    by more than 1e-3."""
    wanted = torch.tensor(drawing.sigmas, dtype=torch.float64)
    if sigmas.shape != wanted.shape or (sigmas.double() - wanted).abs().max() > 1e-5:
        raise Mismatch(
            f"it drew by noise levels {_short(sigmas)}, this run by {_short(wanted)}; serve the same model.path with "
            "its own scheduler, and no other shift or number of steps"
        )


def _trajectory(latents: torch.Tensor, request: Request, drawing: Drawing) -> torch.Tensor:
    """[steps, C, H, W] float32 of an image, out of what the engine packs into tokens as well."""
    (channels, height, width), steps = drawing.shape, len(request.steps)
    plain, tokens = (steps, channels, height, width), (height // PATCH * (width // PATCH), channels * PATCH**2)
    if latents.shape == (steps, *tokens):
        return unpack(latents.float(), (height, width))
    if latents.shape in (plain, (steps, channels, 1, height, width), (steps, 1, channels, height, width)):
        return latents.float().reshape(plain)
    raise Mismatch(f"it gave latents of shape {list(latents.shape)} for {list(plain)}")


def _short(values: torch.Tensor) -> str:
    shown = [f"{value:.4f}" for value in values.flatten().tolist()]
    return f"[{', '.join(shown if len(shown) <= 5 else [*shown[:3], '...', shown[-1]])}] ({len(shown)})"


def check_targets(pipeline: str, targets: Sequence[str]) -> None:
    """UserError for a LoRA of layers that the engine joins, whose adapters it would leave out."""
    joined = [target for target in targets if target.rsplit(".", 1)[-1] in QWEN_JOINED]
    if pipeline == "QwenImagePipeline" and joined:
        rest = [target for target in targets if target not in joined] or ["attn.to_q", "attn.to_k", "attn.to_v"]
        raise UserError(
            f"model.lora.targets holds {', '.join(joined)}, which SGLang joins into one layer of Qwen-Image that takes "
            f"no LoRA; train --model.lora.targets {' '.join(rest)}, or set rollout.engine.kind = none"
        )


def check_model(said: Mapping[str, Any], dtype: str, owner: str) -> None:
    """UserError unless the engine says that its transformer runs in `dtype`, a `model.dtype`."""
    precision = said.get("dit_precision")
    if precision not in PRECISIONS[dtype]:
        raise UserError(
            f"{owner} runs its transformer in {precision!r}, but model.dtype = {dtype!r}; start it with "
            f"--dit-precision {PRECISIONS[dtype][0]}, or change model.dtype"
        )
