"""The token-count rule on one rank; the collectives are in tests/ranks/prepare/test_loss.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from hf_veomni.loss import CausalLMLoss, attach_chunked_loss
from hf_veomni.loss.targets import targets_and_count


def _loss(label_smoothing: float = 0.0) -> CausalLMLoss:
    config = Qwen3Config(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = Qwen3ForCausalLM(config)
    attach_chunked_loss(model, chunked=False, label_smoothing=label_smoothing)
    return model.loss_function


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9), generator=generator)
    labels[0, :4] = -100
    return logits, labels


def _gradients(loss: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5), torch.tensor(5.0)])
@pytest.mark.parametrize("shifted", [False, True])
def test_real_logits_give_the_stock_loss(num_items, shifted):
    logits, labels = _batch()
    given = (
        {"labels": None, "shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}
        if shifted
        else {"labels": labels}
    )
    ours = _loss()(logits=logits, **given, vocab_size=11, num_items_in_batch=num_items)
    stock = ForCausalLMLoss(logits=logits, **given, vocab_size=11, num_items_in_batch=num_items)
    torch.testing.assert_close(_gradients(ours, logits), _gradients(stock, logits))


def test_another_ignore_index_is_respected():
    logits, labels = _batch()
    labels = torch.where(labels == -100, 3, labels)
    ours = _loss()(logits, labels, 11, ignore_index=3)
    stock = ForCausalLMLoss(logits, labels, 11, ignore_index=3)
    torch.testing.assert_close(_gradients(ours, logits), _gradients(stock, logits))


@pytest.mark.parametrize("num_items", [None, 7])
def test_without_targets_it_is_what_stock_gives(num_items):
    logits, labels = _batch()
    labels = torch.full_like(labels, -100)
    ours = _loss()(logits, labels, 11, num_items_in_batch=num_items)
    stock = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, stock, equal_nan=True)
    assert torch.isnan(ours) if num_items is None else ours == 0


def test_flattened_logits_are_accepted_as_in_stock():
    logits, labels = _batch()
    torch.testing.assert_close(_loss()(logits.flatten(0, 1), labels, 11), ForCausalLMLoss(logits, labels, 11))


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)])
def test_smoothing_equals_the_label_smoother_of_transformers(num_items):
    logits, labels = _batch()
    ours = _loss(0.1)(logits, labels, 11, num_items_in_batch=num_items)
    theirs = LabelSmoother(epsilon=0.1)(
        CausalLMOutput(logits=logits), labels, shift_labels=True, num_items_in_batch=num_items
    )
    torch.testing.assert_close(_gradients(ours, logits), _gradients(theirs, logits))


def test_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`label_smoothing` \(1.5\) must be between 0 and 1"):
        _loss().label_smoothing = 1.5


def test_labels_of_another_length_are_refused():
    logits, labels = _batch()
    with pytest.raises(ValueError, match=r"Targets of shape \(2, 8\) must match logits of shape \(2, 9, 11\)"):
        _loss()(logits, labels[:, :8], 11)


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="`labels` .None. or `shift_labels` .None. must be given"):
        _loss()(_batch()[0], None, 11)


def test_the_count_is_of_shifted_targets():
    labels = torch.tensor([[4, 5, -100, 6]])
    targets, count = targets_and_count(labels, None, None, 4, None)
    assert targets.tolist() == [[5, -100, 6, -100]]
    assert count == 2


def test_fp64_logits_are_not_rounded():
    logits, labels = _batch()
    loss = _loss()(logits.double(), labels, 11)
    assert loss.dtype == torch.float64
    expected = F.cross_entropy(logits.double()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
