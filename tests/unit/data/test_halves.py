"""A batch in two halves: where it is split, and what both hold."""

from __future__ import annotations

import pytest
import torch

from hf_veomni.data.halves import split_batch
from hf_veomni.host import knows, remember
from tests.models import packed_batch, padded_batch


@pytest.mark.parametrize(
    ("lengths", "first"),
    [((8, 8), 8), ((4, 20, 4, 4), 24), ((1, 1, 1, 30), 3), ((30, 1, 1), 30), ((5, 5, 5, 5, 5, 5), 15)],
)
def test_documents_are_split_at_the_boundary_of_nearest_cost(lengths: tuple[int, ...], first: int) -> None:
    batch = packed_batch(lengths)
    halves = split_batch(batch, 64)
    assert halves is not None
    assert [len(half["input_ids"][0]) for half in halves] == [first, sum(lengths) - first]
    for name, value in batch.items():
        assert torch.equal(torch.cat([half[name] for half in halves], dim=-1), value)
    assert halves[1]["position_ids"][0, 0] == 0


def test_attention_counts_in_the_cost() -> None:
    halves = split_batch(packed_batch((100, 300, 300, 300)), 4)  # equal tokens would be split after 400
    assert halves is not None and len(halves[0]["input_ids"][0]) == 400
    halves = split_batch(packed_batch([10] * 30 + [300]), 4)
    assert halves is not None and len(halves[0]["input_ids"][0]) == 300


def test_rows_are_split_in_the_middle() -> None:
    batch = padded_batch((9, 4, 7))
    halves = split_batch(batch, 64)
    assert halves is not None and [len(half["input_ids"]) for half in halves] == [1, 2]
    for name, value in batch.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), value)


def test_what_the_host_knows_it_knows_of_both() -> None:
    batch = packed_batch((5, 6))
    batch["position_ids"] = remember(batch["position_ids"])
    halves = split_batch(batch, 64)
    assert halves is not None and all(knows(half["position_ids"]) for half in halves)


def test_positions_of_four_axes_are_split_by_the_first() -> None:
    batch = packed_batch((5, 6))
    batch["position_ids"] = batch["position_ids"].expand(4, 1, -1).clone()
    halves = split_batch(batch, 64)
    assert halves is not None and halves[1]["position_ids"].shape == (4, 1, 6)
    batch["position_ids"] = batch["position_ids"][:3]
    assert split_batch(batch, 64) is None


def test_what_cannot_be_split_is_not() -> None:
    assert split_batch(packed_batch((9,)), 64) is None
    assert split_batch({**packed_batch((5, 6)), "pixel_values": torch.ones(4, 3)}, 64) is None
    assert split_batch({name: x for name, x in packed_batch((5, 6)).items() if name != "position_ids"}, 64) is None
    crossing = packed_batch((5, 6))
    crossing["labels"][0, 5] = 7  # a target that the document before it predicts
    assert split_batch(crossing, 64) is None
    crossing = packed_batch((5, 6, 20))
    crossing["labels"][0, 11] = 7
    halves = split_batch(crossing, 64)
    assert halves is not None and len(halves[0]["input_ids"][0]) == 5
