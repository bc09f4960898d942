"""What looking for faults costs a normal step: one read of the host, where the stock Trainer has read the loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks._syncs import READ, SyncCounter
from tests.ranks.training import Run

STEPS = 6


class _Counting(TrainerCallback):
    """Counts the host's reads from the end of step 2 to the end of the last."""

    def __init__(self) -> None:
        self.counter = SyncCounter(torch.device("cpu"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.counter.__enter__()
        elif state.global_step == STEPS:
            self.counter.__exit__()


def _reads(plan: str | None, **arguments: Any) -> dict[str, int]:
    """By call site."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(arguments={"max_steps": STEPS, "logging_strategy": "no", "include_num_input_tokens_seen": "no"})
    counting = _Counting()
    if plan is None:
        args: Any = TrainingArguments(**run.all_arguments())
        Trainer(model=run.model(), args=args, callbacks=[counting], **run.data()).train()
    else:
        args = OmniTrainingArguments(**run.all_arguments(plan=plan, **arguments))
        OmniTrainer(model=run.model(), args=args, callbacks=[counting], **run.data()).train()
    found: Counter[str] = Counter()
    for (_, kind, site), count in counting.counter.found.items():
        if kind == READ:
            found[site] += count
    return dict(found)


@pytest.mark.parametrize(("plan", "world"), [("", 1), ("dp_shard=2", 2)])
def test_one_read_a_step_and_none_if_it_is_ignored(ranks, plan, world):
    def reads(**arguments: Any) -> list[dict[str, int]]:
        if world == 1:
            return [_reads(plan, **arguments)]
        return ranks(world).run(_reads, plan, timeout=60, **arguments)

    stopping, ignoring = reads()[0], reads(on_nonfinite="ignore")[0]
    mine = {site: count for site, count in stopping.items() if "guarding" in site or "nonfinite" in site}
    assert sum(mine.values()) == STEPS - 2, stopping
    assert sum(stopping.values()) - sum(ignoring.values()) == STEPS - 2, (stopping, ignoring)
    assert not any("trainer/pace" in site or "watchdog" in site or "preflight" in site for site in stopping)
    # Trainer reads each loss of a micro-batch, twice, for `logging_nan_inf_filter`.
    assert sum(_reads(None).values()) > 0
