"""Our forward of MMDiT-like transformers, over the stock weights: SD3's, FLUX.1's, Qwen-Image's, by a small config.

Same weights and mathematics as diffusers' SD3Transformer2DModel, FluxTransformer2DModel and
QwenImageTransformer2DModel, fewer and larger operations: q, k and v are one matrix product per stream, those of image
and text write into one tensor; a residual, its gate and the following norm and modulation are one kernel (both
modulations of a dual-attention block); the modulation of all steps is one product per prompt; text queries of the last
block, which nothing reads, do not attend. FLUX.1 goes on with blocks of one stream, image and text in one tensor, and
turns q and k where SD3 adds positions to the image. Qwen-Image turns them too, text as well; its text has a mask, and
no pooled vector, so that one modulation serves all prompts.
Low-rank adapters are views of one vector (lora.py). Three sets of weights: "adapted" (trained), "base" (frozen),
"merged" (for steps without a likelihood).

Tokens come first in memory, rows second: image and text are then slices of one dense tensor, so that nothing is copied
to join them for attention or to part them after it, and every linear is one matrix product with its bias.

Several processes may compute the same rows together, each a share of the tokens (sequence.py): the streams of a block
are then this process's tokens, and what attention reads and gives is exchanged. They may also have a part of the
blocks' weights each (`Sharding`): a block is gathered when it runs, its modulation when a trajectory is prepared; norms
and what is outside of blocks are whole on each, and nothing is merged.

Nothing here imports diffusers: a model is a `TransformerConfig` and tensors by their stock names.

Shapes: R rows, T image tokens, S text tokens, D = H·head_dim channels, L layers, K steps; latents [R, C, h, w]; streams
[T, R, D] and [S, R, D], of which the kernels see [R, T, D] views.
Modulation vectors of a step lie in one row [R, W], in the order of the blocks, image before text, the last norm at the
end; W = 499,200 for SD3.5-medium.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args, overload

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from advgrpo.errors import UserError
from advgrpo.policy.fused.attention import Recomputed, choose_attention, key_bias
from advgrpo.policy.fused.linear import Activations, StackedLinear, run_joint, run_joint_merged
from advgrpo.policy.fused.lora import LoraWeights, Pair, StackedAdapter
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo_kernels import Fp8Tensor, ada_layer_norm, gated_residual, gelu, linear, merge_lora, qk_rms_norm

EPS = 1e-6  # of every norm in the family
Weights = Literal["adapted", "base", "merged"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_NormWeights = tuple[torch.Tensor, torch.Tensor]
_PACK = 2  # latents of a token's side that FLUX.1's and Qwen-Image's pipelines pack before their networks
_THETA = 10000.0  # of the slowest rotation
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTABLE = (
    *(f"attn.{name}" for name in (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"attn2.{name}" for name in _ATTENTION),
    *(f"{ff}.net.{name}" for ff in ("ff", "ff_context", "img_mlp", "txt_mlp") for name in ("0.proj", "2")),
    *("proj_mlp", "proj_out"),  # of blocks of one stream
)


def can_adapt(target: str) -> bool:
    """Whether every linear whose name ends in `target` can have an adapter here: not those of the AdaLN norms."""
    return any(f".{name}".endswith(f".{target}") for name in ADAPTABLE)


class _Names(NamedTuple):
    """What the families call the same parts: of a block, by stream, and at the ends."""

    feed_forward: tuple[str, str] = ("ff", "ff_context")  # of image and of text
    modulation: tuple[str, str] = ("norm1.linear", "norm1_context.linear")
    embedder: str = "pos_embed.proj"
    text_embedder: str = "context_embedder"


Family = Literal["sd3", "flux", "qwen"]
_NAMES: dict[Family, _Names] = {
    "sd3": _Names(),
    "flux": _Names(embedder="x_embedder"),
    "qwen": _Names(("img_mlp", "txt_mlp"), ("img_mod.1", "txt_mod.1"), "img_in", "txt_in"),
}


@dataclass(frozen=True)
class TransformerConfig:
    """The part of a stock config.json that decides the computation; diffusers' names, sizes before packing."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    pos_embed_max_size: int = 192
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    num_single_layers: int = 0  # blocks of one stream, after the others
    axes_dims_rope: tuple[int, ...] = ()  # of a head dim, by axis: rotary positions in place of a table
    family: Family = "sd3"

    @classmethod
    def from_stock(cls, config: Mapping) -> TransformerConfig:
        """Raises UserError for a norm of q and k that this forward does not know."""
        if "num_single_layers" in config:
            packed = _PACK**2
            return cls(
                num_layers=config["num_layers"],
                num_attention_heads=config["num_attention_heads"],
                attention_head_dim=config["attention_head_dim"],
                in_channels=config["in_channels"] // packed,
                out_channels=(config.get("out_channels") or config["in_channels"]) // packed,
                patch_size=_PACK,
                qk_norm="rms_norm",
                num_single_layers=config["num_single_layers"],
                axes_dims_rope=tuple(config["axes_dims_rope"]),
                family="flux",
            )
        if "axes_dims_rope" in config:
            return cls(
                num_layers=config["num_layers"],
                num_attention_heads=config["num_attention_heads"],
                attention_head_dim=config["attention_head_dim"],
                in_channels=config["in_channels"] // _PACK**2,
                out_channels=config["out_channels"],
                patch_size=_PACK,
                qk_norm="rms_norm",
                axes_dims_rope=tuple(config["axes_dims_rope"]),
                family="qwen",
            )
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise UserError(f"the transformer's qk_norm = {config['qk_norm']!r}; want rms_norm or none")
        chosen = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**{**chosen, "dual_attention_layers": tuple(config.get("dual_attention_layers") or ())})

    @property
    def is_rotary(self) -> bool:
        """Positions turn q and k, and tokens are packed as `_PACK` says."""
        return bool(self.axes_dims_rope)

    @property
    def names(self) -> _Names:
        return _NAMES[self.family]

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulation(self) -> list[list[str]]:
        """The AdaLN linears of every block, in their order, and that of the last norm."""
        blocks = [[f"transformer_blocks.{i}.{name}" for name in self.names.modulation] for i in range(self.num_layers)]
        blocks += [[f"single_transformer_blocks.{i}.norm.linear"] for i in range(self.num_single_layers)]
        return [*blocks, ["norm_out.linear"]]


