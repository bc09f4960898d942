"""What of the time on a link is left bare: each schedule of exchanges, over bandwidths, on a link with its own clock.

    python -m benchmarks overlap                       all of it, small, on the CPU; draws docs/images/overlap*.svg
    python -m benchmarks overlap --shapes experts      one of the two models

One process is one of 8 equal ranks (`_link.py`) and trains two sequences a step with the real code: a mixture at
Qwen3-30B-A3B's layer shapes in ratio (a quarter of each width; ep=8), and a dense model at Llama-3-8B's (an eighth;
sp=8). Link over compute is set by the bandwidth: bytes of the plain schedule / (ratio * its compute); at 0 exchanges
take no time. Which device has such a ratio at the real shapes, `DEVICES` and `ratio_of` say (`_schedules.py`), from
the flops and bytes of a token.

    plain           one sequence after the other, each exchange waited for
    chunks, pairs   the plan's `overlap`
    transformers    plain, with transformers' own exchange of tokens
    attention kept  with checkpointing: what attention has computed and exchanged is kept (`sequence/kept.py`)

    exposed    seconds waited for the link / seconds that the link was busy
    bound      max(0, 1 - compute / link): what no schedule can hide

Routing: "balanced" draws different experts for each token, and all get as many; "skewed" draws experts by a log-normal
popularity, and the process is the rank whose experts get most. Checked: gradients of each schedule equal the plain
one's; pairs take no longer than plain by more than `--slower`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._exchange import even_routing
from benchmarks._link import Link, linked
from benchmarks._record import known_rows, quantiles, record
from benchmarks._schedules import (
    DEVICES,
    KEPT,
    RANKS,
    SCHEDULES,
    SHAPES,
    UNBUNDLED,
    Bench,
    Shapes,
    busiest_rank,
    ratio_of,
    skewed_routing,
)

PICTURE = Path(__file__).parents[1] / "docs/images/overlap.svg"
TIMELINE = PICTURE.with_name("overlap_timeline.svg")
RATIOS = (0.0, 0.3, 0.6, 0.9)


@contextmanager
def benches(shapes: Shapes, routing: str, checkpointing: bool, options: argparse.Namespace) -> Iterator[list[Bench]]:
    """One for each schedule that the model has, behind one link."""
    config = shapes.config(num_hidden_layers=options.layers)
    rank = busiest_rank(config.num_experts) if routing == "skewed" else 0
    route = {"balanced": even_routing, "skewed": skewed_routing}.get(routing, lambda model: nullcontext())
    with ExitStack() as stack:
        link = Link()
        stack.enter_context(linked(link, RANKS, rank, equal=routing != "skewed"))
        found = []
        kept = [name + KEPT for name in options.schedules if name != "transformers"]
        for name in [*options.schedules, *(kept if checkpointing and shapes.axis == "sp" else [])]:
            if name != "transformers" or shapes.axis == "ep":
                plan = {f"{shapes.axis}_size": RANKS}
                found.append(Bench(config, plan, name, checkpointing, link, options.tokens or shapes.tokens))
                stack.enter_context(route(found[-1].model))
        yield found


def measure(shapes: Shapes, routing: str, checkpointing: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each schedule and ratio."""
    about = {"model": shapes.model, "axis": f"{shapes.axis}={RANKS}", "routing": routing}
    with benches(shapes, routing, checkpointing, options) as found:
        return sweep(found, options.ratios, options.repeats, about | {"checkpointing": checkpointing})


def sweep(
    contenders: list[Bench], ratios: Sequence[float], repeats: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each contender and ratio of the link's time to the compute of the first one; they take turns."""
    plain, link = contenders[0], contenders[0].link
    link.bandwidth = float("inf")
    errors: dict[str, float] = {}
    expected: dict[bool, dict[str, Tensor]] = {}  # by the kind of rows: copies of ranks are others for others
    for bench in contenders:
        bench.step()  # warm
        found = bench.gradients()
        alike = expected.setdefault(bench.label.endswith(UNBUNDLED), found) or found
        errors[bench.label] = max((_error(found[n], alike[n]) for n in found), default=0.0)
    computed = []
    for _ in range(repeats):
        plain.step()
        computed.append(link.compute)
    sent, compute = sum(count for _, _, count in link.transfers), quantiles(computed)["p50"]
    rows = []
    for ratio in ratios:
        link.bandwidth = sent / (ratio * compute) if ratio else float("inf")
        results: dict[str, list[dict[str, float]]] = {bench.label: [] for bench in contenders}
        for _ in range(repeats):
            for bench in contenders:
                bench.step()
                one = {"exposed": link.waited / link.busy if ratio else 0.0, "seconds": link.now()}
                one["sent"] = sum(count for _, _, count in link.transfers)
                results[bench.label].append(one | {"compute": link.compute, "busy": link.busy})
        first = results[plain.label]
        for bench in contenders:
            mine = results[bench.label]
            row = about | {
                "schedule": bench.label,
                "link_over_compute": ratio,
                "gradient_error": errors[bench.label],
            }
            row["bound"] = max(0.0, 1 - 1 / ratio) if ratio else 0.0
            row |= {key: quantiles([one[key] for one in mine]) for key in mine[0]}
            for key in ("seconds", "compute", "sent"):
                row[f"{key}_over_plain"] = quantiles([a[key] / b[key] for a, b in zip(mine, first, strict=True)])
            row |= {"tokens": bench.tokens, "flops": bench.flops}
            rows.append(row)
            show(row)
    return rows


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['model']:14s} {row['axis']:5s}{row['routing']:9s} {'ckpt' if row['checkpointing'] else '':5s}"
        f"{row['schedule']:20s} link/compute {row['link_over_compute']:.1f}  exposed {row['exposed']['p50']:6.1%}  "
        f"bound {row['bound']:.1%}  step {row['seconds']['p50']:.2f} s, x {row['seconds_over_plain']['p50']:.3f}  "
        f"error {row['gradient_error']:.1e}",
        flush=True,
    )


