"""A reward that learns, in flow_grpo (github.com/yifan123/flow_grpo): what `multi_score` gives, plus a discriminator's.

Copy this file to scripts/adversary.py, and in scripts/train_sd3.py, below the lines that make reward_fn and
eval_reward_fn, write

    from adversary import with_adversary
    reward_fn = with_adversary(reward_fn, "http://127.0.0.1:8000", weight=1.0)
    eval_reward_fn = with_adversary(eval_reward_fn, "http://127.0.0.1:8000", weight=1.0)

Training calls a reward with only_strict=True, evaluation with False: only the former is learned from.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
import uuid

from PIL import Image

WAIT, PAUSE = 600.0, 2.0  # seconds that a server which is down, or not ready, is waited for, and between attempts


def ask(url: str, images: list, prompts: list[str], collect: bool) -> list[float]:
    """Scores of PIL images; with `collect` the discriminator learns from them. Waits for a server that is down."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files):
        image.convert("RGB").save(file, "PNG", compress_level=1)
    body = {"version": 1, "images": [base64.b64encode(f.getvalue()).decode() for f in files], "prompts": list(prompts)}
    body |= {"collect": True, "request": uuid.uuid4().hex} if collect else {}
    token = os.environ.get("ADVGRPO_REWARD_TOKEN", "")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    direct, gives_up = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + WAIT
    while True:  # the same request, so that the server collects it once
        try:
            with direct.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as answer:
                return json.load(answer)["scores"]
        except (OSError, http.client.HTTPException) as error:
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            if getattr(error, "code", 503) not in (502, 503, 504) or time.monotonic() > gives_up:
                raise RuntimeError(f"{url}: {error} {said}") from error
        time.sleep(PAUSE)


def with_adversary(reward_fn, url: str, weight: float = 1.0):
    """`reward_fn(images, prompts, metadata, only_strict)` with the discriminator's score in "adversary" and "avg"."""

    def scored(images, prompts, metadata, only_strict=True):
        details, more = reward_fn(images, prompts, metadata, only_strict=only_strict)
        pixels = (images * 255).round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
        scores = ask(url, [Image.fromarray(each) for each in pixels], prompts, collect=only_strict)
        totals = details["avg"] if len(details["avg"]) else [0.0] * len(scores)  # no other reward is configured
        details["avg"] = [total + weight * score for total, score in zip(totals, scores)]
        return {**details, "adversary": scores}, more

    return scored
