"""Which rows each data rank trains on: each once an epoch, in a new order each epoch, and after a resume the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_veomni import OmniDataCollatorWithPacking, pack_dataset
from tests.ranks.training import Run

NUM_ROWS = 24
KINDS: dict[str, dict[str, Any]] = {
    "random": {},
    "data_seed": {"data_seed": 7},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "budget": {"token_budget": 48},
    "packed_stream": {},
}


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def _documents() -> list[dict[str, Any]]:
    rows = Run().dataset(NUM_ROWS, 3)
    return [{"input_ids": [3 + i, *rows[i]["input_ids"]]} for i in range(NUM_ROWS)]  # the first token names the row


def _batches(plan: str, kind: str, directory: Path, stop: int, resume: bool) -> list[list[int]]:
    """First tokens of the rows (of a packed sequence: of its documents) of each step of this rank."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments
    from hf_veomni.trainer.loaders import DummyBatch

    seen: list[list[int]] = []

    class Noting(OmniTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            names = inputs["input_ids"][inputs["position_ids"] == 0].tolist()
            seen.append([] if isinstance(inputs, DummyBatch) else names)
            return super().training_step(model, inputs, num_items_in_batch)

    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 1 if kind == "budget" else 2,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "num_train_epochs": 2,
        **KINDS[kind],
    }
    rows: Any = Dataset.from_list(_documents())
    if kind == "packed_stream":
        rows = rows.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)
        rows = pack_dataset(rows, max_tokens=48, buffer_size=4)
        arguments["max_steps"] = 12
    trainer = Noting(
        model=Run().model(),
        args=OmniTrainingArguments(**Run().all_arguments(plan=plan, **arguments)),
        train_dataset=rows,
        data_collator=OmniDataCollatorWithPacking(),
        callbacks=[_Stop(stop)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen


def _whole_and_resumed(plan: str, kind: str, folders: list[Path]) -> tuple[list, list, list]:
    whole = _batches(plan, kind, folders[0], 100, resume=False)
    begun = _batches(plan, kind, folders[1], 3 * len(whole) // 4, resume=False)
    return whole, begun, _batches(plan, kind, folders[1], 100, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_row_once_and_resumes_with_the_rest(ranks, kind, tmp_path):
    results = ranks(2).run(_whole_and_resumed, "dp_shard=2", kind, [tmp_path / "a", tmp_path / "b"], timeout=120)
    names = sorted(document["input_ids"][0] for document in _documents())
    (first, begun, rest), (second, _, rest_of_second) = results
    assert len(first) == len(second), "as many steps on every data rank"
    read = 0
    epochs: list[list[list[int]]] = [[]]
    ends: list[int] = []
    for step, (mine, other) in enumerate(zip(first, second, strict=True), 1):  # an epoch ends when all were seen
        epochs[-1] += [mine, other]
        read += len(mine) + len(other)
        if read == len(names):
            assert sorted(sum(epochs[-1], [])) == names, "each row once"
            epochs.append([])
            ends.append(step)
            read = 0
    assert len(epochs) >= 3 and epochs[0] != epochs[1], "another order in the second epoch"
    assert ends[0] < len(begun) < len(first) and len(begun) not in ends, "stopped within a later epoch"
    assert begun == first[: len(begun)]
    assert rest == first[len(begun) :]
    assert rest_of_second == second[len(begun) :]
