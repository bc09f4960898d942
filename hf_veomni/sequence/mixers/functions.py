"""The modelling files' own convolutions and scans, on one rank's tokens or heads and document by document.

Every function here stands in for one that a mixer's forward calls by name, and calls that one (`inner`): transformers'
torch code, or the kernel that it found in its place.

    convolution   all channels, this rank's tokens; the kernel - 1 tokens before them come from the ranks before
    scan          all tokens, this rank's heads (Mamba-1: channels), so the state never crosses a rank

Shapes: B rows; S, s tokens of the full row and of this rank; H heads, G groups (key heads), C channels, N state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hf_veomni.attention.documents import Documents
from hf_veomni.comm import gather_shards
from hf_veomni.sequence.mixers.exchange import Span, heads_to_tokens, tokens_to_heads
from hf_veomni.sequence.mixers.layout import conv_layout, scan_layout
from hf_veomni.sequence.ulysses import HeadLayout, head_layout

Function = Callable[..., Any]
# What kernels call packed sequences by: the documents say it already, and here rows are cut or turned into documents.
_PACKED_OPTIONS = ("cu_seqlens", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Documents of like lengths share a call of a scan that has no chunks of its own.
DEFAULT_CHUNK = 64


@dataclass(eq=False)
class MixerCall:
    """One call of one mixer.

    Attributes:
        documents: of the full rows.
        layouts: index tensors that the layers share, once a forward instead of once a layer.
        group: the SP group; None for one rank.
    """

    documents: Documents
    layouts: dict[Any, Any]
    group: dist.ProcessGroup | None
    rank: int
    size: int

    def layout(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """An index layout, made once for all layers of a forward."""
        if key not in self.layouts:
            self.layouts[key] = make()
        return self.layouts[key]


def by_document(call: MixerCall, function: Function, tensors: Sequence[Tensor], chunk: int) -> Tensor:
    """`function` on [B, S, *] tensors, to [B, S, *], no state passing from one document to the next.

    Args:
        function: takes and returns [n, L, *]; causal, so that what fills a document up stays behind its end.
        chunk: tokens of the function's chunks.
    """
    if not call.documents.is_packed:
        return function(*tensors)
    device, shape = tensors[0].device, tensors[0].shape[:2]
    layout = call.layout(("scan", chunk, device), lambda: scan_layout(call.documents, chunk, device))
    flat = [x.flatten(0, 1) for x in tensors]
    found = []
    for index in layout.batches:
        batch = [x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in flat]
        found.append(function(*batch).flatten(0, 1))
    return torch.cat(found).index_select(0, layout.result).unflatten(0, shape)


def _conv(
    call: MixerCall,
    inner: Function,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: object,
) -> Tensor:
    """Causal depthwise convolution of [B, C, s].

    Collective: one all-gather of each rank's last kernel - 1 tokens; its backward is a reduce-scatter.
    """
    run = partial(inner, weight=weight, bias=bias, activation=activation, **_without_packing(options))
    kernel, device = weight.shape[-1], hidden_states.device
    if kernel == 1 or (call.size == 1 and not call.documents.is_packed):
        return run(hidden_states)
    layout = call.layout(
        ("conv", kernel, device), lambda: conv_layout(call.documents, kernel, call.size, call.rank, device)
    )
    parts = [F.pad(hidden_states, (0, 1))]
    if call.group is not None:
        tail = hidden_states[..., -min(kernel - 1, hidden_states.shape[-1]) :]
        parts.insert(0, gather_shards(tail, call.group, dim=2))
    return _columns(run(_columns(torch.cat(parts, dim=-1), layout.source)), layout.result)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns [B, M] of [B, C, *]."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def _assign(call: MixerCall, heads: int, groups: int) -> HeadLayout:
    """Heads and the groups (key heads) that they read, by rank."""
    return head_layout(heads, groups, call.size)


def _per_head(call: MixerCall, layout: HeadLayout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Groups [B, S, g, *] as the function takes them: repeated per head where heads share them unevenly."""
    counts = layout.counts(call.rank)
    if len(set(counts)) == 1:
        return list(tensors)
    index = torch.tensor([i for i, n in enumerate(counts) for _ in repeat(None, n)], device=tensors[0].device)
    return [x.index_select(2, index) for x in tensors]


