"""What the ranks of a window tell each other before it runs."""

from __future__ import annotations

import pytest
import torch

from hf_veomni.pipeline.window import check_windows


def _facts() -> torch.Tensor:
    """Of two stages, two data ranks with rows of their own, and two SP ranks."""
    return torch.tensor([[3, 24, 48, 7], [3, 20, 40, 9]])[None, :, None].repeat(2, 1, 2, 1)


def test_windows_that_belong_together_pass() -> None:
    check_windows(_facts())


@pytest.mark.parametrize("place", [(1, 1, 0), (0, 1, 1)], ids=["stage", "sp"])
@pytest.mark.parametrize("fact", range(4))
def test_ranks_of_a_data_rank_read_the_same(place: tuple[int, int, int], fact: int) -> None:
    facts = _facts()
    facts[*place, fact] += 1
    with pytest.raises(ValueError, match="The ranks of data rank 1 were given different batches"):
        check_windows(facts)


def test_data_ranks_run_as_many_micro_batches() -> None:
    facts = _facts()
    facts[:, 0, :, 0] = 2
    with pytest.raises(ValueError, match=r"the data ranks were given \[2, 3\] micro-batches"):
        check_windows(facts)
