"""Bin packing over lengths: which document goes into which bin. Pure index arithmetic.

n documents, `capacity` tokens a bin. A result is one bin number a document, [n]; bins are numbered in the order of
their first document, so a packed dataset keeps the order of its source as far as the packing allows.
"""

from __future__ import annotations

import numpy as np

_BITS = 8  # a word of the bit set holds 2**8 rooms: Python integers of that size are as cheap as small ones


class _Rooms:
    """A set of integers in [0, limit] that answers "the smallest member of at least x" by two bit scans."""

    def __init__(self, limit: int):
        self._words = [0] * ((limit >> _BITS) + 1)
        self._filled = 0  # bit i: word i is not empty

    def add(self, room: int) -> None:
        high = room >> _BITS
        self._words[high] |= 1 << (room & ((1 << _BITS) - 1))
        self._filled |= 1 << high

    def remove(self, room: int) -> None:
        high = room >> _BITS
        self._words[high] ^= 1 << (room & ((1 << _BITS) - 1))
        if not self._words[high]:
            self._filled ^= 1 << high

    def at_least(self, need: int) -> int:
        """The smallest member that is not below `need`, or -1."""
        high = need >> _BITS
        word = self._words[high] >> (need & ((1 << _BITS) - 1))
        if word:
            return need + (word & -word).bit_length() - 1
        filled = self._filled >> (high + 1)
        if not filled:
            return -1
        high += (filled & -filled).bit_length()
        word = self._words[high]
        return (high << _BITS) + (word & -word).bit_length() - 1


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the longest document first, each into the fullest bin that still holds it.

    Needs at most 11/9 of the optimal number of bins, plus one (Johnson 1974); on ragged text it is within one bin of
    the bound tokens / capacity. The sort costs O(n log n), each placement a few integer operations whatever the
    number of bins. The number of bins depends on the lengths only, not on their order.

    Args:
        lengths: tokens of each document, [n], each in [1, capacity].
        capacity: tokens a bin holds.

    Returns:
        The bin of each document, int64 [n].
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity
    sizes = lengths.tolist()
    smallest = min(sizes, default=0)
    bins = np.zeros(len(sizes), dtype=np.int64)
    placed = bins.tolist()
    rooms, open_bins = _Rooms(capacity), {}  # open_bins: room left -> the bins that have it
    num_bins = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[index]
        room = rooms.at_least(size)
        if room < 0:
            room, chosen = capacity, num_bins
            num_bins += 1
        else:
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms.remove(room)
        placed[index] = chosen
        room -= size
        if room >= smallest:
            waiting = open_bins.setdefault(room, [])
            if not waiting:
                rooms.add(room)
            waiting.append(chosen)
    bins[:] = placed
    return _by_first_document(bins, num_bins)


def sequential(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """First come, first packed: a bin is closed when the next document does not fit, so the order is kept.

    Args and result as in `best_fit`.
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity
    ends = np.cumsum(lengths)
    bins = np.empty(len(lengths), dtype=np.int64)
    start = num_bins = 0
    while start < len(lengths):
        base = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, base + capacity, side="right"))
        bins[start:stop] = num_bins
        start, num_bins = stop, num_bins + 1
    return bins


STRATEGIES = {"best_fit": best_fit, "sequential": sequential}


def members(bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents bin after bin, int64 [n], and how many each bin has, int64 [number of bins]."""
    return np.argsort(bins, kind="stable"), np.bincount(bins)


def _by_first_document(bins: np.ndarray, num_bins: int) -> np.ndarray:
    first = np.full(num_bins, len(bins), dtype=np.int64)
    np.minimum.at(first, bins, np.arange(len(bins)))
    number = np.empty(num_bins, dtype=np.int64)
    number[np.argsort(first)] = np.arange(num_bins)
    return number[bins]
