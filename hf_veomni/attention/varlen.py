"""Attention over packed documents without an S x S mask, under the name "omni_varlen".

    "kernel"    torch's varlen kernel, all documents in one call: CUDA, bf16 or fp16, head width up to 256, sinks too
    "flex"      FlexAttention, all documents in one call: on CUDA, what the kernel and sdpa have no argument for
    "fused"     sdpa, a call per document or per block of a window: plain attention without the kernel, and rows of one
                document each, for which sdpa has faster kernels than this one (1.85 times on an H100)
    "blocks"    blocks of queries by the formula, computed again in the backward: everything else

Shapes: B rows; S tokens of a full row; T = B*S; H query heads; G key/value heads; D, W widths of keys and of values.
Local to this rank, without collectives: under Ulysses, H and G are this rank's heads and S is the full row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_veomni.attention.blocks import Block, Formula, attend, attend_recomputed, plan_blocks, take_slices
from hf_veomni.attention.flex import attend_flex, flex_applies
from hf_veomni.attention.kernel import Packing, attend_packed
from hf_veomni.attention.mask import MaskSpec, omni_mask
from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError

VARLEN_NAME = "omni_varlen"

Path = Literal["kernel", "flex", "fused", "blocks"]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_MAX_WIDTH = 256
_KERNEL_TAKES_SINKS = torch.version.hip is None  # whose lse has another shape in torch 2.11


def register_varlen_attention() -> None:
    """Make "omni_varlen" a name that any transformers model takes as its `attn_implementation`. Idempotent."""
    AttentionMaskInterface.register(VARLEN_NAME, omni_mask)
    if VARLEN_NAME not in AttentionInterface().valid_keys():  # what somebody has put in its place stays
        # What it reads of the mask would be frozen into a graph.
        AttentionInterface.register(VARLEN_NAME, torch.compiler.disable(varlen_attention))  # pyright: ignore


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskSpec | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`.

    Args:
        query: [B, H, S, D]; key [B, G, S, D]; value [B, G, S, W]; H a multiple of G.
        attention_mask: what `omni_mask` returned: it alone says who sees whom, `sliding_window` and `is_causal` are
            in it. A tensor or None (decoding with a cache) is left to stock sdpa.
        scaling: of the scores, default D**-0.5.
        dropout: probability, applied to the attention weights.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        s_aux: [H], attention sinks, as in GPT-OSS.
        position_bias: [B or 1, H, S, S], added to the scores.

    Returns:
        [B, S, H, W], zeros for padding, and None for the weights.

    Raises:
        UnsupportedError: the mask is of rows of another shape, or is missing while packed documents are set.
    """
    query, key, value = _settle_autocast(query, key, value)
    formula = Formula(float(query.shape[-1] ** -0.5 if scaling is None else scaling), softcap, dropout)
    if not isinstance(attention_mask, MaskSpec):
        _check_no_documents(query, key, attention_mask)
        kwargs.update(is_causal=is_causal, position_bias=position_bias)
        return _stock_attention(module, query, key, value, attention_mask, formula, s_aux, kwargs), None
    spec = attention_mask
    shape = (query.shape[0], query.shape[2])
    if shape != (spec.num_rows, spec.row_length) or key.shape[2] != spec.row_length:
        raise UnsupportedError(
            f"The mask is of {spec.num_rows} rows of {spec.row_length} tokens, but queries are {shape[0]} rows of "
            f"{shape[1]} and keys of {key.shape[2]}: this attention needs the full rows (under `prepare_omni` it gets "
            "them)."
        )
    if not spec.spans:
        return query.new_zeros(*shape, query.shape[1], value.shape[-1]), None
    match choose_path(query, key, value, spec, formula, sinks=s_aux, bias=position_bias):
        case "kernel":
            return _attend_kernel(query, key, value, spec, formula.scaling, s_aux), None
        case "flex":
            return attend_flex(query, key, value, spec, formula, sinks=s_aux), None  # type: ignore[call-issue]
        case "fused":
            return _attend_fused(query, key, value, spec, formula.scaling), None
        case "blocks":
            return attend_recomputed(query, key, value, spec, formula, sinks=s_aux, bias=position_bias), None


def choose_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: MaskSpec,
    formula: Formula,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Path:
    """Which of the ways at the top of this file attention takes. Same arguments as those ways; reads shapes only."""
    limited = not spec.evaluate and bias is None and formula.softcap is None and not formula.dropout
    if limited and sinks is None and _is_one_document_a_row(spec):
        return "fused"
    if limited and kernel_applies(query, key, value) and (sinks is None or _KERNEL_TAKES_SINKS):
        return "kernel"
    if limited and sinks is None:
        return "fused"
    if bias is None and flex_applies(query, key, value, spec, formula, sinks):  # type: ignore[call-issue]
        return "flex"
    return "blocks"


def _is_one_document_a_row(spec: MaskSpec) -> bool:
    return spec.is_full and spec.is_plain(spec.row_length)


