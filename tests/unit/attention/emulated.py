"""The varlen kernel on the CPU, in the precision of its inputs: what torch's operators compute and ask for."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from hf_veomni.attention import kernel, varlen
from hf_veomni.attention.kernel import Packing
from tests.unit.attention.dense import dense_attention

STOCK = varlen_attn


def check_arguments(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, max_length: Any) -> None:
    assert edges.dtype == torch.int32
    assert type(max_length) is int and max_length == int(edges.diff().max())
    assert query.shape[0] == key.shape[0] == value.shape[0] == edges[-1]
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))


def window_mask(length: int, window: tuple[int, int]) -> Tensor:
    (left, right), distance = window, torch.arange(length)[:, None] - torch.arange(length)
    return ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))


def public(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`."""
    given = inspect.signature(STOCK).bind(query, key, value, *args, **kwargs)
    given.apply_defaults()
    edges = given.arguments["cu_seq_q"]
    assert given.arguments["cu_seq_k"].equal(edges) and given.arguments["max_q"] == given.arguments["max_k"]
    check_arguments(query, key, value, edges, given.arguments["max_q"])
    assert given.arguments.get("enable_gqa", True) or query.shape[1] == key.shape[1]
    outputs = []
    for begin, end in pairwise(edges.tolist()):
        q, k, v = (x[None, begin:end].transpose(1, 2) for x in (query, key, value))
        mask = window_mask(end - begin, given.arguments["window_size"])
        outputs.append(dense_attention(q, k, v, mask, given.arguments["scale"])[0])
    return torch.cat(outputs)


def _scores(query: Tensor, key: Tensor, packing: Packing, begin: int, end: int) -> Tensor:
    """[H, n, n] of one document, -inf where nothing is seen."""
    keys = key[begin:end].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query[begin:end], keys) * packing.scaling
    return scores.masked_fill(~window_mask(end - begin, packing.window), -torch.inf)


def forward(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """`kernel.forward_kernel`: sums and lse in fp32 at least."""
    check_arguments(query, key, value, packing.cu_seqlens, packing.max_length)
    dtype = query.dtype
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    outputs, lses = [], []
    for begin, end in pairwise(packing.cu_seqlens.tolist()):
        scores = _scores(query, key, packing, begin, end)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[begin:end]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outputs).to(dtype), torch.cat(lses, dim=1)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel.backward_kernel`: FlashAttention-2's algorithm, weights from `lse` and row sums from `out`."""
    check_arguments(query, key, value, packing.cu_seqlens, packing.max_length)
    assert lse.is_contiguous() and grad.is_contiguous() and lse.shape == query.shape[1::-1]
    assert grad.dtype == out.dtype == query.dtype
    dtype = query.dtype
    grad, query, key, value, out = (x.to(lse.dtype) for x in (grad, query, key, value, out))
    group, grads = query.shape[1] // key.shape[1], [torch.zeros_like(x) for x in (query, key, value)]
    for begin, end in pairwise(packing.cu_seqlens.tolist()):
        part = slice(begin, end)
        weights = torch.exp(_scores(query, key, packing, begin, end) - lse[:, part, None])
        keys, values = (x[part].repeat_interleave(group, dim=1) for x in (key, value))
        sums = (grad[part] * out[part]).sum(-1).t()[..., None]
        change = weights * (torch.einsum("qhd,khd->hqk", grad[part], values) - sums) * packing.scaling
        grads[0][part] = torch.einsum("hqk,khd->qhd", change, keys)
        heads = torch.einsum("hqk,qhd->khd", change, query[part]), torch.einsum("hqk,qhd->khd", weights, grad[part])
        for total, sums in zip(grads[1:], heads, strict=True):
            total[part] = sums.unflatten(1, (-1, group)).sum(2)
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def use(patch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> list[tuple[int, int]]:
    """Let the kernel path run here, for fp64 or the dtypes given; returns the windows that it is called with."""
    windows: list[tuple[int, int]] = []

    def plain(*args: Any, **kwargs: Any) -> Tensor:
        windows.append(kwargs["window_size"])
        return public(*args, **kwargs)

    def with_lse(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        windows.append(packing.window)
        return forward(query, key, value, packing)

    patch.setattr(varlen, "has_kernel", lambda device: True)
    patch.setattr(varlen, "_KERNEL_DTYPES", dtypes or (torch.float64,))
    patch.setattr(kernel, "varlen_attn", plain)
    patch.setattr(kernel, "forward_kernel", with_lse)
    patch.setattr(kernel, "backward_kernel", backward)
    return windows
