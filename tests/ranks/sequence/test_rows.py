"""Rows as users make them: padded on either side, shorter than sp, or wrongly assigned to the ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.models import build_model, packed_batch
from tests.ranks.parity import relative_error


def _padded(name: str, attention: str, left: bool) -> list[float]:
    """Positions as `generate` and many collators make them: padding gets position 1."""
    from hf_veomni import gather_sequence, prepare_omni

    ids = packed_batch((15,))["input_ids"].repeat(3, 1)
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 9)):
        mask[row, slice(length) if left else slice(-length, None)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # what a padding token would predict is nobody's
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    model = build_model(name)
    wanted = model(**batch, use_cache=False)
    prepare_omni(model, "sp=3", attention=attention)
    got = model(**batch)
    logits = gather_sequence(got.logits, model)
    return [
        relative_error(logits * mask[..., None], wanted.logits * mask[..., None]),
        relative_error(got.loss, wanted.loss),
    ]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("attention", ["auto", "keep"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_padding_with_positions_of_its_own_equals_one_rank(ranks, name, attention, left):
    for errors in ranks(3).run(_padded, name, attention, left):
        assert max(errors) < 1e-5, errors


def _short(name: str, size: int, chunked: bool) -> list[float]:
    from hf_veomni import prepare_omni

    ids = torch.randint(3, 97, (2, size), generator=torch.Generator().manual_seed(1))
    model = build_model(name)
    wanted = model(input_ids=ids, labels=ids, use_cache=False).loss
    wanted.backward()
    expected = model.get_input_embeddings().weight.grad
    model.zero_grad()
    prepare_omni(model, "sp=4", chunked_loss=chunked)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [
        relative_error(loss, wanted),
        relative_error(model.get_input_embeddings().weight.grad.full_tensor(), expected),
    ]


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "full"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_shorter_than_sp_equal_one_rank(ranks, name, size, chunked):
    for errors in ranks(4).run(_short, name, size, chunked):
        assert max(errors) < 1e-5, errors


def _other_rows(change: str) -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama"), "sp=2")
    rank = dist.get_rank()
    lengths = (15 - rank,) if change == "length" else (15,)
    model(**packed_batch(lengths, seed=rank if change == "content" else 0))


@pytest.mark.parametrize("change", ["length", "content"])
def test_ranks_of_an_sp_group_with_different_rows(ranks, change):
    ranks(2).raises(_other_rows, change, match="The ranks of an SP group were given different rows", timeout=30)


def _one_shifted_label() -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama"), "sp=2")
    ids = torch.tensor([[5]])
    model(input_ids=ids, labels=ids, shift_labels=F.pad(ids, (0, 0)))


def test_shifted_labels_that_may_be_a_row_or_a_slice(ranks):
    match = r"`shift_labels` \(1, 1\) may be a full row of 1 token or this rank's"
    ranks(2).raises(_one_shifted_label, match=match, timeout=30)
