"""PickScore as an adversary (docs/method.md section 6): its last vision layers learn.

Shapes: B images [B, 3, H, W] float32 in [0, 1]; T vision tokens of width D, text embeddings of width E.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from advgrpo.adversary.base import image_weights
from advgrpo.adversary.discriminator_adam import DiscriminatorAdam
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.rewards.checks import check_batch
from advgrpo.rewards.pickscore import SCALE
from advgrpo.runtime.fingerprint import module_fingerprint, tokenizer_fingerprint
from advgrpo.types import Features
from advgrpo.vision.clip import ClipModel


@dataclass
class PickScoreResult:
    reward: torch.Tensor  # [B] float32


@dataclass
class PreferenceLoss:
    loss: torch.Tensor  # scalar float32
    accuracy: None = None  # PickScore has no zero, and prompts differ more than images of one: only pairs tell


class PickScoreAdversary:
    """`base.Adversary`: the last vision layers of PickScore learn to score references above generations.

    Everything before those layers and the whole text side is frozen, so it is computed once per image: "hidden"
    [B, T, D] in `dtype`, what enters the first trainable layer, and "text" [B, E] float32. Discriminator updates run
    the trainable layers only, which hold float32 master weights and compute in `dtype`; the layer norm and projection
    behind them are frozen and float32. Reward and loss share that one forward, `_logits`.

    At 224 px the hidden states of CLIP-H take 0.66 MB an image in bfloat16: reference cache and replay buffer hold
    them.

    Args:
        config: batch size, replay and schedule of the head's training.
        seed: of the run.
        path, processor: as PickScore's.
        trainable_layers: how many vision layers learn, from the last (paper 2, released code 1).
        objective: "binary" is the paper's, cross-entropy with references as 1 and generations as 0, but of
            sigmoid(score - b): PickScore has no zero (all scores are positive), and without b, the mean score of both
            sides, the first hundreds of updates drag every score to 0, which group-relative advantages cannot see.
            "pairwise" is the released code's, two-way softmax over the logits (26 * score) of a reference and the
            generation of the same prompt. Replayed generations have no partner, so it wants `replay_capacity` 0.
        learning_rate, betas: Adam's.
        device, dtype: where the model runs; precision of the frozen part and of the arithmetic.

    Raises:
        UserError: the model cannot be loaded, has fewer layers than `trainable_layers`, or "pairwise" with a replay
            buffer.
    """

    text_dependent = True
    backbone = None  # a CLIP whose last layers learn: nobody else looks through it
    state_added_later = ("bias",)  # that checkpoints of before it existed lack; `centre` sets it anew

    def __init__(
        self,
        config: AdversarySection,
        *,
        seed: int,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        trainable_layers: int = 2,
        objective: Literal["binary", "pairwise"] = "binary",
        learning_rate: float = 5e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if objective not in ("binary", "pairwise"):
            raise ValueError(f'objective {objective!r}: want "binary" or "pairwise"')
        if objective == "pairwise" and config.replay_capacity:
            raise UserError(
                f"adversary.replay_capacity = {config.replay_capacity} does not go with the pairwise objective, in "
                "which every generation is compared with a reference of its own prompt; set it to 0"
            )
        self.config, self.seed, self.objective, self.dtype = config, seed, objective, dtype
        self.clip = ClipModel(path, processor=processor, device=device, dtype=dtype, field="adversary.backbone")
        layers = self.clip.model.vision_model.encoder.layers
        if not 1 <= trainable_layers <= len(layers):
            raise UserError(
                f"trainable_layers = {trainable_layers} of the PickScore adversary: {self.clip.path} has {len(layers)} "
                "vision layers"
            )
        self._key = f"{_fingerprint(self.clip)}:{trainable_layers}"
        self.tail = copy.deepcopy(layers[-trainable_layers:]).float().requires_grad_(True)
        self._norm = copy.deepcopy(self.clip.model.vision_model.post_layernorm).float()
        self._projection = copy.deepcopy(self.clip.model.visual_projection).float()
        self.clip.model.vision_model.encoder.layers = layers[:-trainable_layers]
        self.bias = torch.zeros((), device=self.device)  # b, in units of the score; `centre` moves it
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)  # one storage for the whole run
        self.optimizer = DiscriminatorAdam(self.parameters(), lr=learning_rate, betas=betas)

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @property
    def cache_key(self) -> str:
        return self._key

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.tail.parameters())

    @torch.no_grad()
    def features(self, images: torch.Tensor, prompts: list[str]) -> Features:
        """ "hidden" [B, T, D] in the model's dtype and "text" [B, E] float32."""
        check_batch(images, prompts)
        vision = self.clip.model.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(self.clip.preprocess(images).to(self.dtype)))
        for layer in vision.encoder.layers:
            hidden = layer(hidden, None)
        return Features({"hidden": hidden, "text": self.clip.text_embeddings(prompts)})

    def _logits(self, features: Features) -> torch.Tensor:
        """[B] float32 `logit_scale * cos(text, image)`, differentiable in the trainable layers."""
        if len(features) == 0:  # this process holds none of the drawn images; attention cannot reshape nothing
            return features["text"].sum(1) * torch.stack([p.sum() for p in self.parameters()]).sum()
        with self._precision():
            hidden = features["hidden"] if self.dtype != torch.float32 else features["hidden"].float()
            for layer in self.tail:
                hidden = layer(hidden, None)
        image = F.normalize(self._projection(self._norm(hidden[:, 0].float())), dim=-1)
        return self.clip.logit_scale * (image * features["text"]).sum(1)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Autocast to `dtype`; without its weight cache, whose entries would not survive a captured graph."""
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if low else None, enabled=low, cache_enabled=False):
            yield

    @torch.no_grad()
    def score(self, features: Features, sample_ids: torch.Tensor, *, purpose: str, iteration: int) -> PickScoreResult:
        """PickScore under the layers as they stand; nothing is drawn, so ids, purpose and iteration change nothing."""
        return PickScoreResult(self._logits(features) / SCALE)

    def training_features(self, features: Features, sample_ids: torch.Tensor, seed: int | torch.Tensor) -> Features:
        """All of it: attention looks at every token."""
        return features

    def cached_features(self, features: Features) -> Features:
        """All of it."""
        return features

    def centre(self, generated: float, reference: float) -> None:
        """Put the binary objective's threshold midway between the sides' mean scores."""
        if self.objective == "binary":
            self.bias.fill_((generated + reference) / 2)

    def loss(self, reference: Features, generated: Features, *, total: int | None = None) -> PreferenceLoss:
        """The objective's loss, sums over local images divided by `total`.

        Raises:
            ValueError: "pairwise" with sides of different length.
        """
        count, weights = len(reference), image_weights(reference, generated) or (1.0, 1.0)
        logits = self._logits(Features.cat([reference, generated]))
        real, fake = logits[:count], logits[count:]
        if self.objective == "pairwise":
            if len(real) != len(fake):
                raise ValueError(f"pairwise: {len(real)} references but {len(fake)} generations; want pairs in order")
            return PreferenceLoss((F.softplus(fake - real) * weights[0]).sum() / (total or max(1, count)))
        real, fake = real / SCALE - self.bias, fake / SCALE - self.bias
        shares = [2 * (total or max(1, len(side))) for side in (real, fake)]
        losses = F.softplus(-real) * weights[0], F.softplus(fake) * weights[1]
        return PreferenceLoss(losses[0].sum() / shares[0] + losses[1].sum() / shares[1])

    def step(self) -> None:
        """One Adam step on the summed gradients."""
        self.optimizer.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"bias": self.bias, **{name: p.detach() for name, p in self.tail.named_parameters()}}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name in state or name not in self.state_added_later:
                    tensor.copy_(state[name])


def _fingerprint(clip: ClipModel) -> str:
    """Everything that embeddings of images and texts depend on."""
    words = tokenizer_fingerprint(clip.tokenizer)
    return f"clip:{module_fingerprint(clip.model, clip.model.dtype, clip.preprocess.settings, words, clip.max_tokens)}"
