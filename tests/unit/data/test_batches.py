"""Batches that a model would stumble over are refused by name, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni.data.batches import BatchRule, find_fault

IDS = torch.tensor([[3, 4, 5], [6, 7, 0]])
LABELS = torch.tensor([[-100, 4, 5], [6, 7, -100]])


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": LABELS, "attention_mask": torch.ones_like(IDS)},
        {"input_ids": IDS, "position_ids": torch.zeros(3, 2, 3, dtype=torch.long)},  # mRoPE
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
        {"input_ids": IDS.repeat(2, 1, 1)},  # choices
        {"input_ids": -IDS, "pixel_values": torch.ones(2, 3)},  # placeholders below 0
        {"input_values": torch.ones(2, 9), "labels": LABELS},
        {"input_ids": IDS.int(), "labels": LABELS.int()},
        [IDS],
    ],
)
def test_sound_batches_pass(batch: Any) -> None:
    assert find_fault([batch], BatchRule(8)) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": LABELS[:, :2]}, r"`labels` \[2, 2\] of a batch must have the shape of `input_ids`, \[2, 3\]"),
        ({"labels": torch.tensor(1)}, r"`labels` \[\] of a batch must have the shape"),
        ({"labels": LABELS.float()}, "`labels` of a batch are float32 and must be integers"),
        ({"position_ids": IDS.float()}, "`position_ids` of a batch are float32"),
        ({"attention_mask": torch.ones(1, 3)}, r"`attention_mask` \[1, 3\] of a batch must have the shape"),
        ({"attention_mask": torch.ones(2, 3, 4)}, r"`attention_mask` \[2, 3, 4\] of a batch .* end with \[3, 3\]"),
        ({"attention_mask": torch.ones(3, 1, 3, 3)}, r"`attention_mask` \[3, 1, 3, 3\] of a batch"),
        ({"position_ids": torch.zeros(2, 4)}, r"`position_ids` \[2, 4\] of a batch must have the shape of .*\[2, 3\]"),
        ({"position_ids": torch.zeros(3, 4, 3)}, r"`position_ids` \[3, 4, 3\] of a batch must have the shape"),
        ({"position_ids": IDS[0]}, r"`position_ids` \[3\] of a batch must have the shape of `input_ids`"),
        ({"input_ids": IDS.float()}, "`input_ids` of a batch are float32 and must be integers"),
        ({"input_ids": IDS[0]}, r"`input_ids` \[3\] of a batch must have rows and tokens"),
        ({"input_ids": IDS[:0]}, r"`input_ids` \[0, 3\] of a batch hold no token"),
        ({"input_ids": IDS + 1}, "`input_ids` of a batch go from 1 to 8 and must be from 0 to 7"),
        ({"input_ids": IDS - 1}, "`input_ids` of a batch go from -1 to 6"),
        ({"labels": LABELS - 1}, "`labels` of a batch go from -101 to 6 and must be from 0 to 7, or -100"),
        ({"labels": LABELS.clamp(min=-1)}, "`labels` of a batch go from -1 to 7"),
    ],
)
def test_others_are_named(changed: dict[str, Any], message: str) -> None:
    sound = {"input_ids": IDS, "labels": LABELS}
    with pytest.raises(ValueError, match=message):
        if (fault := find_fault([sound, sound | changed], BatchRule(8))) is not None:
            raise fault


@pytest.mark.parametrize("labels", [LABELS[:, :2], torch.tensor([1, 0]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])])
def test_labels_of_others_have_a_shape_of_their_own(labels: torch.Tensor) -> None:
    """Of an encoder-decoder, of one class a row, of shares of classes."""
    assert find_fault([{"input_ids": IDS, "labels": labels}], BatchRule(8, labelled=False)) is None


@pytest.mark.parametrize("batch", [{"input_ids": IDS}, {"input_values": torch.ones(2, 9), "labels": None}])
def test_labels_that_are_trained_must_be_there(batch: dict[str, Any]) -> None:
    assert find_fault([batch], BatchRule(8)) is None
    assert "has no `labels`" in str(find_fault([batch], BatchRule(8, needs_labels=True)))
    assert find_fault([batch | {"shift_labels": LABELS}], BatchRule(8, needs_labels=True)) is None


def test_an_unknown_vocabulary_is_no_limit() -> None:
    assert find_fault([{"input_ids": IDS + 100}], BatchRule(None)) is None


def test_values_on_a_device_are_not_asked_for() -> None:
    """They would be waited for."""
    assert find_fault([{"input_ids": torch.empty(2, 3, dtype=torch.long, device="meta")}], BatchRule(8)) is None


def test_labels_that_are_not_those_of_the_tokens_may_be_of_another_vocabulary() -> None:
    batch = {"input_ids": IDS, "labels": LABELS + 100}
    assert find_fault([batch], BatchRule(8, labelled=False)) is None
    assert find_fault([{**batch, "input_ids": IDS + 1}], BatchRule(8, labelled=False)) is not None
