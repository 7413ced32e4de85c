"""The good things that cases spoil: models, data, a run with a checkpoint and its LoRA, and servers that misbehave."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from advgrpo import config, tiny
from advgrpo.train import main as train
from tests.bad_input.case import World
from tests.unet_models import save_pipeline
from tests.vision_models import write_clip, write_siglip

SIDE = 32
# What a server answers: (status, content type, body).
BEHAVIOURS = {
    "not-found": (404, "application/json", b'{"error": "no such path"}'),
    "refuses": (400, "application/json", b'{"error": "bad request"}'),
    "fails": (500, "application/json", b'{"error": "out of memory"}'),
    "down": (503, "application/json", b'{"error": "starting"}'),
    "wants-a-token": (401, "application/json", b'{"error": "want the token"}'),
    "rude": (400, "application/json", b'{"error": "\\u001b[2J"}'),
    "good": (200, "application/json", b'{"scores": [1.0]}'),
    "redirects": (302, "text/html", b""),
    "html": (200, "text/html", b"<html>welcome</html>"),
    "not-json": (200, "application/json", b"{scores: 1"),
    "list": (200, "application/json", b"[1.0]"),
    "no-scores": (200, "application/json", b'{"values": [1.0]}'),
    "too-many": (200, "application/json", b'{"scores": [1.0, 2.0]}'),
    "text": (200, "application/json", b'{"scores": ["good"]}'),
    "nan": (200, "application/json", b'{"scores": [NaN]}'),
    "overflow": (200, "application/json", b'{"scores": [1e39]}'),
    "boolean": (200, "application/json", b'{"scores": [true]}'),
    "pickled-code": (200, "text/html", b"cos\nsystem\n(S'true'\ntR."),
    "pickled-numpy": (200, "text/html", pickle.dumps({"scores": [np.float64(1)]})),
    "pickled-values": (200, "text/html", pickle.dumps({"values": [1.0]})),
    "chat-silent": (200, "application/json", b'{"choices": [{"message": {"content": "Yes"}, "logprobs": null}]}'),
    "chat-thinks": (
        200,
        "application/json",
        b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "<think>", "logprob": 0.0}]}]}}]}',
    ),
    "engine-in-bf16": (200, "application/json", b'{"object": "list", "data": [{"dit_precision": "bf16"}]}'),
    "endless": (200, "application/json", b'{"scores": [' + b" " * 2_000_000 + b"1.0]}"),
}


def image(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_references(folder: Path, prompts: list[str]) -> Path:
    folder.mkdir()
    index = {}
    for number, prompt in enumerate(prompts):
        index[prompt] = [f"{number}-{k}.png" for k in range(2)]
        for k, name in enumerate(index[prompt]):
            image(10 * number + k).save(folder / name)
    (folder / "references.json").write_text(json.dumps(index))
    return folder


def settings_of(folder: Path, pipeline: str, backbone: str, references: Path) -> dict:
    """A run of seconds: 2 groups of 4, untrained models."""
    own = {
        "iterations": 2,
        "device": "cpu",
        "model": {"path": pipeline, "resolution": SIDE, "max_sequence_length": 12, "lora": {"rank": 4, "alpha": 8}},
        "data": {
            "prompts": str(folder / "prompts.txt"),
            "held_out_prompts": str(folder / "held_out.txt"),
            "references": str(references),
            "cache_dir": str(folder / "cache"),
            "min_reference_size": 16,
        },
        "rollout": {
            "prompts_per_iteration": 2,
            "group_size": 4,
            "micro_batch": 4,
            "num_steps": 4,
            "guidance_scale": 1.0,
            "window": {"noise_range": [0.5, 1.0]},
        },
        "adversary": {
            "backbone": backbone,
            "image_size": SIDE,
            "schedule": "when_fooled",
            "fooled_margin": 2.0,
            "hidden_size": 16,
            "num_patches": 8,
            "updates_per_iteration": 1,
            "warmup_iterations": 0,
            "batch_size": 4,
            "replay_capacity": 8,
        },
        "evaluation": {
            "every": 0,
            "images_per_prompt": 1,
            "num_steps": 2,
            "guidance_scale": 1.0,
            "grid_prompts": 1,
            "metrics": ["rule"],
        },
        "output": {"checkpoint_every": 1, "tensorboard": False},
    }
    return config.merge(config.read_preset("tiny"), own)


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """{behaviour: url} of one server that misbehaves as its path says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(self.path.strip("/").removesuffix("/chat/completions"))

        def do_GET(self) -> None:
            self.answer(self.path.strip("/").removesuffix("/v1/models"))

        def answer(self, name: str) -> None:
            if name == "hangs":
                self.connection.recv(1)  # until the client gives up
                return
            status, kind, body = BEHAVIOURS[name]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield {name: f"{address}/{name}" for name in (*BEHAVIOURS, "hangs")}
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def make_world(folder: Path, pipeline: str, backbone: str) -> Iterator[World]:
    lists = []
    for name, shipped, count in (("prompts", tiny.prompts_file(), 3), ("held_out", tiny.held_out_prompts_file(), 2)):
        lists.append(shipped.read_text().splitlines()[:count])
        (folder / f"{name}.txt").write_text("\n".join(lists[-1]) + "\n")
    references = write_references(folder / "references", lists[0] + lists[1])
    settings = settings_of(folder, pipeline, backbone, references)
    run = folder / "run"
    (folder / "good.yaml").write_text(config.dump(config.build({**settings, "output_dir": str(run)}, "world")))
    assert train(["--config", str(folder / "good.yaml"), "--iterations", "1"]) == 0
    with servers() as urls:
        yield World(
            folder=folder,
            settings=settings,
            pipeline=Path(pipeline),
            backbone=Path(backbone),
            clip=Path(write_clip(folder / "clip")),
            siglip=Path(write_siglip(folder / "siglip")),
            unet=Path(save_pipeline(folder / "unet", xl=False)),
            prompts=lists[0],
            held_out=lists[1],
            references=references,
            run=run,
            servers=urls,
        )
