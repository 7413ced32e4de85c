"""Serve a reward from an environment in which advgrpo is not installed: HPSv3 and others pin versions of their own.

    python serve_elsewhere.py hpsv3.py:HPSv3 --port 8000 --options '{"batch_size": 16}'
    python -m advgrpo.train --rewards.remotes '[{"name": "hpsv3", "url": "http://127.0.0.1:8000", "weight": 1}]'

It needs torch, numpy and Pillow and nothing else, and takes the same classes and functions as rewards.custom, but those
with `score`. The protocol is that of advgrpo/rewards/remote.py. One request at a time. Without encryption: keep it on
127.0.0.1, or inside a private network with a token (environment variable ADVGRPO_REWARD_TOKEN here, and token_file of
the reward there).
"""

import argparse
import base64
import hmac
import importlib.util
import inspect
import io
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import torch
from PIL import Image


def load(source: str, options: dict, device: str):
    """The function, or an instance of the class, that "file.py:NAME" names."""
    path, _, name = source.rpartition(":")
    spec = importlib.util.spec_from_file_location("served_reward", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name)
    if not inspect.isclass(found):
        return found, options
    told = {"device": device} if "device" in inspect.signature(found).parameters else {}
    return found(**{**told, **options}), {}


def scores(judge, options: dict, request: dict, device: str) -> list[float]:
    """One number per image of a request."""
    images = [Image.open(io.BytesIO(base64.b64decode(each)), formats=["PNG"]) for each in request["images"]]
    metadata = request.get("metadata") or [{}] * len(images)
    parameters = inspect.signature(judge).parameters.values()
    keys = {key for entry in metadata for key in entry}
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        keys &= {each.name for each in parameters}
    images = [image.convert("RGB") for image in images]
    if getattr(judge, "images", "tensor") == "tensor":
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        images = pixels.permute(0, 3, 1, 2).to(device).float() / 255
    columns = {key: [entry.get(key) for entry in metadata] for key in sorted(keys)}
    found = judge(images, request["prompts"], **options, **columns)
    found = found.tolist() if hasattr(found, "tolist") else list(found)
    if len(found) != len(images):
        raise ValueError(f"{len(found)} scores for {len(images)} images")
    return [float(score) for score in found]


def make_server(judge, options: dict, device: str, host: str, port: int) -> HTTPServer:
    """Answers requests by `serve_forever()`."""
    token = os.environ.get("ADVGRPO_REWARD_TOKEN", "")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status = 200
            if token and not hmac.compare_digest(shown.encode(), token.encode()):
                status, answer = 401, {"error": "want the token"}
            elif self.headers.get_content_type() != "application/json" or "Origin" in self.headers:
                status, answer = 400, {"error": "want application/json, and no web page"}
            else:
                try:
                    answer = {"scores": scores(judge, options, json.loads(body), device)}
                except Exception as error:
                    status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return HTTPServer((host, port), Handler)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", help="file.py:NAME")
    parser.add_argument("--options", type=json.loads, default={}, help="its options as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    judge, options = load(given.reward, given.options, given.device)
    with make_server(judge, options, given.device, given.host, given.port) as server:
        print(f"serving {given.reward} at http://{given.host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
