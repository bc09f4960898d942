"""What the ranks tell each other before a step: the batches that each has read, and what went wrong meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from hf_veomni.checkpoint import BackgroundError, agree
from hf_veomni.comm import all_gather
from hf_veomni.mesh import ParallelState
from hf_veomni.trainer.loaders import DummyBatch, UnsplitBatches

# Columns of the facts. Ranks of an SP group have the same up to `FAILED`. The last two are in microseconds.
BATCHES, TOKENS, CHECKSUM, REAL, ROWS, HELD, SPLITS, FAILED, SIGNAL, READING, WAITING = range(11)


@dataclass(frozen=True)
class Notes:
    """What a rank tells beside its batches.

    Attributes:
        signal: number of the signal that it got, 0 for none.
        reading: seconds that it took to read them.
        waiting: seconds that it waited for the others in the exchange before.
    """

    signal: int = 0
    reading: float = 0.0
    waiting: float = 0.0


def take(iterator: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """Up to `count` batches, and what went wrong instead of the next one."""
    batches: list[Any] = []
    try:
        while len(batches) < count:
            batches.append(next(iterator))
    except StopIteration:
        pass
    except Exception as error:  # every kind: the other ranks must hear of it, or deadlock
        return batches, error
    return batches, None


def _checksum(batch: Any) -> Tensor | int:
    ids: Any = batch.get("input_ids") if hasattr(batch, "get") else None
    if not isinstance(ids, Tensor):
        return 0
    flat = ids.detach().flatten().long()
    return (flat * (torch.arange(flat.numel(), device=flat.device) % 8191 + 1)).sum()


def exchange_facts(
    batches: Sequence[Any],
    num_tokens: Tensor | int,
    *,
    held: bool,
    splits: bool = False,
    error: Exception | None,
    notes: Notes = Notes(),  # noqa: B008 (frozen)
    state: ParallelState,
    device: torch.device,
) -> Tensor:
    """Tell all ranks about the batches of this one.

    Args:
        num_tokens: label tokens in them.
        held: whether an earlier batch of this pass is at hand, to be run again as a dummy batch.
        splits: whether the last one can be run in two parts.
        error: what went wrong while they were read, or beside training.
        notes: what else this rank has to tell.

    Returns:
        int64 [ranks, 11] on the CPU, with the columns named above; `REAL` are the batches that are no dummy batches.

    Collective: one all-gather over all ranks.

    Raises:
        ValueError: ranks of an SP group read different rows, or a data rank got none at all while others did.
        Exception: `error`, or on the other ranks one of its kind that names the rank.
    """
    real = [batch for batch in batches if not isinstance(batch, DummyBatch)]
    facts = (
        len(batches),
        num_tokens,
        sum(_checksum(batch) for batch in batches),
        len(real),
        sum(find_batch_size(batch) or 0 for batch in real),
        int(held or bool(batches)),
        int(splits),
        0 if error is None else 1 + isinstance(error, BackgroundError),
        notes.signal,
        round(notes.reading * 1e6),
        round(notes.waiting * 1e6),
    )
    sent = torch.stack([torch.as_tensor(fact, dtype=torch.long).to(device) for fact in facts])
    found = all_gather(sent).view(-1, len(facts)).cpu()
    if found[:, FAILED].any():
        agree(error, "Reading a batch" if found[:, FAILED].max() == 1 else "Saving beside training")
    _check_rows(found, state)
    return found


def _check_rows(facts: Tensor, state: ParallelState) -> None:
    stages = facts[:, : CHECKSUM + 1].reshape(state.plan.pp_size, -1, CHECKSUM + 1)
    if (stages != stages[0]).any():
        raise ValueError(
            f"The stages of a pipeline must read the same rows, but read batches, tokens and checksums "
            f"{stages.tolist()}: seed the dataset's shuffling and the collator alike on all ranks."
        )
    facts = facts[: len(stages[0])]
    size = state.sp_size
    for group, rows in enumerate(facts.split(size)):
        if (rows != rows[0])[:, : FAILED + 1].any():
            raise ValueError(
                f"Ranks {group * size} to {group * size + size - 1} form an SP group and must read the same rows, but "
                f"read batches, tokens and checksums {rows[:, : CHECKSUM + 1].tolist()}: seed the dataset's shuffling "
                "and the collator alike on all ranks, or leave sharding by rank to the trainer."
            )
        if not rows[0, HELD] and facts[:, BATCHES].max() > 0:
            raise ValueError(
                f"Data rank {group} got no batch in this epoch while others did: give the dataset at least "
                f"{state.dp_size} batches, or shards."
            )


class InStep:
    """A loader for evaluation that ends on all ranks at once: a rank whose rows ran out runs its last batch again.

    Shards of a stream differ in length, and a rank alone in a gather would deadlock.

    Attributes:
        num_rows: rows that all data ranks have read so far.
    """

    def __init__(
        self,
        loader: Any,
        state: ParallelState,
        device: torch.device,
        notes: Callable[[], Notes] = Notes,
        hear: Callable[[Tensor], None] | None = None,
    ) -> None:
        """
        Args:
            notes: what this rank tells beside its batches.
            hear: is called with the facts of each exchange, alike on all ranks.
        """
        self._loader, self._state, self._device = loader, state, device
        self._notes, self._hear = notes, hear
        self.num_rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def _ends_with_dummy(self) -> bool:
        """Whether the batch that was read last is one that another rank had."""
        sampler = getattr(self._loader, "batch_sampler", None)
        return isinstance(sampler, UnsplitBatches) and sampler.ends_with_dummy and self._loader.end_of_dataloader

    def __iter__(self) -> Iterator[Any]:
        """Collective: one all-gather over all ranks for each batch. Raises as `exchange_facts` does."""
        last: Any = None
        batches = iter(self._loader)
        while True:
            found, error = take(batches, 1)
            told = {"held": last is not None, "error": error, "notes": self._notes()}
            facts = exchange_facts(found, 0, **told, state=self._state, device=self._device)
            if self._hear is not None:
                self._hear(facts)
            if not facts[:, BATCHES].any():
                return
            if found and self._ends_with_dummy():
                found = [DummyBatch.of(found[0])]
            self.num_rows += int(facts[: self._state.dp_size * self._state.sp_size : self._state.sp_size, ROWS].sum())
            last = found[0] if found else last
            yield last if found else DummyBatch.of(last)
