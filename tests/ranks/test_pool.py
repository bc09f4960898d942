"""The harness itself: order of results, exceptions, hangs, deaths, and nothing that passes from case to case."""

from __future__ import annotations

import os
import signal
import time
from contextvars import ContextVar

import pytest
import torch
import torch.distributed as dist

from tests.ranks.pool import RankPool, RanksFailed

variable: ContextVar[int] = ContextVar("variable", default=0)


def _rank_and_sum(offset: int, scale: int = 1) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset) * scale)
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _tensor() -> torch.Tensor:
    return torch.full((3,), dist.get_rank())


def _raise_on(rank: int, message: str) -> None:
    if dist.get_rank() == rank:
        print("before the fall")
        raise KeyError(message)
    dist.barrier()


def _raise_while_the_other_sleeps() -> None:
    if dist.get_rank() == 0:
        raise KeyError("only here")
    time.sleep(600)


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def _refuse_everywhere() -> None:
    raise ValueError(f"`size` ({dist.get_rank()}) is refused")


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def _crash(flag: str, always: bool) -> str:
    if dist.get_rank() == 1 and (always or not os.path.exists(flag)):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return "done"


def _pid() -> int:
    return os.getpid()


def _leave_traces() -> None:
    dist.new_group([0])
    variable.set(1)
    os.environ["TRACE"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.rand(dist.get_rank() + 1)


def _find_traces() -> tuple:
    groups = len(dist.distributed_c10d._world.pg_map)
    defaults = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return groups, variable.get(), os.environ.get("TRACE"), defaults, torch.rand(1).item()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_results_come_in_rank_order(ranks, world_size):
    expected = sum(2.0 * (rank + 1) for rank in range(world_size))
    assert ranks(world_size).run(_rank_and_sum, 1, scale=2) == [(rank, expected) for rank in range(world_size)]


def test_ranks_are_reused_and_tensors_travel(ranks):
    first = ranks(2).run(_pid)
    assert ranks(2).run(_pid) == first
    assert [t.tolist() for t in ranks(2).run(_tensor)] == [[0, 0, 0], [1, 1, 1]]


def test_exception_on_one_rank_ends_the_others_within_seconds(ranks):
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(_raise_on, 1, "only here")
    assert time.monotonic() - begin < 20
    text = str(caught.value)
    assert "rank 1 raised KeyError: 'only here'" in text and "before the fall" in text
    assert text.index("---- rank 1") < text.index("---- rank 0")  # the cause stands first
    assert len(ranks(2).run(_pid)) == 2


def test_exception_beside_a_rank_that_hangs_shows_both(ranks):
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match="(?s)rank 0 raised KeyError.*rank 1 was still running.*_sleeps"):
        ranks(2).run(_raise_while_the_other_sleeps)
    assert time.monotonic() - begin < 20
    assert len(ranks(2).run(_pid)) == 2


def test_hang_ends_at_the_time_limit_with_stacks(ranks):
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match="(?s)rank 0 was still running.*barrier.*rank 1 was still running.*_hang_on"):
        ranks(2).run(_hang_on, 1, timeout=3)
    assert time.monotonic() - begin < 20
    assert len(ranks(2).run(_pid)) == 2


def test_death_of_a_rank_is_reported(ranks):
    with pytest.raises(RanksFailed, match="rank 1 died with exit code 7"):
        ranks(2).run(_die_on, 1)
    assert len(ranks(2).run(_pid)) == 2


def test_a_crash_in_native_code_is_repeated_once_and_told(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(RankPool, "repeats", 0)
    with pytest.warns(RuntimeWarning, match="(?s)A rank crashed.*rank 1 died with exit code -11.*Segmentation fault"):
        assert ranks(2).run(_crash, str(tmp_path / "flag"), False) == ["done", "done"]
    with pytest.warns(RuntimeWarning), pytest.raises(RanksFailed, match="rank 1 died with exit code -11"):
        ranks(2).run(_crash, str(tmp_path / "flag"), True)
    assert RankPool.repeats == 2
    with pytest.raises(RanksFailed, match="rank 1 died with exit code -11"):
        ranks(2).run(_crash, str(tmp_path / "flag"), True)


def test_raises_wants_every_rank_to_raise_and_keeps_the_ranks(ranks):
    before = ranks(2).run(_pid)
    messages = ranks(2).raises(_refuse_everywhere, match=r"`size` \(\d\) is refused")
    assert messages == ["`size` (0) is refused", "`size` (1) is refused"]
    with pytest.raises(RanksFailed, match="expected on every rank"):
        ranks(2).raises(_refuse_everywhere, match="another message")
    with pytest.raises(RanksFailed, match="expected on every rank"):
        ranks(2).raises(_pid, match="")
    assert ranks(2).run(_pid) == before


def test_nothing_passes_to_the_next_case(ranks):
    before = ranks(2).run(_find_traces)
    ranks(2).run(_leave_traces)
    assert ranks(2).run(_find_traces) == before
    assert before[0][:3] == (1, 0, None) and before[0] == before[1]