def check(rows: list[dict[str, Any]], tolerance: float, slower: float) -> list[str]:
    """What is wrong with the rows."""
    wrong = []
    for row in rows:
        name = f"{row['schedule']} of {row['model']} ({row['routing']}, checkpointing {row['checkpointing']})"
        if row["gradient_error"] > tolerance:
            wrong.append(f"gradients of {name} are off by {row['gradient_error']:.1e}")
        ratio, over = row["link_over_compute"], row["seconds_over_plain"]["p50"]
        if row["schedule"].startswith("pairs") and over > 1 + slower:
            wrong.append(f"{name} takes {over:.3f} times as long as plain at link / compute {ratio}")
    return list(dict.fromkeys(wrong))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Exposed share over link / compute, a panel for each model and way."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = sorted({_panel(row) for row in rows if row["link_over_compute"]})
    names = list(dict.fromkeys(row["schedule"] for row in rows))
    colors = {name: f"C{number}" for number, name in enumerate(names)}  # the same in every panel
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        here = [r for r in rows if _panel(r) == panel and r["link_over_compute"]]
        for name in names:
            line = [r for r in here if r["schedule"] == name]
            shares = [100 * r["exposed"]["p50"] for r in line]
            axis.plot([r["link_over_compute"] for r in line], shares, "o-", color=colors[name])
        ratios = [r["link_over_compute"] for r in here]
        steps = [min(ratios) + (max(ratios) - min(ratios)) * i / 50 for i in range(51)]
        axis.plot(steps, [100 * max(0.0, 1 - 1 / x) for x in steps], "k:")
        axis.set_ylim(-3, 105)
        routing = "" if panel[2] == "none" else f", {panel[2]}"
        axis.set_title(f"{panel[0]} {panel[1]}{routing}{', checkpointing' * panel[3]}", fontsize=8)
        axis.set_xlabel("link / compute", fontsize=8)
        axis.set_ylabel("exposed, % of the link's time", fontsize=8)
        axis.tick_params(labelsize=7)
    handles = [Line2D([], [], marker="o", color=color) for color in colors.values()]
    bound = Line2D([], [], linestyle=":", color="black")
    names.append("bound")
    figure.legend([*handles, bound], names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_timeline(options: argparse.Namespace, path: Path) -> None:
    """One step of the mixture with each schedule at link / compute = 0.6: what computes, waits and travels when."""
    from matplotlib.figure import Figure

    found = []
    with benches(SHAPES["experts"], "balanced", False, options) as contenders:
        link = contenders[0].link
        for bench in contenders:
            link.bandwidth = float("inf")
            bench.step()
            bench.step()
            if not found:
                bandwidth = sum(count for _, _, count in link.transfers) / (0.6 * link.compute)
            link.bandwidth = bandwidth
            bench.step()
            found.append((bench.schedule, link.now(), list(link.waits), list(link.transfers)))
    figure = Figure(figsize=(9, 1.1 * len(found) + 0.5), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False).flatten()
    for axis, (name, end, waits, transfers) in zip(axes, found, strict=True):
        axis.broken_barh([(0, end)], (1.1, 0.8), color="#4c78a8")
        axis.broken_barh([(a, b - a) for a, b in waits], (1.1, 0.8), color="#e45756")
        axis.broken_barh([(a, b - a) for a, b, _ in transfers], (0.1, 0.8), color="#72b7b2")
        axis.set_yticks([0.5, 1.5], ["link", "compute"], fontsize=7)
        axis.set_title(f"{name}: {end:.2f} s, {sum(b - a for a, b in waits):.2f} s of them waiting (red)", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("seconds of the simulated clock", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="plain first")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="link / compute")
    parser.add_argument("--routing", nargs="+", choices=["balanced", "skewed"], default=["balanced", "skewed"])
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="of a rank and sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--slower", type=float, default=0.1, help="seconds over plain's, above 1; a busy CPU is noisy")
    parser.add_argument("--keep", action="store_true", help="what the result has of cases that are not measured now")
    parser.add_argument("--no-draw", action="store_true")
    return parser.parse_args()


def _panel(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["axis"], row["routing"], row["checkpointing"]


def main() -> None:
    """Measure, write the json, draw, and say what is wrong."""
    options = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        shapes = SHAPES[name]
        for routing in options.routing if shapes.axis == "ep" else ["none"]:
            for checkpointing in options.checkpointing:
                rows += measure(shapes, routing, bool(checkpointing), options)
    wrong = check(rows, options.tolerance, options.slower)
    if options.keep:
        measured = {(*_panel(row), row["schedule"]) for row in rows}
        known = [row for row in known_rows("overlap") if "schedule" in row]
        rows += [row for row in known if (*_panel(row), row["schedule"]) not in measured]
    devices = []
    for device, link, rate in DEVICES:
        for s in SHAPES.values():
            ratio = round(ratio_of(s, device, rate), 2)
            print(f"{device:9s} {link:19s} {s.model:14s} {s.axis}={RANKS}: link / compute {ratio:.2f}")
            devices.append(
                {"device": device, "link": link, "model": s.model, "axis": f"{s.axis}={RANKS}", "ratio": ratio}
            )
    record("overlap", [*rows, *devices], f"ep={RANKS} and sp={RANKS}; schedules {', '.join(options.schedules)}")
    if not options.no_draw:
        draw(rows, PICTURE)
        draw_timeline(options, TIMELINE)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
