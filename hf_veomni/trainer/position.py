"""Where a run stands in its data, in rows of an epoch: so that a step of another size goes on with the next row.

Trainer counts steps. `global_step % steps_per_epoch` names other rows as soon as a step has another number of rows, or
the order is another one, and it says nothing. A checkpoint keeps the position in rows, and what it depends on.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset as Stream
from transformers.trainer_utils import has_length

POSITION_NAME = "data_position.json"
_ANY = "any"
_ANEW = "or set `ignore_data_skip=True`, with which the epoch begins anew"


@dataclass(frozen=True)
class Reading:
    """How a run reads its data.

    Attributes:
        order: what the order of the rows depends on, by name; "any" for what it does not depend on here.
        rows: that all data ranks read at a time; 1 where a sampler makes the batches of all ranks itself.
        accumulation: how often for a step.
    """

    order: dict[str, Any]
    rows: int
    accumulation: int

    @property
    def rows_per_step(self) -> int:
        """Of one data rank, in one optimizer step."""
        return self.rows * self.accumulation

    @classmethod
    def of(cls, args: Any, dataset: Any, data_ranks: int) -> Reading:
        """
        Args:
            args: training arguments.
            dataset: the training set.
        """
        size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        order: dict[str, Any] = dict.fromkeys(("data ranks", "`per_device_train_batch_size`"), _ANY)
        if not has_length(dataset):
            workers = args.dataloader_num_workers
            order |= {"rows of `train_dataset`": "unknown", "`dataloader_num_workers`": max(1, workers)}
            if workers > 1:  # each reads batches of its own part
                order["`per_device_train_batch_size`"] = size
            if isinstance(dataset, Stream) and 1 < data_ranks <= dataset.n_shards:
                order["data ranks"] = data_ranks  # accelerate gives each shards of its own
            return cls(order, size * data_ranks, accumulation)
        strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
        seed = args.seed if args.data_seed is None else args.data_seed
        order |= {
            "rows of `train_dataset`": len(dataset),
            "`train_sampling_strategy`": strategy,
            "`data_seed` (or `seed`)": _ANY if strategy == "sequential" else seed,
            "`token_budget`": args.token_budget,
            "`gradient_accumulation_steps`": _ANY,
        }
        whole_batches = args.token_budget is not None or strategy == "batch_rebalance"
        if whole_batches:
            order["data ranks"] = data_ranks
        if args.token_budget is None and strategy in ("batch_rebalance", "group_by_length"):
            order |= {"`per_device_train_batch_size`": size, "`gradient_accumulation_steps`": accumulation}
        return cls(order, 1 if whole_batches else size * data_ranks, accumulation)


@dataclass(frozen=True)
class Position:
    """
    Attributes:
        step: Trainer's `global_step`.
        epoch: epochs that are done.
        rows: rows that are done of the next one, in the unit of `Reading.rows`.
        rows_per_step: of the run that wrote it.
        order: of that run.
    """

    step: int
    epoch: int
    rows: int
    rows_per_step: int
    order: dict[str, Any]

    @classmethod
    def after(cls, step: int, epoch: float, batches_per_epoch: int, reading: Reading) -> Position:
        """
        Args:
            epoch: Trainer's, a fraction of which is batches.
            batches_per_epoch: that each data rank reads in an epoch. Of a stream Trainer's guess, which it never ends
                at: what is left over of the last batch belongs to it.
        """
        done = round(epoch * batches_per_epoch)
        epochs, batches = divmod(done, batches_per_epoch)
        if reading.order["rows of `train_dataset`"] == "unknown" and epochs and not batches:
            epochs, batches = epochs - 1, batches_per_epoch
        return cls(step, epochs, batches * reading.rows, reading.rows_per_step, reading.order)

    def write(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint."""
        (checkpoint / POSITION_NAME).write_text(json.dumps({"version": 1, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> Position | None:
        """None of a checkpoint that has none: of the stock Trainer, or of an earlier version.

        Raises:
            ValueError: it cannot be read.
        """
        path = checkpoint / POSITION_NAME
        try:
            stored = json.loads(path.read_text())
            step, epoch, rows, rows_per_step = (
                int(stored[name]) for name in ("step", "epoch", "rows", "rows_per_step")
            )
            if min(step, epoch, rows, rows_per_step) < 0:
                raise ValueError("a count is negative")
            return cls(step, epoch, rows, rows_per_step, dict(stored["order"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' cannot be read ({type(error).__name__}: {error}): name another checkpoint, {_ANEW}."
            ) from error

    def check(self, reading: Reading, *, counts_steps: bool) -> None:
        """Refuse to go on where other rows would be read than an undisturbed run would.

        Args:
            counts_steps: whether `max_steps` says when the run ends, and not a number of epochs.

        Raises:
            ValueError: another order; or another number of rows in a step, where the end of the run depends on it or
                the position is not between two steps.
        """
        for name, value in reading.order.items():
            if name in self.order and self.order[name] != value:
                raise ValueError(
                    f"The checkpoint was written by a run with another order of its rows: {name} was "
                    f"{self.order[name]!r} and is {value!r} now, so which rows are left of the epoch is unknown. Put "
                    f"it back, {_ANEW}."
                )
        here = reading.rows_per_step
        if here == self.rows_per_step or (counts_steps and self.rows % here == 0):
            return
        fitting, rest = divmod(self.rows_per_step, reading.rows)
        way_out = (
            f"set `gradient_accumulation_steps` to {fitting}"
            if rest == 0 and fitting
            else "choose data ranks, `per_device_train_batch_size` and `gradient_accumulation_steps` of that product"
        )
        why = (
            f"the {self.rows} rows that are done of the epoch are no whole number of such steps"
            if counts_steps
            else "the steps of its epochs and its schedule would be others (with `max_steps` they are yours to say)"
        )
        raise ValueError(
            f"A step of this run reads {here} rows (data ranks x `per_device_train_batch_size` x "
            f"`gradient_accumulation_steps`), a step of the run that wrote the checkpoint read {self.rows_per_step}: "
            f"{why}. To keep {self.rows_per_step}, {way_out}, {_ANEW}."
        )

    def batches(self, reading: Reading) -> int:
        """That each data rank leaves out of the epoch, after `check`."""
        return self.rows // reading.rows

    def epochs_until(self, steps: int, batches_per_epoch: int, reading: Reading) -> int:
        """Epochs, those that are done included, in which so many more steps are made."""
        per_epoch = max(1, math.ceil(batches_per_epoch / reading.accumulation))
        begun = self.batches(reading) // reading.accumulation
        return self.epoch + math.ceil((begun + steps) / per_epoch)
