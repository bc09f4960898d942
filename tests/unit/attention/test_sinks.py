"""Attention sinks on the varlen kernel, which is emulated here in fp64, against GPT-OSS's own eager attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss import modeling_gpt_oss

from hf_veomni.attention import kernel, varlen
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.varlen import VARLEN_NAME, varlen_attention
from tests.unit.attention import emulated
from tests.unit.attention.dense import FUNCTIONS, LENGTHS, dense_mask, gradients, make_spec, random_inputs
from tests.unit.attention.test_varlen_models import LENGTHS as MODEL_LENGTHS
from tests.unit.attention.test_varlen_models import build, largest_difference, packed, run

SHAPES = [(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 12, 5), (8, 2, 5, 12)]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return emulated.use(monkeypatch)


def make_inputs(*shape: int) -> list[Tensor]:
    """Query, key, value and sinks, of which some outweigh all keys and some weigh nothing."""
    inputs = random_inputs(LENGTHS, *shape)
    sinks = torch.randn(shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    sinks[0], sinks[1] = 40, -40
    return [*inputs, sinks.requires_grad_()]


def stock(inputs: list[Tensor], allowed: Tensor, scaling: float) -> Tensor:
    query, key, value, sinks = inputs
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=True, sinks=sinks)
    out, _ = modeling_gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling=scaling)
    return out


def ours(inputs: list[Tensor], spec: Any, scaling: float) -> Tensor:
    return varlen_attention(SimpleNamespace(), *inputs[:3], spec, scaling=scaling, s_aux=inputs[3])[0]


def assert_exact(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert float((out - expected).detach().abs().max()) < 1e-12
    for got, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert got.dtype == wanted.dtype
        assert float((got - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("causal", (-1, 0)),
        ("sliding", (16, 0)),
        ("bidirectional", (-1, -1)),
        ("bidirectional sliding", (9, 9)),
        ("left only", (39, -1)),
    ],
)
def test_sinks_on_the_kernel_equal_gpt_oss_eager(
    name: str, window: Any, shape: tuple[int, ...], windows: list[Any]
) -> None:
    inputs = make_inputs(*shape)
    out = ours(inputs, make_spec(FUNCTIONS[name], LENGTHS), 0.4)
    assert windows == [window]
    assert_exact(out, stock(inputs, dense_mask(FUNCTIONS[name], LENGTHS), 0.4), inputs)


@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_padding_gets_zeros_and_gives_no_gradient(name: str, windows: list[Any]) -> None:
    padding = torch.ones(2, 230, dtype=torch.bool)
    padding[0, 211:], padding[1, :41] = False, False
    inputs = make_inputs(4, 2, 8, 8)
    out = ours(inputs, make_spec(FUNCTIONS[name], LENGTHS, padding), 0.4)
    assert len(windows) == 1
    expected = stock(inputs, dense_mask(FUNCTIONS[name], LENGTHS, padding), 0.4)
    assert_exact(out, expected.masked_fill(~padding[..., None, None], 0), inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, windows: list[Any]) -> None:
    inputs = make_inputs(4, 2, 8, 8)
    spec = make_spec(FUNCTIONS["sliding"], LENGTHS)

    def attention(*tensors: Tensor) -> Tensor:
        return ours(list(tensors), spec, 0.4)

    results = []
    for out in (attention(*inputs), checkpoint(attention, *inputs, use_reentrant=reentrant)):
        out.pow(2).sum().backward()
        results.append([x.grad for x in inputs])
        for x in inputs:
            x.grad = None
    assert len(windows) == 3  # the second one ran twice
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


def test_only_what_needs_a_gradient_gets_one(windows: list[Any]) -> None:
    inputs = make_inputs(4, 2, 8, 8)
    spec = make_spec(FUNCTIONS["causal"], LENGTHS)
    frozen = [*inputs[:3], inputs[3].detach()]
    grads = zip(
        gradients(ours(frozen, spec, 0.4), inputs[:3]), gradients(ours(inputs, spec, 0.4), inputs), strict=False
    )
    assert all(one.equal(other) for one, other in grads)


def test_gradient_of_sinks_is_summed_in_parts(windows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SUMMED_TOKENS", 64)
    inputs = make_inputs(4, 2, 8, 8)
    out = ours(inputs, make_spec(FUNCTIONS["causal"], LENGTHS), 0.4)
    assert_exact(out, stock(inputs, dense_mask(FUNCTIONS["causal"], LENGTHS), 0.4), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_as_the_kernel_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks stay in fp32, their gradient is summed in fp32, and outputs have one more rounding than the kernel's."""
    emulated.use(monkeypatch, dtype)
    exact = make_inputs(8, 2, 64, 64)
    inputs = [*(x.detach().to(dtype).requires_grad_() for x in exact[:3]), exact[3].detach().float().requires_grad_()]
    rounded = [x.detach().double().requires_grad_() for x in inputs]
    expected = stock(rounded, dense_mask(FUNCTIONS["sliding"], LENGTHS), 0.1)
    out = ours(inputs, make_spec(FUNCTIONS["sliding"], LENGTHS), 0.1)
    assert out.dtype == dtype
    pairs = [(out, expected), *zip(gradients(out, inputs), gradients(expected, rounded), strict=True)]
    for (got, wanted), given in zip(pairs, [out, *inputs], strict=True):
        assert got.dtype == given.dtype
        assert float(((got.double() - wanted).norm() / wanted.norm()).detach()) < 2e-2


