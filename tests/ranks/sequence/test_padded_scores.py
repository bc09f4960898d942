"""Losses that read what a model says at padding: as stock sdpa and eager have it, which agree on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    BertForQuestionAnswering,
    LlamaForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from tests.ranks.trainer.test_losses import _bert, _spread
from tests.ranks.training import tiny_model

IDS = torch.tensor([[5, 9, 17, 4, 8, 33, 21, 6], [7, 3, 12, 40, 11, 0, 0, 0]])
MASK = (IDS != 0).long()


def _llama(attention: str) -> nn.Module:
    config = tiny_model().config
    config._attn_implementation = attention
    return LlamaForQuestionAnswering(config)


def _roberta(attention: str) -> nn.Module:
    sizes = _bert(attn_implementation=attention).to_dict()
    kept = {key: value for key, value in sizes.items() if key not in ("model_type", "architectures")}
    return RobertaForQuestionAnswering(RobertaConfig(**kept, attn_implementation=attention))


SPANS: dict[str, Callable[[str], nn.Module]] = {
    "bert": lambda attention: BertForQuestionAnswering(_bert(attn_implementation=attention)),
    "roberta": _roberta,
    "llama": _llama,
}


def _full(grads: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in grads if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def _spans(plan: str | None, name: str, attention: str) -> tuple[float, dict[str, Tensor]]:
    from hf_veomni import prepare_omni

    model: Any = _spread(SPANS[name](attention)).train()
    if plan is not None:
        prepare_omni(model, plan)
    ends = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 3])}
    loss = model(input_ids=IDS, attention_mask=MASK, **ends).loss
    loss.backward()
    return loss.item(), _full(model.named_parameters())


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(wanted.abs().max()) for wanted in expected.values())  # some are zero
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("world", "plan"), [(1, ""), (2, "dp_shard=2"), (2, "sp=2")])
@pytest.mark.parametrize("name", list(SPANS))
def test_spans_of_answers_in_padded_rows_equal_stock(ranks, name, world, plan, attention):
    expected, gradients = _spans(None, name, "sdpa" if attention == "eager" else "eager")  # the other one
    arguments = (plan, name, attention)
    found = [_spans(*arguments)] if world == 1 else ranks(world).run(_spans, *arguments, timeout=60)
    for loss, grads in found:
        assert loss == pytest.approx(expected, rel=1e-5)
        _assert_close(grads, gradients)


def _z_loss(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1).square().mean()


def _scored(logits: Tensor) -> Tensor:
    """Labels on padding."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1].float().square().mean()


READERS = {"z": _z_loss, "labels": _scored, "last": _last}


def _read(plan: str | None, name: str) -> tuple[float, dict[str, Tensor]]:
    from hf_veomni import gather_sequence, prepare_omni

    model: Any = tiny_model().train()
    if plan is not None:
        prepare_omni(model, plan, attention="keep")
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    loss = READERS[name](logits if plan is None else gather_sequence(logits, model))
    loss.backward()
    return loss.item(), _full(model.named_parameters())


@pytest.mark.parametrize(("world", "plan"), [(1, ""), (2, "dp_shard=2"), (2, "sp=2")])
@pytest.mark.parametrize("name", list(READERS))
def test_with_the_models_own_attention_padding_is_as_in_stock(ranks, name, world, plan):
    expected, gradients = _read(None, name)
    for loss, grads in [_read(plan, name)] if world == 1 else ranks(world).run(_read, plan, name, timeout=60):
        assert loss == pytest.approx(expected, rel=1e-5)
        _assert_close(grads, gradients)