def _local(x: object, span: Span, dim: int = 0) -> Any:
    """This rank's heads of a parameter; None stays None."""
    return x.narrow(dim, span[0], span[1] - span[0]) if isinstance(x, Tensor) else x


def _delta_rule(
    call: MixerCall,
    inner: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = DEFAULT_CHUNK,
    **options: object,
) -> tuple[Tensor, None]:
    """Gated delta rule: query, key [B, s, G, *], value [B, s, H, *], g and beta [B, s, H] (KDA: g [B, s, H, *])."""
    layout = _assign(call, value.shape[2], key.shape[2])
    spans = (layout.key_value, layout.key_value, layout.query, layout.query, layout.query)
    query, key, *rest = tokens_to_heads((query, key, value, g, beta), spans, call.group, call.rank)
    query, key = _per_head(call, layout, (query, key))
    options = {**_without_packing(options), "output_final_state": False}

    def scan(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return inner(query, key, value, g=g, beta=beta, chunk_size=chunk_size, **options)[0]

    out = by_document(call, scan, (query, key, *rest), chunk_size)
    return heads_to_tokens(out, layout.query, call.group, call.rank), None


def _mamba2_scan(
    call: MixerCall,
    inner: Function,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Mamba-2: hidden states [B, s, H, *], dt [B, s, H], B and C [B, s, G, N]; A, D, dt_bias per head."""
    assert z is None, "the families gate after the scan"
    layout = _assign(call, hidden_states.shape[2], B.shape[2])
    spans = (layout.query, layout.query, layout.key_value, layout.key_value)
    hidden_states, dt, B, C = tokens_to_heads((hidden_states, dt, B, C), spans, call.group, call.rank)
    B, C = _per_head(call, layout, (B, C))
    mine = layout.query[call.rank]
    A, D, dt_bias = _local(A, mine), _local(D, mine), _local(dt_bias, mine)
    options = {**_without_packing(options), "return_final_states": False}

    def scan(hidden_states: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return inner(hidden_states, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, **options)

    out = by_document(call, scan, (hidden_states, dt, B, C), chunk_size)
    return heads_to_tokens(out, layout.query, call.group, call.rank)


def _mamba1_scan(
    call: MixerCall,
    inner: Function,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Mamba-1: hidden states, dt and z [B, C, s], B and C [B, N, s], which every channel reads; A [C, N], D [C]."""
    channels = hidden_states.shape[1]
    split = _assign(call, channels, channels).query
    every = [(0, B.shape[1])] * call.size
    gate = () if z is None else (z,)
    tensors = [x.transpose(1, 2) for x in (hidden_states, dt, B, C, *gate)]
    spans = [split, split, every, every, *(split for _ in gate)]
    tensors = tokens_to_heads(tensors, spans, call.group, call.rank)
    mine = split[call.rank]
    A, D, delta_bias = _local(A, mine), _local(D, mine), _local(delta_bias, mine)
    options = {**_without_packing(options), "return_last_state": False}

    def scan(*tensors: Tensor) -> Tensor:
        x, dt, B, C, *gate = (x.transpose(1, 2) for x in tensors)
        z = gate[0] if gate else None
        return inner(x, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **options).transpose(1, 2)

    out = by_document(call, scan, tensors, DEFAULT_CHUNK)
    return heads_to_tokens(out, split, call.group, call.rank).transpose(1, 2)


def _fused(call: MixerCall, inner: Function, *args: object, **kwargs: object) -> Any:
    """Kernels that fuse convolution, scan and projection: without an answer the forward takes these one by one."""
    return inner(*args, **kwargs) if call.size == 1 and not call.documents.is_packed else None


def _without_packing(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _PACKED_OPTIONS}


# Name in a modelling file -> what stands in for it.
FUNCTIONS: dict[str, Function] = {
    "causal_conv1d_fn": _conv,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba2_split_conv1d_scan_combined": _fused,
    "mamba_selective_scan": _mamba1_scan,
    "mamba_inner_fn": _fused,
}
