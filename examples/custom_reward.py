"""A reward of your own, to copy: how red an image is, as red as its prompt's line in the prompt file asks.

    python -m advgrpo.train --adversary.kind none \
        --rewards.custom '[{"name": "red", "import": "examples/custom_reward.py:redness", "weight": 1}]'

docs/rewards.md says what else a reward may be: a class that loads a model once, PIL images, several at once.
"""


def redness(images, prompts, target=None, strength=1.0):
    """`images` [B, 3, H, W] float32 in [0, 1]; `target` from the prompt file if it has one; `strength` an option."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    found = red - (green + blue) / 2  # [B]
    wanted = [1.0 if each is None else each for each in target or [1.0] * len(prompts)]
    return [-strength * abs(value - aim) for value, aim in zip(found.tolist(), wanted)]
