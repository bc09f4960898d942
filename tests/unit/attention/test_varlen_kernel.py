"""The path through torch's varlen kernel: emulated on the CPU, and real on a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2

from hf_veomni.attention import kernel, varlen
from hf_veomni.attention.blocks import Formula
from hf_veomni.attention.varlen import varlen_attention
from tests.unit.attention import emulated
from tests.unit.attention.dense import (
    FUNCTIONS,
    LENGTHS,
    assert_equal,
    dense_attention,
    dense_mask,
    gradients,
    make_spec,
    random_inputs,
)
from tests.unit.attention.test_flex import GROUPS, exact_softmax, images  # noqa: F401
from tests.unit.attention.test_sinks import make_inputs, ours, stock


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


def on_cuda(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def right_padding(padded: bool) -> Tensor | None:
    if not padded:
        return None
    padding = torch.ones(2, 230, dtype=torch.bool)
    padding[0, 211:], padding[1, :41] = False, False
    return padding


def to_cuda(exact: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values in `dtype`, sinks in fp32."""
    kinds = (dtype, dtype, dtype, torch.float32)
    return [x.detach().to("cuda", kind).requires_grad_() for x, kind in zip(exact, kinds, strict=False)]


def assert_close(out: Tensor, inputs: list[Tensor], expected: Tensor, exact: list[Tensor], limit: float) -> None:
    """Outputs and gradients, each relative to its norm in fp64."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # FlexAttention frees what its backward has used.
    grads = torch.autograd.grad((out * weights.to(out)).sum(), inputs)
    pairs = [(out, expected), *zip(grads, gradients(expected, exact), strict=True)]
    pairs = [(got.detach().double().cpu(), wanted.detach().double().cpu()) for got, wanted in pairs]
    errors = [float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs]
    assert max(errors) < limit, errors


def path_on_cuda(inputs: list[Tensor], spec: Any, softcap: float | None = None) -> str:
    sinks = inputs[3] if len(inputs) > 3 else None
    return varlen.choose_path(*inputs[:3], spec, Formula(0.1, softcap), sinks=sinks)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 2, 64, 64), (4, 4, 128, 128), (4, 4, 192, 128), (6, 1, 20, 12), (4, 2, 256, 256)], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "unknown"])
def test_cuda_kernel_equals_fp64_on_cpu(name: str, padded: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    padding = right_padding(padded)
    exact = random_inputs(LENGTHS, *shape)
    expected = dense_attention(*exact, dense_mask(FUNCTIONS[name], LENGTHS, padding))
    inputs = to_cuda(exact, dtype)
    spec = make_spec(FUNCTIONS[name], LENGTHS, None if padding is None else padding.cuda(), device="cuda")
    assert path_on_cuda(inputs, spec) == "kernel"
    out, _ = varlen_attention(SimpleNamespace(), *inputs, spec)
    assert_close(out, inputs, expected, exact, 2e-2)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 1, 64, 64), (6, 2, 20, 12), (4, 4, 128, 128)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_cuda_sinks_equal_gpt_oss_eager_in_fp64(
    name: str, padded: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    padding = right_padding(padded)
    exact = make_inputs(*shape)
    expected = stock(exact, dense_mask(FUNCTIONS[name], LENGTHS, padding), 0.1)
    if padding is not None:
        expected = expected.masked_fill(~padding[..., None, None], 0)
    inputs = to_cuda(exact, dtype)
    spec = make_spec(FUNCTIONS[name], LENGTHS, None if padding is None else padding.cuda(), device="cuda")
    assert path_on_cuda(inputs, spec) == "kernel"
    assert_close(ours(inputs, spec, 0.1), inputs, expected, exact, 2e-2)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 256, 256), (4, 2, 128, 128)], ids=str)
@pytest.mark.usefixtures("exact_softmax")
def test_cuda_softcap_equals_gemma2_eager_in_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact, module = random_inputs(LENGTHS, *shape), SimpleNamespace(num_key_value_groups=2, training=True)
    inputs = to_cuda(exact, dtype)
    for name, padded in (("causal", False), ("sliding", False), ("sliding", True)):
        padding = right_padding(padded)
        allowed = dense_mask(FUNCTIONS[name], LENGTHS, padding)
        mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
        expected, _ = modeling_gemma2.eager_attention_forward(module, *exact, mask, scaling=0.1, softcap=3.0)
        if padding is not None:
            expected = expected.masked_fill(~padding[..., None, None], 0)
        spec = make_spec(FUNCTIONS[name], LENGTHS, None if padding is None else padding.cuda(), device="cuda")
        if dtype == torch.bfloat16:  # in fp32 a width of 256 may be too much for the device, which is exact as well
            assert path_on_cuda(inputs, spec, 3.0) == "flex"
        out, _ = varlen_attention(module, *inputs, spec, scaling=0.1, softcap=3.0)
        assert_close(out, inputs, expected, exact, 2e-2 if dtype == torch.bfloat16 else 1e-3)


@on_cuda
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", [*FUNCTIONS, "images"])
def test_cuda_without_kernel_equals_fp64_on_cpu(name: str, softcap: float | None) -> None:
    function = FUNCTIONS[name] if name in FUNCTIONS else images(GROUPS.cuda())
    on_host = FUNCTIONS[name] if name in FUNCTIONS else images(GROUPS)
    exact = random_inputs(LENGTHS, 4, 2, 64, 32)
    expected, _ = varlen_attention(SimpleNamespace(), *exact, make_spec(on_host, LENGTHS), softcap=softcap)
    inputs = to_cuda(exact, torch.float32)
    spec = make_spec(function, LENGTHS, device="cuda")
    if name != "unknown" and (softcap is not None or name == "images"):
        assert path_on_cuda(inputs, spec, softcap) == "flex"
    out, _ = varlen_attention(SimpleNamespace(), *inputs, spec, softcap=softcap)
    assert_close(out, inputs, expected, exact, 1e-3)


@on_cuda
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cuda_recomputation_gives_the_same_gradients(softcap: float | None) -> None:
    """Of sinks on the kernel and of a softcap on FlexAttention, whose first call comes inside of the checkpoint."""
    exact = make_inputs(4, 2, 128, 128) if softcap is None else random_inputs(LENGTHS, 4, 2, 128, 128)
    inputs, spec = to_cuda(exact, torch.bfloat16), make_spec(FUNCTIONS["sliding"], LENGTHS, device="cuda")

    def attention(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        options: dict[str, Any] = {"scaling": 0.1, "softcap": softcap, "s_aux": sinks[0] if sinks else None}
        return varlen_attention(SimpleNamespace(), query, key, value, spec, **options)[0]

    again = checkpoint(attention, *inputs, use_reentrant=False)
    assert_close(again, inputs, attention(*inputs).double().cpu(), inputs, 1e-2)


@on_cuda
@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_cuda_sinks_in_fp32_equal_gpt_oss_eager_in_fp64(name: str) -> None:
    exact = make_inputs(8, 2, 64, 64)
    inputs, spec = to_cuda(exact, torch.float32), make_spec(FUNCTIONS[name], LENGTHS, device="cuda")
    assert path_on_cuda(inputs, spec) == "flex"
    expected = stock(exact, dense_mask(FUNCTIONS[name], LENGTHS), 0.1)
    assert_close(ours(inputs, spec, 0.1), inputs, expected, exact, 1e-3)


@on_cuda
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_cuda_64k_tokens_take_one_call_and_no_square(softcap: float | None) -> None:
    """Sinks on the kernel, a softcap on FlexAttention; the scores of one head alone would be 8 GB."""
    lengths = ((20000, 1, 30000, 15535),)
    spec = make_spec(FUNCTIONS["causal"], lengths, device="cuda")
    query, key, value = (
        torch.randn(1, n, 65536, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2)
    )
    sinks = torch.zeros(8, device="cuda", requires_grad=True) if softcap is None else None
    options: dict[str, Any] = {"scaling": 0.1, "softcap": softcap, "s_aux": sinks}
    inputs = [x for x in (query, key, value, sinks) if x is not None]
    assert path_on_cuda(inputs, spec, softcap) == ("kernel" if softcap is None else "flex")
    for _ in range(2):  # the first one compiles
        torch.cuda.reset_peak_memory_stats()
        out, _ = varlen_attention(SimpleNamespace(), query, key, value, spec, **options)
        grads = torch.autograd.grad(out.sum(), inputs)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    assert torch.cuda.max_memory_allocated() < 2e9
