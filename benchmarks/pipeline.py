"""A pipeline's bubble and memory against the formulas of its schedule, and pp against sp and ep at equal worlds.

    python -m benchmarks pipeline                      all of it, small, on the CPU; draws docs/images/pipeline*.svg
    python -m benchmarks pipeline --parts bubble       one of the parts

Stages run one after the other in one process, with the package's own `run_window`; `_pipeline.py` puts their actions
on one simulated clock.

    bubble    share of all ranks' time in which they stand still; (p - 1) / (v m + p - 1) if all actions were equal.
              Ranks are not: the last one has the head too, and whoever has less waits for the busiest one. With all as
              slow as that one, 1 - (mean / busiest) (1 - formula)
    held      what a rank keeps for backwards, in micro-batches of its own; min(m, p - rank) by 1F1B, with v stages on
              each rank (2 (p - rank - 1) + (v - 1) p + 1) / v at most
    scaling   one mixture and 16 documents over 2, 4, 8 ranks, as stages (16 micro-batches), as SP ranks and as EP
              ranks (two micro-batches of packed rows): seconds of one rank / (ranks * seconds), over the bandwidth of
              the link. The bandwidth is given as link / compute: the time of ep=8's exchanges over its compute.
              Gathers and reductions of FSDP2 take no time here; their bytes are counted

Checked: the bubble of equal actions is that of the formula, that of the measured ones no more than `--tolerance`
beyond what unequal ranks cost, and no rank holds more than the formula says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks._link import Link, linked
from benchmarks._pipeline import Stage, bubble, measure_stage, replay
from benchmarks._record import known_rows, record
from benchmarks._schedules import dense, mixture

PICTURE = Path(__file__).parents[1] / "docs/images/pipeline.svg"
TIMELINE = PICTURE.with_name("pipeline_timeline.svg")
COLORS = {False: ("#2b5c8a", "#7fa8cf"), True: ("#d9730d", "#f2b880")}  # of a rank's first and second stage
RATIOS = (0.0, 0.3, 1.0, 3.0)
WORLDS = (2, 4, 8)
DOCUMENTS, ROWS = 16, 2


def _batches(count: int, tokens: int, vocabulary: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, vocabulary, (count, 1, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def _make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def _window(config: Any, ranks: int, count: int, tokens: int, repeats: int, chunks: int = 1) -> list[Stage]:
    batches = _batches(count, tokens, config.vocab_size)
    return [measure_stage(lambda: _make(config), ranks, place, batches, repeats, chunks) for place in range(ranks)]


def _equal(stages: Sequence[Stage]) -> list[Stage]:
    """The same window with all forwards equally long, and all backwards: what is left of the bubble is the formula."""
    both = [(a.backward, s) for stage in stages for a, s in zip(stage.actions, stage.seconds, strict=True)]
    mean = {k: sum(s for b, s in both if b == k) / sum(b == k for b, _ in both) for k in (False, True)}
    return [replace(stage, seconds=[mean[action.backward] for action in stage.actions]) for stage in stages]


def measure_bubble(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of ranks, of stages on each, and of micro-batches."""
    config = dense(256, 768, 4, 4, num_hidden_layers=8)
    rows = []
    for stages, chunks in product(options.stages, options.chunks):
        for count in (times * stages for times in options.times):
            found = _window(config, stages, count, options.tokens, options.repeats, chunks)
            row: dict[str, Any] = {"part": "bubble", "stages": stages, "chunks": chunks, "micro_batches": count}
            row |= {"bubble": bubble(replay(found)), "formula": (stages - 1) / (chunks * count + stages - 1)}
            row["equal"] = bubble(replay(_equal(found)))
            row["busy"] = [sum(stage.seconds) / count for stage in found]
            row["unequal"] = 1 - sum(row["busy"]) / stages / max(row["busy"]) * (1 - row["formula"])
            row["held"] = [stage.held / stage.one for stage in found]
            row["held_formula"] = [_most(stages, chunks, count, place) for place in range(stages)]
            row["layers"] = [stage.layers for stage in found]
            rows.append(row)
            print(
                f"pp={stages} v={chunks} m={count:2d}  bubble {row['bubble']:.1%}, with the busiest rank's time "
                f"{row['unequal']:.1%}, equal stages {row['equal']:.1%}, formula {row['formula']:.1%}  "
                f"held {' '.join(f'{x:.2f}' for x in row['held'])}, formula {row['held_formula']}",
                flush=True,
            )
    return rows