def _settle_autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """Cast as autocast would at sdpa: rotary embeddings leave queries and keys in fp32 beside bf16 values."""
    kind = tensors[0].device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not enabled or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _check_no_documents(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    documents = current().documents
    if mask is not None or documents is None or not documents.is_packed:
        return
    if (query.shape[0], query.shape[2]) == (documents.num_rows, documents.row_length) and key.shape[2] == query.shape[
        2
    ]:
        raise UnsupportedError(
            "The row holds packed documents, but this model hands no mask to its attention, so they would see each "
            "other: train it on unpacked rows."
        )


def _stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    formula: Formula,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Stock sdpa; the formula on full scores where sdpa has no sinks or softcap (it drops sinks silently)."""
    if sinks is None and formula.softcap is None:
        options = {"scaling": formula.scaling, "dropout": formula.dropout, **kwargs}
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    causal = kwargs["is_causal"] if kwargs["is_causal"] is not None else getattr(module, "is_causal", True)
    length, bias = query.shape[2], kwargs["position_bias"]
    if mask is None and causal and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else mask + bias
    seed = int(torch.randint(1 << 62, ())) if formula.dropout else 0
    out = attend(query, key, value, formula, sinks=sinks, bias=bias, mask=mask, seed=seed)
    return out.transpose(1, 2).contiguous()


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, spec: MaskSpec, scaling: float) -> Tensor:
    """One fused call per span, or per block of queries where a window is felt. Returns [B, S, H, W]."""
    width = value.shape[-1]
    query, key, value = _equal_widths(query, key, value)  # else sdpa falls back to full scores
    full = _is_one_document_a_row(spec)
    if query.is_cuda and query.shape[1] != key.shape[1] and not (full and kernel_applies(query, key, value)):
        # Beside a mask, and in fp32, no fused CUDA kernel repeats heads.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    if full:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=spec.causal, scale=scaling, enable_gqa=grouped
        )
        return out[..., :width].transpose(1, 2).contiguous()
    if "fused" not in spec.cache:
        planned = plan_blocks(spec, _window_block(spec), split_plain=False)
        spans = [block.queries for block in planned], [block.keys for block in planned]
        spec.cache["fused"] = planned, *spans, not all(block.plain for block in planned)
    blocks, of_queries, of_keys, overlap = spec.cache["fused"]
    queries = take_slices(query, of_queries, overlap=False)
    keys, values = take_slices(key, of_keys, overlap=overlap), take_slices(value, of_keys, overlap=overlap)
    pieces, filled = [], 0
    for block, q, k, v in zip(blocks, queries, keys, values, strict=True):
        mask = None if block.plain else _window_mask(spec, block, query)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=block.plain and spec.causal, scale=scaling, enable_gqa=grouped
        )
        begin = block.queries.row * spec.row_length + block.queries.begin
        if begin > filled:
            pieces.append(query.new_zeros(1, begin - filled, query.shape[1], width))
        pieces.append(out[..., :width].transpose(1, 2))
        filled = begin + out.shape[2]
    if filled < query.shape[0] * spec.row_length:
        pieces.append(query.new_zeros(1, query.shape[0] * spec.row_length - filled, query.shape[1], width))
    return torch.cat(pieces, dim=1).view(query.shape[0], spec.row_length, query.shape[1], width)


def _equal_widths(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad with zeros to the widest, which changes neither scores nor the first columns of the output."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)


def _window_block(spec: MaskSpec) -> int:
    """Queries of a block: a quarter of the window, which keeps both the masked share and the number of calls low."""
    reach = (spec.before or 0) + (spec.after or 0)
    return min(256, max(64, 1 << (reach // 4).bit_length()))


def _window_mask(spec: MaskSpec, block: Block, query: Tensor) -> Tensor:
    """Additive [m, n], a view of one band that all blocks, documents and layers share.

    Column j of the band is the key `before` tokens to the left of the block's first query, plus j. sdpa would make a
    boolean mask additive for each block, and keep each for the backward.
    """
    before = spec.max_length if spec.before is None else min(spec.before, spec.max_length)
    after = spec.max_length if spec.after is None else min(spec.after, spec.max_length)
    name = ("band", query.dtype, query.device)
    band = spec.cache.get(name)
    if band is None:
        size = _window_block(spec)
        band = torch.full((size, size + before + after), -torch.inf, dtype=query.dtype, device=query.device)
        band = spec.cache[name] = band.triu(before + after + 1) + band.tril(-1)
    (_, first, last), (_, low, high) = block.queries, block.keys
    origin = first - before
    mask = band[: last - first, low - origin : high - origin]
    return mask.contiguous() if mask.is_cuda else mask  # fused CUDA kernels want aligned rows


def kernel_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's varlen kernel can take these: it has no mask, dropout or softcap, so those never ask."""
    width = max(query.shape[-1], value.shape[-1])
    return (
        has_kernel(query.device)
        and query.dtype in _KERNEL_DTYPES
        and query.dtype == key.dtype == value.dtype
        and width <= KERNEL_MAX_WIDTH
    )


def has_kernel(device: torch.device) -> bool:
    """FlashAttention-2 needs Ampere (compute capability 8.0) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_kernel(
    query: Tensor, key: Tensor, value: Tensor, spec: MaskSpec, scaling: float, sinks: Tensor | None
) -> Tensor:
    """All spans in one call of the varlen kernel. Returns [B, S, H, W]."""
    rows, heads, length, _ = query.shape
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8  # the kernel's widths are multiples of 8
    layout = spec.kernel_layout
    index = None if layout.index is None else layout.index.to(query.device)

    def flatten(x: Tensor) -> Tensor:
        x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        x = x.transpose(1, 2).reshape(rows * length, x.shape[1], width)
        return x if index is None else x.index_select(0, index)

    reach = layout.max_length - 1
    before, after = (-1 if limit is None or 0 < reach <= limit else limit for limit in (spec.before, spec.after))
    packing = Packing(layout.cu_seqlens.to(query.device), layout.max_length, scaling, (before, after))
    out = attend_packed(flatten(query), flatten(key), flatten(value), packing, sinks)
    if index is not None:
        out = out.new_zeros(rows * length, heads, width).index_copy(0, index, out)
    return out[..., : value.shape[-1]].reshape(rows, length, heads, value.shape[-1])