@dataclass
class Prepared:
    """What a trajectory needs of its prompts: computed once, for all steps."""

    text: torch.Tensor  # [R, S, D] embedded text tokens
    modulation: torch.Tensor  # [K, P, W] of P prompts; P = 1 where it does not depend on them
    row: torch.Tensor | None = None  # [R] int64 into the prompts of `modulation`; None: the rows are the prompts
    mask: torch.Tensor | None = None  # [R, S] bool, text tokens that are attended to; None: all

    def rows(self, index: torch.Tensor) -> Prepared:
        row = index if self.row is None else self.row.index_select(0, index)
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return Prepared(self.text.index_select(0, index), self.modulation, row, mask)

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {"text": self.text, "modulation": self.modulation, "row": self.row, "mask": self.mask}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Prepared:
        return Prepared(**tensors)

    def at(self, step: torch.Tensor) -> torch.Tensor:
        """[R, W] modulation of the step whose number the device tensor `step` [1] holds, or of each row's own, [R]."""
        if len(step) > 1:
            row = torch.arange(len(step), device=step.device) if self.row is None else self.row
            return self.modulation[step, row]
        modulation = self.modulation.index_select(0, step)[0]
        return modulation if self.row is None else modulation.index_select(0, self.row)


class Norm(NamedTuple):
    """Modulation [R, D] of one norm, of which a dual-attention block reads two forms: arguments of the kernels."""

    shift: torch.Tensor
    scale: torch.Tensor
    shift2: torch.Tensor | None = None
    scale2: torch.Tensor | None = None


class Modulation(NamedTuple):
    """A stream's vectors [R, D] in one step, in the order in which the stock AdaLN linears give them.

    A text stream that ends has a shift and a scale alone, and its linear, that of a last norm, gives the scale first.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor | None = None
    mlp_shift: torch.Tensor | None = None
    mlp_scale: torch.Tensor | None = None
    mlp_gate: torch.Tensor | None = None
    dual_shift: torch.Tensor | None = None
    dual_scale: torch.Tensor | None = None
    dual_gate: torch.Tensor | None = None

    @property
    def attention(self) -> Norm:
        """Of what the block's attention reads, and its dual attention."""
        return Norm(self.shift, self.scale, self.dual_shift, self.dual_scale)

    @property
    def mlp(self) -> Norm:
        """Of what the block's feed-forward reads."""
        return Norm(self.mlp_shift, self.mlp_scale)


class Normed(NamedTuple):
    """What a block's attentions read: modulated norms of the streams, as e4m3 where the linear that reads them is."""

    image: Activations | None  # [T, R, D]; after the last block what the output's linear reads
    dual: Activations | None  # [T, R, D] the image in the form that its dual attention reads
    text: Activations | None  # [S, R, D]


class _Next(NamedTuple):
    """A norm that a residual is followed by, in the same kernel; without one it is left to whoever reads it."""

    norm: Norm | None = None
    reader: StackedLinear | None = None  # what reads the result, as e4m3 where its weights are


class _Ending(NamedTuple):
    """What the streams of a block are followed by."""

    image: _Next = _Next()
    text: _Next = _Next()


_NO_NORM = _Next()
_NO_NORMS = _Ending()


@dataclass
class _Heads:
    """One stream's side of an attention."""

    qkv: StackedLinear
    norms: _NormWeights | None  # of q and k
    out: StackedLinear | None  # None: nothing reads this stream's output


@dataclass
class _Stream:
    """Image or text side of a block, or all of a block of one stream.

    The latter's attention is followed by no linear of its own: the feed-forward's second reads what it gives as well.
    """

    attention: _Heads
    dual: _Heads | None  # a second attention among the image tokens
    feed_forward: tuple[StackedLinear, StackedLinear] | None
    first: int  # where its modulation starts, in units of D
    count: int  # vectors of modulation: 9 dual, 6, 3 of one stream, or 2 for a text stream that ends here
    unread: tuple[StackedLinear, ...] = ()  # what Qwen-Image has after a text that ends: adapted in name, never run

    def modulation(self, row: torch.Tensor, width: int) -> Modulation:
        """Its vectors in one step's [R, W]."""
        chunks = row[:, self.first * width : (self.first + self.count) * width].chunk(self.count, dim=1)
        return Modulation(*chunks) if self.count > 2 else Modulation(scale=chunks[0], shift=chunks[1])

    def linears(self) -> list[StackedLinear]:
        heads = [self.attention] + ([self.dual] if self.dual else [])
        found = [layer for h in heads for layer in (h.qkv, h.out) if layer is not None]
        return found + list(self.feed_forward or ()) + list(self.unread)


@dataclass
class _Block:
    image: _Stream
    text: _Stream


class Together(torch.nn.Module):
    """Layers whose weights are all here inside of a call: those of a block, or units like this one.

    Args:
        parts: the layers, which the function that is called reads by itself.
    """

    def __init__(self, parts: Sequence[torch.nn.Module]):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return function(*given, **named)