def _most(ranks: int, chunks: int, count: int, place: int) -> float:
    """Micro-batches that a rank holds by the schedule."""
    after = ranks - place - 1
    return min(count, after + 1 if chunks == 1 else (2 * after + (chunks - 1) * ranks + 1) / chunks)


def _documents(config: Any, rows: int, each: int, tokens: int) -> list[dict[str, Tensor]]:
    """`rows` packed rows of `each` documents."""
    ids = torch.randint(0, config.vocab_size, (rows, 1, each * tokens), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens).repeat(each)[None]
    return [{"input_ids": row, "labels": row, "position_ids": positions} for row in ids]


def _step(config: Any, axis: str, world: int, options: argparse.Namespace) -> tuple[float, Link]:
    """CPU time of one rank's window, and the link with what it has sent in it."""
    from hf_veomni import ParallelPlan, prepare_omni, run_window

    link = Link()
    each = DOCUMENTS // ROWS // (world if axis == "ep" else 1)  # EP ranks have documents of their own
    rows = _documents(config, ROWS, each, options.length)
    seconds = []
    with linked(link, world):
        model = prepare_omni(_make(config), ParallelPlan.from_dict({f"{axis}_size": world}))
        for _ in range(options.repeats + 1):
            model.zero_grad()
            link.reset()
            run_window(model, rows)
            seconds.append(link.compute)
    return min(seconds[1:]), link


