import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_veomni.data import BalancedBatchSampler
from hf_veomni.modality import Assignment, assign_items, assign_samples, balance, balance_report
from hf_veomni.modality.balance import _place, lower_bound

costs_of_items = st.lists(st.floats(0, 1e6, allow_subnormal=False) | st.integers(0, 20), max_size=60)
few_costs = st.lists(st.integers(0, 50), min_size=1, max_size=8)
ranks = st.integers(1, 9)
RANDOM = np.random.default_rng(0)


def siglip_like(patches):
    """FLOPs of a width of 1,152: attention meets the linear part at about 6,000 patches."""
    return 6 * 15.2e6 * 27 * patches + 12 * 1152 * 27 * np.asarray(patches, dtype=float) ** 2


def distributions(count, random=RANDOM):
    """Patches of an image, ragged as in real batches."""
    return {
        "uniform": random.integers(64, 4097, count),
        "log-uniform": np.exp(random.uniform(np.log(64), np.log(4097), count)).astype(int),
        "zipf": np.minimum(64 * random.zipf(1.5, count), 4096),
        "one huge": np.append(random.integers(64, 513, count - 1), 16_384),
        "equal": np.full(count, 256),
    }


def optimum(costs, num_ranks):
    parts = itertools.product(range(num_ranks), repeat=len(costs))
    return min(max(sum(c for c, r in zip(costs, part, strict=True) if r == rank) for rank in range(num_ranks))
               for part in parts)  # fmt: skip


def largest(costs, num_ranks, **options):
    return assign_items(costs, num_ranks, **options).loads(costs).max()


@settings(max_examples=60, deadline=None)
@given(costs=few_costs, num_ranks=st.integers(1, 3))
def test_few_items_equal_the_optimum(costs, num_ranks):
    best = optimum(costs, num_ranks)
    assert lower_bound(costs, num_ranks) <= best * (1 + 1e-12)
    assert largest(costs, num_ranks) <= best * 1.001


@settings(max_examples=100, deadline=None)
@given(costs=costs_of_items, num_ranks=ranks)
def test_every_item_has_one_rank_and_the_bounds_hold(costs, num_ranks):
    one = assign_items(costs, num_ranks)
    items = [one.items(rank).tolist() for rank in range(num_ranks)]
    assert sorted(sum(items, [])) == list(range(len(costs))) and [len(part) for part in items] == one.counts.tolist()
    assert all(one.rank_of[item] == rank for rank, part in enumerate(items) for item in part)
    top, mean = one.loads(costs).max(), sum(costs) / num_ranks
    assert top >= lower_bound(costs, num_ranks) * (1 - 1e-9)
    assert top <= (mean + max(costs, default=0) * (1 - 1 / num_ranks)) * (1 + 1e-9)  # Graham 1966, any list order
    order = np.argsort(-np.asarray(costs, dtype=float), kind="stable")
    sorted_costs = np.asarray(costs, dtype=float)[order]
    lpt = _place(sorted_costs, np.zeros(len(costs)), num_ranks, np.inf)
    assert top <= Assignment.from_ranks(lpt, num_ranks).loads(sorted_costs).max() * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(costs=few_costs, num_ranks=st.integers(2, 3))
def test_lpt_alone_keeps_the_bound_of_graham(costs, num_ranks):
    sorted_costs = np.sort(np.asarray(costs, dtype=float))[::-1]
    lpt = _place(sorted_costs, np.zeros(len(costs)), num_ranks, np.inf)
    top = Assignment.from_ranks(lpt, num_ranks).loads(sorted_costs).max()
    assert top <= (4 / 3 - 1 / (3 * num_ranks)) * optimum(costs, num_ranks) + 1e-9


@settings(max_examples=60, deadline=None)
@given(costs=costs_of_items, num_ranks=ranks, random=st.randoms())
def test_largest_load_does_not_depend_on_the_order(costs, num_ranks, random):
    shuffled = random.sample(costs, len(costs))
    assert largest(costs, num_ranks) == largest(shuffled, num_ranks)


