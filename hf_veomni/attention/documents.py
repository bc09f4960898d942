"""Where the packed documents of a batch of rows begin and end.

Shapes: B rows; S tokens of a full row; N documents of the full batch. A row is a boundary too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_veomni.host import forget, is_same, knows, on_host


def find_breaks(positions: Tensor) -> Tensor:
    """Where a document ends and another begins: a position is not its left neighbour's plus one.

    Args:
        positions: [.., S] of full rows; waits for the device unless the host knows them (`host`).

    Returns:
        bool [.., S - 1] on the CPU.
    """
    return on_host(positions).diff(dim=-1) != 1


@dataclass(frozen=True, eq=False)
class Documents:
    """Boundaries of the packed documents of a batch of full rows [B, S].

    Attributes:
        lengths: tokens of every document, per row; each row sums to S.
        cu_seqlens: int32 [N + 1], where the documents begin in the flattened B*S tokens, and B*S.
        max_length: tokens of the longest document.
        padding: tokens at the end of every row that only fill it up.
        positions: [1 or B, S], of which the documents were read, on the device and remembered on the host; None where
            they came otherwise.
    """

    lengths: tuple[tuple[int, ...], ...]
    cu_seqlens: Tensor
    max_length: int
    padding: int = 0
    positions: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> Documents:
        """Documents of given lengths in tokens, one sequence of lengths per row.

        Raises:
            ValueError: no row, a length below 1, or rows of different sizes.
        """
        rows = tuple(tuple(int(length) for length in row) for row in lengths)
        if not rows or any(length < 1 for row in rows for length in row) or not all(rows):
            raise ValueError(f"`lengths` ({rows}) must hold one row or more, each of documents of 1 token or more.")
        sizes = [sum(row) for row in rows]
        if len(set(sizes)) > 1:
            raise ValueError(f"`lengths` gives rows of {sizes} tokens: all rows of a batch must be equally long.")
        flat = list(chain.from_iterable(rows))
        edges = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)
        return cls(rows, edges.to(device or "cpu", non_blocking=True), max(flat))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Documents:
        """Documents of packed sequences, by `find_breaks`.

        Args:
            position_ids: [B, S] of the full rows. Waits for the device unless the host knows them (`host`).

        Raises:
            ValueError: not [B, S], or empty.
        """
        if position_ids.dim() != 2 or not position_ids.numel():
            raise ValueError(
                f"`position_ids` {list(position_ids.shape)} must be [rows, tokens] and not empty: of mRoPE positions "
                "pass the text row alone."
            )
        num_rows, size = position_ids.shape
        begins = F.pad(find_breaks(position_ids), (1, 0), value=True)
        flat: list[int] = begins.flatten().nonzero().flatten().tolist()
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        for first, following in zip(flat, [*flat[1:], num_rows * size], strict=True):
            rows[first // size].append(following - first)
        return cls.from_lengths(rows, device=position_ids.device)

    @cached_property
    def num_rows(self) -> int:
        """B."""
        return len(self.lengths)

    @cached_property
    def row_length(self) -> int:
        """S, tokens of a row."""
        return sum(self.lengths[0])

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one document."""
        return any(len(row) > 1 for row in self.lengths)

    @cached_property
    def holds_several(self) -> bool:
        """Whether some row holds more than one document beside the padding that fills it up."""
        return any(len(row) > 1 + (self.padding > 0) for row in self.lengths)

    def told_by(self, position_ids: Tensor) -> bool:
        """Whether these, [B, S], are the positions that the documents were read of: the same memory, unchanged."""
        rows, positions = self.num_rows, self.positions
        if positions is None or position_ids.shape != (rows, self.row_length):
            return False
        return knows(positions) and is_same(forget(positions).expand(rows, -1), position_ids)

    @cached_property
    def segments(self) -> Tensor | None:
        """[B, S], the document of every token, counted within its row; None if no row is packed."""
        if not self.is_packed:
            return None
        rows = [
            torch.arange(len(row)).repeat_interleave(torch.tensor(row), output_size=self.row_length)
            for row in self.lengths
        ]
        return torch.stack(rows).to(self.cu_seqlens.device, non_blocking=True)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Every document as (row, begin, end) in tokens of its row, end exclusive, in order."""
        for index, row in enumerate(self.lengths):
            for end, length in zip(accumulate(row), row, strict=True):
                yield index, end - length, end
