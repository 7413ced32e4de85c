"""A vision-language model as judge: the probability of "yes" to a question about the image and its prompt.

Any OpenAI-compatible server that takes images and gives log-probabilities will do (`vllm serve MODEL`, SGLang, ...).
A request is one image, as a PNG data URL, and the question; the answer is cut after its first token, and

    score = p(yes) / (p(yes) + p(no))

over the 20 likeliest first tokens, p(yes) being the sum over those that read "yes" without spaces, quotes and case
("Yes", " yes", "YES"). Unlike a number written out by the model this is continuous, so the images of a group differ.

Where yes and no together have less than `min_probability`, the model was about to say something else (a thinking
model's "<think>", "The", ...), and what is left for yes and no means little: an error, not a score of 0.5.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import finite_scores
from advgrpo.rewards.judge_client import (
    JudgeClient,
    Refused,
    check_ranges,
    excerpt,
    parse_json,
    read_token,
    token_variable,
    untold,
)
from advgrpo.rewards.pixels import to_uint8
from advgrpo.rewards.remote import png

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

_TOP = 20  # what OpenAI's API allows, and vLLM's --max-logprobs by default
_MARKS = " \t\r\n▁ĠĊ\"'`*“”"  # around a word; two tokenizers' spaces, where a server does not decode them
_TOLERANCE = 1.01  # probabilities are rounded, but do not add up to more than this
Choice = Mapping[str, Any]


class ChatJudge:
    """One question per image to an OpenAI-compatible chat endpoint, several at once.

    Args:
        base_url: such as http://host:8000/v1; "/chat/completions" is added.
        model: its name on the server.
        question: what is asked; {prompt} stands for the prompt.
        body: keys of the request beside "model" and "messages".
        concurrency: requests under way at once.
        name: the reward's, for errors.
        timeout, retries, backoff, wait, max_answer_bytes: see `JudgeClient`.
        token_file: a file with the API key; see `read_token`.

    Attributes:
        progress: as in `RemoteReward`; called by the thread that scores alone.

    Raises:
        UserError: an argument that cannot work.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        question: str,
        body: Mapping[str, Any],
        name: str,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        wait: float = 300.0,
        token_file: str = "",
        max_answer_bytes: int = 1_000_000,
    ) -> None:
        if "{prompt}" not in question:
            raise UserError(f"reward {name}: question = {question!r}: want {{prompt}} where the prompt belongs")
        if fixed := {"model", "messages", "stream", "n"} & body.keys():
            raise UserError(f"reward {name}: extra_body sets {min(fixed)!r}, which the judge sets itself; leave it out")
        if not model:
            raise UserError(f"reward {name}: model is empty; want the model's name on the server")
        try:
            json.dumps(dict(body), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {name}: extra_body cannot be sent as JSON ({error}); correct it") from None
        check_ranges(f"reward {name}", ("concurrency", concurrency, 1, 1024))
        self.name, self.question, self.concurrency = name, question, concurrency
        self._body = {"model": model, **body}
        self.progress: Callable[..., None] = untold
        self._client = JudgeClient(
            f"{base_url.rstrip('/')}/chat/completions",
            name=name,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            wait=wait,
            token=read_token(token_file, f"reward {name}: token_file =", token_variable(name)),
            max_answer_bytes=max_answer_bytes,
            url_field="base_url",
        )

    def ask(self, images: torch.Tensor, prompts: list[str], read: Callable[[Choice], float]) -> list[float]:
        """What `read` makes of the first choice of every answer; it raises `Refused` where that is none.

        Raises:
            ValueError: unusable images (see `to_uint8`).
            RunFailure: no valid answer, after the retries if they could help; names the prompt.
        """
        requests = [
            (prompt, self._request(pixels, prompt)) for pixels, prompt in zip(to_uint8(images, prompts), prompts)
        ]
        return self._client.ask_all(
            requests, lambda answer: read(_choice(answer)), at_once=self.concurrency, tell=self.progress
        )

    def _request(self, pixels: np.ndarray, prompt: str) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        return json.dumps({**self._body, "messages": [{"role": "user", "content": content}]}).encode()


class VlmJudge(Reward):
    """The `Reward` protocol over the question above.

    Args:
        min_probability: least share of the first token's probability on yes and no together.
        extra_body: more keys of the request, such as {"chat_template_kwargs": {"enable_thinking": False}}.
        base_url, model, question, concurrency, name and the rest: see `ChatJudge`.

    Raises:
        UserError: an argument that cannot work.
    """

    name = "vlm_judge"
    scores_references = False  # its time is not ours to spend

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        question: str,
        min_probability: float = 0.1,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        name: str = "vlm_judge",
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        wait: float = 300.0,
        token_file: str = "",
    ) -> None:
        check_ranges(f"reward {name}", ("min_probability", min_probability, 0, 1))
        self.name, self.min_probability = name, min_probability
        self._judge = ChatJudge(
            base_url=base_url,
            model=model,
            question=question,
            body={"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP, **(extra_body or {})},
            name=name,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            wait=wait,
            token_file=token_file,
        )

    @property
    def progress(self) -> Callable[..., None]:
        """See `ChatJudge`."""
        return self._judge.progress

    @progress.setter
    def progress(self, tell: Callable[..., None]) -> None:
        self._judge.progress = tell

    def check_prompts(self, prompts: list[str]) -> None:
        """One trial request with a grey image; call it before any work is done.

        Raises:
            UserError: the server does not answer as it should.
        """
        try:
            self.score(torch.full((1, 3, 64, 64), 0.5), prompts[:1], None)
        except RunFailure as error:
            raise UserError(f"{error}; start the server, or correct its base_url and settings") from error

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """p(yes) / (p(yes) + p(no)) [B] float32 on the images' device; `references` are not sent.

        Raises:
            ValueError: unusable images.
            RunFailure: no valid answer, log-probabilities are missing, or neither yes nor no is likely enough.
        """
        scores = self._judge.ask(images, prompts, lambda choice: yes_share(choice, self.min_probability))
        return finite_scores(torch.tensor(scores, dtype=torch.float64), images, prompts, self.name)


def yes_share(choice: Choice, min_probability: float) -> float:
    """p(yes) / (p(yes) + p(no)) of a choice of a chat completion with log-probabilities.

    Raises:
        Refused: there are none, they are no log-probabilities, or yes and no have less than `min_probability` together.
    """
    probabilities = first_token(choice)
    yes, no = (sum(p for token, p in probabilities if token.strip(_MARKS).casefold() == word) for word in ("yes", "no"))
    found = yes + no
    if found > _TOLERANCE:
        raise Refused(f"the probabilities of yes and no add up to {found:.3g}: these are no log-probabilities")
    if found == 0 or found < min_probability:
        likely = ", ".join(f"{token!r} {p:.1%}" for token, p in sorted(probabilities, key=lambda each: -each[1])[:3])
        raise Refused(
            f"yes and no have {found:.2%} of the first token's probability, less than min_probability = "
            f"{min_probability:g}; likelier are {likely}. Ask for one word, yes or no, in question, switch thinking "
            "off by extra_body, or take another model"
        )
    return yes / found


def first_token(choice: Choice) -> list[tuple[str, float]]:
    """(token, probability) of the likeliest first tokens; Refused where the choice has none."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(top, list) or not top:
        raise Refused(
            "the answer has no logprobs.content[0].top_logprobs: the server gives no log-probabilities; take one that "
            f"does (vLLM with --max-logprobs of at least {_TOP}, SGLang)"
        )
    found = []
    for entry in top:
        token, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        if not isinstance(token, str) or not number or value > 0.01:
            raise Refused(f"an entry of top_logprobs is no token with its log-probability: {json.dumps(entry)[:200]}")
        found.append((token, math.exp(min(value, 0.0))))
    return found


def _choice(answer: bytes) -> Choice:
    record = parse_json(answer)
    choices = record.get("choices") if isinstance(record, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Refused(f'the answer has no "choices": {excerpt(answer)}; want base_url of a chat endpoint')
    return choices[0]
