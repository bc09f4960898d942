"""Pipelined Ulysses: the attention alone in fp64 against one rank, full models in fp32 against the blocking form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_veomni import UnsupportedError, detach_omni, prepare_omni
from hf_veomni.comm.all_to_all import _GROUPS
from hf_veomni.context import within
from hf_veomni.sequence.pipelined import pipelined_attention
from hf_veomni.sequence.ulysses import EXCHANGED, AttentionCall
from tests.models import build_model, packed_batch, padded_batch
from tests.ranks.sequence.test_ulysses import _errors


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2), (9, 3), (8, 4), (5, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_it_equals_single_rank(ranks, size, heads):
    for errors in ranks(size).run(_errors, *heads, 4, pipelined_attention):
        assert max(errors) < 1e-12, errors


def test_another_value_width_equals_single_rank(ranks):
    for errors in ranks(2).run(_errors, 4, 2, 3, pipelined_attention):
        assert max(errors) < 1e-12, errors


def differences(model: Any, other: Any, batch: Any) -> list[float]:
    """Relative differences of loss and gradients between two prepared models of the same weights."""
    losses = []
    for each in (model, other):
        loss = each(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    found = [abs(float(losses[0] - losses[1])) / float(losses[0])]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            a, b = one.grad.to_local(), two.grad.to_local()
            found.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) if a.numel() else 0.0)
    return found


def _models(name: str, packed: bool, checkpointing: bool) -> tuple[float, int]:
    """The largest difference, and exchanges of both."""
    batch = packed_batch([11, 1, 17, 8]) if packed else padded_batch([23, 37])
    models = [prepare_omni(build_model(name), f"sp=2{overlap}") for overlap in ("", ",overlap=chunks")]
    for model in models:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    calls, original = [], dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        worst = max(differences(*models, batch))
    finally:
        dist.all_to_all_single = original
    assert all(EXCHANGED not in vars(module) for module in detach_omni(models[1]).modules())
    return worst, len(calls)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "llama_uneven", "llama_mqa", "gpt_oss", "deepseek_v3"])
def test_models_equal_the_blocking_form(ranks, name, packed, checkpointing):
    if name == "gpt_oss" and packed is False:
        pytest.skip("its padded rows are covered by the others")
    for worst, calls in ranks(2).run(_models, name, packed, checkpointing, timeout=120):
        assert worst < 1e-6
        assert calls > 2 * 2 * 2 * 2, "no more exchanges than those of the blocking form"


def _order() -> list[str]:
    """What a rank does, in order, forward and backward."""
    log: list[str] = []

    class Logged:
        def start(self, x: Any, *args: Any) -> Any:
            log.append("start")
            return _GROUPS.start(x, *args)

        def wait(self, ticket: Any) -> Any:
            log.append("wait")
            return _GROUPS.wait(ticket)

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            log.append("attend")
            return (q + k + v).transpose(1, 2)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            log.append("attend")
            return (grads[0].transpose(1, 2),) * 3

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return Attend.apply(q, k, v), None

    module, group = torch.nn.Module(), dist.group.WORLD
    tensors = [torch.randn(1, 8, 6, 2, requires_grad=True) for _ in range(3)]
    with within(transport=Logged()):
        out = pipelined_attention(AttentionCall(attention, module, None, 8, {}), *tensors, group)
        log.append("|")
        out.sum().backward()
    return log


def test_exchanges_are_under_the_attention_in_both_directions(ranks):
    """Between the start of an exchange and its wait some chunk attends, but for the first one in and the last out."""
    for log in ranks(2).run(_order):
        forward, backward = log[: log.index("|")], log[log.index("|") + 1 :]
        assert forward.count("attend") == backward.count("attend") == 4
        for phase in (forward, backward):
            under = 0
            waiting: list[int] = []
            for place, what in enumerate(phase):
                if what == "start":
                    waiting.append(place)
                elif what == "wait":
                    begin = waiting.pop(0)
                    under += "attend" in phase[begin:place]
            assert under >= 6, phase  # of 8


def _keys(heads: int, groups: int) -> list[int]:
    """Where the keys of each chunk lie."""
    found: list[int] = []

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        found.append(k.data_ptr())
        return (q + k + v).transpose(1, 2), None

    call = AttentionCall(attention, torch.nn.Module(), None, heads, {})
    tensors = [torch.randn(1, count, 6, 2, requires_grad=True) for count in (heads, groups, groups)]
    pipelined_attention(call, *tensors, dist.group.WORLD).sum().backward()
    return found


def test_keys_that_came_with_the_chunk_before_are_not_copied(ranks):
    for places in ranks(2).run(_keys, 8, 2):
        assert len(places) == 4 and len(set(places)) == 1


def test_chunks_of_nothing_are_refused():
    with pytest.raises(UnsupportedError, match="`overlap` .'chunks'. has no effect on LlamaForCausalLM"):
        prepare_omni(build_model("llama"), "overlap=chunks")


def _by_rules(rules: dict[str, dict[str, str]], overlap: str) -> list[str]:
    plan = {"sp_size": 2, "ep_size": 2, "overlap": overlap, "modules": rules}
    model = prepare_omni(build_model("qwen3_moe"), plan)
    marks = {EXCHANGED, "_omni_chunks"}
    return [name for name, module in model.named_modules() if marks & set(vars(module))]


@pytest.mark.parametrize(
    ("rules", "overlap", "expected"),
    [
        ({}, "chunks", ["layers.0.self_attn", "layers.0.mlp.experts", "layers.1.self_attn", "layers.1.mlp.experts"]),
        ({"*.experts": {"overlap": "none"}}, "chunks", ["layers.0.self_attn", "layers.1.self_attn"]),
        ({"*.1.self_attn": {"overlap": "chunks"}}, "none", ["layers.1.self_attn"]),
        ({}, "none", []),
    ],
)
def test_rules_choose_by_module(ranks, rules, overlap, expected):
    for found in ranks(2).run(_by_rules, rules, overlap):
        assert found == [f"model.{name}" for name in expected]


def test_a_rule_without_effect_is_refused(ranks):
    rules = {"*.mlp": {"overlap": "chunks"}}
    ranks(2).raises(_by_rules, rules, "none", match="'chunks'. for '..mlp' has no effect", kind="UnsupportedError")
