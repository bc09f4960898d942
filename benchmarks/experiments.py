"""The experiments of a paper on training with FSDP, SP and EP, small, on the CPU and the simulated link.

    python -m benchmarks experiments                    all six: a json, and a plot each in docs/images
    python -m benchmarks experiments --only sp mixed    some of them
    python -m benchmarks experiments --tiny             in seconds, to see it run

    fsdp       tokens/s, MFU and activations at sequences that stand for 8K, 16K and 32K tokens
    sp         1, 2, 4, 8 ranks share a sequence: the longest one in the memory of the first, and MFU
    degrees    FSDP with SP and EP, over their degrees on 8 ranks
    ablation   FSDP, with SP, with EP, with both; each with and without overlap
    overlap    bare share of the link over its bandwidth, for experts of three sizes, and the bound
    mixed      one of 8 ranks is slower: a step of all of them, with and without overlap

Models have two layers at the widths of a real one, divided; seconds are those of the link's clock (`_link.py`), bytes
those of live storages (`_memory.py`). MFU is over the rate of a large matmul measured in the same run. Gathers of FSDP
take no time on this link: they are prefetched, and every contender has them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._exchange import even_routing
from benchmarks._link import Link, linked
from benchmarks._record import known_rows, quantiles, record
from benchmarks._schedules import RANKS, SCHEDULES, SHAPES, Bench, dense, mixture, ratio_of
from benchmarks._timing import matmul_rate
from benchmarks.overlap import sweep

PICTURES = Path(__file__).parents[1] / "docs/images"
LINK = ("H100", 50e9)  # 400 Gb/s a device, between nodes


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        tokens: of a rank and sequence; it takes 16 in a chunk for even routing to send each expert as many.
        narrow: divides all widths further.
    """

    tokens: int = 512
    layers: int = 2
    repeats: int = 3
    narrow: int = 1

    def experts(self, hidden: int = 512, width: int = 192, heads: int = 8) -> Any:
        return mixture(
            hidden // self.narrow, width // self.narrow, heads, 1, 128 // self.narrow, num_hidden_layers=self.layers
        )

    def dense(self) -> Any:
        return dense(512 // self.narrow, 1792 // self.narrow, 32, 8, num_hidden_layers=self.layers)


TINY = Size(tokens=64, layers=1, repeats=1, narrow=8)
Rows = list[dict[str, Any]]


@contextmanager
def behind(
    config: Any, plan: Mapping[str, int], schedules: Sequence[str], tokens: int, ranks: int = RANKS, slow: float = 1.0
) -> Iterator[list[Bench]]:
    """Benches for each schedule on one of `ranks` equal ranks, which is `slow` times slower than this CPU."""
    with ExitStack() as stack:
        link = Link(clock=lambda: slow * time.thread_time())
        if ranks > 1:
            stack.enter_context(linked(link, ranks))
        found = []
        for schedule in schedules:
            found.append(Bench(config, plan, schedule, False, link, tokens))
            stack.enter_context(even_routing(found[-1].model))
            found[-1].step()  # warm
        yield found


def timed(bench: Bench, repeats: int, rate: float) -> dict[str, Any]:
    """Quantiles over steps, and MFU."""
    steps = []
    for _ in range(repeats):
        bench.step()
        link = bench.link
        one = {"seconds": link.now(), "tokens_per_second": bench.tokens / link.now()}
        one |= {"mfu": bench.flops / link.now() / rate, "waited": link.waited}
        steps.append(one | {"exposed": link.waited / link.busy if link.busy else 0.0})
    sent = sum(count for _, _, count in bench.link.transfers)
    return {key: quantiles([one[key] for one in steps]) for key in steps[0]} | {"sent": sent}


def bandwidth(bench: Bench, ratio: float) -> float:
    """Bytes a second at which the link's time is `ratio` of the compute of a step."""
    bench.link.bandwidth = float("inf")
    bench.step()
    return sum(count for _, _, count in bench.link.transfers) / (ratio * bench.link.compute)


def speed_of(size: Size, shapes: str) -> float:
    """Bandwidth of a link that is to this CPU what `LINK` is to its device, at the real layer's shapes."""
    axis, config = SHAPES[shapes].axis, size.dense() if shapes == "dense" else size.experts()
    with behind(config, {f"{axis}_size": RANKS}, ["plain"], size.tokens) as (bench,):
        return bandwidth(bench, ratio_of(SHAPES[shapes], *LINK))


def fsdp(size: Size, rate: float) -> Rows:
    rows = []
    for factor, stands_for in ((2, 8192), (4, 16384), (8, 32768)):
        with behind(size.dense(), {}, ["plain"], size.tokens * factor) as (bench,):
            row = {"tokens": size.tokens * factor, "stands_for": stands_for, "contender": "FSDP"}
            rows.append(row | timed(bench, size.repeats, rate) | bench.memory())
    return rows


def sp(size: Size, rate: float) -> Rows:
    rows: Rows = []
    speed = speed_of(size, "dense")
    for ranks in (1, 2, 4, 8):
        peaks = {}
        for tokens in (size.tokens, 2 * size.tokens):
            with behind(size.dense(), {"sp_size": ranks}, ["plain"], tokens, ranks) as (bench,):
                bench.link.bandwidth = speed
                peaks[tokens * ranks] = bench.memory()["peak"]
                found = timed(bench, size.repeats, rate)
        (short, low), (long, high) = peaks.items()
        each = (high - low) / (long - short)
        budget = rows[0]["budget"] if rows else high
        row = {"sp_size": ranks, "tokens": long, "peak": high, "budget": budget, "contender": "sp"}
        rows.append(row | {"longest": round(long + (budget - high) / each)} | found)
    return rows


def degrees(size: Size, rate: float) -> Rows:
    rows, speed = [], speed_of(size, "experts")
    for plan in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8)):
        sizes = dict(zip(("sp_size", "ep_size"), plan, strict=True))
        with behind(size.experts(), sizes, ["plain"], size.tokens) as (bench,):
            bench.link.bandwidth = speed
            row = {"plan": f"sp={plan[0]},ep={plan[1]}", "contender": "plain", **sizes}
            rows.append(row | timed(bench, size.repeats, rate) | bench.memory())
    return rows