def measure_scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each world, axis and bandwidth: the same documents, packed, in windows that suit the axis."""
    config = mixture(128, 32, 8, 8, 16, num_hidden_layers=8, num_experts=32)
    alone = measure_stage(
        lambda: _make(config), 1, 0, _documents(config, DOCUMENTS, 1, options.length), options.repeats
    )
    one = sum(alone.seconds)
    steps: dict[tuple[str, int], tuple[float, Link]] = {}
    for world in WORLDS:
        for axis in ("sp", "ep"):
            steps[axis, world] = seconds, link = _step(config, axis, world, options)
            exchanged = sum(size for _, _, size in link.transfers)
            print(
                f"{axis}={world}: compute {seconds:.3f} s of {one:.3f} s, {exchanged / 1e6:.1f} MB exchanged, "
                f"{link.gathered / 1e6:.1f} MB gathered and reduced",
                flush=True,
            )
    compute, link = steps["ep", WORLDS[-1]]
    slow = sum(size for _, _, size in link.transfers) / compute  # bytes a second at link / compute 1
    rows = []
    for world in WORLDS:
        documents = _documents(config, DOCUMENTS, 1, options.length)
        staged = [measure_stage(lambda: _make(config), world, i, documents, options.repeats) for i in range(world)]
        for ratio in RATIOS:
            bandwidth = slow / ratio if ratio else float("inf")
            took, sent, gathered = {}, {"pp": max(sum(stage.sent) for stage in staged)}, {"pp": 0}
            took["pp"] = max(each[-1].end for each in replay(staged, bandwidth))
            for axis in ("sp", "ep"):  # each exchange of the plain schedule is waited for
                seconds, link = steps[axis, world]
                sent[axis], gathered[axis] = sum(size for _, _, size in link.transfers), link.gathered
                took[axis] = seconds + sent[axis] / bandwidth
            for axis, seconds in took.items():
                row = {"part": "scaling", "axis": axis, "world": world, "link_over_compute": ratio}
                row |= {"bytes": sent[axis], "gathered": gathered[axis]}
                rows.append(row | {"seconds": seconds, "efficiency": one / (world * seconds)})
            shown = "  ".join(f"{axis} {one / (world * seconds):.0%}" for axis, seconds in sorted(took.items()))
            print(f"world {world}, link / compute {ratio}: {shown}", flush=True)
        print(f"pp={world}: {sent['pp'] / 1e6:.1f} MB sent", flush=True)
    return rows


def check(rows: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """What is wrong with the rows."""
    wrong = []
    for row in rows:
        if row["part"] != "bubble":
            continue
        name = f"pp={row['stages']}, {row['micro_batches']} micro-batches"
        if abs(row["equal"] - row["formula"]) > tolerance:
            wrong.append(f"{name}: bubble equal stages {row['equal']:.3f}, by the formula {row['formula']:.3f}")
        if row["bubble"] > row["unequal"] + tolerance:
            wrong.append(f"{name}: bubble {row['bubble']:.3f}, and {row['unequal']:.3f} by its busiest rank")
        for place, (held, most) in enumerate(zip(row["held"], row["held_formula"], strict=True)):
            if held > most * (1 + tolerance):
                wrong.append(f"{name}: stage {place} holds {held:.2f} micro-batches, by the formula {most}")
    return wrong


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bubble over micro-batches; efficiency over ranks for each bandwidth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.8), layout="constrained")
    axes = figure.subplots(1, 1 + len(RATIOS))
    found = [row for row in rows if row["part"] == "bubble"]
    sizes = dict.fromkeys((row["stages"], row["chunks"]) for row in found)
    for color, (stages, chunks) in zip(("#4c78a8", "#e45756", "#72b7b2", "#f58518"), sizes, strict=False):
        line = [row for row in found if (row["stages"], row["chunks"]) == (stages, chunks)]
        counts = [row["micro_batches"] for row in line]
        axes[0].plot(counts, [100 * row["bubble"] for row in line], "o-", color=color, label=f"p={stages}, v={chunks}")
        axes[0].plot(counts, [100 * row["formula"] for row in line], ":", color=color)
    axes[0].set_ylim(0)
    axes[0].set_title("bubble, dotted: (p - 1) / (v m + p - 1)", fontsize=8)
    axes[0].set_xlabel("micro-batches m", fontsize=8)
    axes[0].set_ylabel("% of all ranks' time", fontsize=8)
    for axis, ratio in zip(axes[1:], RATIOS, strict=True):
        for name in ("pp", "sp", "ep"):
            line = [
                row
                for row in rows
                if row["part"] == "scaling" and row["axis"] == name and row["link_over_compute"] == ratio
            ]
            axis.plot([row["world"] for row in line], [100 * row["efficiency"] for row in line], "o-", label=name)
        axis.set_ylim(0, 115)
        axis.set_xticks(WORLDS)
        axis.set_title(f"link / compute {ratio:g}", fontsize=8)
        axis.set_xlabel("ranks", fontsize=8)
    axes[1].set_ylabel("efficiency, % of one rank's speed", fontsize=8)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_timeline(options: argparse.Namespace, path: Path) -> None:
    """A window of eight micro-batches over four stages: forwards, backwards, and what stands still."""
    from matplotlib.figure import Figure

    config = dense(256, 768, 4, 4, num_hidden_layers=8)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, chunks in zip(axes, (1, 2), strict=True):
        ran = replay(_window(config, 4, 8, options.tokens, options.repeats, chunks))
        for place, actions in enumerate(ran):
            for one in actions:
                color = COLORS[one.action.backward][one.action.chunk]
                bar = [(one.begin, one.end - one.begin)]
                axis.broken_barh(bar, (-place - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.3)
                middle = (one.begin + one.end) / 2
                axis.text(middle, -place, str(one.action.index), ha="center", va="center", fontsize=5, color="white")
        axis.set_yticks([-place for place in range(4)], [f"rank {place}" for place in range(4)], fontsize=7)
        axis.set_title(f"pp=4, pp_stages={chunks}: {bubble(ran):.0%} of the time stands still", fontsize=8)
        axis.tick_params(labelsize=7)
    label = "seconds of the simulated clock; forwards blue, backwards orange, second stage pale"
    axes[-1].set_xlabel(label, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=["bubble", "scaling"], default=["bubble", "scaling"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4], help="ranks")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2], help="stages of each rank")
    parser.add_argument("--times", nargs="+", type=int, default=[1, 2, 4], help="micro-batches of each rank")
    parser.add_argument("--tokens", type=int, default=128, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document, of the scaling")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--no-draw", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, write the json, draw, and say what is wrong."""
    options = parse()
    torch.set_num_threads(1)
    rows = [row for row in known_rows("pipeline") if row["part"] not in options.parts]
    if "bubble" in options.parts:
        rows += measure_bubble(options)
    if "scaling" in options.parts:
        rows += measure_scaling(options)
    wrong = check(rows, options.tolerance)
    record("pipeline", rows, "pp=2, pp=4; pp, sp and ep over 2, 4 and 8 ranks")
    if not options.no_draw:
        draw(rows, PICTURE)
        draw_timeline(options, TIMELINE)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
