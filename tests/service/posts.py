"""Requests to a served discriminator, as its protocol describes them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any

import torch

from advgrpo.rewards.pixels import to_uint8
from advgrpo.rewards.remote import png


def body_of(images: torch.Tensor, prompts: list[str], **more: Any) -> dict[str, Any]:
    """The JSON object of a request."""
    encoded = [base64.b64encode(png(pixels)).decode() for pixels in to_uint8(images, prompts)]
    return {"version": 1, "images": encoded, "prompts": list(prompts), **more}


def post(url: str, body: dict[str, Any], token: str = "") -> tuple[int, dict[str, Any]]:
    """(status, answer)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
