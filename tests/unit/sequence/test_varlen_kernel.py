"""The path through torch's varlen kernel: emulated on the CPU, and real on a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from hf_veomni.sequence import kernel, varlen
from hf_veomni.sequence.varlen import varlen_attention
from tests.unit.sequence import emulated
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


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the kernel path run here, with the kernel emulated in fp64; returns the windows that it is called with."""
    return emulated.use(monkeypatch)


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


def test_kernel_of_torch_2_11_takes_groups_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.use(monkeypatch)
    given: dict[str, Any] = {}

    def without_groups(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.update(kwargs, heads=(query.shape[1], key.shape[1], value.shape[1]))
        return query.clone()

    monkeypatch.setattr(kernel, "varlen_attn", without_groups)
    for takes_groups in (False, True):
        given.clear()
        monkeypatch.setattr(kernel, "_TAKES_GROUPS", takes_groups)
        varlen_attention(SimpleNamespace(), *random_inputs(LENGTHS), make_spec(FUNCTIONS["causal"], LENGTHS))
        assert given["heads"] == (4, 2, 2)  # nothing is repeated
        assert given.get("enable_gqa", False) == takes_groups


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
        ("causal", {"s_aux": torch.zeros(4), "dropout": 0.5}),
        ("causal", {"s_aux": torch.zeros(4), "softcap": 2.0}),
        ("unknown", {"s_aux": torch.zeros(4)}),
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
