"""RMSNorm of q and k into the shape of attention.

Planted bugs that turned this file red: text tokens first; q weight on k; image weight on text; mean over the padded
head dim; weight missing in the gradient; layout of the fused gradient ignored; strides of v not looked at; gradients
of image and text swapped; results stored in another memory order (the process dies); text gradients at the first rows,
or with another stride; gradients read with the strides of the first; k in place of v. Of the rotation: the same turn
in the backward; turns of the first tokens for the text; halves as pairs. Of halves as pairs: the halves exchanged; the
same turn in the backward; the second half of v not moved; neighbours turned by the reference. Of tables by head: the
first head's for all; tables as long as the stream at hand.
"""

import pytest
import torch
import torch.nn.functional as F

from advgrpo_kernels import _runtime, qk_rms_norm, qk_rms_norm_ref
from advgrpo_kernels.ops.qk_rms_norm import _qk_rms_norm_op
from advgrpo_kernels.testing import assert_within_budget

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]
SHAPES = [(1, 1, 1, 1, 8), (2, 7, 3, 3, 16), (2, 45, 5, 2, 20)]  # B, T, S, H, D; the last has several ragged tiles


def inputs(shape, dtype, device):
    """(image qkv, text qkv, four weights)."""
    B, T, S, H, D = shape
    qkv, txt = (torch.randn(B, n, 3, H, D, device=device).to(dtype).requires_grad_() for n in (T, S))
    return qkv, txt, (torch.randn(4, D, device=device) + 1).to(dtype).unbind()


def joint(function, weights, **settings):
    def of_streams(qkv, txt, **more):
        text = {"txt_qkv": txt, "txt_weights": weights[2:]}
        return torch.cat(function(qkv, weights[:2], **text, **settings, **more))

    return of_streams


def one_tensor(function, weights, **settings):
    """Both streams in one tensor, as linears that write into one buffer leave them."""

    def of_streams(qkv, txt, **more):
        text = {"txt_tokens": txt.shape[1], "txt_weights": weights[2:]}
        return torch.cat(function(torch.cat([qkv, txt], dim=1), weights[:2], **text, **settings, **more))

    return of_streams


def image(function, weights, **settings):
    return lambda qkv, **more: torch.cat(function(qkv, weights[:2], **settings, **more))


