"""Ranks that die, stall, fail or disagree: each rank ends within a minute, and says who it was and where."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

from tests.ranks.alone import Ended, run_alone
from tests.ranks.training import PackedRows, Run, collate

MINUTE = 60.0


class _Rows(PackedRows):
    """Rows, of which reading one does something on one rank."""

    def __init__(self, rank: int, index: int, action: str) -> None:
        super().__init__(16, 0)
        self.rank, self.index, self.action = rank, index, action

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        if dist.is_initialized() and dist.get_rank() == self.rank or os.environ.get("RANK") == str(self.rank):
            if self.action == "slow":
                time.sleep(0.1)
            elif index == self.index:
                self._act(row)
        return row

    def _act(self, row: dict[str, Any]) -> None:
        if self.action == "stall":
            time.sleep(1000)
        elif self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "shape":
            row["labels"] = row["labels"] + [5]


def _trainer(rows: Any, plan: str = "dp_shard=2", **arguments: Any) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    given = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", **arguments}
    args = OmniTrainingArguments(**Run().all_arguments(plan=plan, **given))
    return OmniTrainer(model=Run().model(), args=args, train_dataset=rows, data_collator=collate, eval_dataset=rows)


def _train(rank: int, action: str, where: int, index: int, **arguments: Any) -> None:
    _trainer(_Rows(where, index, action), **arguments).train()


def _in_forward(rank: int, action: str, **arguments: Any) -> None:
    """Rank 1 stalls or fails in the middle of a layer."""
    trainer = _trainer(PackedRows(16, 0), **arguments)

    def act(*_: Any) -> None:
        if rank == 1 and trainer.state.global_step == 2:
            if action == "stall":
                time.sleep(1000)
            raise RuntimeError("out of something")

    trainer.model.model.layers[1].mlp.register_forward_hook(act)
    trainer.train()


def _check(ended: list[Ended], begun: float = 30.0) -> None:
    """All by themselves. `begun`: seconds that a start may take on a busy machine."""
    for rank, end in enumerate(ended):
        assert end.code is not None, f"rank {rank} hung:\n{end.output[-3000:]}"
        assert end.seconds < MINUTE + begun, end.seconds


def test_a_rank_that_stalls_while_it_reads_is_named(tmp_path):
    ended = run_alone(_stalls, 2, tmp_path)
    _check(ended)
    assert [end.code for end in ended] == [76, 76], [end.output[-2000:] for end in ended]
    for end in ended:
        assert re.search(r"No progress: rank 1 for \d+ s in reading the batches of step [34] \(.*in _act", end.output)
        assert "Rank 0 waits." in end.output


def _stalls(rank: int) -> None:
    _train(rank, "stall", 1, 7, stall_timeout=4)


def _stalls_inside(rank: int) -> None:
    _in_forward(rank, "stall", stall_timeout=4)


def test_a_rank_that_stalls_in_a_layer_is_named(tmp_path):
    """While the other waits for it in a collective, at the same micro-batch."""
    ended = run_alone(_stalls_inside, 2, tmp_path)
    _check(ended)
    assert [end.code for end in ended] == [76, 76], [end.output[-2000:] for end in ended]
    for end in ended:
        assert re.search(r"No progress: rank 1 for \d+ s in micro-batch 1 of step 3 \(.*in act", end.output)


def _stalls_at(rank: int, place: str, folder: str) -> None:
    """Where a step has no limit of its own."""
    due = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "output_dir": folder}
    trainer = _trainer(PackedRows(16, 0), stall_timeout=4, wait_timeout=6, **due)

    def stall(*_: Any, **__: Any) -> None:
        if rank == 1:
            time.sleep(1000)

    if place == "save":
        trainer._save_rng_state = stall
    else:
        layer = trainer.model.model.layers[1].mlp
        layer.register_forward_hook(lambda module, *_: stall() if module.training == (place == "step") else None)
    trainer.train()


@pytest.mark.parametrize(
    ("place", "named"),
    [
        pytest.param("step", "micro-batch 1 of step 1", marks=pytest.mark.slow),
        ("evaluation", "evaluating a batch"),
        pytest.param("save", "saving after step 2", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_stalls_outside_of_usual_steps_is_named(tmp_path, place, named):
    ended = run_alone(_stalls_at, 2, tmp_path, place, str(tmp_path / "run"))
    _check(ended)
    assert [end.code for end in ended] == [76, 76], [end.output[-2000:] for end in ended]
    for end in ended:
        assert re.search(rf"No progress: rank 1 for \d+ s in {named} \(.*in stall\). Rank 0 waits", end.output)
        assert "set a higher `wait_timeout`" in end.output


def _fails_inside(rank: int) -> None:
    _in_forward(rank, "fail")


def test_an_error_of_one_rank_ends_the_other(tmp_path):
    ended = run_alone(_fails_inside, 2, tmp_path)
    _check(ended)
    assert ended[1].code == 1 and "RuntimeError: out of something" in ended[1].output
    assert ended[0].code in (1, 76), ended[0].output[-3000:]
    assert "Rank 1 failed: RuntimeError: out of something" in ended[0].output, ended[0].output[-3000:]


def _is_killed(rank: int, where: int) -> None:
    _train(rank, "kill", where, 6 + where)


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 1])  # each waits half a minute
def test_a_killed_rank_is_named_by_the_other(tmp_path, where):
    ended = run_alone(_is_killed, 2, tmp_path, where)
    _check(ended)
    other = ended[1 - where]
    assert ended[where].code == -signal.SIGKILL and other.code in (1, 76)
    assert f"Nothing has been heard of rank {where}" in other.output, other.output[-3000:]
    assert "RankError" in other.output or other.code == 76


def _is_frozen(rank: int) -> None:
    from hf_veomni.trainer import watchdog

    watchdog.LOST, watchdog.GRACE = 6.0, 3.0
    _train(rank, "stop", 1, 7)


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_other(tmp_path):
    """It never ends by itself; its connections stay open."""
    frozen, other = reversed(run_alone(_is_frozen, 2, tmp_path, limit=40))
    assert frozen.code is None and other.code in (1, 76), other.output[-3000:]
    assert "Nothing has been heard of rank 1" in other.output, other.output[-3000:]


def _loses_worker(rank: int) -> None:
    _train(rank, "kill", 1, 7, dataloader_num_workers=1)


def test_a_data_worker_that_dies_is_named_on_every_rank(tmp_path):
    ended = run_alone(_loses_worker, 2, tmp_path)
    _check(ended)
    for end in ended:
        assert end.code in (1, 76) and "DataLoader worker" in end.output, end.output[-3000:]


def test_shapes_that_do_not_match_are_named_on_every_rank(ranks):
    match = r"`labels` \[1, \d+\] of a batch must have the shape of `input_ids`, \[1, \d+\]"
    ranks(2).raises(_shapes, match=match, timeout=30)


def _shapes() -> None:
    _train(dist.get_rank(), "shape", 1, 5)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _slow(action: str) -> list[str]:
    kept = _Kept()
    logging.getLogger("hf_veomni.trainer.guarding").addHandler(kept)
    _train(dist.get_rank(), action, 1, -1, logging_steps=4)
    return [line for line in kept.lines if "waited" in line]


def test_a_slow_rank_is_named_once_with_its_share(ranks):
    first, second = ranks(2).run(_slow, "slow", timeout=60)
    assert len(first) == 1 and not second, (first, second)
    match = re.search(r"waited (\S+) s a step for rank 1, (\d+)% of a step's", first[0])
    assert match and 0.05 < float(match[1]) < 0.5, first


def test_ranks_of_the_same_pace_are_not_named(ranks):
    assert not ranks(2).run(_slow, "none", timeout=60)[0]


def _differing(name: str, values: tuple[Any, Any]) -> None:
    arguments = {name: values[dist.get_rank()]}
    _trainer(PackedRows(8, 0), **arguments).train()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", (1e-3, 1e-4)),
        ("seed", (1, 2)),
        ("max_steps", (4, 5)),
        ("gradient_accumulation_steps", (1, 2)),
    ],
)
def test_arguments_that_differ_are_named_with_their_ranks(ranks, name, values):
    match = rf"Arguments: `{name}` differs between the ranks: {values[0]} on rank 0; {values[1]} on rank 1"
    ranks(2).raises(_differing, name, values, match=match, timeout=60)


def _resuming() -> None:
    _trainer(PackedRows(8, 0)).train(resume_from_checkpoint=[None, "somewhere"][dist.get_rank()])


def test_a_resume_on_one_rank_alone_is_named(ranks):
    ranks(2).raises(_resuming, match="`resume_from_checkpoint` differs .*'somewhere' on rank 1", timeout=60)


def _data(kind: str) -> None:
    rank, rows = dist.get_rank(), [dict(PackedRows(8, 0)[i]) for i in range(8)]
    if kind == "fewer":
        rows = rows[rank:]
    elif kind == "other":
        rows = rows[::-1] if rank else rows
    else:
        rows = [{**row, "more": 1} for row in rows] if rank else rows
    _trainer(Dataset.from_list(rows)).train()


@pytest.mark.parametrize(("kind", "name"), [("fewer", "rows"), ("other", "row 0"), ("columns", "columns")])
def test_data_that_differs_is_named(ranks, kind, name):
    ranks(2).raises(_data, kind, match=rf"Data: `{name}` differs between the ranks", timeout=60)


def _evaluation(several: bool) -> None:
    rows = PackedRows(4 + dist.get_rank(), 0)
    trainer = _trainer(PackedRows(8, 0))
    trainer.eval_dataset = {"code": rows, "text": PackedRows(4, 0)} if several else rows
    trainer.train()


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_data_that_differs_is_named(ranks, several):
    match = (
        rf"Evaluation data{' .code.' if several else ''}: `rows` differs between the ranks: 4 on rank 0; 5 on rank 1"
    )
    ranks(2).raises(_evaluation, several, match=match, timeout=60)


def _apart(folder: str) -> None:
    """Each rank in a folder of its own, as on machines that share no disk."""
    from hf_veomni.trainer import preflight

    preflight._VISIBLE = 0.5
    own = Path(folder) / str(dist.get_rank())
    own.mkdir()
    os.chdir(own)
    _trainer(PackedRows(8, 0), output_dir="out", save_strategy="steps").train()


def test_a_folder_that_ranks_do_not_share_is_named(ranks, tmp_path):
    message = r"`output_dir` \(.*out'\) is not the same folder on all ranks: rank 1 cannot see what rank 0 writes"
    ranks(2).raises(_apart, str(tmp_path), match=message, timeout=60)


def _version(package: str) -> None:
    from hf_veomni.trainer import preflight

    stock = preflight._version
    mine = {package: f"9.{dist.get_rank()}"}
    preflight._version = lambda name: mine.get(name) or stock(name)
    try:
        _trainer(PackedRows(8, 0)).train()
    finally:
        preflight._version = stock


def test_versions_that_differ_are_named(ranks):
    match = r"Versions: `transformers` differs between the ranks: 9\.0 on rank 0; 9\.1 on rank 1"
    ranks(2).raises(_version, "transformers", match=match, timeout=60)


def _late() -> None:
    trainer = _trainer(PackedRows(8, 0), ddp_timeout=2)
    if dist.get_rank() == 1:
        time.sleep(5)
    trainer.train()


def test_a_rank_that_does_not_come_is_named(ranks):
    ranks(2).raises(_late, match=r"`train` was not called by rank [01].* within `ddp_timeout` \(2 s\)", timeout=60)


class _Never:
    def is_completed(self) -> bool:
        return False


def _cut(rank: int) -> None:
    from hf_veomni.trainer import preflight

    preflight._EXCHANGE = 2.0
    trainer = _trainer(PackedRows(8, 0))
    if rank == 1:
        dist.all_reduce = lambda *args, **kwargs: _Never()
    trainer.train()


def test_a_group_that_does_not_exchange_is_named(tmp_path):
    ended = run_alone(_cut, 2, tmp_path)
    _check(ended)
    for end in ended:
        assert end.code == 1, end.output[-3000:]
        assert "axis `dp_shard` over ranks 0, 1 exchanged nothing within 2 s" in end.output, end.output[-3000:]


def _is_killed_early(rank: int) -> None:
    from hf_veomni.trainer import preflight, watchdog

    watchdog.LOST, watchdog.GRACE = 6.0, 3.0
    trainer = _trainer(PackedRows(8, 0))
    if rank == 1:
        preflight._try_groups = lambda *args: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL))  # type: ignore
    trainer.train()


def test_a_rank_that_is_killed_before_the_first_step_is_named(tmp_path):
    """While the other waits for its message over the store, which tells nothing of a lost rank."""
    ended = run_alone(_is_killed_early, 2, tmp_path)
    _check(ended)
    assert ended[1].code == -signal.SIGKILL and ended[0].code in (1, 76)
    assert "Nothing has been heard of rank 1" in ended[0].output, ended[0].output[-3000:]


def test_the_harness_tells_a_hang(tmp_path):
    """Else the tests above could not fail."""
    ended = run_alone(_hang, 1, tmp_path, limit=8)
    assert ended[0].code is None
    with pytest.raises(AssertionError, match="rank 0 hung"):
        _check(ended)


def _hang(rank: int) -> None:
    torch.distributed.barrier()
    time.sleep(1000)
