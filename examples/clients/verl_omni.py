"""A reward that learns, in verl-omni (github.com/verl-project/verl-omni): a discriminator behind HTTP.

Copy this file anywhere and name it among the rewards:

    reward.reward_manager.name=MultiVisualRewardManager
    reward.custom_reward_function.path=pkg://verl_omni.reward_loop.reward_manager.multi
    reward.custom_reward_function.name=_multi_reward_placeholder
    +reward.reward_functions.adversary.path=/where/it/is/verl_omni.py
    +reward.reward_functions.adversary.name=compute_score
    +reward.reward_functions.adversary.required=True
    +reward.reward_functions.adversary.server_url=http://127.0.0.1:8000

Rows whose extra_info.split is "train" are learned from, others are scored. The prompt is extra_info.raw_prompt, or the
row's ground truth where there is none.
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


def compute_score(solution_image, ground_truth: str, extra_info: dict, server_url: str) -> dict[str, float]:
    """The discriminator's score of one image, uint8 [3, H, W]; called in a thread of its own."""
    image = Image.fromarray(solution_image.reshape(solution_image.shape[-3:]).permute(1, 2, 0).cpu().numpy())
    prompt = extra_info.get("raw_prompt", ground_truth)
    (score,) = ask(server_url, [image], [prompt], collect=extra_info["split"] == "train")
    return {"score": score}
