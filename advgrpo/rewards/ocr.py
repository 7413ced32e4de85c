"""Does the image show the text its prompt quotes? Read by RapidOCR (PP-OCR models in the wheel, no network).

    r = 1                                                       if the target is contained in the recognised text
    r = 1 - min(edit_distance(text, target), len(target)) / len(target)                                 otherwise

on lower-cased text without white space, with the Levenshtein distance: the OCR reward of Flow-GRPO (arXiv 2505.05470),
the rule term of Adv-GRPO's eq. 8. Not differentiable, and an empty image scores 0.

Every image is read on its own, by one thread. Recognising the lines of a whole batch together would pad them to a
common width, which changes what is read: the reward would depend on how the images were split over processes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import to_uint8

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

_QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”')


def target_text(prompt: str) -> str:
    """The first text in double quotes (straight or typographic), as Flow-GRPO's prompt sets have it.

    Raises:
        UserError: no quoted text, or nothing but white space between the quotes.
    """
    match = _QUOTED.search(prompt)
    text = (match.group(1) or match.group(2) or "").strip() if match else ""
    if not text:
        raise UserError(
            f"reward ocr: prompt {prompt!r} has no text in double quotes to look for; "
            'write it as in: a sign that says "OPEN"'
        )
    return text


def normalize_text(text: str) -> str:
    """Lower case without any white space: what distances are measured on."""
    return "".join(text.lower().split())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each at cost 1."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def text_reward(target: str, recognized: str) -> float:
    """The formula above for one pair of texts; `target` must not be blank.

    Raises:
        ValueError: `target` is blank.
    """
    target, recognized = normalize_text(target), normalize_text(recognized)
    if not target:
        raise ValueError("the target is blank")
    if target in recognized:
        return 1.0
    return 1.0 - min(edit_distance(recognized, target), len(target)) / len(target)


class OcrReward(Reward):
    """The `Reward` protocol over RapidOCR.

    Args:
        detection_size: images are enlarged to this shorter side before text is looked for. 736 is the engine's own
            default (0.18 s an image on one CPU core); 192 reads the tiny world's words as well, at 0.02 s.
        min_confidence: lines the engine is less sure of are left out.
        workers: images read at the same time, each by one thread with an engine of its own (about 200 MB).

    Raises:
        UserError: an argument out of range, or `rapidocr` and `onnxruntime` are not installed.
    """

    name = "ocr"

    def __init__(self, *, detection_size: int = 736, min_confidence: float = 0.5, workers: int = 1) -> None:
        if detection_size < 32:
            raise UserError(f"reward ocr: detection_size = {detection_size} must be at least 32 pixels")
        if not 0 <= min_confidence < 1:
            raise UserError(f"reward ocr: min_confidence = {min_confidence} must be in [0, 1)")
        if workers < 1:
            raise UserError(f"reward ocr: workers = {workers} must be at least 1")
        self._engine_settings = {
            "Global.log_level": "critical",
            "Global.text_score": min_confidence,
            "Global.use_cls": False,  # turns lines upright; PP-OCRv6 mostly reads them upside down as well
            "Det.limit_side_len": detection_size,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        self._local = threading.local()
        _engine_class()
        self.progress: Callable[[str], None] = lambda doing: None  # told of every image; for the run to set
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for the first prompt without a quoted target; call it before any work is done."""
        for prompt in prompts:
            target_text(prompt)

    def read(self, images: torch.Tensor, prompts: list[str]) -> list[str]:
        """The recognised text of float images [B, 3, H, W] in [0, 1], lines joined by spaces; "" if there is none.

        Raises:
            ValueError: unusable images (see `to_uint8`).
            RuntimeError: the engine failed; names the prompt.
        """
        pixels, texts = to_uint8(images, prompts), []
        for text in self._pool.map(self._read_one, pixels, prompts):
            texts.append(text)
            self.progress(f"reward ocr: {len(texts)} of {len(prompts)} images read")
        return texts

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """Rewards [B] float32 in [0, 1] on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt without a target, before anything is read.
            ValueError, RuntimeError: as `read`.
        """
        targets = [target_text(prompt) for prompt in prompts]
        texts = self.read(images, prompts)
        rewards = [text_reward(target, text) for target, text in zip(targets, texts)]
        return torch.tensor(rewards, dtype=torch.float32, device=images.device)

    def _read_one(self, pixels: np.ndarray, prompt: str) -> str:
        try:
            if not hasattr(self._local, "engine"):
                self._local.engine = _engine_class()(params=self._engine_settings)
            lines = self._local.engine(np.ascontiguousarray(pixels[:, :, ::-1])).txts  # the engine wants BGR
        except Exception as error:  # onnxruntime, OpenCV and the engine have no common base class
            raise RuntimeError(f"OCR failed on the image for prompt {prompt!r}: {error}") from error
        return " ".join(lines or ())


def _engine_class() -> Any:
    try:
        import onnxruntime  # noqa: F401  imported by rapidocr only at the first image
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f'reward ocr needs rapidocr and onnxruntime ({error}); pip install "advgrpo[ocr]"') from error
    return RapidOCR
