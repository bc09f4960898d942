"""Attention with full scores and a dense mask: what the varlen attention is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask import MaskSpec, omni_mask
from hf_veomni.context import within

Rows = tuple[tuple[int, ...], ...]

LENGTHS: Rows = ((70, 1, 129, 30), (230,))
FUNCTIONS: dict[str, Callable] = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(17),
    "bidirectional sliding": masking_utils.sliding_window_bidirectional_mask_function(9),
    "left only": masking_utils.sliding_window_overlay(40),
    "unknown": lambda batch_idx, head_idx, q_idx, kv_idx: (q_idx - kv_idx) % 3 == batch_idx,
}


def documents_set(documents: Documents | None) -> AbstractContextManager[None]:
    return within(documents=documents)


def make_spec(function: Callable, lengths: Rows, padding: Tensor | None = None, **kwargs: Any) -> MaskSpec:
    documents = Documents.from_lengths(lengths)
    size = documents.row_length
    with documents_set(documents):
        spec = omni_mask(len(lengths), size, size, mask_function=function, attention_mask=padding, **kwargs)
    assert isinstance(spec, MaskSpec)
    return spec


def dense_mask(function: Callable, lengths: Rows, padding: Tensor | None = None) -> Tensor:
    """[B, 1, S, S], without any of the code under test."""
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    size = numbers.shape[1]
    mask = masking_utils.sdpa_mask(len(lengths), size, size, mask_function=function, allow_is_causal_skip=False)
    mask = mask & (numbers[:, None, :, None] == numbers[:, None, None, :])
    return mask if padding is None else mask & padding[:, None, None, :] & padding[:, None, :, None]


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None) -> Tensor:
    """Full scores; a query that sees nothing gets zeros. Returns [B, S, H, E]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    alive = mask.any(-1, keepdim=True)
    return (scores.masked_fill(~mask & alive, -torch.inf).softmax(-1) * alive @ value).transpose(1, 2)


def random_inputs(
    lengths: Rows,
    heads: int = 4,
    num_kv: int = 2,
    width: int = 8,
    value_width: int = 8,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Query, key and value as models make them: views of [B, S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, width), (num_kv, width), (num_kv, value_width)]
    rows, size = len(lengths), sum(lengths[0])
    made = [torch.randn(rows, size, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out)).sum(), inputs, retain_graph=True)


def assert_equal(out: Tensor, expected: Tensor, inputs: Sequence[Tensor], limit: float = 1e-10) -> None:
    """Outputs, and the gradients of one weighted sum of them."""
    assert out.shape == expected.shape
    assert float((out - expected).detach().abs().max()) < limit
    for got, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert float((got - wanted).abs().max()) < limit
