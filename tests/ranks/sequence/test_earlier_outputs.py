"""Outputs are gathered as what they are, also after another call; a loss set by hand gets full rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.ranks.training import lora_model, tiny_model

ROW = torch.arange(3, 11)[None]


def _outputs(model: Any, kind: str, length: int) -> Any:
    """What is gathered of one call, and its loss if it has one."""
    row = ROW[:, :length] if length < 9 else torch.arange(3, 3 + length)[None]
    with torch.set_grad_enabled(kind in ("training", "computed")):
        out = model.train(kind in ("training", "computed"))(input_ids=row, output_hidden_states=True)
        values = {
            "training": lambda: out.logits,
            "evaluated": lambda: out.logits,
            "hidden": lambda: out.hidden_states[-1],
            "computed": lambda: out.logits.float().log_softmax(-1).tanh(),
            "view": lambda: out.logits[..., :7],
            "tuple": lambda: model(input_ids=row, return_dict=False)[0],
            "lost": lambda: out.logits.log_softmax(-1),
        }
        return values[kind]()


def _gathered(kind: str, lengths: tuple[int, int], named: bool) -> Tensor:
    """The output of the first of two calls, gathered after the second."""
    from hf_veomni import gather_sequence, prepare_omni

    model = prepare_omni(lora_model() if kind == "computed" else tiny_model(), "sp=2")
    first = _outputs(model, kind, lengths[0])
    second = _outputs(model, kind, lengths[1])
    length = {"length": lengths[0]} if named else {}
    whole = gather_sequence(first, model, **length)
    assert gather_sequence(second, model, **({"length": lengths[1]} if named else {})).shape[1] == lengths[1]
    return whole.detach().clone()


@pytest.mark.parametrize("lengths", [(7, 8), (8, 7), (7, 12)], ids=str)
@pytest.mark.parametrize("kind", ["training", "evaluated", "hidden", "computed", "view", "tuple"])
def test_the_output_of_an_earlier_call_is_gathered_as_its_row(ranks, kind, lengths):
    expected = _outputs(lora_model() if kind == "computed" else tiny_model(), kind, lengths[0])
    for found in ranks(2).run(_gathered, kind, lengths, False, timeout=60):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_may_be_of_two_rows_is_refused_or_named(ranks):
    ranks(2).raises(_gathered, "lost", (7, 8), False, match="may be of a row of 7 or of 8 tokens", timeout=60)
    expected = _outputs(tiny_model(), "lost", 7)
    for found in ranks(2).run(_gathered, "lost", (7, 8), True, timeout=60):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _focal(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
    scores = logits[:, :-1].float().log_softmax(-1)
    picked = scores.gather(-1, labels[:, 1:, None])[..., 0]
    return -((1 - picked.exp()).square() * picked).mean()


def _last(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits[:, -1], labels[:, -1])


def _z_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return ForCausalLMLoss(logits, labels, vocab_size) + logits.logsumexp(-1).square().mean()


LOSSES = {"focal": _focal, "last": _last, "z": _z_loss, "stock": ForCausalLMLoss}


def _trained(plan: str | None, name: str, when: str) -> tuple[float, dict[str, Tensor]]:
    from hf_veomni import prepare_omni

    model: Any = tiny_model()
    if when == "before":
        model.loss_function = LOSSES[name]
    if plan is not None:
        prepare_omni(model, plan)
    model.loss_function = LOSSES[name]
    row = ROW[:, :7]
    loss = model.train()(input_ids=row, labels=row).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_set_by_hand_gets_whole_rows(ranks, name, when):
    expected, gradients = _trained(None, name, "after")
    for loss, found in ranks(2).run(_trained, "sp=2", name, when, timeout=60):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert found.keys() == gradients.keys()
        for key, wanted in gradients.items():
            torch.testing.assert_close(found[key], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_detaching_leaves_the_loss_that_was_set():
    from hf_veomni import detach_omni, prepare_omni

    model: Any = prepare_omni(tiny_model(), "")
    model.loss_function = _last
    model(input_ids=ROW, labels=ROW)
    assert detach_omni(model).loss_function is _last
