"""How many bytes a forward keeps for its backward, and how many are alive at once: formulas, and counting on meta.

Saved for the backward of the transformer, elements per token and channel of its width D, the same for both streams:

    what                                               fused          stock (diffusers + PEFT)
    residual stream, before each of two norms          2 b            2 b
    input of q, k, v for their LoRA                    1 b            3 f (a float32 copy each)
    q and k around their norm                          0 (2 b) *      2 f + 2 b *
    q, k, v as attention reads them                    3 b            3 b
    attention's output, and as to_out's LoRA keeps it  1 b            1 b + 1 f
    input of GELU                                      4 b            4 b
    dual attention (image; not in the first block)     3 + 1 b (2 *)  2 f * + 2 b * + 4 b
    inputs of all linears when every weight trains                    8 b

FLUX.1: a block of two streams as above, stock with 4 b around the norms of q and k and their rotation, and no f there;
one of one stream keeps its residual once and has no projection of the attention alone: 10 b fused, 13 b + 3 f stock.
FLUX.2, stock alone: 19 b and 4 f in a block of two streams, 18 b and 6 f in one of one; 28 and 25 with all weights.
Qwen-Image: FLUX.1's blocks of two streams, stock with 5 f there, of rotations in complex numbers.

Where processes share out a sequence's tokens (model.sequence_parallel), tokens are those of a process, and an
attention whose to_out has a LoRA keeps 1 b more: its output by heads, and by tokens.

b: elements of model.dtype; f: float32; *: only with norms of q and k (SD3.5). An adapter keeps its rank besides. Fused,
the normalised q and k are computed again for the backward from the product that their norm keeps (in brackets: where
checkpointing recomputes the block, they are not). With checkpointing a block keeps its two input streams, 1 b, and one
block at a time is recomputed in full. SD3.5-medium, 16 sequences of 1024 + 205 tokens: 18.5 GB fused, 41.7 GB stock.
Tests compare both with what autograd saves.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from advgrpo.plan.known_models import Vae, VideoVae, meta_vae
from advgrpo.policy.fused.decoder import Decoder

_FLOAT32 = 4
# Alive at once beside what is saved, elements of model.dtype per token and channel, counted on meta: a forward without
# gradients peaks around GELU (4 in, 4 out, and the streams with their norms), a backward there too.
_FORWARD_ALIVE = 13.3
_BACKWARD_ALIVE = 7
# Of FLUX.1: rotation in float32, and attention and feed-forward of a block of one stream side by side. Of
# Qwen-Image, which has no such blocks.
_FLUX_ALIVE = {"fused": (14.9, 8.1), "stock": (17.4, 13.0)}
_FLUX_EXCHANGED_BACKWARD = 11.8  # fused, where gradients of q, k and v are exchanged beside that of the feed-forward
# FLUX.2, stock: an adapter on `to_qkv_mlp_proj` gives 9 D in float32, twice.
_FLUX2_ALIVE = {"stock": (49.7, 18.4)}
_QWEN_ALIVE = {"fused": (11.9, 7.1), "stock": (16.4, 8.7)}


@dataclass(frozen=True)
class TransformerShape:
    """What the bytes of one sequence depend on."""

    path: str  # "fused" or "stock"
    width: int  # D
    heads: int
    layers: int
    dual: frozenset[int]  # blocks with a second attention among the image tokens
    qk_norm: bool
    image_tokens: int
    text_tokens: int
    element: int  # bytes of model.dtype
    rank: int  # of the adapters; 0 when every weight trains
    first_trained: int  # block with the first adapter; nothing before it is saved
    math_attention: bool  # keeps the attention matrix
    swiglu: bool = False  # FLUX.2's blocks, whose feed-forwards are gated
    single_layers: int | None = None  # FLUX.1's blocks of one stream, after the others; 0: Qwen-Image; None: SD3
    processes: int = 1  # that share out the tokens of a sequence, and in attention its heads

    @property
    def tokens(self) -> int:
        """Of a sequence, on the process that has the most."""
        return self._most_of(self.image_tokens) + self._most_of(self.text_tokens)

    def _most_of(self, tokens: int) -> int:
        return -(-tokens // self.processes)

    @property
    def trained_layers(self) -> int:
        return self.layers + (self.single_layers or 0) - self.first_trained

    @property
    def _exchanged(self) -> int:
        """An attention's output by tokens, as to_out's LoRA keeps it, beside that by heads."""
        return int(self.processes > 1)

    def _flux_bytes(self, single: bool, recomputed: bool = False) -> int:
        """Saved by a block of FLUX.1 or Qwen-Image for one sequence, or alive when checkpointing has recomputed it."""
        fused = self.path == "fused"
        if fused:
            own, floats = (10 if single else 11 + self._exchanged) + 2 * recomputed, 0
        else:
            own, floats = (13, 3) if single else (14, 4 if self.single_layers else 5)
            if self.swiglu:
                own, floats = (18, 6) if single else (19, 4)
        if not self.rank:
            own, floats = own + (8 if single else 10) - self.swiglu, 0
        low_rank = (3 if single else 4) * self.rank * (self.element if fused else _FLOAT32)
        return self.tokens * (self.width * (own * self.element + floats * _FLOAT32) + low_rank) + self._matrix()

    def block_bytes(self, dual: bool, recomputed: bool) -> int:
        """Saved by one block for one sequence, or alive when checkpointing has recomputed it."""
        norm, fused = int(self.qk_norm), self.path == "fused"
        if fused:
            around_norm = 2 * norm * recomputed
            own, floats = 2 + 1 + around_norm + 3 + 1 + 4 + self._exchanged, 0
            dual_own, dual_floats = around_norm + 3 + 1, 0
        else:
            own, floats = 2 + 2 * norm + 3 + 1 + 4, 3 + 2 * norm + 1
            dual_own, dual_floats = 2 * norm + 4, 2 * norm
        if not self.rank:
            own, floats = own + 8, floats - 4
        joint = self.tokens * self.width * (own * self.element + floats * _FLOAT32)
        low_rank = self.tokens * 4 * self.rank * (self.element if fused else _FLOAT32)
        of_token = self.width * (dual_own * self.element + dual_floats * _FLOAT32)
        second = (self._most_of(self.image_tokens) * of_token + self._matrix(self.image_tokens)) * dual
        return joint + low_rank + second + self._matrix()

    def saved_bytes(self, *, checkpointing: bool) -> int:
        """Saved by a training forward of one sequence; with checkpointing, while one block is recomputed."""
        return max(self.saved_at(checkpointing=checkpointing))

    def saved_at(self, *, checkpointing: bool) -> list[int]:
        """Of one sequence, when the gradient of each trained block is computed: what it and those before it have saved,
        with checkpointing at their boundaries, and what it has recomputed."""
        trained = range(self.first_trained, self.layers)
        if self.single_layers is not None:
            trained = range(self.first_trained, self.layers + self.single_layers)
            blocks = [self._flux_bytes(single=i >= self.layers, recomputed=checkpointing) for i in trained]
        else:
            duals = (i in self.dual and i > self.first_trained for i in trained)
            blocks = [self.block_bytes(dual, recomputed=checkpointing) for dual in duals]
        if not checkpointing:
            return list(accumulate(blocks))
        return [number * self._boundary + block for number, block in enumerate(blocks, 1)]

    def kept_after(self, *, checkpointing: bool) -> list[int]:
        """Of one sequence, when each block has run forward: what it and those before it have saved."""
        kept = self.saved_at(checkpointing=False)
        if checkpointing:
            kept = [number * self._boundary for number in range(1, self.trained_layers + 1)]
        return [0] * self.first_trained + kept

    def boundary_bytes(self) -> int:
        """What checkpointing keeps at the block boundaries."""
        return self.trained_layers * self._boundary

    @property
    def _boundary(self) -> int:
        return self.tokens * self.width * self.element

    @property
    def _rotary_alive(self) -> tuple[float, float]:
        if self.swiglu:
            return _FLUX2_ALIVE[self.path]
        return (_FLUX_ALIVE if self.single_layers else _QWEN_ALIVE)[self.path]

    def forward_bytes(self) -> int:
        """Alive at once in a forward without gradients."""
        alive = _FORWARD_ALIVE if self.single_layers is None else self._rotary_alive[0]
        return round(alive * self.tokens * self.width * self.element) + self._matrix()

    def backward_bytes(self) -> int:
        """Gradients alive at once in the backward, beside what is saved."""
        alive = _BACKWARD_ALIVE if self.single_layers is None else self._rotary_alive[1]
        if self.single_layers and self._exchanged:
            alive = _FLUX_EXCHANGED_BACKWARD
        return round(alive * self.tokens * self.width * self.element) + self._matrix()

    def _matrix(self, tokens: int | None = None) -> int:
        """Of attention among so many tokens, or all, by the heads of one process."""
        tokens = self.image_tokens + self.text_tokens if tokens is None else tokens
        return tokens**2 * (self.heads // self.processes) * _FLOAT32 * self.math_attention


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at once; `peak` is the most seen.

    Works on the meta device, where nothing is allocated. Library workspaces (cuDNN, cuBLAS) are not tensors.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        for tensor in tree_leaves((args, kwargs)):  # views of what was there before are not new
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage(), new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage(), new=True)
        return result

    def _track(self, storage: torch.UntypedStorage, *, new: bool) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if new else 0
        self.alive += self._known[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._known.pop(key)


class OnGpu(TorchFunctionMode):
    """Operations on the meta device as a GPU runs them: attention without its matrix, and what `torch.autocast` casts
    in the layers of a vision network, without its weight cache.

    Args:
        autocast: to which precision; None: not at all.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if self.autocast is not None and function in (F.linear, F.scaled_dot_product_attention, F.layer_norm):
            dtype = torch.float32 if function is F.layer_norm else self.autocast
            args, kwargs = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **kwargs)


@functools.cache
def decode_bytes(config: Vae, dtype: torch.dtype, side: int) -> int:
    """Most bytes alive while one image of `side` latents is decoded, counted on meta."""
    latents = torch.empty((1, config.latent_channels, side, side), device="meta")
    if isinstance(config, VideoVae):
        decode, latents = config.stock().to(dtype).decode, latents.unsqueeze(2).to(dtype)
    else:
        decode = Decoder(config, dtype=dtype, device="meta")
    with torch.no_grad(), AliveBytes() as counted:
        decode(latents)
    return counted.peak


@functools.cache
def encode_bytes(config: Vae, resolution: int) -> int:
    """Most bytes alive while the stock VAE encodes one image of so many pixels a side in float32, counted on meta."""
    image = torch.empty((1, 3, resolution, resolution), device="meta")
    image = image.unsqueeze(2) if isinstance(config, VideoVae) else image
    vae: Any = meta_vae(config)
    with torch.no_grad(), OnGpu(), AliveBytes() as counted:
        vae.encode(image * 2 - 1).latent_dist.mode()
    return counted.peak
