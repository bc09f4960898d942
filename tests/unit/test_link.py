"""The benchmarks' link: a transfer takes what it says, compute proceeds meanwhile, and the bytes really move."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks._link import Link, linked
from hf_veomni.comm.gather import all_gather, reduce_scatter


class Hand:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_a_transfer_takes_bytes_over_bandwidth_and_latency(hand: Hand) -> None:
    link = Link(1000.0, 0.5, hand)
    link.wait(link.start(2000))
    assert link.now() == link.waited == link.busy == 2.5 and link.compute == 0


def test_compute_proceeds_under_a_transfer(hand: Hand) -> None:
    link = Link(1000.0, clock=hand)
    until = link.start(2000)
    hand.time += 1.5
    link.wait(until)
    assert (link.compute, link.waited, link.now()) == (1.5, 0.5, 2.0)
    until = link.start(1000)
    hand.time += 3.0
    link.wait(until)  # long over
    assert link.waited == 0.5 and link.busy == 3.0 and link.now() == 5.0


def test_transfers_queue_behind_each_other(hand: Hand) -> None:
    link = Link(1000.0, clock=hand)
    first, second = link.start(1000), link.start(1000)
    assert (first, second) == (1.0, 2.0)
    link.wait(second)
    link.wait(first)
    assert link.waited == 2.0 and [end for _, end, _ in link.transfers] == [1.0, 2.0]


def test_moving_the_bytes_is_no_compute(hand: Hand) -> None:
    link = Link(clock=hand)
    with link.moving():
        hand.time += 7.0
    hand.time += 1.0
    assert link.compute == link.now() == 1.0


def test_the_clock_runs_with_this_threads_cpu_time() -> None:
    link = Link()
    time.sleep(0.05)
    assert link.now() < 0.04
    begin = time.thread_time()
    while time.thread_time() - begin < 0.02:
        pass
    assert 0.02 <= link.now() < 0.06


def test_an_exchange_moves_the_bytes_of_equal_ranks_and_takes_its_time(hand: Hand) -> None:
    link = Link(8.0, clock=hand)
    sent = torch.arange(6.0)  # 1 to rank 0, 2 to rank 1, 3 to rank 2
    out = torch.empty(6)
    with linked(link, 3, rank=1):
        group = dist.new_group([0, 1, 2])
        work = dist.all_to_all_single(out, sent, [2, 2, 2], [1, 2, 3], group=group, async_op=True)
        assert link.busy == 4 * 4 / 8 and link.waited == 0
        hand.time += 0.5
        assert work is not None
        work.wait()
        assert link.waited == 1.5
        assert out.tolist() == [1, 2, 1, 2, 1, 2]
        with pytest.raises(ValueError, match="counts exchanged"):
            dist.all_to_all_single(torch.empty(6), sent, [1, 2, 3], [1, 2, 3], group=group)


def test_unequal_ranks_send_zeros_of_the_sizes_that_were_exchanged(hand: Hand) -> None:
    link = Link(4.0, clock=hand)
    out = torch.full((6,), 9.0)
    with linked(link, 3, rank=1, equal=False):
        dist.all_to_all_single(out, torch.arange(1.0, 7.0), [1, 2, 3], [2, 2, 2])
        assert out.tolist() == [0, 3, 4, 0, 0, 0] and link.busy == 4
        with pytest.raises(ValueError, match="counts exchanged"):
            dist.all_to_all_single(torch.empty(6), torch.empty(6), [2, 1, 3], [2, 2, 2])


def test_other_collectives_are_those_of_equal_ranks_and_take_no_time() -> None:
    link = Link(1.0)
    one = torch.ones(2)
    objects: list[object] = [None] * 4
    with linked(link, 4, rank=3):
        dist.all_reduce(one)
        group: Any = dist.new_group([0, 1, 2, 3])
        gathered, scattered = all_gather(one, group), reduce_scatter(torch.arange(8.0), group)
        dist.all_gather_object(objects, "here")
    assert one.tolist() == [4, 4] and gathered.tolist() == [4] * 8 and scattered.tolist() == [24, 28]
    assert objects == ["here"] * 4 and link.busy == 0 and not dist.is_initialized()
