"""Index arithmetic that keeps packed documents apart in a convolution and in a scan; no collectives.

    convolution, kernel of 3: two columns before each document,     . . a a a a . . b b b
    zeros (.) at its begin or tokens of the ranks before (<)        < < a a . . b b b

    scan, chunks of 4: documents of as many chunks side by side,    [a a a a - ; c c c c c]   [b b -]
    filled up (-) with their last token, which nothing reads

Shapes: B rows; S tokens of the full row; s of this rank; t <= s last tokens that each rank passes on; M columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_veomni.attention.documents import Documents
from hf_veomni.host import forget, make, remember


@dataclass(frozen=True, eq=False)
class ConvLayout:
    """Where the columns of a convolution come from, and where its results are.

    Attributes:
        source: int64 [B, M], columns of [tails of all ranks (sp * t) | local tokens (s) | one of zeros].
        result: int64 [B, s], column of M for each local token.
    """

    source: Tensor
    result: Tensor


def conv_layout(
    documents: Documents, kernel: int, sp_size: int, rank: int, device: torch.device | str = "cpu"
) -> ConvLayout:
    """Columns for a causal convolution of `kernel` taps over this rank's slice of packed sequences.

    Every part of a document in the slice is preceded by the kernel - 1 tokens before it: of the same document where
    it began on an earlier rank, zeros where it begins here.
    """
    reach = kernel - 1
    part = documents.row_length // sp_size
    tail = min(part, reach) if sp_size > 1 else 0
    low, high = rank * part, (rank + 1) * part
    first_local, zero = sp_size * tail, sp_size * tail + part
    sources: list[list[int]] = [[] for _ in range(documents.num_rows)]
    results: list[list[int]] = [[] for _ in range(documents.num_rows)]
    for row, begin, end in documents.spans():
        first, last = max(begin, low), min(end, high)
        if first >= last:
            continue
        columns = sources[row]
        columns += [rank * tail - (low - at) if begin <= at else zero for at in range(first - reach, first)]
        results[row] += range(len(columns), len(columns) + last - first)
        columns += range(first_local + first - low, first_local + last - low)
    width = max(len(columns) for columns in sources)
    padded = [columns + [zero] * (width - len(columns)) for columns in sources]
    return ConvLayout(_index(padded, device), _index(results, device))


@dataclass(frozen=True, eq=False)
class ScanLayout:
    """Documents of full rows as batches for a scan.

    Attributes:
        batches: int64 [n, L] each, tokens of the flattened B*S.
        result: int64 [B*S], where each token is in the flattened and concatenated batches.
    """

    batches: tuple[Tensor, ...]
    result: Tensor


def scan_layout(documents: Documents, chunk: int, device: torch.device | str = "cpu") -> ScanLayout:
    """Batches of documents that fill as many chunks of `chunk` tokens each.

    A chunked scan fills its last chunk anyway, so that none of them costs more than alone.
    """
    batches, result = make(_scan_indices, documents, chunk)
    return ScanLayout(tuple(forget(remember(x, device)) for x in batches), forget(remember(result, device)))


def _scan_indices(documents: Documents, chunk: int) -> tuple[list[Tensor], Tensor]:
    size = documents.row_length
    groups: dict[int, list[tuple[int, int]]] = {}
    for row, begin, end in documents.spans():
        groups.setdefault(-(-(end - begin) // chunk), []).append((row * size + begin, end - begin))
    result = torch.empty(documents.num_rows * size, dtype=torch.long)
    batches, offset = [], 0
    for _, group in sorted(groups.items()):
        starts, lengths = (torch.tensor(x)[:, None] for x in zip(*group, strict=True))
        step = torch.arange(int(lengths.max()))[None]
        index = starts + torch.minimum(step, lengths - 1)
        real = step < lengths
        result[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
        offset += index.numel()
        batches.append(index)
    return batches, result


def _index(rows: list[list[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
