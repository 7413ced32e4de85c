"""What the tests' untrained models are made for: 32 pixels, captions of the tiny world, and the tests' own prompts."""

from __future__ import annotations

from advgrpo.tiny import scenes
from advgrpo.tiny.architecture import Size

_OWN = ("a small red star on the left of a blue background", "a large green ring at the top of a white background")
_WORDS = sorted({*scenes.vocabulary(), *(word for prompt in _OWN for word in prompt.split())})
UNIT = Size(tuple(_WORDS), caption_words=11, image_size=32, dual_layers=3, patch_size=4)
