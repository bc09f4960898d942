"""The path through torch's varlen kernel: emulated on the CPU, and real on a CUDA device."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import masking_utils

from hf_veomni.sequence import varlen
from hf_veomni.sequence.varlen import varlen_attention
from tests.unit.sequence.dense import (
    FUNCTIONS,
    LENGTHS,
    assert_equal,
    dense_attention,
    dense_mask,
    gradients,
    make_spec,
    random_inputs,
)


def emulated_kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, and what it asks of its arguments."""
    given = inspect.signature(varlen_attn).bind(query, key, value, *args, **kwargs)
    given.apply_defaults()
    edges, (left, right) = given.arguments["cu_seq_q"], given.arguments["window_size"]
    assert edges.dtype == torch.int32 and given.arguments["cu_seq_k"].equal(edges)
    longest = int(edges.diff().max())
    assert type(given.arguments["max_q"]) is int and given.arguments["max_q"] == given.arguments["max_k"] == longest
    assert query.shape[0] == key.shape[0] == value.shape[0] == edges[-1]
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert given.arguments["enable_gqa"] or query.shape[1] == key.shape[1]
    outputs = []
    for begin, end in pairwise(edges.tolist()):
        q, k, v = (x[None, begin:end].transpose(1, 2) for x in (query, key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        mask = ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        outputs.append(dense_attention(q, k, v, mask, given.arguments["scale"])[0])
    return torch.cat(outputs)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the kernel path run here, with the kernel emulated in fp64; returns the windows that it is called with."""
    calls: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["window_size"])
        return emulated_kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "_KERNEL_DTYPES", (torch.float64,))
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    return calls


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (4, 2, 12, 5), (4, 1, 5, 12)], ids=str)
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("causal", (-1, 0)),
        ("bidirectional", (-1, -1)),
        ("sliding", (16, 0)),
        ("bidirectional sliding", (9, 9)),
        ("left only", (39, -1)),
    ],
)
def test_kernel_path_equals_dense_mask(name: str, window: Any, shape: tuple[int, ...], kernel_calls: list) -> None:
    inputs = random_inputs(LENGTHS, *shape)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS[name], LENGTHS))
    assert kernel_calls == [window]
    assert_equal(out, dense_attention(*inputs, dense_mask(FUNCTIONS[name], LENGTHS)), inputs)


def test_kernel_without_groups_gets_equal_heads(kernel_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_TAKES_GROUPS", False)
    inputs = random_inputs(LENGTHS, 4, 2, 8, 8)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS["causal"], LENGTHS))
    assert kernel_calls == [(-1, 0)]
    assert_equal(out, dense_attention(*inputs, dense_mask(FUNCTIONS["causal"], LENGTHS)), inputs)


def test_kernel_path_drops_padding_and_windows_that_nothing_feels(kernel_calls: list) -> None:
    lengths = ((16, 74), (90,))
    padding = torch.ones(2, 90, dtype=torch.bool)
    padding[0, 60:], padding[1, :41] = False, False
    inputs = random_inputs(lengths)
    for function, window in [
        (masking_utils.sliding_window_causal_mask_function(50), (-1, 0)),
        (masking_utils.sliding_window_causal_mask_function(48), (47, 0)),
    ]:
        out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(function, lengths, padding))
        assert kernel_calls.pop() == window
        assert_equal(out, dense_attention(*inputs, dense_mask(function, lengths, padding)), inputs)


def test_kernel_is_not_called_for_padding_alone(kernel_calls: list) -> None:
    spec = make_spec(FUNCTIONS["causal"], ((9,),), torch.zeros(1, 9, dtype=torch.bool))
    assert not varlen_attention(SimpleNamespace(), *random_inputs(((9,),)), spec)[0].any()
    assert kernel_calls == []


def test_kernel_path_cuts_chunks(kernel_calls: list) -> None:
    function = masking_utils.chunked_causal_mask_function(50, torch.zeros(2, dtype=torch.long))
    cut = ((50, 20, 1, 50, 50, 29, 30), (50, 50, 50, 50, 30))
    inputs = random_inputs(LENGTHS)
    out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(function, LENGTHS))
    assert kernel_calls == [(-1, 0)]
    assert_equal(out, dense_attention(*inputs, dense_mask(FUNCTIONS["causal"], cut)), inputs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unknown", {}),
        ("causal", {"softcap": 2.0}),
        ("causal", {"s_aux": torch.zeros(4)}),
        ("causal", {"dropout": 0.5}),
        ("causal", {"position_bias": torch.zeros(1, 4, 230, 230)}),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_the_blocks(name: str, options: dict, kernel_calls: list) -> None:
    out, _ = varlen_attention(
        SimpleNamespace(), *random_inputs(LENGTHS), make_spec(FUNCTIONS[name], LENGTHS), **options
    )
    assert out.shape == (2, 230, 4, 8) and kernel_calls == []


def test_kernel_takes_what_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def applies(width: int, dtype: torch.dtype, value_width: int = 8) -> bool:
        x = torch.zeros(1, 1, 4, width, dtype=dtype)
        return varlen.kernel_applies(x, x, torch.zeros(1, 1, 4, value_width, dtype=dtype))

    assert not applies(64, torch.bfloat16)  # on the CPU
    monkeypatch.setattr(varlen, "has_kernel", lambda device: True)
    assert applies(64, torch.bfloat16) and applies(256, torch.float16)
    assert not applies(64, torch.float32) and not applies(257, torch.bfloat16)
    assert not applies(64, torch.bfloat16, value_width=512)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (4, 4, 128, 128), (4, 4, 192, 128), (6, 1, 20, 12)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "unknown"])
def test_cuda_kernel_equals_fp64_on_cpu(name: str, padded: bool, shape: tuple[int, ...]) -> None:
    padding = None
    if padded:
        padding = torch.ones(2, 230, dtype=torch.bool)
        padding[0, 211:], padding[1, :41] = False, False
    exact = random_inputs(LENGTHS, *shape)
    expected = dense_attention(*exact, dense_mask(FUNCTIONS[name], LENGTHS, padding))
    inputs = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    assert varlen.kernel_applies(*inputs)
    on_device = None if padding is None else padding.cuda()
    spec = make_spec(FUNCTIONS[name], LENGTHS, on_device, device="cuda")
    out, _ = varlen_attention(SimpleNamespace(), *inputs, spec)
    pairs = [(out, expected), *zip(gradients(out, inputs), gradients(expected, exact), strict=True)]
    for got, wanted in pairs:
        error = (got.double().cpu() - wanted).norm() / wanted.norm()
        assert float(error.detach()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cuda_without_kernel_equals_fp64_on_cpu(name: str, softcap: float | None) -> None:
    exact = random_inputs(LENGTHS, 4, 2, 64, 32)
    expected, _ = varlen_attention(SimpleNamespace(), *exact, make_spec(FUNCTIONS[name], LENGTHS), softcap=softcap)
    inputs = [x.detach().to("cuda", torch.float32).requires_grad_() for x in exact]
    spec = make_spec(FUNCTIONS[name], LENGTHS, device="cuda")
    out, _ = varlen_attention(SimpleNamespace(), *inputs, spec, softcap=softcap)
    pairs = [(out, expected), *zip(gradients(out, inputs), gradients(expected, exact), strict=True)]
    for got, wanted in pairs:
        error = (got.double().cpu() - wanted).norm() / wanted.norm()
        assert float(error.detach()) < 1e-3
