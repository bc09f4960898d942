"""The path through FlexAttention, uncompiled and in fp64, against stock attention and dense masks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2

from hf_veomni.attention import flex
from hf_veomni.attention.blocks import Formula
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.varlen import VARLEN_NAME, choose_path, varlen_attention
from tests.unit.attention.dense import (
    FUNCTIONS,
    LENGTHS,
    Rows,
    assert_equal,
    dense_attention,
    dense_mask,
    gradients,
    make_spec,
    random_inputs,
)
from tests.unit.attention.test_sinks import make_inputs, ours, stock
from tests.unit.attention.test_varlen import LargestTensor
from tests.unit.attention.test_varlen_models import LENGTHS as MODEL_LENGTHS
from tests.unit.attention.test_varlen_models import build, largest_difference, packed, run

GROUPS = torch.tensor([[0] * 20 + [1] * 30 + [0] * 40 + [2] * 60 + [0] * 80, [1] * 90 + [0] * 140])


def images(groups: Tensor, window: int | None = None) -> Callable:
    """Tokens of an image see all of it, as in Gemma 3."""

    def same_group(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        group = groups[batch_idx, q_idx]
        return (group == groups[batch_idx, kv_idx]) & (group > 0)

    causal = masking_utils.causal_mask_function
    if window is not None:
        causal = masking_utils.sliding_window_causal_mask_function(window)
    return masking_utils.or_masks(causal, same_group)


MIXED = {**FUNCTIONS, "images": images(GROUPS), "images in a window": images(GROUPS, 17)}


@pytest.fixture(autouse=True)
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled FlexAttention has a backward on the CPU, in any precision, and a check that forbids it."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *args: None)
    torch._dynamo.reset()  # without `_compiled`, all tests share the 8 variants that one function may have


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the path run here; returns the block masks that FlexAttention is called with."""
    masks: list[Any] = []

    def uncompiled(*args: Any, block_mask: Any, **kwargs: Any) -> Any:
        masks.append(block_mask)
        return flex_attention(*args, block_mask=block_mask, **kwargs)

    monkeypatch.setattr(flex, "has_flex", lambda device: True)
    monkeypatch.setattr(flex, "_ERROR", {torch.float64: 1e-12})
    monkeypatch.setattr(flex, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(flex, "_compiled", lambda kind: uncompiled)
    monkeypatch.setattr(flex, "flex_works", lambda *args: True)
    return masks


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's eager attention rounds its softmax to fp32."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (6, 2, 8, 5), (4, 1, 5, 8)], ids=str)
@pytest.mark.parametrize("name", ["causal", "sliding", "bidirectional sliding"])
def test_softcap_equals_gemma2_eager(name: str, shape: tuple[int, ...], calls: list, exact_softmax: None) -> None:
    inputs = random_inputs(LENGTHS, *shape)
    allowed = dense_mask(FUNCTIONS[name], LENGTHS)
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    module = SimpleNamespace(num_key_value_groups=shape[0] // shape[1], training=True)
    expected, _ = modeling_gemma2.eager_attention_forward(module, *inputs, mask, scaling=0.7, softcap=1.5)
    out, _ = varlen_attention(module, *inputs, make_spec(FUNCTIONS[name], LENGTHS), scaling=0.7, softcap=1.5)
    assert len(calls) == 1
    assert_equal(out, expected, inputs, limit=1e-12)


@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_sinks_equal_gpt_oss_eager(name: str, calls: list) -> None:
    inputs = make_inputs(4, 2, 8, 8)
    out = ours(inputs, make_spec(FUNCTIONS[name], LENGTHS), 0.4)
    assert len(calls) == 1
    assert_equal(out, stock(inputs, dense_mask(FUNCTIONS[name], LENGTHS), 0.4), inputs, limit=1e-11)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["images", "images in a window"])
def test_masks_without_gaps_are_evaluated_once(name: str, padded: bool, calls: list) -> None:
    padding = None
    if padded:
        padding = torch.ones(2, 230, dtype=torch.bool)
        padding[0, 211:], padding[1, :41] = False, False
    inputs = random_inputs(LENGTHS)
    spec = make_spec(MIXED[name], LENGTHS, padding)
    assert spec.evaluate
    expected = dense_attention(*inputs, dense_mask(MIXED[name], LENGTHS, padding))
    for _ in range(2):
        out, _ = varlen_attention(SimpleNamespace(), *inputs, spec)
        assert_equal(out, expected, inputs, limit=1e-12)
    assert len(calls) == 2 and calls[0] is calls[1]


def test_masks_with_gaps_are_left_to_the_blocks(calls: list) -> None:
    padding = torch.ones(2, 230, dtype=torch.bool)
    padding[1, 100:110] = False  # behind it, causal queries see what is on both sides
    inputs = random_inputs(LENGTHS)
    for name, given in (("unknown", None), ("causal", padding)):
        out, _ = varlen_attention(SimpleNamespace(), *inputs, make_spec(FUNCTIONS[name], LENGTHS, given), softcap=3.0)
        assert out.shape == (2, 230, 4, 8) and calls == []


def test_compiled_for_one_length_and_then_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second length makes it compile for any; further lengths and masks do not."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, backend=backend, **kwargs))
    flex._compiled.cache_clear()

    def attend(name: str, tokens: int, rows: int = 1, grad: bool = True) -> int:
        before, lengths = len(compiled), ((tokens // 3, tokens - tokens // 3),) * rows
        inputs = [x.detach().requires_grad_(grad) for x in random_inputs(lengths, 4, 2, 16, 16)]
        with torch.set_grad_enabled(grad):
            flex.attend_flex(*inputs, make_spec(FUNCTIONS[name], lengths), Formula(0.1, 3.0))
        return len(compiled) - before

    assert [attend("causal", n) for n in (256, 1024, 1000, 128, 100, 77, 2048)] == [1, 1, 0, 0, 0, 0, 0]
    assert [attend(name, 1000) for name in FUNCTIONS if name != "unknown"] == [0] * 5
    assert [attend("causal", n, grad=False) for n in (256, 1024, 77)] == [1, 0, 0]
    assert [attend("causal", 500, rows=rows) for rows in (2, 3, 5)] == [1, 0, 0]
    flex._compiled.cache_clear()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_gets_zeros_and_gives_no_gradient(softcap: float | None, calls: list) -> None:
    padding = torch.ones(2, 230, dtype=torch.bool)
    padding[0, 211:], padding[1, :41] = False, False
    inputs = make_inputs(4, 2, 8, 8)
    spec = make_spec(FUNCTIONS["causal"], LENGTHS, padding)
    out, _ = varlen_attention(SimpleNamespace(), *inputs[:3], spec, scaling=0.4, softcap=softcap, s_aux=inputs[3])
    assert len(calls) == 1 and not out[~padding].any()
    for grad in gradients(out, inputs[:3]):
        assert not grad.transpose(1, 2)[~padding].any() and torch.isfinite(grad).all()
    if softcap is None:
        expected = stock(inputs, dense_mask(FUNCTIONS["causal"], LENGTHS, padding), 0.4)
        assert_equal(out, expected.masked_fill(~padding[..., None, None], 0), inputs, limit=1e-11)


ROWS: list[Rows] = [LENGTHS, ((128, 128, 300),), ((1,) * 200 + (500,),), ((640,),), ((37, 900, 3),)]


@pytest.mark.parametrize("lengths", ROWS, ids=lambda rows: str(rows)[:30])
@pytest.mark.parametrize("name", MIXED)
def test_block_mask_equals_dense_mask(name: str, lengths: Rows) -> None:
    """Which blocks are left out, full or partly masked, and what the mask function says inside of the last kind."""
    if (name.startswith("images") and lengths != LENGTHS) or name == "unknown":
        pytest.skip("the groups are those of other rows, or there is no block mask")
    limits = flex.find_limits(make_spec(MIXED[name], lengths))
    assert limits is not None and limits.dead is None
    mask, size = flex.make_block_mask(limits), sum(lengths[0])
    assert mask.shape == (len(lengths), 1, -(-size // 128) * 128, -(-size // 128) * 128)
    blocks = mask.shape[-1] // 128
    got = torch.zeros(len(lengths), blocks, 128, blocks, 128, dtype=torch.bool)
    rows, own = torch.arange(len(lengths)), torch.arange(mask.shape[-1])
    inside = mask.mask_mod(rows[:, None, None], torch.tensor(0), own[:, None], own).view(got.shape)
    seen = []
    for num, indices, partly in [
        (mask.kv_num_blocks, mask.kv_indices, True),
        (mask.full_kv_num_blocks, mask.full_kv_indices, False),
    ]:
        for row in range(len(lengths)):
            for query in range(blocks):
                for key in indices[row, 0, query, : num[row, 0, query]].tolist():
                    assert (row, query, key) not in seen
                    seen.append((row, query, key))
                    got[row, query, :, key] = inside[row, query, :, key] if partly else True
    got = got.view(len(lengths), blocks * 128, -1)[:, :size, :size]
    assert got.equal(dense_mask(MIXED[name], lengths)[:, 0])
    needed = got.new_zeros(len(lengths), blocks * 128, blocks * 128)
    needed[:, :size, :size] = got
    needed[:, range(size, blocks * 128), range(size, blocks * 128)] = True  # padding sees itself
    assert len(seen) == int(needed.view(-1, blocks, 128, blocks, 128).any(-1).any(2).sum())  # and no block beside


@pytest.mark.parametrize("name", ["causal", "sliding"])
def test_nothing_of_64k_tokens_squared_is_made(name: str) -> None:
    lengths = ((20000, 1, 30000, 15535),)
    with LargestTensor() as largest:
        limits = flex.find_limits(make_spec(FUNCTIONS[name], lengths))
        assert limits is not None
        mask = flex.make_block_mask(limits)
    assert mask.kv_indices.shape == (1, 1, 512, 512)
    assert largest.numel <= 2 * 512**2  # of 4096 * 512**2
    held = (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices)
    assert sum(x.numel() * x.itemsize for x in held if x is not None) == 16 * 512**2


def test_a_mask_of_a_long_document_is_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flex.find_limits(make_spec(MIXED["images"], LENGTHS))
    monkeypatch.setattr(flex, "_EVALUATED", 500)
    with LargestTensor() as largest:
        parts = flex.find_limits(make_spec(MIXED["images"], LENGTHS))
    assert whole is not None and parts is not None and largest.numel < 2000
    assert whole.low.equal(parts.low) and whole.high.equal(parts.high)


def path(softcap: float | None = None, dropout: float = 0.0, **kwargs: Any) -> str:
    inputs = random_inputs(LENGTHS, dtype=kwargs.pop("dtype", torch.float64))
    spec = make_spec(FUNCTIONS["causal"], LENGTHS)
    return choose_path(*inputs, spec, Formula(0.4, softcap, dropout), **kwargs)


def test_it_is_chosen_where_a_trial_was_right(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    assert path(softcap=2.0) == "flex" and path() == "fused"
    assert path(sinks=torch.zeros(4)) == "flex"
    assert path(softcap=2.0, dropout=0.1) == "blocks"
    assert path(softcap=2.0, bias=torch.zeros(1, 4, 230, 230)) == "blocks"
    assert path(softcap=2.0, dtype=torch.bfloat16) == "blocks"  # of no known error here
    monkeypatch.setattr(flex, "_LEAST_WIDTH", 16)
    assert path(softcap=2.0) == "blocks"


def trial(**kwargs: Any) -> bool:
    flex_works = flex.flex_works.__wrapped__  # without its memory
    given = {"rows": 2, "heads": (4, 2), "widths": (8, 5), "formula": Formula(0.4, 2.0), "with_sinks": True, **kwargs}
    return flex_works(torch.device("cpu"), torch.float64, **given)


def test_trial_compares_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_ERROR", {torch.float64: 1e-12})
    monkeypatch.setattr(flex, "_compiled", lambda kind: flex_attention)
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("seen"), lambda x: x):
        assert trial() and trial(with_sinks=False) and trial(formula=Formula(0.4))
    assert torch.get_rng_state().equal(state)

    def wrong_gradient(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return flex_attention(query + (query - query.detach()) * 1e-3, *args, **kwargs)

    monkeypatch.setattr(flex, "_compiled", lambda kind: wrong_gradient)
    with pytest.warns(UserWarning, match=r"does not run here for \(4, 2\) heads .* \(a relative error of 1"):
        assert not trial()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(flex, "_compiled", lambda kind: fails)
    with pytest.warns(UserWarning, match="out of resource: shared memory.*block by block"):
        assert not trial()


def test_packed_gemma2_equals_each_document_alone(calls: list, exact_softmax: None) -> None:
    generator = torch.Generator().manual_seed(1)
    size = sum(MODEL_LENGTHS)
    ids = torch.randint(1, 60, (1, size), generator=generator)
    weights = torch.randn(1, size, 60, dtype=torch.float64, generator=generator)
    alone = build("gemma2", "eager")
    pieces = []
    for part, weight in zip(ids.split(MODEL_LENGTHS, 1), weights.split(MODEL_LENGTHS, 1), strict=True):
        piece, expected = run(alone, part, weight)
        pieces.append(piece)
    for checkpointing in (False, True):
        calls.clear()
        model = build("gemma2", VARLEN_NAME)
        if checkpointing:
            # Uncompiled, FlexAttention traces its backward in each forward, which the other kind takes for its own.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.train()
        positions = torch.cat([torch.arange(n) for n in MODEL_LENGTHS])[None]
        with packed(Documents.from_lengths([MODEL_LENGTHS])):
            logits, grads = run(model, ids, weights, position_ids=positions)
        assert len(calls) == (4 if checkpointing else 2)
        assert len({id(mask) for mask in calls}) == 2  # one for each kind of layer, in the recomputation too
        assert float((logits - torch.cat(pieces, 1)).abs().max()) < 2e-6
        assert largest_difference(grads, expected) < 2e-5
