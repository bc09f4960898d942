"""Features go to the rank whose slice has their tokens, in fp64, with their gradients."""

from __future__ import annotations

import pytest
import torch


def _exchange(sp_size: int, rank_of: list[int], rows: list[int]) -> tuple[torch.Tensor, ...]:
    """What arrives here, the gradient of this rank's own features, and what both should be."""
    from hf_veomni.mesh import init_parallel_state
    from hf_veomni.modality.balance import Assignment
    from hf_veomni.modality.exchange import exchange_rows

    state = init_parallel_state(f"sp={sp_size}")
    assignment = Assignment.from_ranks(rank_of, sp_size)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(rows), 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(sum(rows), 3, dtype=torch.float64, generator=generator)
    needed = torch.arange(sum(rows)) * sp_size // sum(rows)  # the tokens of a rank's slice are neighbours
    owned = torch.tensor(rank_of).repeat_interleave(torch.tensor(rows)) == state.sp_rank
    local = features[owned].clone().requires_grad_()
    found = exchange_rows(local, rows, assignment, needed.numpy(), state)
    (found * weights * (state.sp_rank + 1)).sum().backward()
    wanted = features * (needed == state.sp_rank)[:, None]
    assert local.grad is not None
    return found.detach(), wanted, local.grad, (weights * (needed + 1)[:, None])[owned]


@pytest.mark.parametrize(
    ("rank_of", "rows"),
    [([1, 0, 1], [4, 2, 5]), ([1, 1, 1], [3, 1, 2]), ([0, 1, 0, 1], [1, 9, 1, 1])],
    ids=["crossed", "one rank has all", "a long item"],
)
@pytest.mark.parametrize("sp_size", [2, 4])
def test_rows_go_where_their_tokens_are(ranks, sp_size, rank_of, rows):
    for found, wanted, gradient, wanted_gradient in ranks(sp_size).run(_exchange, sp_size, rank_of, rows):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=0)


def _arrivals(family: str) -> list[int]:
    """Rows that arrive in each exchange of one call, and the placeholders in this rank's slice by exchange."""
    from hf_veomni import get_parallel_state, prepare_omni
    from hf_veomni.modality import exchange as slices
    from tests.omni_models import FAMILIES, build

    model = prepare_omni(build(family), "sp=2")
    row = FAMILIES[family].row(0, FAMILIES[family].items)
    stock, arrived = slices.all_to_all, []

    def count(x, group, send, receive):
        arrived.append(sum(receive))
        return stock(x, group, send, receive)

    slices.all_to_all = count
    try:
        model(**row)
    finally:
        slices.all_to_all = stock
    ids, rank = row["input_ids"][0], get_parallel_state(model).sp_rank
    part = -(-len(ids) // 2)
    mine = ids[rank * part : (rank + 1) * part]
    return [sum(arrived), sum(int((mine == token).sum()) for token in (90, 91, 92))]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "voxtral"])
def test_no_rank_gets_rows_of_other_slices(ranks, family):
    for arrived, mine in ranks(2).run(_arrivals, family):
        assert 0 < arrived <= mine


def _cached(family: str) -> list[torch.Tensor]:
    """Logits with a cache, for which every rank runs the full row, and the stock model's."""
    from hf_veomni import prepare_omni
    from tests.omni_models import FAMILIES, build

    model, row = build(family).eval(), FAMILIES[family].row(0, FAMILIES[family].items)
    del row["labels"]
    with torch.no_grad():
        wanted = model(**row).logits
        prepare_omni(model, "sp=2")
        return [model(**row, use_cache=True).logits, wanted]


def test_a_whole_row_gets_all_rows(ranks):
    for found, wanted in ranks(2).run(_cached, "qwen3_vl"):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
