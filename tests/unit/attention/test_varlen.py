"""The varlen attention against full scores and a dense mask."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from hf_veomni.attention.blocks import take_slices
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask import Span, omni_mask
from hf_veomni.attention.varlen import VARLEN_NAME, register_varlen_attention, varlen_attention
from tests.unit.attention.dense import (
    FUNCTIONS,
    LENGTHS,
    Rows,
    assert_equal,
    dense_attention,
    dense_mask,
    documents_set,
    gradients,
    make_spec,
    random_inputs,
)


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 8, 5), (4, 2, 5, 8)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_packed_rows_equal_dense_mask(name: str, shape: tuple[int, ...]) -> None:
    inputs = random_inputs(LENGTHS, *shape)
    spec = make_spec(FUNCTIONS[name], LENGTHS)
    out, weights = varlen_attention(SimpleNamespace(), *inputs, spec)
    assert weights is None and out.is_contiguous()
    assert_equal(out, dense_attention(*inputs, dense_mask(FUNCTIONS[name], LENGTHS)), inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["left", "right", "hole", "row"])
def test_padding_is_not_attended_and_gets_zeros(kind: str, name: str) -> None:
    lengths = ((90,), (90,))
    padding = torch.ones(2, 90, dtype=torch.bool)
    begin, end = {"left": (0, 33), "right": (60, 90), "hole": (20, 31), "row": (0, 90)}[kind]
    padding[1, begin:end] = False
    inputs = random_inputs(lengths)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS[name], lengths, padding))
    assert_equal(out, dense_attention(*inputs, dense_mask(FUNCTIONS[name], lengths, padding)), inputs)
    assert not out[1, begin:end].any()
    for grad in gradients(out, inputs):
        assert not grad[1, :, begin:end].any()


def test_batch_of_padding_only_gets_zeros() -> None:
    inputs = random_inputs(((9,),))
    spec = make_spec(FUNCTIONS["causal"], ((9,),), torch.zeros(1, 9, dtype=torch.bool))
    assert not varlen_attention(SimpleNamespace(), *inputs, spec)[0].any()


@st.composite
def packed_rows(draw: st.DrawFn) -> Rows:
    size = draw(st.integers(1, 200))
    edges = st.sets(st.integers(1, size - 1), max_size=8) if size > 1 else st.just(set())
    return tuple(
        tuple(b - a for a, b in pairwise([0, *sorted(draw(edges)), size])) for _ in range(draw(st.integers(1, 2)))
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=packed_rows(),
    window=st.one_of(st.none(), st.integers(1, 200)),
    chunk=st.one_of(st.none(), st.integers(1, 200)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1)]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_any_lengths_windows_chunks_and_heads(
    lengths: Rows, window: int | None, chunk: int | None, heads: tuple[int, int], softcap: float | None
) -> None:
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    mask = dense_mask(function, lengths)
    if chunk is not None:
        starts = torch.zeros(len(lengths), dtype=torch.long)
        function = masking_utils.and_masks(function, masking_utils.chunked_overlay(chunk, starts))
        places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]) // chunk
        mask = mask & (places[:, None, :, None] == places[:, None, None, :])
    inputs = random_inputs(lengths, *heads)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(function, lengths), softcap=softcap)
    key, value = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in inputs[1:])
    scores = inputs[0] @ key.transpose(-1, -2) * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    assert_equal(out, expected, inputs)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_document_changes_no_other(name: str, softcap: float | None) -> None:
    spec = make_spec(FUNCTIONS[name], LENGTHS)
    results = []
    for change in (0, 100):
        inputs = [x.detach().clone() for x in random_inputs(LENGTHS)]
        for x in inputs:
            x[0, :, 71:200] += change
            x.requires_grad_()
        out, _ = varlen_attention(SimpleNamespace(), *inputs, spec, softcap=softcap)
        results.append([out.transpose(1, 2), *gradients(out, inputs)])
    for one, other in zip(*results, strict=True):
        assert one[0, :, :71].equal(other[0, :, :71]) and one[0, :, 200:].equal(other[0, :, 200:])
        assert one[1].equal(other[1])
        assert not one[0, :, 71:200].equal(other[0, :, 71:200])


@pytest.mark.parametrize("name", ["causal", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close_to_fp64(dtype: torch.dtype, name: str) -> None:
    inputs = random_inputs(LENGTHS, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_attention(*exact, dense_mask(FUNCTIONS[name], LENGTHS))
    for softcap in (None, 1e4):  # a cap that high changes nothing, and takes the other path
        out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS[name], LENGTHS), softcap=softcap)
        assert out.dtype == dtype
        pairs = [(out, expected), *zip(gradients(out, inputs), gradients(expected, exact), strict=True)]
        for got, wanted in pairs:
            assert got.dtype == dtype
            assert float(((got - wanted).norm() / wanted.norm()).detach()) < (
                1e-2 if dtype == torch.bfloat16 else 1e-5
            )


def test_autocast_takes_mixed_inputs() -> None:
    inputs = random_inputs(LENGTHS, dtype=torch.float32)
    spec = make_spec(FUNCTIONS["sliding"], LENGTHS)
    low = [x.bfloat16() for x in inputs]
    for softcap in (None, 3.0):
        expected, _ = varlen_attention(SimpleNamespace(), *low, spec, softcap=softcap)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = varlen_attention(SimpleNamespace(), *inputs[:2], low[2], spec, softcap=softcap)
        assert out.dtype == torch.bfloat16
        for got, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert got.equal(wanted)


@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_softcap_equals_gemma2_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = torch.nn.functional.softmax  # eager rounds its softmax to fp32
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: stock(x, dim=dim))
    inputs = random_inputs(LENGTHS)
    allowed = dense_mask(FUNCTIONS[name], LENGTHS)
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    module = SimpleNamespace(num_key_value_groups=2, training=True)
    expected, _ = modeling_gemma2.eager_attention_forward(module, *inputs, mask, scaling=0.7, softcap=1.5)
    out, _ = varlen_attention(module, *inputs, make_spec(FUNCTIONS[name], LENGTHS), scaling=0.7, softcap=1.5)
    assert_equal(out, expected, inputs)
    for tensor_mask in (mask, allowed):  # what decoding with a cache comes with
        out, _ = varlen_attention(module, *inputs, tensor_mask, scaling=0.7, softcap=1.5)
        assert_equal(out, expected, inputs)


@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_sinks_equal_gpt_oss_eager(name: str) -> None:
    query, key, value = random_inputs(LENGTHS)
    sinks = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    inputs = [query, key, value, sinks]
    allowed = dense_mask(FUNCTIONS[name], LENGTHS)
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    module = SimpleNamespace(num_key_value_groups=2, training=True, sinks=sinks)
    expected, _ = modeling_gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling=0.4)
    out, _ = varlen_attention(module, query, key, value, make_spec(FUNCTIONS[name], LENGTHS), scaling=0.4, s_aux=sinks)
    assert_equal(out, expected, inputs)
    out, _ = varlen_attention(module, query, key, value, mask, scaling=0.4, s_aux=sinks)
    assert_equal(out, expected, inputs)


@pytest.mark.parametrize("bias_shape", [(1, 4), (2, 4), (1, 1)])
def test_position_bias_is_added_to_the_scores(bias_shape: tuple[int, int]) -> None:
    inputs = random_inputs(LENGTHS)
    bias = torch.randn(*bias_shape, 230, 230, dtype=torch.float64, requires_grad=True)
    mask = dense_mask(FUNCTIONS["causal"], LENGTHS)
    key, value = (x.repeat_interleave(2, dim=1) for x in inputs[1:])
    scores = inputs[0] @ key.transpose(-1, -2) * 8**-0.5 + bias
    expected = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    spec = make_spec(FUNCTIONS["causal"], LENGTHS)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, spec, position_bias=bias)
    assert_equal(out, expected, [*inputs, bias])


def test_dropout_drops_the_same_weights_in_the_backward() -> None:
    lengths = ((700,),)
    query, key, _ = random_inputs(lengths, heads=8, num_kv=8)
    value = torch.eye(700, dtype=torch.float64).expand(1, 8, -1, -1).clone().requires_grad_()  # outputs are weights
    spec = make_spec(FUNCTIONS["causal"], lengths)
    torch.manual_seed(3)
    out, _ = varlen_attention(SimpleNamespace(), query, key, value, spec, dropout=0.25)
    whole = dense_attention(query, key, value, dense_mask(FUNCTIONS["causal"], lengths))
    kept = out != 0
    share = float(kept.sum() / (whole != 0).sum())
    assert abs(share - 0.75) < 0.005
    assert float((out - whole / 0.75).detach()[kept].abs().max()) < 1e-12
    assert_equal(out, whole * kept / 0.75, [query, key])
    (grad,) = torch.autograd.grad(out[..., 5].sum(), [value])
    assert float((grad[0, :, :, 5] - out.detach().sum(1)[0]).abs().max()) < 1e-10
    again, _ = varlen_attention(SimpleNamespace(), query, key, value, spec, dropout=0.25)
    assert not again.equal(out)
    torch.manual_seed(3)
    assert varlen_attention(SimpleNamespace(), query, key, value, spec, dropout=0.25)[0].equal(out)
    assert not varlen_attention(SimpleNamespace(), query, key, value, spec, dropout=1.0)[0].any()


def test_dropout_differs_from_block_to_block() -> None:
    query, key, _ = random_inputs(((700,),), heads=8, num_kv=8)
    value = torch.eye(700, dtype=torch.float64).expand(1, 8, -1, -1)
    spec = make_spec(FUNCTIONS["bidirectional"], ((700,),))
    out, _ = varlen_attention(SimpleNamespace(), query, key, value, spec, dropout=0.5)
    assert len(next(iter(spec.cache.values()))) > 1
    assert (out[0, :, 0] != 0).unique(dim=0).shape[0] == 700


def test_overlapping_slices_sum_in_fp32() -> None:
    tensor = torch.zeros(1, 1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
    slices = take_slices(tensor, [Span(0, 1, 3)] * 300, overlap=True)  # bf16 counts to 256
    sum(x.sum() for x in slices).backward()
    assert tensor.grad is not None and tensor.grad.flatten().tolist() == [0, 300, 300, 0]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else [out]
        owned = [x for x in outputs if isinstance(x, Tensor) and x.untyped_storage().nbytes() > 8]
        self.numel = max([self.numel, *(x.untyped_storage().nbytes() // x.itemsize for x in owned)])
        return out


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tensor_has_the_square_of_the_row(name: str, softcap: float | None) -> None:
    size, heads = 6000, 1
    inputs = random_inputs(((size,),), heads, heads, width=4, value_width=2, dtype=torch.float32)
    with LargestTensor() as largest:
        spec = make_spec(FUNCTIONS[name], ((size,),))
        varlen_attention(SimpleNamespace(), *inputs, spec, softcap=softcap)[0].sum().backward()
    blocks_of_whole_documents = softcap is not None or spec.evaluate or name == "left only"
    limit = 512 * size if blocks_of_whole_documents else 2 * size * 4  # else nothing is larger than the inputs
    assert size * 4 <= largest.numel <= limit


def test_masks_that_are_tensors_are_left_to_stock() -> None:
    query, key, value = random_inputs(((12,),))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    out, _ = varlen_attention(module, query, key, value, None)
    assert_equal(
        out, dense_attention(query, key, value, torch.ones(12, 12, dtype=torch.bool).tril()), [query, key, value]
    )
    last = query[:, :, -1:]  # decoding sees all of the cache
    for softcap in (None, 1e9):
        out, _ = varlen_attention(module, last, key, value, None, softcap=softcap)
        expected = dense_attention(last, key, value, torch.ones(1, 12, dtype=torch.bool))
        assert float((out - expected).detach().abs().max()) < 1e-6


def test_packed_documents_without_a_mask_are_refused() -> None:
    inputs = random_inputs(((5, 7),))
    with documents_set(Documents.from_lengths([(5, 7)])), pytest.raises(ValueError, match="hands no mask"):
        varlen_attention(SimpleNamespace(), *inputs, None)
    with documents_set(Documents.from_lengths([(12,)])):
        varlen_attention(SimpleNamespace(num_key_value_groups=2), *inputs, None)


def test_parts_of_the_row_are_refused() -> None:
    inputs = random_inputs(((6,),))
    with pytest.raises(ValueError, match="1 rows of 12 tokens, but queries are 1 rows of 6"):
        varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS["causal"], ((12,),)))


def test_registering_twice_keeps_a_wrapper() -> None:
    register_varlen_attention()
    assert AttentionMaskInterface()[VARLEN_NAME] is omni_mask

    def wrapper() -> None: ...

    before = AttentionInterface()[VARLEN_NAME]
    try:
        AttentionInterface.register(VARLEN_NAME, wrapper)
        register_varlen_attention()
        assert AttentionInterface()[VARLEN_NAME] is wrapper
    finally:
        AttentionInterface.register(VARLEN_NAME, before)
