"""UnifiedReward 2.0 (github.com/CodeGoat24/UnifiedReward) as a reward: the scores that it writes, as a mean in 0 to 1.

    pip install vllm      # on the judge's machine
    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --served-model-name UnifiedReward --port 8080

It writes "Alignment Score (1-5): 2.69" and so on, so the answer is read to its end; a missing score is an error. The
question is the one it was trained with.
"""

import re

import torch

from advgrpo.rewards.judge_client import Refused
from advgrpo.rewards.vlm_judge import ChatJudge

QUESTION = """You are presented with a generated image and its associated text caption. Your task is to analyze the \
image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
AXES = ("Alignment", "Coherence", "Style")


class UnifiedReward:
    """`axes`: those whose mean is the score; further options are `ChatJudge`'s, such as concurrency and timeout."""

    scores_references = False  # its time is not ours to spend

    def __init__(
        self, base_url="http://127.0.0.1:8080/v1", model="UnifiedReward", axes=AXES, name="unified", **options
    ):
        body = {"max_tokens": 512, "temperature": 0}
        self.judge = ChatJudge(base_url=base_url, model=model, question=QUESTION, body=body, name=name, **options)
        self.axes, self.progress = tuple(axes), None

    def __call__(self, images, prompts):
        self.judge.progress = self.progress or self.judge.progress
        return torch.tensor(self.judge.ask(images, prompts, self.read))

    def read(self, choice):
        """The mean of the axes, 1 to 5 made 0 to 1."""
        text = choice.get("message", {}).get("content") or ""
        found = {axis: re.search(rf"{axis} Score \(1-5\): *([0-9.]+)", text) for axis in self.axes}
        if missing := [axis for axis, match in found.items() if match is None]:
            raise Refused(f"the answer has no {missing[0]} Score (1-5): {text[:200]!r}")
        return sum((float(match[1]) - 1) / 4 for match in found.values()) / len(self.axes)
