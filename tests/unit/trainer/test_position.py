"""A resumed run reads the rows that are left, whatever the size of its steps; or it says why it cannot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments
from hf_veomni.trainer.position import POSITION_NAME, Position, Reading
from tests.ranks.training import Run, collate

ROWS = 12


class Noted(Dataset):
    def __init__(self, rows: int = ROWS) -> None:
        self.rows, self.read = Run().dataset(rows, 0), list[int]()

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.rows[index]


class NotedStream(IterableDataset):
    def __init__(self, rows: int = ROWS) -> None:
        self.rows, self.read = Run().dataset(rows, 0), list[int]()

    def __iter__(self) -> Any:
        for index in range(len(self.rows)):  # type: ignore[arg-type]
            self.read.append(index)
            yield self.rows[index]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step
        control.should_save |= state.global_step == self.step


class Noting:
    """Put before a trainer: `fed` are the rows that it trained on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.fed = [*getattr(self, "fed", ()), *inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


def train(folder: Path, data: Any, resume: Any = None, stop: int = -1, stock: bool = False, **more: Any) -> Any:
    """Steps of two rows unless `more` says otherwise; a checkpoint at the last. Returns the trainer."""
    values = Run().all_arguments(output_dir=str(folder), save_strategy="steps", **{"save_steps": 100, **more})
    kind, arguments = (Trainer, TrainingArguments) if stock else (OmniTrainer, OmniTrainingArguments)
    noted: Any = type("Noting", (Noting, kind), {})
    made = noted(
        Run().model(), arguments(**values), train_dataset=data, data_collator=collate, callbacks=[StopAt(stop)]
    )
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    data = Noted()
    train(tmp_path_factory.mktemp("stock"), data, stock=True)
    assert len(data.read) == 2 * ROWS
    return data.read


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows into the second epoch; and, as checkpoint-4, eight into the first."""
    folder = tmp_path_factory.mktemp("begun")
    train(folder, Noted(), stop=8, save_steps=4)
    return folder


@pytest.mark.parametrize(
    ("step", "size", "accumulation"), [(4, 1, 4), (4, 2, 1), (8, 1, 1), (8, 4, 1)], ids=lambda number: str(number)
)
def test_goes_on_with_the_next_row(tmp_path, whole, begun, step, size, accumulation):
    """Of steps of another size `max_steps` says how many; of the same size the epochs do."""
    data, per_step = Noted(), size * accumulation
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    left = 2 * ROWS - 2 * step
    if per_step != 2:
        sizes["max_steps"] = step + left // per_step
    train(tmp_path, data, f"{begun}/checkpoint-{step}", **sizes)
    assert data.read == whole[2 * step :]


def test_goes_on_twice(tmp_path, whole, begun):
    """The step is none of either size any more."""
    train(tmp_path, Noted(), f"{begun}/checkpoint-4", gradient_accumulation_steps=4, max_steps=20, stop=6)
    data = Noted()
    train(tmp_path, data, True, gradient_accumulation_steps=1, max_steps=14)
    assert data.read == whole[16:]


def test_a_stream_goes_on_with_the_next_row(tmp_path):
    train(tmp_path, NotedStream(), max_steps=12, stop=8)
    assert Position.read(tmp_path / "checkpoint-8").rows == 4  # type: ignore[union-attr]
    data = NotedStream()
    trainer = train(tmp_path, data, True, gradient_accumulation_steps=4, max_steps=10)
    expected = [data.rows[index]["input_ids"] for index in range(4, ROWS)]
    assert trainer.fed == expected


def test_a_stream_goes_on_behind_the_steps_of_a_run_that_is_done(tmp_path):
    """Trainer takes the stream for one epoch of `max_steps`, of which nothing was left."""
    train(tmp_path, NotedStream(2 * ROWS), max_steps=ROWS // 2)
    data = NotedStream(2 * ROWS)
    trainer = train(tmp_path, data, True, max_steps=ROWS // 2 + 2)
    assert trainer.fed == [data.rows[index]["input_ids"] for index in range(ROWS, ROWS + 4)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "epochs of other steps": (
        {"gradient_accumulation_steps": 4},
        r"reads 4 rows.* read 2: the steps of its epochs.*set `gradient_accumulation_steps` to 2, or set `ignore",
    ),
    "between two steps": (
        {"per_device_train_batch_size": 3, "max_steps": 5},
        r"reads 6 rows.* read 2: the 8 rows that are done of the epoch are no whole .*choose data ranks, `per_device",
    ),
    "seed": ({"seed": 7}, r"`data_seed` \(or `seed`\) was 42 and is 7 now.*Put it back, or set `ignore_data_skip"),
    "order": (
        {"train_sampling_strategy": "sequential"},
        r"`train_sampling_strategy` was 'random' and is 'sequential'",
    ),
    "rows": ({}, r"rows of `train_dataset` was 12 and is 8 now"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_to_go_on_with_other_rows(tmp_path, begun, name):
    more, message = REFUSED[name]
    data = Noted(8 if name == "rows" else ROWS)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, data, f"{begun}/checkpoint-4", **more)
    assert data.read == []
    train(tmp_path, data, f"{begun}/checkpoint-4", ignore_data_skip=True, **{"max_steps": 5, **more})
    assert 0 < len(data.read) < ROWS, "the way out"


def test_says_what_is_left_behind(begun, caplog):
    """Of checkpoints in the run's own folder, when an earlier one is named."""
    logging.getLogger("transformers").propagate = True
    train(begun, Noted(), f"{begun}/checkpoint-4", max_steps=4)
    assert "later steps beside it (checkpoint-8), which it does not use" in caplog.text


def test_says_when_nothing_is_left_to_train(tmp_path, begun, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        trainer = train(tmp_path, Noted(), f"{begun}/checkpoint-8", max_steps=7)
    assert trainer.state.global_step == 8
    assert "is at step 8, and this run ends with step 7" in caplog.text


def test_a_checkpoint_without_a_position_is_resumed_as_the_stock_trainer_does(tmp_path, whole):
    train(tmp_path, Noted(), stock=True, stop=4)
    data = Noted()
    train(tmp_path, data, True)
    assert data.read == whole[8:]


def test_a_position_that_cannot_be_read(tmp_path):
    for text in ("", "[]", '{"step": 1}', '{"step": -1, "epoch": 0, "rows": 0, "rows_per_step": 1, "order": {}}'):
        (tmp_path / POSITION_NAME).write_text(text)
        with pytest.raises(ValueError, match=rf"{POSITION_NAME}' cannot be read .*name another checkpoint, or set"):
            Position.read(tmp_path)


def _reading(data: Any, data_ranks: int, **more: Any) -> Reading:
    return Reading.of(TrainingArguments(output_dir="x", use_cpu=True, **more), data, data_ranks)


def test_shards_of_a_stream_belong_to_a_number_of_data_ranks():
    """accelerate gives each data rank shards of its own, where there are enough."""
    stream = datasets.Dataset.from_dict({"x": list(range(8))}).to_iterable_dataset(num_shards=4)
    readings = {ranks: _reading(stream, ranks, max_steps=1) for ranks in (1, 2, 4, 8)}
    assert [readings[ranks].order["data ranks"] for ranks in (1, 2, 4, 8)] == ["any", 2, 4, "any"]
    place = Position.after(3, 0.5, 6, readings[2])
    place.check(readings[2], counts_steps=True)
    with pytest.raises(ValueError, match="data ranks was 2 and is 4 now"):
        place.check(readings[4], counts_steps=True)