def test_operators_of_the_installed_torch_take_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, through forward and backward: the only test without a GPU that meets the real operators."""
    monkeypatch.setattr(varlen, "has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "_settle_autocast", lambda *tensors: tensors)  # the meta device has none
    query, key, value, sinks = (
        torch.randn(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in [(2, 8, 230, 20), (2, 2, 230, 20), (2, 2, 230, 12), (8,)]
    )
    for name in ("causal", "sliding"):
        spec = make_spec(FUNCTIONS[name], LENGTHS, device="meta")
        out = ours([query, key, value, sinks], spec, 0.4)
        assert out.shape == (2, 230, 8, 12) and out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.sum(), [query, key, value, sinks])
        assert [x.shape for x in grads] == [x.shape for x in (query, key, value, sinks)]
    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal"]
    schema = torch.ops.torch_attn._varlen_attn.default._schema
    assert [x.name for x in schema.arguments][:10] == [*names, "scale", "window_size"]
    schema = torch.ops.torch_attn._varlen_attn_backward.default._schema
    expected = ["grad_out", *names[:3], "out", "lse", *names[3:], "rng_state", "scale", "window_size"]
    assert [x.name for x in schema.arguments][:14] == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gpt_oss_equals_each_document_alone(checkpointing: bool, windows: list[Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    size = sum(MODEL_LENGTHS)
    ids = torch.randint(1, 60, (1, size), generator=generator)
    weights = torch.randn(1, size, 60, dtype=torch.float64, generator=generator)
    alone = build("gpt_oss", "eager")
    pieces = []
    for part, weight in zip(ids.split(MODEL_LENGTHS, 1), weights.split(MODEL_LENGTHS, 1), strict=True):
        piece, expected = run(alone, part, weight)
        pieces.append(piece)
    model = build("gpt_oss", VARLEN_NAME)
    if checkpointing:
        model.activation_checkpointing_enable()
    positions = torch.cat([torch.arange(n) for n in MODEL_LENGTHS])[None]
    with packed(Documents.from_lengths([MODEL_LENGTHS])):
        logits, grads = run(model, ids, weights, position_ids=positions)
    assert windows[:2] == [(4, 0), (-1, 0)]  # a layer with a window, and one without
    assert float((logits - torch.cat(pieces, 1)).abs().max()) < 2e-6  # its router and norms round to fp32
    assert largest_difference(grads, expected) < 2e-5