class Sharding(Protocol):
    """Leaves each of several processes its share of weights that wait to be used; policy/sharding.py has one."""

    @property
    def device(self) -> torch.device:
        """Where the weights are used; they may be read elsewhere."""
        ...

    def share_out(self, unit: Together) -> None:
        """Of the unit's weights; from then on all processes call it together, inside of a call of the network."""
        ...

    def join(self, network: Together, *runs: Sequence[Together]) -> None:
        """The network of the units that are shared out, in the orders in which they are called one after the other."""
        ...


class _Reader:
    """Takes stock tensors by name, to the device, and, where the stock module is given, points it at the stacked
    copies."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], stock: torch.nn.Module | None, device: torch.device):
        self.tensors, self.stock, self.device = tensors, stock, device

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor if tensor.is_meta else tensor.to(self.device)  # of which the shape is all there is

    def stacked(self, *names: str) -> StackedLinear:
        layer = StackedLinear(names, *([self.read(f"{n}.{kind}") for n in names] for kind in ("weight", "bias")))
        self.share(names, layer.weight, layer.bias)
        return layer

    def share(self, names, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """The stock parameters become slices of the stacked ones: no memory is held twice."""
        if self.stock is None or len(names) == 1:
            return
        sizes = [len(self.tensors[f"{n}.weight"]) for n in names]
        for name, w, b in zip(names, weight.split(sizes), bias.split(sizes)):
            module = self.stock.get_submodule(name)
            module.weight.data, module.bias.data = w, b

    def heads(self, prefix: str, projections: tuple[str, ...], norms: tuple[str, str], out: str | None) -> _Heads:
        names = [f"{prefix}.{norm}.weight" for norm in norms]
        return _Heads(
            self.stacked(*(f"{prefix}.{p}" for p in projections)),
            (self.read(names[0]), self.read(names[1])) if names[0] in self.tensors else None,
            self.stacked(f"{prefix}.{out}") if out else None,
        )


class FusedTransformer:
    """Forward and adapters of one model. `predict` is the entry; see the module's docstring.

    Args:
        config: what to compute.
        tensors: parameters and buffers by stock name, all on one device, the linears in the model's dtype.
        stock: the module the tensors came from, whose linears then share the stacked weights.
        attention: name of attention.py.
        checkpointing: recompute each block in the backward pass.
        sequence: the processes that share out the tokens of every row, and call `predict` on the same ones together;
            None: this one has them all. The gradient of `lora` is then this process's part of the sum.
        sharding: leaves this process its share of every block, as soon as it is read; all processes then call `prepare`
            and `predict` together, with no merged or quantised weights. None: it has all of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        stock: torch.nn.Module | None = None,
        attention: str = "auto",
        checkpointing: bool = False,
        sequence: SequenceGroup | None = None,
        sharding: Sharding | None = None,
    ):
        self.config, self.checkpointing, self.sequence, self._sharding = config, checkpointing, sequence, sharding
        reader = _Reader(tensors, stock, tensors["proj_out.weight"].device if sharding is None else sharding.device)
        of_blocks = ("transformer_blocks.", "single_transformer_blocks.")
        self._small = {name: reader.read(name) for name in tensors if not name.startswith(of_blocks)}
        self.dtype, self.device = tensors["proj_out.weight"].dtype, reader.device
        # Normalised q and k are a quarter of what a training step saves; on a CPU recomputing them only costs time.
        self.recompute_qk = self.device.type != "cpu"
        masked = config.family == "qwen"
        self.attention_name, self._attend = choose_attention(attention, self.device, self.dtype, masked=masked)
        self._units: list[Together] = []  # of the blocks, in the order in which they run
        self.blocks = self._read_blocks(reader)
        self.singles = self._read_singles(reader)
        self._modulation = self._read_modulation(reader)
        self._network = Together([*self._units, *(unit for unit, _ in self._modulation)])
        if sharding is not None:
            sharding.join(self._network, self._units, [unit for unit, _ in self._modulation[:-1]])
        self._positions: dict[tuple[int, int], torch.Tensor] = {}
        self._turns: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.lora: LoraWeights | None = None

    def _read_blocks(self, reader: _Reader) -> list[_Block]:
        blocks, first = [], 0
        for i in range(self.config.num_layers):
            prefix, last = (
                f"transformer_blocks.{i}",
                i == self.config.num_layers - 1 and not self.config.num_single_layers,
            )
            dual = i in self.config.dual_attention_layers
            image_ff, text_ff = (f"{prefix}.{name}.net" for name in self.config.names.feed_forward)
            names, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
            image = _Stream(
                reader.heads(f"{prefix}.attn", names, norms, "to_out.0"),
                reader.heads(f"{prefix}.attn2", names, norms, "to_out.0") if dual else None,
                (reader.stacked(f"{image_ff}.0.proj"), reader.stacked(f"{image_ff}.2")),
                first,
                9 if dual else 6,
            )
            names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            after = (f"{prefix}.attn.to_add_out", f"{text_ff}.0.proj", f"{text_ff}.2")
            whole = self.config.family == "qwen"  # whose last text has all of a block's parts
            text = _Stream(
                reader.heads(f"{prefix}.attn", names, norms, None if last else "to_add_out"),
                None,
                None if last else (reader.stacked(after[1]), reader.stacked(after[2])),
                first + image.count,
                2 if last and not whole else 6,
                tuple(reader.stacked(name) for name in after) if last and whole else (),
            )
            first += image.count + text.count
            blocks.append(_Block(image, text))
            self._units.append(self._unit([*image.linears(), *text.linears()]))
        self._last_norm = first
        return blocks

    def _read_singles(self, reader: _Reader) -> list[_Stream]:
        singles = []
        for i in range(self.config.num_single_layers):
            prefix = f"single_transformer_blocks.{i}"
            heads = reader.heads(f"{prefix}.attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), None)
            feed_forward = reader.stacked(f"{prefix}.proj_mlp"), reader.stacked(f"{prefix}.proj_out")
            singles.append(_Stream(heads, None, feed_forward, self._last_norm, 3))
            self._units.append(self._unit(singles[-1].linears()))
            self._last_norm += 3
        return singles

    def _read_modulation(self, reader: _Reader) -> list[tuple[Together, StackedLinear]]:
        """Every AdaLN linear, in the order of the blocks and the last norm's at the end: one [W, D], or, where blocks
        are shared out, one for each of them, and the last whole."""
        *blocks, last = self.config.modulation
        if self._sharding is None:
            layer = reader.stacked(*(name for names in blocks for name in names), *last)
            return [(Together([layer]), layer)]
        found = []
        for names in blocks:
            layer = reader.stacked(*names)
            found.append((self._unit([layer]), layer))
        layer = reader.stacked(*last)
        return [*found, (Together([layer]), layer)]

    def _unit(self, layers: Sequence[StackedLinear]) -> Together:
        """Layers that are used together, shared out where blocks are."""
        unit = Together(layers)
        if self._sharding is not None:
            self._sharding.share_out(unit)
            for layer in layers:
                layer.shared_out = True
        return unit

    def linears(self) -> list[StackedLinear]:
        """Every linear of the blocks, in order."""
        return [layer for block in self._linears_by_block() for layer in block]

    def _linears_by_block(self) -> list[list[StackedLinear]]:
        double = [[*block.image.linears(), *block.text.linears()] for block in self.blocks]
        return double + [single.linears() for single in self.singles]

    def adapt(self, is_target: Callable[[str], bool], **settings) -> LoraWeights:
        """Put adapters beside the linears whose stock names `is_target` accepts; `settings` go to LoraWeights."""
        adapters: list[StackedAdapter] = []
        for layer in self.linears():
            adapter = layer.adapter(is_target)
            layer.adapter_number = None if adapter is None else len(adapters)
            if adapter is not None:
                adapters.append(adapter)
        self.lora = LoraWeights(adapters, device=self.device, **settings)
        return self.lora

    def _quantisable(self) -> list[StackedLinear]:
        """The linears that run as e4m3 where weights do: of all blocks but the first and the last."""
        return [layer for layers in self._linears_by_block()[1:-1] for layer in layers if layer.can_quantize]

    def prepare_merged(self, *, fp8: bool) -> None:
        """Allocate merged weights, e4m3 where they can be if `fp8`; call `merge` to fill them."""
        quantised = set(self._quantisable()) if fp8 else set()
        for layer in self.linears():
            layer.prepare_merged(layer in quantised)
        self._merge_lists = self._list_merges()

    def hold_merged_alone(self) -> dict[str, torch.Tensor | Fp8Tensor]:
        """Allocate merged weights, e4m3 where they can be, of a model whose weights of blocks and modulation are on the
        meta device.

        Returns:
            Stock name of each of these linears -> its rows of what `merged` runs, in the order of the forward pass:
            for the caller to write, there is no `merge` here.
        """
        quantised = set(self._quantisable())
        for layer in self.linears():
            layer.allocate_merged(layer in quantised, self.device)
        rows = {name: layer.merged_rows(part) for layer in self.linears() for part, name in enumerate(layer.names)}
        ((_, modulation),) = self._modulation
        weight = torch.empty_like(modulation.weight, device=self.device)
        modulation.weight = torch.nn.Parameter(weight, requires_grad=False)
        return rows | dict(zip(modulation.names, weight.split(modulation.sizes), strict=True))

    def prepare_fp8_base(self) -> None:
        """Quantise the frozen weights of the inner blocks once; adapters and their products keep the model's dtype."""
        for layer in self._quantisable():
            layer.prepare_fp8_base()

    def _list_merges(self):
        """Arguments of merge_lora: those written in the model's dtype, those written as e4m3."""
        modules = self.lora.modules()
        plain, quantised = ([], [], [], []), ([], [], [], [])
        for layer in self.linears():
            for part in layer.adapted:
                arguments = (layer.slices()[part], *modules[layer.names[part]], layer.merged_rows(part))
                for column, value in zip(plain if layer.merged_fp8 is None else quantised, arguments):
                    column.append(value)
        return plain, quantised

    def merge(self) -> None:
        """W + (alpha/r)·B·A from the pristine base, rounded once, in place: captured graphs read the new weights."""
        plain, quantised = self._merge_lists
        if plain[0]:
            merge_lora(*plain[:3], self.lora.scale, outs=plain[3])
        if quantised[0]:
            merge_lora(*quantised[:3], self.lora.scale, fp8=quantised[3])

    @torch.no_grad()
    def merge_error(self) -> torch.Tensor:
        """`merge_error` of one adapted linear, in the middle of the model, in e4m3 where any is."""
        plain, quantised = self._merge_lists
        weight, a, b, merged = (column[len(column) // 2] for column in (quantised if quantised[0] else plain))
        return merge_error(weight, (a, b), self.lora.scale, merged)

    @torch.no_grad()
    def prepare(
        self,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> Prepared:
        """Embed text [R, S, E] and pooled [R, E'] for all `timesteps` [K] at once.

        Args:
            guidance: FLUX.1-dev's.
            mask: [R, S] bool, Qwen-Image's.
        """
        return self._network(self._prepare, text, pooled, timesteps, guidance, mask)

    def _prepare(
        self,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: float | None,
        mask: torch.Tensor | None,
    ) -> Prepared:
        time = self._perceptron("time_text_embed.timestep_embedder", self._waves(timesteps.float()))
        if self.config.family == "qwen":
            text = F.rms_norm(text.float(), text.shape[-1:], self._small["txt_norm.weight"].float(), EPS)
            embedded = self._linear(self.config.names.text_embedder, text.to(self.dtype))
            row = torch.zeros(len(text), dtype=torch.int64, device=self.device)
            return Prepared(embedded, self._modulate(F.silu(time))[:, None], row, mask)
        embedded = self._linear(self.config.names.text_embedder, text)
        if guidance is not None:
            scale = torch.full((1,), 1000 * guidance, device=self.device)
            time = time + self._perceptron("time_text_embed.guidance_embedder", self._waves(scale))
        pooled = self._perceptron("time_text_embed.text_embedder", pooled)
        conditioning = F.silu(time[:, None] + pooled[None])
        return Prepared(embedded, self._modulate(conditioning))

    def _modulate(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] of conditioning [..., D]."""
        found = [unit(layer.run_base, x) for unit, layer in self._modulation]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _waves(self, values: torch.Tensor) -> torch.Tensor:
        """[K, 256] cosines and sines of times, or of another scalar between 0 and 1 times 1000, [K] float32."""
        factor = 1
        if self.config.family == "flux":  # given over 1000 and taken times 1000 in its own dtype
            values = ((values / 1000).to(self.dtype) * 1000).float()
        elif self.config.family == "qwen":  # the angles are, in float32: the order moves a cosine of 900 by 6e-5
            values, factor = (values / 1000).to(self.dtype).float(), 1000
        half = torch.arange(128, dtype=torch.float32, device=self.device) * (-torch.log(torch.tensor(10000.0)) / 128)
        angles = factor * (values[:, None] * torch.exp(half))
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(self.dtype)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._small[f"{name}.weight"], self._small[f"{name}.bias"])

    def _perceptron(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(f"{name}.linear_2", F.silu(self._linear(f"{name}.linear_1", x)))

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Prepared, weights: Weights) -> torch.Tensor:
        """Velocity [R, C, h, w] in the model's dtype at step number `step` (int64 [1], or [R] for one per row)."""
        return self._network(self._predict, latents, step, prepared, weights)

    def _predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Prepared, weights: Weights) -> torch.Tensor:
        rotary = self._rotary(latents.shape[-2:], prepared.text.shape[1])
        streams = self._image_tokens(latents), prepared.text.shape[1]
        bias = None if prepared.mask is None else key_bias(prepared.mask, streams[0], self.dtype)
        forward = _Forward(self, weights, prepared.at(step), streams, rotary, bias)
        x, text, normed = self._embed(latents), self._own(prepared.text.transpose(0, 1)).contiguous(), None
        for block, following, unit in zip(
            self.blocks, [*self.blocks[1:], None], self._units[: len(self.blocks)], strict=True
        ):
            run = partial(unit, forward.block, block)
            if not self.checkpointing:
                joins = following is None and self.singles  # whose norm is of both streams in one tensor
                ending = _NO_NORMS if joins else forward.start_of(following)
                x, text, normed = run(x, text, normed=normed, ending=ending)
            elif torch.is_grad_enabled():  # no norm leaves a block: each is computed again with the block that reads it
                x, text, _ = checkpoint(run, x, text, use_reentrant=False, preserve_rng_state=False)
            else:
                x, text, _ = run(x, text)
        if self.singles:
            last = self._run_singles(forward, x, text)
        else:
            last = forward.last_norm(x) if self.checkpointing else normed.image
        patches = self._linear("proj_out", last)
        if self.sequence is not None:
            patches = self.sequence.gathered(patches, streams[0])
        return self._unpatch(patches, latents.shape[-2:])

    def _own(self, stream: torch.Tensor) -> torch.Tensor:
        """This process's tokens of all [T, ...]."""
        return stream if self.sequence is None else stream[self.sequence.own(len(stream))]

    def _run_singles(self, forward: _Forward, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[T, R, D] what the output's linear reads after the blocks of one stream, of image [T, R, D] and text."""
        tokens, normed, joint = len(x), None, torch.cat([x, text])
        units = self._units[len(self.blocks) :]
        for block, following, unit in zip(self.singles, [*self.singles[1:], None], units, strict=True):
            run = partial(unit, forward.single, block, only=tokens if following is None else None)
            if not self.checkpointing:
                joint, normed = run(joint, normed=normed, then=forward.start_of_single(following))
            elif torch.is_grad_enabled():
                joint, _ = checkpoint(run, joint, use_reentrant=False, preserve_rng_state=False)
            else:
                joint, _ = run(joint)
        return forward.last_norm(joint) if self.checkpointing else normed

    def _embed(self, latents: torch.Tensor) -> torch.Tensor:
        """This process's patches [T, R, D] with their positions; the patch convolution as a matrix product."""
        p, (rows, channels, height, width) = self.config.patch_size, latents.shape
        patches = latents.to(self.dtype).view(rows, channels, height // p, p, width // p, p).permute(2, 4, 0, 1, 3, 5)
        name = self.config.names.embedder
        weight, bias = self._small[f"{name}.weight"], self._small[f"{name}.bias"]
        patches = linear(self._own(patches.reshape(-1, rows, channels * p * p)), weight.flatten(1), bias)
        if self.config.is_rotary:
            return patches
        return (patches + self._own(self._position(height // p, width // p))).to(self.dtype)

    def _position(self, height: int, width: int) -> torch.Tensor:
        """[T, 1, D] the centre of the stock position embedding; kept, so that capture finds it ready."""
        if (height, width) not in self._positions:
            side = self.config.pos_embed_max_size
            top, left = (side - height) // 2, (side - width) // 2
            grid = self._small["pos_embed.pos_embed"].view(side, side, -1)
            crop = grid[top : top + height, left : left + width]
            self._positions[height, width] = crop.reshape(height * width, 1, -1).contiguous()
        return self._positions[height, width]

    def _rotary(self, size: Sequence[int], text_tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [T + S, head_dim / 2] float32 for latents of `size`, image first; None where there is a table.

        The axes are 0, the patch's row and its column. FLUX.1 counts these from 0, and text stands at 0; Qwen-Image
        counts them from the image's middle, and text goes on along the diagonal from where half the longer side ends.
        Angles are position / θ^(2i / dim) of an axis' pair i, in float64. Kept, so that capture finds them ready.
        """
        config = self.config
        if not config.is_rotary:
            return None
        height, width = size[0] // config.patch_size, size[1] // config.patch_size
        key = height, width, text_tokens
        if key not in self._turns:
            wide = {"device": self.device, "dtype": torch.float64}
            places = torch.zeros(height * width + text_tokens, 3, **wide)
            places[: height * width, 1] = torch.arange(height, **wide).repeat_interleave(width)
            places[: height * width, 2] = torch.arange(width, **wide).repeat(height)
            if config.family == "qwen":
                places[: height * width, 1] -= height - height // 2
                places[: height * width, 2] -= width - width // 2
                places[height * width :] = max(height // 2, width // 2) + torch.arange(text_tokens, **wide)[:, None]
            angles = torch.cat(
                [
                    places[:, axis, None] * _THETA ** (-torch.arange(0, dim, 2, **wide) / dim)
                    for axis, dim in enumerate(config.axes_dims_rope)
                ],
                dim=1,
            )
            self._turns[key] = angles.cos().float(), angles.sin().float()
        return self._turns[key]

    def _image_tokens(self, latents: torch.Tensor) -> int:
        """T of latents [R, C, h, w], on all processes together."""
        return latents.shape[-2] * latents.shape[-1] // self.config.patch_size**2

    def _unpatch(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        p, channels, rows = self.config.patch_size, self.config.out_channels, x.shape[1]
        if self.config.is_rotary:
            x = x.view(size[0] // p, size[1] // p, rows, channels, p, p).permute(2, 3, 0, 4, 1, 5)
            return x.reshape(rows, channels, *size)
        x = x.view(size[0] // p, size[1] // p, rows, p, p, channels).permute(2, 5, 0, 3, 1, 4)
        return x.reshape(rows, channels, *size)


class _Forward:
    """One pass: the weights it runs, the modulation of its step, how many tokens image and text have on all processes
    together, the turns of q and k where positions are rotary, and what every attention adds for the tokens that are
    not attended to, [R, 1, 1, T + S], where there are any."""

    def __init__(
        self,
        model: FusedTransformer,
        weights: Weights,
        modulation: torch.Tensor,
        streams: tuple[int, ...],
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        bias: torch.Tensor | None = None,
    ):
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
        self.model, self.weights, self.modulation, self.rotary = model, weights, modulation, rotary
        self.streams = streams
        self.biases = () if bias is None else (bias,)  # attention's further argument
        self.pairs = model.lora.pairs(model.dtype) if weights == "adapted" and model.lora else []
        self._vectors: dict[int, Modulation] = {}  # by where they start: a block's are read by the one before as well

    def linear(self, layer: StackedLinear, x: Activations) -> torch.Tensor:
        """[..., N] of x [..., K] by the weights of this pass."""
        if self.weights == "merged":
            return layer.run_merged(x)
        pair = self._pair(layer)
        return layer.run_base(x) if pair is None else layer.run_adapted(x, pair, self.model.lora.scale)

    def _pair(self, layer: StackedLinear) -> Pair | None:
        """A [g, r, K] and B [g, n, r] that stand beside the layer in this pass."""
        return self.pairs[layer.adapter_number] if self.pairs and layer.adapter_number is not None else None

    def block(
        self,
        block: _Block,
        x: torch.Tensor,
        text: torch.Tensor,
        *,
        normed: Normed | None = None,
        ending: _Ending = _NO_NORMS,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Normed]:
        """Residual streams [T, R, D] and [S, R, D] after `block`, None for a text that ends here, and their norms.

        Args:
            x, text: the streams before it.
            normed: the streams' norms that the block before has left; None computes them here.
            ending: the norms to leave for the next block.
        """
        image_mod, text_mod = self.vectors(block.image), self.vectors(block.text)
        if normed is None:
            normed = self._first_norms(block, x, text, image_mod, text_mod)
        out, text_out = self._joint_attention(block, normed.image, normed.text)
        dual = None if block.image.dual is None else self._self_attention(block.image.dual, normed.dual)
        x, image, second = self._after_attention(block.image, x, image_mod, out, dual=dual, then=ending.image)
        if text_out is None:
            return x, None, Normed(image, second, None)
        text, text_normed, _ = self._after_attention(block.text, text, text_mod, text_out, then=ending.text)
        return x, text, Normed(image, second, text_normed)

    def single(
        self,
        block: _Stream,
        x: torch.Tensor,
        *,
        normed: Activations | None = None,
        then: _Next = _NO_NORM,
        only: int | None = None,
    ) -> tuple[torch.Tensor, Activations | None]:
        """The residual stream after a block of one stream, and its norm where `then` asks for one.

        Args:
            x: [T + S, R, D] before it, image first.
            normed: its norm that the block before has left; None computes it here.
            then: the norm to leave for the next block.
            only: so many first tokens go on, of which nothing else is computed than keys and values; None: all.
        """
        mod = self.vectors(block)
        if normed is None:
            quantize = self._fp8(block.attention.qkv)
            normed = _swapped(ada_layer_norm(_swapped(x), *mod.attention, eps=EPS, quantize=quantize))
        qkv = self._split(self.linear(block.attention.qkv, normed))
        out = self._attention(qkv, block.attention.norms, queries=only)
        if only is not None:
            x, normed = x[:only], _first(normed, only)
        wide, after = block.feed_forward
        joined = torch.cat([out, self._wide(wide, normed)], dim=-1)
        x, following, _ = self._residual(x, self.linear(after, joined), mod.gate, then=then)
        return x, following

    def start_of_single(self, following: _Stream | None) -> _Next:
        """The norm that a block of one stream starts with; after the last one the output's."""
        if following is None:
            return _Next(self._last_vectors())
        return _Next(self.vectors(following).attention, following.attention.qkv)

    def vectors(self, stream: _Stream) -> Modulation:
        if stream.first not in self._vectors:
            self._vectors[stream.first] = stream.modulation(self.modulation, self.model.config.width)
        return self._vectors[stream.first]

    def start_of(self, following: _Block | None) -> _Ending:
        """The norms that a block starts with, for the one before it; after the last block the output's."""
        if following is None:
            return _Ending(image=_Next(self._last_vectors()))
        image, text = following.image, following.text
        return _Ending(
            _Next(self.vectors(image).attention, image.attention.qkv),
            _Next(self.vectors(text).attention, text.attention.qkv),
        )

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        """[T, R, D] what the output's linear reads of the residual stream x [T, R, D]."""
        return _swapped(ada_layer_norm(_swapped(x), *self._last_vectors(), eps=EPS))

    def _last_vectors(self) -> Norm:
        width = self.model.config.width
        scale, shift = self.modulation[:, self.model._last_norm * width :].chunk(2, dim=1)
        return Norm(shift, scale)

    def _first_norms(
        self, block: _Block, x: torch.Tensor, text: torch.Tensor, image_mod: Modulation, text_mod: Modulation
    ) -> Normed:
        """Of residual streams x [T, R, D] and text [S, R, D]."""
        quantize = self._fp8(block.image.attention.qkv)
        image = ada_layer_norm(_swapped(x), *image_mod.attention, eps=EPS, quantize=quantize)
        image, dual = map(_swapped, image) if block.image.dual else (_swapped(image), None)
        quantize = self._fp8(block.text.attention.qkv)
        normed_text = ada_layer_norm(_swapped(text), *text_mod.attention, eps=EPS, quantize=quantize)
        return Normed(image, dual, _swapped(normed_text))

    def _fp8(self, reader: StackedLinear | None) -> bool:
        """Whether the linear that reads a norm's result wants it as e4m3."""
        return self.weights == "merged" and reader is not None and reader.merged_fp8 is not None

    def _after_attention(
        self,
        stream: _Stream,
        x: torch.Tensor,
        mod: Modulation,
        out: torch.Tensor,
        *,
        dual: torch.Tensor | None = None,
        then: _Next,
    ) -> tuple[torch.Tensor, Activations | None, Activations | None]:
        """The rest of a block for one stream: attention's and the feed-forward's residual.

        Args:
            x: residual stream [T, R, D] (or S) before the block.
            out, dual: [T, R, D] of its attentions.
            then: the norm to end with.

        Returns:
            The stream after the block, and what `_residual` says of its norm.
        """
        into_mlp = _Next(mod.mlp, stream.feed_forward[0])
        x, inner, _ = self._residual(x, out, mod.gate, out2=dual, gate2=mod.dual_gate, then=into_mlp)
        return self._residual(x, self._feed_forward(stream, inner), mod.mlp_gate, then=then)

    def _residual(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        gate: torch.Tensor,
        *,
        out2: torch.Tensor | None = None,
        gate2: torch.Tensor | None = None,
        then: _Next,
    ) -> tuple[torch.Tensor, Activations | None, Activations | None]:
        """x + gate·out (+ gate2·out2), and of that the norm in its first and second form, None where there is none: one
        kernel. x, out, out2 and results [T, R, D], gates [R, D]."""
        x, out, out2 = _swapped(x), _swapped(out), None if out2 is None else _swapped(out2)
        if then.norm is None:
            return _swapped(gated_residual(x, out, gate, out2, gate2)), None, None
        quantize = self._fp8(then.reader)
        results = gated_residual(x, out, gate, out2, gate2, **then.norm._asdict(), eps=EPS, quantize=quantize)
        x, first, *second = map(_swapped, results)
        return x, first, second[0] if second else None

    def _feed_forward(self, stream: _Stream, x: Activations) -> torch.Tensor:
        """[T, R, D] of the modulated norm x [T, R, D]."""
        first, second = stream.feed_forward
        return self.linear(second, self._wide(first, x, reader=second))

    def _wide(self, layer: StackedLinear, x: Activations, reader: StackedLinear | None = None) -> Activations:
        """GELU of a linear, [T, R, 4·D], as e4m3 where the linear `reader` that reads it is."""
        if self.weights == "merged" and layer.merged_fp8 is None:
            return layer.run_merged_gelu(x)
        return gelu(self.linear(layer, x), quantize=self._fp8(reader))

    def _joint_attention(
        self, block: _Block, image: Activations, text: Activations
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [T, R, D] and [S, R, D] of the modulated norms image [T, R, D] and text [S, R, D].

        None for a text stream that ends here, whose queries are left out.
        """
        heads, text_heads = block.image.attention, block.text.attention
        layers, tokens = (heads.qkv, text_heads.qkv), len(image.data)
        qkv = self._split(self._joint_linear(layers, (image, text)))
        attend = partial(self._attention, qkv, heads.norms, txt_norms=text_heads.norms, tokens=tokens)
        if text_heads.out is None:
            return self.linear(heads.out, attend(queries=tokens)), None
        out = attend()
        out, text_out = out.split([tokens, len(out) - tokens])
        return self.linear(heads.out, out), self.linear(text_heads.out, text_out)

    def _self_attention(self, heads: _Heads, x: Activations) -> torch.Tensor:
        """[T, R, D] of the modulated norm x [T, R, D]: image tokens among themselves."""
        return self.linear(heads.out, self._attention(self._split(self.linear(heads.qkv, x)), heads.norms))

    def _joint_linear(
        self, layers: tuple[StackedLinear, StackedLinear], streams: tuple[Activations, Activations]
    ) -> torch.Tensor:
        """[T + S, R, N] of image [T, R, K] and text [S, R, K]."""
        if self.weights == "merged":
            return run_joint_merged(layers, streams)
        pairs = self._pair(layers[0]), self._pair(layers[1])
        return run_joint(layers, streams, pairs, self.model.lora.scale if self.pairs else 1.0)

    def _split(self, y: torch.Tensor) -> torch.Tensor:
        """[R, T, 3, H, head_dim] of the product of q, k and v [T, R, 3·D]."""
        config = self.model.config
        return _swapped(y.view(*y.shape[:-1], 3, config.num_attention_heads, config.attention_head_dim))

    def _attention(
        self,
        qkv: torch.Tensor,
        norms: _NormWeights | None,
        *,
        txt_norms: _NormWeights | None = None,
        tokens: int = 0,
        queries: int | None = None,
    ) -> torch.Tensor:
        """[Tq, R, D] from the product [R, T, 3, H, head_dim] of the image, or of image and text.

        Args:
            norms, txt_norms: of q and k of the image, and of a text that attends with it.
            tokens: how many of a joint product's tokens are the image's.
            queries: only the first ones attend; None: all.
        """
        if self.model.sequence is not None:
            return self._exchanged_attention(self.model.sequence, qkv, norms, txt_norms, queries)
        return self._all_tokens(qkv, norms, txt_norms, tokens, queries)

    def _exchanged_attention(
        self,
        sequence: SequenceGroup,
        qkv: torch.Tensor,
        norms: _NormWeights | None,
        txt_norms: _NormWeights | None,
        queries: int | None,
    ) -> torch.Tensor:
        """As `_attention`, of this process's tokens of each stream, whose heads attend among all tokens."""
        tokens = self.streams[0]
        streams = self.streams if qkv.shape[1] > sequence.count(tokens) else self.streams[:1]  # text, too, or images
        every = _swapped(sequence.heads(_swapped(qkv), streams))
        out = self._all_tokens(every, norms, txt_norms, tokens, None if queries is None else tokens)
        attending = streams if queries is None else streams[:1]
        return sequence.tokens(out.unflatten(2, (1, 1, -1)), attending).flatten(2)  # a process's heads as a wide one

    def _all_tokens(
        self,
        qkv: torch.Tensor,
        norms: _NormWeights | None,
        txt_norms: _NormWeights | None,
        tokens: int,
        queries: int | None,
    ) -> torch.Tensor:
        """As `_attention`, where all tokens are here."""
        inputs = partial(self._attention_inputs, qkv, norms, txt_norms, tokens)
        q, k, v = inputs()
        recompute = self.model.recompute_qk and not self.model.checkpointing  # which recomputes the whole block
        recompute = recompute and norms is not None and torch.is_grad_enabled()
        with Recomputed((q, k), lambda: inputs()[:2]) if recompute else nullcontext():
            return _swapped(self.model._attend(q if queries is None else q[:, :, :queries], k, v, *self.biases))

    def _attention_inputs(
        self, qkv: torch.Tensor, norms: _NormWeights | None, txt_norms: _NormWeights | None, tokens: int
    ) -> Sequence[torch.Tensor]:
        """q, k and v [R, H, T, head_dim] of all tokens; see `_attention`."""
        if norms is None:
            return [t.transpose(1, 2) for t in qkv.unbind(2)]
        text = {} if txt_norms is None else {"txt_weights": txt_norms, "txt_tokens": qkv.shape[1] - tokens}
        return qk_rms_norm(qkv, norms, **text, rotary=self.rotary, eps=EPS)


def merge_error(weight: torch.Tensor, pair: Pair, scale: float, merged: torch.Tensor | Fp8Tensor) -> torch.Tensor:
    """|W' - W - ΔW| / |ΔW|, a scalar on the device, of W and its merged weight W' [N, K]; ΔW = scale·B·A.

    What rounding to the model's dtype, or to e4m3, takes from the adapters' work on steps that run merged weights:
    changes below half a unit in the last place of W vanish. 0 while there is no change.
    """
    a, b = pair
    change = scale * (b @ a)
    size = change.norm()
    merged = merged.dequantize() if isinstance(merged, Fp8Tensor) else merged.float()
    return torch.where(size > 0, (merged - weight.float() - change).norm() / size, 0.0)


def _first(x: Activations, count: int) -> Activations:
    """The first tokens of [T, ...]."""
    return Fp8Tensor(x.data[:count], x.scale[:count]) if isinstance(x, Fp8Tensor) else x[:count]


@overload
def _swapped(x: torch.Tensor) -> torch.Tensor: ...
@overload
def _swapped(x: Fp8Tensor) -> Fp8Tensor: ...
@overload
def _swapped(x: Activations) -> Activations: ...
def _swapped(x: Activations) -> Activations:
    """Views [R, T, ...] of [T, R, ...] and back."""
    if isinstance(x, Fp8Tensor):
        return Fp8Tensor(x.data.transpose(0, 1), x.scale.transpose(0, 1))
    return x.transpose(0, 1)
