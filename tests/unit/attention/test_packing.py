"""What documents answer in transformers' place is what it would have found itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import masking_utils

from hf_veomni.attention.mask_reader import tell_packing, untell_packing
from hf_veomni.context import within
from hf_veomni.host import forget, remember
from hf_veomni.sequence.checks import row_documents

ROWS = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 6, 7, 9]])


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often transformers' own function looked."""
    stock, found = masking_utils.find_packed_sequence_indices, [0]

    def look(position_ids: torch.Tensor) -> torch.Tensor | None:
        found[0] += 1
        return stock(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    tell_packing()
    tell_packing()
    yield found
    untell_packing()
    assert masking_utils.find_packed_sequence_indices is look


@pytest.mark.parametrize("positions", [ROWS, ROWS[:1], torch.arange(6)[None], torch.arange(6).expand(2, -1)])
def test_documents_answer_for_their_positions(looks: list[int], positions: torch.Tensor) -> None:
    expected = masking_utils.find_packed_sequence_indices(positions)
    assert looks == [1]
    documents = row_documents(remember(positions), len(positions))
    with within(documents=documents):
        found = masking_utils.find_packed_sequence_indices(positions)
        assert looks == [1]
        assert (found is None) if expected is None else torch.equal(found, expected)
        assert documents.segments is found
        masking_utils.find_packed_sequence_indices(positions.clone())  # of other positions they know nothing
        masking_utils.find_packed_sequence_indices(positions[:, :3])
        assert looks == [3]


def test_changed_positions_are_looked_at_again(looks: list[int]) -> None:
    host = ROWS.clone()
    positions = remember(host).to(torch.device("meta"))
    documents = row_documents(positions, 2)
    assert documents.told_by(forget(positions))
    forget(positions).add_(1)
    assert not documents.told_by(forget(positions))