@settings(max_examples=60, deadline=None)
@given(costs=costs_of_items, num_ranks=ranks)
def test_assignment_is_deterministic_and_numbered_by_first_item(costs, num_ranks):
    one, two = assign_items(costs, num_ranks), assign_items(np.array(costs), num_ranks)
    assert one.rank_of.tolist() == two.rank_of.tolist()
    firsts = [part[0] for rank in range(num_ranks) if len(part := one.items(rank))]
    assert firsts == sorted(firsts) and not one.counts[len(firsts) :].any()


@pytest.mark.parametrize("name", distributions(8))
def test_ragged_images_meet_the_target_where_the_optimum_allows(name):
    random = np.random.default_rng(1)
    for _ in range(30):
        costs = siglip_like(distributions(64, random)[name])
        report = balance_report(costs, assign_items(costs, 8))
        assert report.balanced <= max(1.05, report.bound * 1.01), report


@pytest.mark.parametrize("name", distributions(8))
def test_a_thousand_items_are_even(name):
    costs = siglip_like(distributions(1000, np.random.default_rng(2))[name])
    report = balance_report(costs, assign_items(costs, 8))
    assert report.balanced <= report.bound * 1.002, report


def test_each_stage_finds_what_those_before_it_do_not(monkeypatch):
    by_swaps, by_differencing, by_search = [5, 5, 4, 4, 3, 3, 3], [10, 9, 7, 4, 4, 4, 2, 2], [11, 10, 8, 6, 6, 1]
    assert (largest(by_swaps, 3), largest(by_differencing, 2), largest(by_search, 2)) == (9, 21, 21)
    monkeypatch.setattr(balance, "_SEARCHED", 0)
    assert (largest(by_swaps, 3), largest(by_differencing, 2), largest(by_search, 2)) == (9, 21, 22)
    monkeypatch.setattr(balance, "_DIFFERENCED", 0)
    assert (largest(by_swaps, 3), largest(by_differencing, 2)) == (9, 22)
    monkeypatch.setattr(balance, "_SWEEPS", 0)
    assert largest(by_swaps, 3) == 11


@settings(max_examples=80, deadline=None)
@given(costs=few_costs, num_ranks=st.integers(1, 4), data=st.data())
def test_no_rank_exceeds_its_limit(costs, num_ranks, data):
    patches = data.draw(st.lists(st.integers(0, 9), min_size=len(costs), max_size=len(costs)))
    limit = max(max(patches), -(-sum(patches) // num_ranks) + 9)  # with room for the largest item: always possible
    one = assign_items(costs, num_ranks, patches=patches, max_patches=limit)
    assert sorted(one.order.tolist()) == list(range(len(costs)))
    assert one.num_rows(patches).max() <= limit


def test_a_limit_binds_and_places_by_size_where_lpt_finds_no_room():
    assert largest([9, 1, 1, 1], 2) == 9
    limited = assign_items([9, 1, 1, 1], 2, patches=[1, 5, 5, 5], max_patches=10)
    assert limited.num_rows([1, 5, 5, 5]).max() <= 10 and limited.loads([9, 1, 1, 1]).max() == 10
    tight = assign_items([3, 2, 1, 1], 2, patches=[1, 1, 5, 5], max_patches=6)
    assert sorted(tight.num_rows([1, 1, 5, 5])) == [6, 6]
    by_size = assign_items([5, 5, 1, 1, 1], 2, patches=[2, 2, 6, 4, 2], max_patches=8)
    assert sorted(by_size.num_rows([2, 2, 6, 4, 2])) == [8, 8]


@pytest.mark.parametrize("costs", [[], [3.0], [0.0] * 5, [0.0, 0.0, 7.0]])
def test_few_and_free_items(costs):
    one = assign_items(costs, 4)
    assert one.counts.sum() == len(costs) and one.counts.max(initial=0) <= 2  # free items are spread out
    report = balance_report(costs, one)
    assert report.balanced == report.bound == (4.0 if sum(costs) else 1.0)
    assert sorted(one.restore([2] * len(costs))) == list(range(2 * len(costs)))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), max_size=20), num_ranks=ranks)