def turns(tokens, dim, device, *heads):
    """cos and sin of a random angle for every token and pair of the head dim, and where `heads` are given for each."""
    angle = torch.randn(*heads, tokens, dim // 2, device=device)
    return [angle.cos(), angle.sin()]


def gradient_like(shape, dtype, device, *, text):
    B, T, S, H, D = shape
    return torch.randn(3 * B, H, T + S * text, D, device=device).to(dtype)


@pytest.mark.every_second("shape", "dtype", "form")
@pytest.mark.parametrize("form", [joint, one_tensor, image])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_within_error_budget(shape, dtype, form, device):
    qkv, txt, weights = inputs(shape, dtype, device)
    args = [qkv] if form is image else [qkv, txt]
    dy = gradient_like(shape, dtype, device, text=form is not image)
    assert_within_budget(form(qk_rms_norm, weights, backend="triton"), form(qk_rms_norm_ref, weights), args, dy)


@pytest.mark.every_second("shape", "dtype", "form", "pairs", "by_head")
@pytest.mark.parametrize("form", [joint, one_tensor, image])
@pytest.mark.parametrize("by_head", [False, True], ids=["one_table", "by_head"])
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_forward_and_backward_within_error_budget(shape, dtype, pairs, by_head, form, device):
    qkv, txt, weights = inputs(shape, dtype, device)
    _, T, S, H, D = shape
    args, tokens = ([qkv], T) if form is image else ([qkv, txt], T + S)
    settings = {"rotary": turns(tokens, D, device, *[H] * by_head), "rotary_pairs": pairs}
    dy = gradient_like(shape, dtype, device, text=form is not image)
    kernel = form(qk_rms_norm, weights, backend="triton", **settings)
    assert_within_budget(kernel, form(qk_rms_norm_ref, weights, **settings), args, dy)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_inputs_of_flux(backend, device, monkeypatch):
    """What FluxAttnProcessor hands to attention, text before image there, for blocks of two streams and of one."""
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    seen = []

    def recorded(query, key, value, **_):
        seen.append([t.transpose(1, 2) for t in (query, key, value)])
        return value

    monkeypatch.setattr(flux, "dispatch_attention_fn", recorded)
    x, txt = torch.randn(2, 6, 32, device=device), torch.randn(2, 3, 32, device=device)
    ids = torch.zeros(9, 3, device=device)
    ids[3:, 1], ids[3:, 2] = torch.arange(6, device=device) // 3, torch.arange(6, device=device) % 3
    table = flux.FluxPosEmbed(10000, (4, 6, 6))(ids)  # [tokens, D] each, every angle twice
    rotary = [t[:, ::2].roll(-3, 0) for t in table]  # image tokens first
    for added in (32, None):
        attn = flux.FluxAttention(32, 2, 16, bias=True, added_kv_proj_dim=added, eps=1e-6, pre_only=added is None)
        attn = attn.to(device)
        with torch.no_grad():
            for name, parameter in attn.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
            linears = attn.to_q, attn.to_k, attn.to_v
            if added:
                attn(x, encoder_hidden_states=txt, image_rotary_emb=table)
                qkv = torch.stack([linear(x).unflatten(-1, (2, 16)) for linear in linears], dim=2)
                added_linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
                text = {"txt_qkv": torch.stack([f(txt).unflatten(-1, (2, 16)) for f in added_linears], dim=2)}
                text["txt_weights"] = (attn.norm_added_q.weight, attn.norm_added_k.weight)
            else:
                attn(torch.cat([txt, x], dim=1), image_rotary_emb=table)
                both = torch.cat([x, txt], dim=1)
                qkv, text = torch.stack([linear(both).unflatten(-1, (2, 16)) for linear in linears], dim=2), {}
            norms = attn.norm_q.weight, attn.norm_k.weight
            got = qk_rms_norm(qkv, norms, rotary=rotary, **text, backend=backend)
        expected = [t.roll(-3, 2) for t in seen[-1]]
        torch.testing.assert_close(list(got), expected, rtol=1e-5, atol=3e-6)


def assert_turned_as(stock, rotary, pairs, backend, device, shape=(2, 7, 3, 20)):
    """query, key and the gradient of qkv as of PyTorch's norm and `stock`, which turns [B, H, T, D]."""
    B, T, H, D = shape
    qkv, weights = torch.randn(B, T, 3, H, D, device=device, requires_grad=True), torch.randn(2, D, device=device)
    upstream = list(torch.randn(3, B, H, T, D, device=device))

    def with_gradient(out):
        return [*out, *torch.autograd.grad(out, qkv, upstream)]

    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    q, k = (F.rms_norm(x, (D,), weight, 1e-6) for x, weight in zip((q, k), weights))
    expected = with_gradient([*stock(q, k), v])
    got = with_gradient(qk_rms_norm(qkv, weights.unbind(), rotary=rotary, rotary_pairs=pairs, backend=backend))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_halves_are_turned_as_llama_turns_them(backend, device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cos, sin = turns(7, 20, device)
    both = [torch.cat([table, table], dim=-1)[None] for table in (cos, sin)]
    assert_turned_as(lambda q, k: llama.apply_rotary_pos_emb(q, k, *both), (cos, sin), "half", backend, device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_pairs_are_turned_as_diffusers_turns_them(pairs, backend, device):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    cos, sin = turns(7, 20, device)
    interleaved = pairs == "interleaved"
    both = [t.repeat_interleave(2, dim=-1) if interleaved else torch.cat([t, t], dim=-1) for t in (cos, sin)]

    def stock(*heads):
        dim = -1 if interleaved else -2
        return [embeddings.apply_rotary_emb(x, both, use_real_unbind_dim=dim) for x in heads]

    assert_turned_as(stock, (cos, sin), pairs, backend, device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_tables_by_head_turn_as_those_of_ltx2(pairs, backend, device):
    """Its own tables, whose angles go on from head to head: [B, H, T, D/2] of halves, [B, T, H·D] of neighbours."""
    ltx = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    H, D = 3, 20
    form = {"rope_type": "split" if pairs == "half" else "interleaved", "num_attention_heads": H}
    tables = ltx.LTX2AudioVideoRotaryPosEmbed(H * D, **form)(torch.rand(1, 3, 7, device=device) * 20)
    if pairs == "half":
        rotary = [table[0] for table in tables]
        turn = ltx.apply_split_rotary_emb
    else:
        rotary = [table[0].unflatten(-1, (H, D))[..., ::2].transpose(0, 1) for table in tables]

        def turn(x, tables):
            side_by_side = x.transpose(1, 2).flatten(2)
            return ltx.apply_interleaved_rotary_emb(side_by_side, tables).unflatten(-1, (H, D)).transpose(1, 2)

    assert not torch.equal(rotary[0][0], rotary[0][1])
    assert_turned_as(lambda *heads: [turn(x, tables) for x in heads], rotary, pairs, backend, device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_equal_tables_by_head_give_the_bits_of_one_table(pairs, backend, device):
    qkv, txt, weights = inputs((2, 6, 4, 3, 16), torch.float32, device)
    one = turns(10, 16, device)
    results = []
    for rotary in (one, [table.expand(3, -1, -1) for table in one]):
        settings = {"rotary": rotary, "rotary_pairs": pairs, "backend": backend}
        out = joint(qk_rms_norm, weights, **settings)(qkv, txt)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (qkv, txt))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.gpu
def test_full_size_within_error_budget():
    shape = (2, 1024, 205, 24, 64)
    qkv, txt, weights = inputs(shape, torch.bfloat16, "cuda")
    kernel, dy = joint(qk_rms_norm, weights, backend="triton"), gradient_like(shape, torch.bfloat16, "cuda", text=True)
    assert_within_budget(kernel, joint(qk_rms_norm_ref, weights), [qkv, txt], dy)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_inputs_of_diffusers(backend, device, monkeypatch):
    """What JointAttnProcessor2_0 hands to attention, with and without text."""
    attention = pytest.importorskip("diffusers.models.attention_processor")
    seen = []

    def recorded(query, key, value, **_):
        seen.append((query, key, value))
        return value

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    processor = attention.JointAttnProcessor2_0()
    settings = {"query_dim": 32, "heads": 2, "dim_head": 16, "qk_norm": "rms_norm", "eps": 1e-6, "bias": True}
    x, txt = torch.randn(2, 5, 32, device=device), torch.randn(2, 3, 32, device=device)
    for added in (32, None):
        context = {"added_kv_proj_dim": added, "context_pre_only": False if added else None}
        attn = attention.Attention(**settings, **context, processor=processor).to(device)
        with torch.no_grad():
            for name, parameter in attn.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
            attn(x, encoder_hidden_states=txt if added else None)
            split = {"sizes": (2, 16), "dim": -1}
            qkv = [linear(x).unflatten(**split) for linear in (attn.to_q, attn.to_k, attn.to_v)]
            text = {}
            if added:
                linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
                text["txt_qkv"] = [linear(txt).unflatten(**split) for linear in linears]
                text["txt_weights"] = (attn.norm_added_q.weight, attn.norm_added_k.weight)
            got = qk_rms_norm(qkv, (attn.norm_q.weight, attn.norm_k.weight), **text, backend=backend)
        torch.testing.assert_close(tuple(got), seen[-1], rtol=1e-5, atol=2e-6)


def test_fused_and_separate_layouts_give_the_same_bits(device):
    qkv, txt, weights = inputs((2, 6, 3, 2, 16), torch.float32, device)
    text = {"txt_weights": weights[2:], "backend": "triton"}
    grad = torch.randn(2, 2, 9, 16, device=device)
    results = []
    for image_form in (qkv, qkv.unbind(2), [t.contiguous() for t in qkv.unbind(2)]):
        out = qk_rms_norm(image_form, weights[:2], txt_qkv=[t.clone() for t in txt.unbind(2)], **text)
        results.append(
            [*out, *torch.autograd.grad(sum((o * grad * i).sum() for i, o in enumerate(out, 1)), (qkv, txt))]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_memory_order_changes_no_bit_and_is_kept(backend, device):
    """Tokens first in memory, in one tensor or two, as against images first; v of one tensor stays where it is."""
    qkv, txt, weights = inputs((3, 6, 4, 2, 16), torch.float32, device)
    text, upstream = {"txt_weights": weights[2:], "backend": backend}, torch.randn(3, 3, 2, 10, 16, device=device)
    upstream = [*upstream[:2], upstream[2].transpose(1, 2).contiguous().transpose(1, 2)]

    def with_gradients(out):
        return [*out, *torch.autograd.grad(out, (qkv, txt), upstream)]

    expected = with_gradients(qk_rms_norm(qkv, weights[:2], txt_qkv=txt, **text))
    reference = with_gradients(qk_rms_norm(qkv, weights[:2], txt_qkv=txt, txt_weights=weights[2:], backend="torch"))
    torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-5)
    assert all(t.transpose(1, 2).is_contiguous() for t in expected[:3])
    token_first = [t.transpose(0, 1).contiguous() for t in (qkv, txt)]
    one = torch.cat(token_first).transpose(0, 1)
    found = with_gradients(qk_rms_norm(one, weights[:2], txt_tokens=4, **text))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(t.permute(2, 0, 1, 3).is_contiguous() for t in found[:2])
    assert found[2].data_ptr() == one[:, :, 2].data_ptr()
    for pairs, heads in (("interleaved", []), ("half", [2])):
        turning = {"rotary": turns(10, 16, device, *heads), "rotary_pairs": pairs}
        turned = with_gradients(qk_rms_norm(qkv, weights[:2], txt_qkv=txt, **turning, **text))
        found = with_gradients(qk_rms_norm(one, weights[:2], txt_tokens=4, **turning, **text))
        assert all(torch.equal(a, b) for a, b in zip(found, turned, strict=True))
        assert all(t.permute(2, 0, 1, 3).is_contiguous() for t in found[:2])
    two = [t.transpose(0, 1) for t in token_first]
    found = with_gradients(qk_rms_norm(two[0], weights[:2], txt_qkv=two[1], **text))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_results_that_nothing_reads_have_no_part_in_the_gradient(device):
    qkv, _, weights = inputs((2, 6, 4, 2, 16), torch.float32, device)
    for used in ((0,), (2,), (0, 1)):
        grads = []
        for backend in ("triton", "torch"):
            out = qk_rms_norm(qkv, weights[:2], backend=backend)
            grads.append(torch.autograd.grad(sum(out[i].sin().sum() for i in used), qkv)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_views_and_mixed_dtypes(device):
    """q, k, v as slices of wider rows, half activations under float32 weights, and a transposed gradient."""
    wide = torch.randn(2, 5, 100, device=device).half().requires_grad_()
    weights = torch.randn(2, 16, device=device).unbind()
    results = []
    for backend in ("triton", "torch"):
        parts = [part[..., :32].unflatten(-1, (2, 16)) for part in wide.chunk(3, dim=-1)]
        parts[2] = parts[2].transpose(2, 3).contiguous().transpose(2, 3)
        out = qk_rms_norm(parts, weights, backend=backend)
        loss = sum((o.transpose(1, 2).float().square() * i).sum() for i, o in enumerate(out, 1))
        results.append((*out, *torch.autograd.grad(loss, wide)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)


def test_opcheck(device):
    qkv, txt, weights = inputs((2, 3, 2, 2, 16), torch.float32, device)
    image_weights, text_weights = list(weights[:2]), list(weights[2:])
    torch.library.opcheck(_qk_rms_norm_op, ([qkv], image_weights, [txt], text_weights, [], 0, 1e-6, False))
    parts = [part.detach().clone().requires_grad_() for part in qkv.unbind(2)]
    torch.library.opcheck(_qk_rms_norm_op, (parts[:2], image_weights, [], [], [], 0, 1e-6, False))
    parts = [part.transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_() for part in parts[:2]]
    by_head = turns(3, 16, device, 2)
    torch.library.opcheck(_qk_rms_norm_op, (parts, image_weights, [], text_weights, by_head, 1, 1e-6, True))


def test_compiles_without_graph_break(device):
    qkv, txt, weights = inputs((2, 3, 2, 2, 16), torch.float32, device)
    turning = {"rotary": turns(5, 16, device, 2), "rotary_pairs": "half"}
    for form, settings in ((joint, {}), (one_tensor, turning)):
        function = form(qk_rms_norm, weights, backend="triton", **settings)
        compiled = torch.compile(lambda *a, f=function: f(*a).sin().sum(), fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(qkv, txt), (qkv, txt))
        torch.testing.assert_close(got, torch.autograd.grad(function(qkv, txt).sin().sum(), (qkv, txt)))


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    qkv, txt, weights = inputs((4, 5, 3, 2, 16), torch.float32, device)
    text = {"txt_weights": weights[2:], "backend": "triton"}
    whole = qk_rms_norm(qkv, weights[:2], txt_qkv=txt, **text)
    part = qk_rms_norm(qkv[1:3], weights[:2], txt_qkv=txt[1:3], **text)
    assert all(torch.equal(w[1:3], p) for w, p in zip(whole, part))


def test_bad_arguments_raise(device):
    qkv, txt, weights = inputs((2, 3, 2, 2, 16), torch.float32, device)
    text = {"txt_weights": weights[2:]}
    with pytest.raises(ValueError, match=r"qkv must be \[B, T, 3, H, D\] or three"):
        qk_rms_norm(qkv[0], weights[:2])
    with pytest.raises(ValueError, match=r"a weight of qkv must be floating point \[16\]"):
        qk_rms_norm(qkv, (weights[0], weights[1][:8]))
    with pytest.raises(ValueError, match="give txt_qkv and txt_weights together"):
        qk_rms_norm(qkv, weights[:2], txt_qkv=txt)
    with pytest.raises(ValueError, match="or txt_tokens and txt_weights"):
        qk_rms_norm(qkv, weights[:2], txt_tokens=1)
    with pytest.raises(ValueError, match="txt_tokens must leave image tokens of the 3 in qkv, got 3"):
        qk_rms_norm(qkv, weights[:2], txt_tokens=3, **text)
    with pytest.raises(ValueError, match="txt_qkv or txt_tokens, not both"):
        qk_rms_norm(qkv, weights[:2], txt_qkv=txt, txt_tokens=1, **text)
    with pytest.raises(ValueError, match="txt_tokens needs qkv as one tensor"):
        qk_rms_norm(qkv.unbind(2), weights[:2], txt_tokens=1, **text)
    with pytest.raises(ValueError, match=r"txt_qkv must be torch\.float32 with"):
        qk_rms_norm(qkv, weights[:2], txt_qkv=txt[:1], **text)
    with pytest.raises(ValueError, match="q, k and v must have one dtype"):
        qk_rms_norm([qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2].half()], weights[:2])
    with pytest.raises(
        ValueError, match=r"rotary\[1\] must be float32 \[3, 16/2\], or .*, got torch\.float16 \[3, 8\]"
    ):
        qk_rms_norm(qkv, weights[:2], rotary=(turns(3, 16, device)[0], turns(3, 16, device)[1].half()))
    with pytest.raises(ValueError, match=r"rotary\[0\] must be float32 \[5, 16/2\]"):
        qk_rms_norm(qkv, weights[:2], txt_qkv=txt, rotary=turns(3, 16, device), **text)
    with pytest.raises(
        ValueError, match=r"\[3, 16/2\], or \[2, 3, 16/2\] by head, on .*, got torch\.float32 \[3, 3, 8\]"
    ):
        qk_rms_norm(qkv, weights[:2], rotary=turns(3, 16, device, 3))
    with pytest.raises(ValueError, match=r"cos and sin must have one shape, got \[\[3, 8\], \[2, 3, 8\]\]"):
        qk_rms_norm(qkv, weights[:2], rotary=(turns(3, 16, device)[0], turns(3, 16, device, 2)[1]))
    for function in (qk_rms_norm, qk_rms_norm_ref):
        with pytest.raises(ValueError, match="rotary_pairs = 'halves': want one of 'interleaved', 'half'"):
            function(qkv, weights[:2], rotary=turns(3, 16, device), rotary_pairs="halves")
        with pytest.raises(ValueError, match="rotary_pairs = 'half' goes with rotary, which is missing"):
            function(qkv, weights[:2], rotary_pairs="half")
    with pytest.raises(ValueError, match=r"rotary must be \(cos, sin\), got 1 tensors"):
        qk_rms_norm(qkv, weights[:2], rotary=turns(3, 16, device)[:1])
    with pytest.raises(RuntimeError, match="has no gradient for"):
        qk_rms_norm(qkv, [w.clone().requires_grad_() for w in weights[:2]], backend="triton")


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    qkv, _, weights = inputs((1, 2, 1, 1, 8), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="needs triton"):
        qk_rms_norm(qkv, weights[:2], backend="triton")
    torch.testing.assert_close(qk_rms_norm(qkv, weights[:2]), qk_rms_norm_ref(qkv, weights[:2]))