def ablation(size: Size, rate: float) -> Rows:
    rows, speed, length = [], speed_of(size, "experts"), 4 * size.tokens
    plans = {"FSDP": {}, "+SP": {"sp_size": 4}, "+EP": {"ep_size": 8}, "+SP +EP": {"sp_size": 4, "ep_size": 8}}
    for name, plan in plans.items():
        tokens = length // plan.get("sp_size", 1)
        with behind(size.experts(), plan, ["plain", "pairs"], tokens) as benches:
            for bench in benches:
                bench.link.bandwidth = speed
                row = {"plan": name, "contender": bench.schedule, "tokens": length}
                rows.append(row | timed(bench, size.repeats, rate) | bench.memory())
    return rows


def overlap(size: Size, rate: float) -> Rows:
    rows = []
    widths = {"30B-A3B": (512, 192, 8), "235B-A22B": (1024, 384, 16), "671B-A37B": (1792, 512, 16)}
    for model, (hidden, width, heads) in widths.items():
        config = size.experts(hidden, width, heads)
        with behind(config, {"ep_size": RANKS}, ["plain", "chunks", "pairs"], max(64, size.tokens // 2)) as benches:
            about = {"model": model, "axis": f"ep={RANKS}", "routing": "balanced", "checkpointing": False}
            found = sweep(benches, (0.3, 0.6, 0.9, 1.5, 3.0), size.repeats, about)
        rows += [row | {"contender": row["schedule"]} for row in found]
    return rows


def mixed(size: Size, rate: float) -> Rows:
    rows: Rows = []
    with behind(size.experts(), {"ep_size": RANKS}, ["plain"], size.tokens) as (bench,):
        speed = bandwidth(bench, 0.6)
    for slow in (1.0, 1.25, 1.5, 2.0):
        plan = {"ep_size": RANKS}
        with behind(size.experts(), plan, ["plain", "chunks", "pairs"], size.tokens, slow=slow) as benches:
            for bench in benches:
                bench.link.bandwidth = speed
                found = timed(bench, size.repeats, rate)
                first = next((r for r in rows if r["slow"] == 1 and r["contender"] == "plain"), found)
                over = found["seconds"]["p50"] / first["seconds"]["p50"]
                # What work that follows the ranks' speeds would take, without any exchange: no schedule can have less.
                row = {"slow": slow, "contender": bench.schedule, "over_equal": over}
                rows.append(row | {"even_speeds": RANKS / (RANKS - 1 + 1 / slow)} | found)
    return rows


@dataclass(frozen=True)
class Experiment:
    """What is run, and how it is drawn: one panel for each of `values` over `places`, a line for each contender."""

    run: Callable[[Size, float], Rows]
    places: str
    values: tuple[str, ...]
    by: str = "contender"


EXPERIMENTS = {
    "fsdp": Experiment(fsdp, "stands_for", ("tokens_per_second", "mfu", "peak")),
    "sp": Experiment(sp, "sp_size", ("longest", "mfu", "peak")),
    "degrees": Experiment(degrees, "plan", ("tokens_per_second", "sent", "peak")),
    "ablation": Experiment(ablation, "plan", ("tokens_per_second", "exposed", "peak")),
    "overlap": Experiment(overlap, "link_over_compute", ("exposed",), "model"),
    "mixed": Experiment(mixed, "slow", ("over_equal", "exposed")),
}


# How a value is drawn: its name, and what one of it is in the unit of the axis.
UNITS = {
    "tokens_per_second": ("tokens/s", 1.0),
    "mfu": ("MFU, %", 0.01),
    "exposed": ("exposed share of the link, %", 0.01),
    "peak": ("activations at the peak, MiB", 2.0**20),
    "sent": ("sent by a rank, MiB", 2.0**20),
    "longest": ("longest sequence, tokens", 1.0),
    "over_equal": ("time of a step, relative to equal ranks", 1.0),
}
PLACES = {
    "stands_for": "tokens that the sequence stands for",
    "slow": "one rank slower by a factor of",
    "link_over_compute": "link / compute",
    "sp_size": "ranks that share a sequence (sp)",
}


def draw(experiment: Experiment, rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(row[experiment.by] for row in rows)) if experiment.by != "contender" else [None]
    panels = [(split, value) for split in splits for value in experiment.values]
    figure = Figure(figsize=(3.6 * len(panels), 2.9), layout="constrained")
    for axis, (split, value) in zip(figure.subplots(1, len(panels), squeeze=False).flatten(), panels, strict=True):
        label, unit = UNITS[value]
        here = [row for row in rows if split is None or row[experiment.by] == split]
        for name in dict.fromkeys(row["contender"] for row in here):
            line = [row for row in here if row["contender"] == name]
            heights = [row[value]["p50"] if isinstance(row[value], dict) else row[value] for row in line]
            places = [str(row[experiment.places]) for row in line]
            color = f"C{SCHEDULES.index(name)}" if name in SCHEDULES else "C0"  # a schedule's is always the same
            axis.plot(places, [height / unit for height in heights], "o-", color=color, label=name)
        for bound in ("bound", "even_speeds"):
            if bound in here[0] and value in ("exposed", "over_equal"):
                places = dict.fromkeys((str(row[experiment.places]), row[bound] / unit) for row in here)
                if (bound == "bound") == (value == "exposed"):
                    axis.plot(*zip(*places, strict=True), "k:", label="bound")
        axis.set_title(": ".join(filter(None, (split, label))), fontsize=8)
        axis.set_xlabel(PLACES.get(experiment.places, ""), fontsize=8)
        axis.set_ylim(0, 1.08 * max(top for line in axis.lines for top in line.get_ydata()))
        axis.tick_params(labelsize=7)
        if experiment.places == "plan":
            for tick in axis.get_xticklabels():
                tick.set(rotation=40, ha="right", rotation_mode="anchor")
        if len(axis.lines) > 1:
            axis.legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*EXPERIMENTS], default=[*EXPERIMENTS])
    parser.add_argument("--tiny", action="store_true", help="as small as shows that it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="the other experiments' rows of the result as it is")
    parser.add_argument("--no-draw", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run them, write the json and the plots."""
    options = parse()
    torch.set_num_threads(1)
    rate = matmul_rate(torch.device("cpu"), torch.float32, 1024)
    size = TINY if options.tiny else Size(repeats=options.repeats)
    rows: Rows = []
    for name in options.only:
        begin = time.perf_counter()
        found = [{"experiment": name, **row} for row in EXPERIMENTS[name].run(size, rate)]
        print(f"{name}: {len(found)} rows, {time.perf_counter() - begin:.0f} s", flush=True)
        rows += found
        if not options.no_draw:
            draw(EXPERIMENTS[name], found, PICTURES / f"experiment_{name}.svg")
    if options.keep:
        rows += [row for row in known_rows("experiments") if row["experiment"] not in options.only]
    record("experiments", rows)


if __name__ == "__main__":
    main()
