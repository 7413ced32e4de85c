"""A request for scores: its body, checked and decoded; what one may cost is known before any image is decoded."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from advgrpo.data.images import ImageError, open_image, read_header
from advgrpo.rewards.remote import PROTOCOL_VERSION

_RETRY_AFTER = 5  # seconds, for clients that were not served in time


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    max_bytes: int = 200_000_000  # of its body
    max_pixels: int = 2**25  # of all its images: 500 MB while they are scored; 32 of 1024 x 1024
    max_image_pixels: int = 2**22  # of each: 2048 x 2048
    request_seconds: float = 60.0  # until its head, and from there until its body is there
    score_seconds: float = 600.0  # from there to the answer: its turn, decoding, scoring


class Refusal(Exception):
    """Answered with `status`; from 500 on, and for 408, it may be sent again."""

    def __init__(self, message: str, status: int = 400, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def too_late(doing: str) -> Refusal:
    """The answer to a request whose time ended while it was `doing` something."""
    message = f"the judge is busy: the request's time ended {doing}; send fewer images, or later"
    return Refusal(message, 503, Retry_After=str(_RETRY_AFTER))


def parse_request(body: bytes, limits: Limits, ends: float) -> tuple[list[bytes], list[str]]:
    """`parse_images` of `read_request`; raises as they do."""
    return parse_images(read_request(body), limits, ends)


def read_request(body: bytes) -> dict[str, Any]:
    """The JSON object of a request of this version of the protocol; Refusal for anything else."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON ({error})") from None
    if not isinstance(request, dict) or request.get("version") != PROTOCOL_VERSION:
        raise Refusal(f'want an object with "version": {PROTOCOL_VERSION}')
    return request


def parse_images(request: dict[str, Any], limits: Limits, ends: float) -> tuple[list[bytes], list[str]]:
    """(PNG files, as many prompts) of a request; nothing is decoded.

    Args:
        ends: when the request's time does, by time.monotonic.

    Raises:
        Refusal: no such lists, or the images differ in size, are none by their headers, or exceed `limits`.
    """
    encoded, prompts = request.get("images"), request.get("prompts")
    for key, value in (("images", encoded), ("prompts", prompts)):
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise Refusal(f'"{key}" must be a list of at least one text')
    if len(encoded) != len(prompts):
        raise Refusal(f"{len(encoded)} images but {len(prompts)} prompts")
    images, sizes, pixels = [], set(), 0
    for number, text in enumerate(encoded):
        if time.monotonic() > ends:
            raise too_late("reading its images")
        images.append(_from_base64(text, number))
        with _named(number, limits):
            image = io.BytesIO(images[-1])
            size = read_header(image, "", formats=("PNG",), max_pixels=limits.max_image_pixels).size
        sizes.add(size)
        pixels += size[0] * size[1]
        if pixels > limits.max_pixels:
            raise Refusal(f"the images have more than {limits.max_pixels:,} pixels together; send fewer at once", 413)
    if len(sizes) > 1:
        raise Refusal(f"the images differ in size: {sorted(sizes)}")
    return images, prompts


def decode(images: list[bytes], limits: Limits, ends: float) -> torch.Tensor:
    """[B, 3, H, W] float32 in [0, 1] of PNG files of one size; Refusal for one that is damaged or not plain RGB."""
    pixels = None
    for number, content in enumerate(images):
        if time.monotonic() > ends:
            raise too_late("decoding its images")
        with _named(number, limits):
            image = open_image(io.BytesIO(content), "", formats=("PNG",), max_pixels=limits.max_image_pixels)
        if pixels is None:
            pixels = np.empty((len(images), image.height, image.width, 3), np.uint8)
        pixels[number] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def _from_base64(text: str, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error, or a text that is not ASCII
        raise Refusal(f"image {number} is not in base64 ({error})") from None


@contextmanager
def _named(number: int, limits: Limits) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        wanted = f"want an RGB PNG of at most {limits.max_image_pixels:,} pixels"
        raise Refusal(f"image {number} {error.reason}; {wanted}") from None
