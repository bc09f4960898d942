"""Draw docs/images/packed_sequence.svg: one packed sequence on two ranks, in the layers and in the attention.

    python docs/draw_packed_sequence.py [PATH]

Needs matplotlib (the "plot" extra). The same text for the same version of matplotlib, so that a diff means a change.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

PATH = Path(__file__).parent / "images" / "packed_sequence.svg"

DOCUMENTS = (("chat", 5), ("image + text", 9), ("code", 3), ("audio + text", 7))
COLORS = ("#8dd3c7", "#fdb462", "#b3b3d9", "#fb8072")
EDGE = {"edgecolor": "#4b5563", "linewidth": 0.8}
LENGTH = sum(length for _, length in DOCUMENTS)
HALF = LENGTH // 2
HEADS = ("heads 0 to 3", "heads 4 to 7")


def _spans() -> list[tuple[str, int, int, str]]:
    """(name, first token, one past the last, color) of each document."""
    spans, start = [], 0
    for (name, length), color in zip(DOCUMENTS, COLORS, strict=True):
        spans.append((name, start, start + length, color))
        start += length
    return spans


def _bar(axes: Axes, low: int, high: int, y: float, shift: float = 0.0) -> None:
    """The tokens [low, high) of the sequence as a bar of its documents' colors."""
    for _, first, last, color in _spans():
        left, right = max(first, low), min(last, high)
        if left < right:
            axes.add_patch(Rectangle((left + shift, y), right - left, 1.0, facecolor=color, **EDGE))


def _mask(axes: Axes, x: float, y: float, size: float) -> None:
    """Which tokens see which, queries down and keys across: a triangle for each document."""
    scale = size / LENGTH
    axes.add_patch(Rectangle((x, y), size, size, facecolor="white", **EDGE))
    for _, first, last, color in _spans():
        left, right = x + first * scale, x + last * scale
        top, bottom = y + size - first * scale, y + size - last * scale
        axes.add_patch(Polygon([(left, top), (left, bottom), (right, bottom)], facecolor=color, **EDGE))


def _say(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 9.5, "color": "#111827", **style})


def draw(path: Path) -> None:
    """Write the drawing as svg."""
    figure = Figure(figsize=(9.6, 5.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-8.5, LENGTH + 3.5), ylim=(-14.6, 3.4))
    axes.set_axis_off()
    label = {"ha": "right", "fontsize": 10.5, "fontweight": "bold"}

    _say(axes, -0.8, 0.5, "packed\nsequence", **label)
    _bar(axes, 0, LENGTH, 0.0)
    for name, first, last, _ in _spans():
        _say(axes, (first + last) / 2, 1.55, name)
        _say(axes, (first + last) / 2, 0.5, f"{last - first}", fontsize=9)
    _say(axes, LENGTH / 2, 2.7, f"documents of any modality, one behind the other: {LENGTH} tokens and no padding")

    _say(axes, -0.8, -2.6, "layers, loss", **label)
    for rank in range(2):
        low, shift = rank * HALF, (-0.6, 0.6)[rank]
        _bar(axes, low, low + HALF, -3.1, shift)
        _say(axes, low + HALF / 2 + shift, -3.7, f"rank {rank}: {HALF} tokens, all heads", fontsize=9)
        axes.annotate(
            "",
            (low + HALF / 2 + shift, -1.9),
            (low + HALF / 2, -0.15),
            arrowprops={"arrowstyle": "->", "color": "#6b7280"},
        )

    _say(axes, -0.8, -9.2, "attention", **label)
    for rank in range(2):
        x = rank * HALF + 2.2
        _mask(axes, x, -12.8, 7.6)
        _say(axes, x + 3.8, -13.6, f"rank {rank}: {LENGTH} tokens, {HEADS[rank]}", fontsize=9)
    for start in (0, 1):
        for end in (0, 1):
            tail = (start * HALF + HALF / 2 + (-0.6, 0.6)[start], -4.1)
            axes.annotate(
                "",
                (end * HALF + 6.0, -5.1),
                tail,
                arrowprops={"arrowstyle": "->", "color": "#2563eb", "linewidth": 1.4},
            )
    _say(axes, LENGTH / 2, -5.6, "all-to-all", color="#2563eb", fontsize=9)
    matplotlib.rcParams["svg.hashsalt"] = "hf_veomni"
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PATH)
