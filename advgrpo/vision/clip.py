"""CLIP as the rewards use it: one loader, text embeddings kept per prompt, image embeddings of tensors.

Shapes: B images [B, 3, H, W] float32 in [0, 1]; embeddings [B, E] float32, L2-normalised.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from advgrpo.errors import UserError
from advgrpo.runtime.transfer import to_device
from advgrpo.vision.loading import expanded, load_pretrained
from advgrpo.vision.preprocess import ImagePreprocess

_PROMPTS_IN_MEMORY = 65536  # of 4 KB each at 1,024 dimensions


def preference_folder(path: str) -> str:
    """The folder behind "tiny", the shipped preference model; any other path as it is."""
    from advgrpo.tiny import PREFERENCE_MODELS

    return str(PREFERENCE_MODELS.get(path, path))


class ClipModel:
    """A frozen CLIPModel with its tokenizer and its preprocessing.

    Args:
        path: CLIPModel folder or hub id; "tiny" for the shipped preference model.
        processor: folder or hub id of tokenizer and image processor, where `path` holds only weights; None for `path`.
        device: where it runs and where embeddings live.
        dtype: of the weights and of the arithmetic; embeddings and logit_scale are float32 always.
        field: the setting that `path` came from, for errors.

    Raises:
        UserError: no such model, another architecture, incomplete weights, no tokenizer, no image processor.
    """

    def __init__(
        self,
        path: str,
        *,
        processor: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        field: str = "path",
    ):
        self.path = preference_folder(path)
        source = expanded(self.path if processor is None else processor)
        source_field = field if processor is None else f"the processor of {field}"
        self.device = torch.device(device)
        model = load_pretrained(CLIPModel, self.path, model_types=("clip",), field=field, dtype=dtype)
        self.model = model.to(self.device)
        self.preprocess = ImagePreprocess.load(source, field=source_field, device=self.device)
        self._check_image_size(source, source_field)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"{source_field} = {source!r} has no tokenizer: {error}") from error
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        self.logit_scale: float = model.logit_scale.float().exp().item()
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()

    def _check_image_size(self, source: str, field: str) -> None:
        side = self.model.config.vision_config.image_size
        made = self.preprocess.crop or self.preprocess.size
        if made != (side, side):
            raise UserError(f"{field} = {source!r} makes images of {made}, but the model looks at {side}x{side}")

    @torch.no_grad()
    def text_embeddings(self, prompts: list[str]) -> torch.Tensor:
        """[B, E] of B prompts, cut at the model's longest text.

        Every new prompt is encoded on its own and unpadded, so its embedding does not depend on its neighbours, a
        resumed run scores as the first one did, and the end of text, which CLIP pools at, is there once.
        """
        return torch.stack([self._text(prompt) for prompt in prompts])

    def _text(self, prompt: str) -> torch.Tensor:
        if prompt in self._texts:
            self._texts.move_to_end(prompt)
            return self._texts[prompt]
        tokens = self.tokenizer(prompt, max_length=self.max_tokens, truncation=True, return_tensors="pt")
        ids, mask = (to_device(tokens[name], self.device) for name in ("input_ids", "attention_mask"))
        output = self.model.text_model(input_ids=ids, attention_mask=mask)
        embedding = F.normalize(self.model.text_projection(output.pooler_output).float()[0], dim=-1)
        self._texts[prompt] = embedding
        if len(self._texts) > _PROMPTS_IN_MEMORY:
            self._texts.popitem(last=False)
        return embedding

    @torch.no_grad()
    def image_embeddings(self, images: torch.Tensor) -> torch.Tensor:
        """[B, E] of B images."""
        pixels = self.preprocess(images).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)
