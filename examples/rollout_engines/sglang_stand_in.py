"""A stand-in for SGLang-Diffusion's server: the routes that `rollout.engine` uses, over a stock diffusers SD3 pipeline.

It is for trying out and for tests, on a CPU in float32: slow, and one request at a time. What draws is diffusers'
transformer and scheduler, with nothing of advgrpo's policy or sampler.

    python examples/rollout_engines/sglang_stand_in.py --model tiny --port 30000

Like the engine it loads nothing from a path that it has loaded before, leaves out adapters of layers that it does not
have, and has none once it is started anew.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack
import safetensors.torch
import torch
from diffusers import StableDiffusion3Pipeline


class Engine:
    """The pipeline, its adapters, and what the routes do. Subclasses in the tests lie.

    Args:
        folder: of an SD3 pipeline.
        max_sequence_length: tokens of T5's prompt.
    """

    def __init__(self, folder: str | Path, max_sequence_length: int = 256):
        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.max_sequence_length = max_sequence_length
        self.lock = threading.Lock()
        self.linears = {n: m for n, m in self.pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        for name, module in self.linears.items():
            module.register_forward_hook(
                lambda module, inputs, output, name=name: self.adapted(name, inputs[0], output)
            )
        self.forget()

    def forget(self) -> None:
        """As after a start."""
        self.tensors: dict[str, torch.Tensor] = {}  # what is bound: "<module>.lora_A", "<module>.lora_B"
        self.loaded: dict[str, str] = {}  # nickname -> path
        self.current: dict[str, Any] | None = None

    def adapted(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A linear layer's output with its adapter's."""
        down, up = self.tensors.get(f"{name}.lora_A"), self.tensors.get(f"{name}.lora_B")
        if down is None or up is None:
            return output
        return output + inputs.to(down.dtype) @ down.T @ up.T

    def health(self) -> dict[str, Any]:
        return {"status": "ok"}

    def models(self) -> dict[str, Any]:
        card = {
            "id": "stand-in",
            "object": "model",
            "dit_precision": "fp32",
            "pipeline_class": "StableDiffusion3Pipeline",
        }
        return {"object": "list", "data": [card]}

    def set_lora(self, request: dict[str, Any]) -> dict[str, Any]:
        nickname, path = request["lora_nickname"], request["lora_path"]
        if self.loaded.get(nickname) != path:
            self.bind(safetensors.torch.load_file(path))
            self.loaded[nickname] = path
        self.current = {"nickname": nickname, "path": path, "merged": False, "mode": "unmerged", "strength": 1.0}
        return {"status": "ok", "message": f"Successfully set LoRA adapter(s): {nickname}"}

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        named = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        self.tensors = {n: t for n, t in named.items() if n.rsplit(".", 1)[0] in self.linears}

    def list_loras(self) -> dict[str, Any]:
        loaded = [{"nickname": nickname, "path": path} for nickname, path in self.loaded.items()]
        return {"loaded_adapters": loaded, "active": {"transformer": [self.current]} if self.current else {}}

    def check(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        wanted = request["expected_named_tensors_sha256"]
        missing = sorted(name for name in wanted if name not in self.tensors)
        other = sorted(n for n, digest in wanted.items() if n in self.tensors and sha256(self.tensors[n]) != digest)
        if missing or other:
            parts = [f"missing {len(missing)} tensor(s): {', '.join(missing[:5])}"] if missing else []
            parts += [f"checksum mismatch for {len(other)} tensor(s): {', '.join(other[:5])}"] if other else []
            return 400, {
                "success": False,
                "message": f"Module 'transformer' update weight check failed: {'; '.join(parts)}",
            }
        return 200, {"success": True, "message": f"Verified module 'transformer' update for {len(wanted)} tensor(s)."}

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """One image per seed, with the latents before the steps that are asked for."""
        seeds = [request["seed"] + number for number in range(request["num_outputs_per_prompt"])]
        trajectory, sigmas = self.trajectory(request, seeds)
        kept = torch.stack([trajectory[step] for step in request["rollout_return_step_indices"]], dim=1)
        pictures = self.pictures(trajectory[-1])
        return [
            {
                "request_id": "0",
                "prompt": request["prompt"],
                "seed": request["seed"],
                "generated_output": packed(picture),
                "dit_trajectory": {
                    "latents": packed(latents),
                    "timesteps": packed(sigmas[:-1] * 1000),
                    "sigmas": packed(sigmas),
                },
            }
            for picture, latents in zip(pictures, kept)
        ]

    def noise(self, seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        return torch.cat(
            [torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        )

    @torch.no_grad()
    def trajectory(self, request: dict[str, Any], seeds: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Latents [R, C, H, W] before every step and at the end, and the noise levels."""
        pipe, scale = self.pipe, request["guidance_scale"]
        side = [request[name] // pipe.vae_scale_factor for name in ("height", "width")]
        latents = self.noise(seeds, (pipe.transformer.config.in_channels, *side))
        texts = pipe.encode_prompt(
            request["prompt"],
            None,
            None,
            negative_prompt=request.get("negative_prompt"),
            do_classifier_free_guidance=scale > 1,
            max_sequence_length=self.max_sequence_length,
        )
        pipe.scheduler.set_timesteps(request["num_inference_steps"])
        sigmas, found = pipe.scheduler.sigmas.clone(), [latents]
        for step, time in enumerate(pipe.scheduler.timesteps):
            velocity = self.velocity(latents, time.expand(len(latents)), texts[0], texts[2])
            if scale > 1:
                unguided = self.velocity(latents, time.expand(len(latents)), texts[1], texts[3])
                velocity = unguided + scale * (velocity - unguided)
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
            found.append(latents)
        return found, sigmas

    def velocity(
        self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        rows = len(latents)
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=text.expand(rows, -1, -1),
            pooled_projections=pooled.expand(rows, -1),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.pipe.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    digest.update(str(tensor.dtype).encode())
    digest.update(repr(tuple(tensor.shape)).encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def packed(tensor: torch.Tensor) -> dict[str, Any]:
    data = base64.b64encode(safetensors.torch.save({"t": tensor.contiguous()})).decode()
    return {"__tensor__": True, "data": data, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        routes = {"/health": "health", "/v1/models": "models", "/v1/list_loras": "list_loras"}
        self.answer(routes.get(self.path), ())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        routes = {
            "/v1/set_lora": "set_lora",
            "/update_weights_from_tensor_checker": "check",
            "/rollout/generate": "generate",
        }
        self.answer(routes.get(self.path), (request,))

    def answer(self, method: str | None, arguments: tuple) -> None:
        if method is None:
            return self.send(404, "application/json", b'{"detail": "Not Found"}')
        try:
            with self.engine.lock:
                found = getattr(self.engine, method)(*arguments)
        except Exception as error:
            return self.send(500, "application/json", json.dumps({"message": repr(error)}).encode())
        status, found = found if isinstance(found, tuple) else (200, found)
        if method == "generate":
            return self.send(status, "application/msgpack", msgpack.packb(found))
        return self.send(status, "application/json", json.dumps(found).encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def server(engine: Engine, port: int = 0) -> ThreadingHTTPServer:
    """On this machine alone; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"engine": engine}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help='folder of an SD3 pipeline, or "tiny"')
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--max-sequence-length", type=int, default=0, help="of T5; 0: 8 for tiny, 256 otherwise")
    given = parser.parse_args()
    folder, length = given.model, given.max_sequence_length or (8 if given.model == "tiny" else 256)
    if folder == "tiny":
        from advgrpo.tiny import WORLDS

        folder = WORLDS["tiny"].pipeline
    listening = server(Engine(folder, length), given.port)
    print(f"serving {given.model} at http://127.0.0.1:{listening.server_address[1]}", flush=True)
    listening.serve_forever()


if __name__ == "__main__":
    main()