def test_features_come_back_into_order(sizes, num_ranks):
    one = assign_items(sizes, num_ranks)
    rows = np.repeat(np.arange(len(sizes)), sizes) * 10 + np.concatenate([np.arange(s) for s in sizes] or [[]])
    items = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    of_ranks = [np.concatenate([items[i] for i in one.items(rank)] or [[]]) for rank in range(num_ranks)]
    assert [len(part) for part in of_ranks] == one.num_rows(sizes).tolist()
    assert np.concatenate(of_ranks)[one.restore(sizes)].tolist() == rows.tolist()
    assert one.order[one.inverse].tolist() == list(range(len(sizes)))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), num_ranks=st.integers(1, 5))
def test_samples_are_those_of_the_sampler_and_never_less_even(lengths, num_ranks):
    costs = np.array(lengths) + np.array(lengths) ** 2 / 7
    steps = assign_samples(costs, lengths, 30, num_ranks, seed=3, epoch=2)
    sampler = BalancedBatchSampler(costs, 30, num_ranks, None, 3, lengths=lengths)
    sampler.set_epoch(2)
    batches = [*sampler]
    assert len(steps) * num_ranks == len(batches)
    for index, step in enumerate(steps):
        theirs = batches[index * num_ranks : (index + 1) * num_ranks]
        assert sorted(np.concatenate(step)) == sorted(sum(theirs, []))
        assert all(len(batch) and sum(lengths[i] for i in batch) <= 30 for batch in step)
        top = max(costs[batch].sum() for batch in theirs)
        assert max(costs[batch].sum() for batch in step) <= top * (1 + 1e-9)


def test_samples_are_evened_out_beyond_the_sampler():
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(16), np.log(2048), 400)).astype(int)
    costs = lengths + lengths**2 / 2000
    steps = assign_samples(costs, lengths, 3000, 8)
    batches = [*BalancedBatchSampler(costs, 3000, 8, None, lengths=lengths)]

    def over_mean(step):
        loads = [costs[batch].sum() for batch in step]
        return max(loads) / np.mean(loads)

    ours = [over_mean(step) for step in steps]
    theirs = [over_mean(batches[first : first + 8]) for first in range(0, len(batches), 8)]
    assert all(a <= b + 1e-9 for a, b in zip(ours, theirs, strict=True))
    assert sum(a < b - 1e-6 for a, b in zip(ours, theirs, strict=True)) >= 3  # little: budgets are nearly full


def test_report_reads_well():
    one = assign_items([6, 1, 1, 1, 1, 2], 2)
    assert str(balance_report([6, 1, 1, 1, 1, 2], one)) == (
        "6 items on 2 ranks, max/mean cost: contiguous 1.333, round-robin 1.333, balanced 1.000 (no less than 1.000)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign_items([1.0, -1.0], 2), "`costs` (item 1: -1) must be one number for each item"),
        (lambda: assign_items([1.0, float("nan")], 2), "`costs` (item 1: nan)"),
        (lambda: assign_items([[1.0]], 2), "`costs` ([[1.0]])"),
        (lambda: assign_items([1.0], 0), "`num_ranks` (0) must be a positive integer"),
        (lambda: assign_items([1.0], 2, patches=[1]), "`patches` and `max_patches` go together"),
        (lambda: assign_items([1.0], 2, patches=[1, 2], max_patches=3), "must be one number for each of the 1 items"),
        (lambda: assign_items([1, 1], 2, patches=[1, 4], max_patches=3), "Item 1 has 4 patches, above"),
        (lambda: assign_items([1] * 3, 2, patches=[2] * 3, max_patches=3), "3 items of 6 patches on 2 ranks"),
        (lambda: balance_report([1.0], assign_items([1.0, 2.0], 2)), "for each of the 2 assigned items"),
    ],
)  # fmt: skip
def test_errors_name_value_rule_and_way_out(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
