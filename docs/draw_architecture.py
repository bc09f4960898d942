"""Draw docs/images/architecture.svg: one batch on two ranks (sp=2, ep=2), with shapes, files and collectives.

    python docs/draw_architecture.py [PATH]

Needs matplotlib (the "plot" extra). The same text for the same version of matplotlib, so that a diff means a change.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

PATH = Path(__file__).parent / "images" / "architecture.svg"

COLORS = {"world": "#6b7280", "sp": "#2563eb", "ep": "#c2410c", "fsdp": "#15803d"}
LEGEND = {"world": "all ranks", "sp": "SP group", "ep": "EP group", "fsdp": "fsdp (experts: efsdp)"}
LANES = {0: 5.55, 1: 8.35}  # middle of each rank's lane
LANE_WIDTH = 2.5
LEFT, FILES, RIGHT = 0.25, 9.95, 13.6


@dataclass(frozen=True)
class Compute:
    """What both ranks do, each for itself: the shape that it has then, and the file."""

    what: str
    shapes: tuple[str, str]
    file: str = ""
    tall: bool = False  # the full sequence, not a slice


@dataclass(frozen=True)
class Collective:
    """A collective over one kind of group, and what the backward does at its place."""

    name: str
    group: str
    backward: str
    file: str = ""


@dataclass(frozen=True)
class Layer:
    """A frame around what follows, up to `None`."""

    title: str


def _same(shape: str) -> tuple[str, str]:
    return shape, shape


STEPS: list[Compute | Collective | Layer | None] = [
    Compute("collator: samples packed", _same("ids, labels, positions [1, S]"), "data/collator.py", True),
    Collective("all-gather: tokens, checksum, errors", "world", "", "trainer/facts.py"),
    Compute("model: hooks check the call", _same("[1, S]"), "sequence/calls.py", True),
    Compute("backbone: pad, find documents", _same("[1, S']   documents: 7 | 3 | 6"), "sequence/attach.py", True),
    Collective("all-gather: embedding", "fsdp", "all-gather, reduce-scatter (mean)", "FSDP2"),
    Compute("embeddings, mask, rotary tables", _same("[1, S', C]   mask: spans"), "attention/mask.py", True),
    Compute("slice before the first layer", ("[1, s, C]  first half", "[1, s, C]  second half"),
            "sequence/shard.py"),
    Layer("each layer"),
    Collective("all-gather: the layer's parameters", "fsdp", "all-gather, reduce-scatter (mean)", "FSDP2"),
    Layer("checkpointed: runs again in the backward"),
    Compute("norm, q k v", _same("q [1, H, s, D]"), "(transformers)"),
    Collective("all-to-all: tokens for heads", "sp", "all-to-all back", "sequence/ulysses.py"),
    Compute("attention within documents", ("[1, h, S', D]  heads 0, 1", "[1, h, S', D]  heads 2, 3"),
            "attention/varlen.py", True),
    Collective("all-to-all: heads for tokens", "sp", "all-to-all back", "sequence/ulysses.py"),
    Compute("output projection, norm, router", _same("[s, C], K experts for each"), "(transformers)"),
    Collective("all-to-all: E counts (kept, not repeated)", "ep", "", "expert/dispatch.py"),
    Collective("all-to-all: tokens to their experts", "ep", "all-to-all back", "expert/dispatch.py"),
    Compute("experts", ("[R, C]  experts 0, 1", "[R, C]  experts 2, 3"), "expert/compute.py"),
    Collective("all-to-all: outputs back", "ep", "all-to-all back", "expert/dispatch.py"),
    Compute("weighted sum, residual", ("[1, s, C]  first half", "[1, s, C]  second half"), "expert/dispatch.py"),
    None,
    None,
    Collective("all-gather: norm and head (kept)", "fsdp", "reduce-scatter (mean)", "FSDP2"),
    Compute("head: lazy logits", _same("[1, s, V], not computed"), "loss/lazy_logits.py"),
    Compute("cross entropy in chunks", _same("sum of losses / targets"), "loss/chunked.py"),
    Collective("all-reduce: the loss", "sp", "none: times sp", "loss/targets.py"),
    Collective("all-reduce: router's loss, 2 E + 2", "world", "none", "expert/router_loss.py"),
    Compute("backward: upwards, right column", _same("gradients of shards"), "(torch)"),
    Collective("all-reduce: gradient norm, each mesh", "fsdp", "", "(Trainer)"),
    Compute("optimizer", _same("this rank's shards"), "(torch)"),
]  # fmt: skip

HEIGHT = 0.62  # of a step


def _box(axes: Any, middle: float, y: float, text: str, full: bool) -> None:
    width = LANE_WIDTH if full else LANE_WIDTH * 0.84
    box = FancyBboxPatch(
        (middle - width / 2, y - 0.2), width, 0.4, boxstyle="round,pad=0.02,rounding_size=0.06",
        facecolor="#eef2f7" if full else "#ffffff", edgecolor="#475569", linewidth=0.9,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(middle, y, text, ha="center", va="center", fontsize=7.6, color="#0f172a")


def _draw_compute(axes: Any, step: Compute, y: float) -> None:
    axes.text(LEFT + 0.35, y, step.what, ha="left", va="center", fontsize=9, color="#0f172a")
    for rank, middle in LANES.items():
        _box(axes, middle, y, step.shapes[rank], step.tall)
    axes.text(FILES, y, step.file, ha="left", va="center", fontsize=8, family="monospace", color="#334155")


def _draw_collective(axes: Any, step: Collective, y: float) -> None:
    color = COLORS[step.group]
    low, high = LANES[0] - LANE_WIDTH / 2, LANES[1] + LANE_WIDTH / 2
    axes.add_patch(Rectangle((low, y - 0.15), high - low, 0.3, facecolor=color, edgecolor="none", alpha=0.92))
    axes.text((low + high) / 2, y, step.name, ha="center", va="center", fontsize=8.2, color="white", weight="bold")
    axes.text(FILES, y, step.file, ha="left", va="center", fontsize=8, family="monospace", color="#334155")
    if step.backward:
        axes.text(RIGHT + 0.15, y, step.backward, ha="left", va="center", fontsize=8, color=color)


def _draw_frame(axes: Any, title: str, top: float, bottom: float, depth: int) -> None:
    left, right = LEFT + 0.12 * depth, RIGHT - 0.12 * depth
    frame = Rectangle(
        (left, bottom), right - left, top - bottom, fill=False, edgecolor="#64748b", linewidth=1.1,
        linestyle="-" if depth == 0 else (0, (4, 3)),
    )  # fmt: skip
    axes.add_patch(frame)
    axes.text(left + 0.12, top - 0.19, title, ha="left", va="center", fontsize=8.6, style="italic", color="#475569")


def _draw_head(axes: Any, y: float) -> None:
    for rank, middle in LANES.items():
        axes.text(middle, y, f"rank {rank}", ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(LEFT + 0.35, y, "forward, from top to bottom", ha="left", va="center", fontsize=9.5, weight="bold")
    axes.text(FILES, y, "file", ha="left", va="center", fontsize=9.5, weight="bold")
    axes.text(RIGHT + 0.15, y, "in the backward, upwards", ha="left", va="center", fontsize=9.5, weight="bold")
    for place, (group, name) in enumerate(LEGEND.items()):
        x = LEFT + 0.35 + 3.1 * place
        axes.add_patch(Rectangle((x, y + 0.44), 0.4, 0.22, facecolor=COLORS[group], edgecolor="none"))
        axes.text(x + 0.52, y + 0.55, f"collective over {name}", ha="left", va="center", fontsize=8.6)
    note = "wide box: the full sequence, narrow box: this rank's part"
    axes.text(LEFT + 0.35, y + 1.0, note, ha="left", va="center", fontsize=8.6, color="#475569")


def draw() -> Figure:
    """The drawing; heights follow from the number of steps."""
    figure = Figure(figsize=(13.2, 12.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y, open_frames = 0.0, list[tuple[str, float]]()
    for step in STEPS:
        if step is None:
            title, top = open_frames.pop()
            _draw_frame(axes, title, top, y + HEIGHT / 2 - 0.04 - 0.1 * (1 - len(open_frames)), len(open_frames))
            y -= 0.16
        elif isinstance(step, Layer):
            open_frames.append((step.title, y + HEIGHT / 2))
            y -= 0.38
        else:
            (_draw_compute if isinstance(step, Compute) else _draw_collective)(axes, step, y)
            y -= HEIGHT
    _draw_head(axes, 0.72)
    axes.set_xlim(0, 16.6)
    axes.set_ylim(y + 0.2, 2.05)
    return figure


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    with matplotlib.rc_context({"svg.hashsalt": "hf_veomni", "font.family": "DejaVu Sans"}):
        draw().savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
