"""Engines that lie: the stand-in of examples/rollout_engines with one thing wrong, in every way that is known."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FILE = Path(__file__).parents[2] / "examples/rollout_engines/sglang_stand_in.py"
_SPEC = importlib.util.spec_from_file_location("sglang_stand_in", _FILE)
stand_in = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in)
Engine = stand_in.Engine


class Sworn(Engine):
    """Says that whatever it is asked for lies there."""

    def check(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        count = len(request["expected_named_tensors_sha256"])
        return 200, {"success": True, "message": f"Verified module 'transformer' update for {count} tensor(s)."}


class OldWeights(Engine):
    """Takes the first adapter and no later one."""

    def bind(self, tensors):
        if not self.tensors:
            super().bind(tensors)


class OldWeightsSworn(OldWeights, Sworn):
    pass


class BaseWeightsSworn(Sworn):
    def bind(self, tensors):
        pass


class PartlyBound(Engine):
    def bind(self, tensors):
        super().bind({name: tensor for name, tensor in tensors.items() if "1.attn.to_k" not in name})


class PartlyComputed(Engine):
    """Has every tensor, and one layer that does not run its own."""

    left_out = "transformer_blocks.1.attn.to_k"

    def adapted(self, name, inputs, output):
        return output if name == self.left_out else super().adapted(name, inputs, output)


class FewerCounted(Engine):
    def check(self, request):
        return 200, {"success": True, "message": "Verified module 'transformer' update for 6 tensor(s)."}


class NothingCounted(Engine):
    def check(self, request):
        return 200, {"success": True, "message": "ok"}


class AlphaTwice(Engine):
    """Multiplies by alpha / rank where there is nothing left to multiply by."""

    def adapted(self, name, inputs, output):
        return output + 2 * (super().adapted(name, inputs, output) - output)


class SilentlyKept(Engine):
    """Says that it has set the adapter, and lists an older one."""

    def list_loras(self):
        return {"active": {"transformer": [{**(self.current or {}), "path": "/elsewhere/lora-000001.safetensors"}]}}


class TwoAdapters(Engine):
    def list_loras(self):
        return {"active": {"transformer": [self.current, self.current]}}


class Weaker(Engine):
    def list_loras(self):
        return {"active": {"transformer": [{**self.current, "strength": 0.5}]}}


class OtherShift(Engine):
    def trajectory(self, request, seeds):
        found, sigmas = super().trajectory(request, seeds)
        return found, sigmas * 1.01


class OtherSteps(Engine):
    def trajectory(self, request, seeds):
        return super().trajectory({**request, "num_inference_steps": request["num_inference_steps"] + 1}, seeds)


class OtherGuidance(Engine):
    def trajectory(self, request, seeds):
        return super().trajectory({**request, "guidance_scale": 1.01 * request["guidance_scale"]}, seeds)


class OwnNegative(Engine):
    """A negative prompt of its own, as SGLang's where none is sent."""

    def trajectory(self, request, seeds):
        return super().trajectory({**request, "negative_prompt": "a small red star"}, seeds)


class OtherPrompt(Engine):
    def trajectory(self, request, seeds):
        return super().trajectory({**request, "prompt": "a large green ring"}, seeds)


class FewerTokens(Engine):
    """Reads three words of a prompt."""

    def trajectory(self, request, seeds):
        return super().trajectory({**request, "prompt": " ".join(request["prompt"].split()[:3])}, seeds)


class HalfSaid(Engine):
    def models(self):
        return {"data": [{"dit_precision": "bf16"}]}


class HalfComputed(Engine):
    """Says float32 and rounds what its network gives to bfloat16."""

    def velocity(self, *arguments):
        return super().velocity(*arguments).bfloat16().float()


class RowsTurned(Engine):
    """The images of a request the other way round, noise and all."""

    def trajectory(self, request, seeds):
        return super().trajectory(request, seeds[::-1])


class ImagesTurned(Engine):
    """Each image's noise in its place, and another's image."""

    def trajectory(self, request, seeds):
        found, sigmas = super().trajectory(request, seeds)
        return [found[0], *(latents.flip(0) for latents in found[1:])], sigmas


class OtherNoise(Engine):
    def noise(self, seeds, shape):
        return super().noise([seed + 1_000_000 for seed in seeds], shape)


class HalfNoise(Engine):
    def noise(self, seeds, shape):
        rows = [
            torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)
            for seed in seeds
        ]
        return torch.cat(rows).float()


class Truncated(Engine):
    def trajectory(self, request, seeds):
        found, sigmas = super().trajectory(request, seeds)
        return [latents[..., :-1] for latents in found], sigmas


class NotFinite(Engine):
    def trajectory(self, request, seeds):
        found, sigmas = super().trajectory(request, seeds)
        found[-1][0, 0, 0, 0] = float("nan")
        return found, sigmas


class TooFew(Engine):
    def generate(self, request):
        return super().generate(request)[:-1]


class OtherSeed(Engine):
    def generate(self, request):
        return [{**row, "seed": 7} for row in super().generate(request)]


class NoTrajectory(Engine):
    def generate(self, request):
        return [{**row, "dit_trajectory": None} for row in super().generate(request)]


class Unpackable(Engine):
    def generate(self, request):
        rows = super().generate(request)
        rows[0]["dit_trajectory"]["latents"]["data"] = "AAAA"
        return rows


class Late(Engine):
    def generate(self, request):
        time.sleep(0.5)
        return super().generate(request)


class ForgetsOnce(Engine):
    """Is restarted before its next draw, and draws with the base weights."""

    forgot = False

    def generate(self, request):
        if not self.forgot:
            self.forgot = True
            self.forget()
        return super().generate(request)


class Forgets(Engine):
    """Is restarted before every draw of anything but a probe."""

    def generate(self, request):
        if len(request["rollout_return_step_indices"]) == 2:
            self.forget()
        return super().generate(request)


class DiesOnce(Engine):
    """Ends in the middle of an answer, and is started anew."""

    died = False

    def generate(self, request):
        if not self.died:
            self.died = True
            self.forget()
            raise ConnectionResetError
        return super().generate(request)


@contextmanager
def acting(engine: Engine, kind: type[Engine], *, forget: bool = True) -> Iterator[Engine]:
    """The engine, which is of that kind meanwhile; loading a pipeline for each would take minutes."""
    if forget:
        engine.forget()
    engine.__class__ = kind
    own = set(vars(engine))
    try:
        yield engine
    finally:
        engine.__class__ = Engine
        for name in set(vars(engine)) - own:
            delattr(engine, name)
        engine.forget()
