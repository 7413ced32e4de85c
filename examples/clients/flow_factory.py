"""A reward that learns, in Flow-Factory (github.com/X-GenGroup/Flow-Factory): a discriminator behind HTTP.

Copy this file to where Python finds it, as adversary_reward.py, and name it in the YAML:

    rewards:
      - {name: adversary, reward_model: adversary_reward.AdversaryReward, weight: 1.0, batch_size: 16,
         server_url: "http://127.0.0.1:8000", collect: true}
    eval_rewards:
      - {name: adversary, reward_model: adversary_reward.AdversaryReward, batch_size: 16,
         server_url: "http://127.0.0.1:8000", collect: false}

Without eval_rewards evaluation would be scored by the first, and learned from.
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

import torch
from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput

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


class AdversaryReward(PointwiseRewardModel):
    """The discriminator's score of every image; `collect` of its entry in the YAML says whether it learns from them."""

    required_fields = ("prompt", "image")
    use_tensor_inputs = False

    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        self.url, self.collect = config.server_url, config.collect

    def __call__(self, prompt, image=None):
        return RewardModelOutput(rewards=torch.tensor(ask(self.url, image, prompt, self.collect)))
