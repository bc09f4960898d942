"""What is foreseen against what is: formulas against dry runs and a cluster with a clock of its own, dry runs against
ranks that are there.

python -m benchmarks foresight                 all; draws docs/images/foresight.svg and foresight_ranks.svg
python -m benchmarks foresight --parts time    one of them, and what the result has of the others
python -m benchmarks foresight --parts         none: the plots of the result

memory   peak of a rank, and bytes that it sends, by formulas and by dry run of the real code, 5 % apart at most
time     seconds of a step of one of 8 ranks behind a link (`_link.py`), by formulas and as simulated, 5 % apart at
         most. The device is this CPU: its rates are those of the plain schedule behind a link that takes no time,
         and each schedule's own compute is measured there, too, since small chunks cost more of a CPU. Foreseen is
         what the link adds.
ranks    bytes that 2 and 4 ranks with gloo hold before a step and at the peak of each phase, and send, by dry run and
         as counted (`_foresight_ranks.py`): 2 % apart at most at the peaks, equal else
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._foresight import CASES, CONFIGS, Case
from benchmarks._foresight_ranks import RANK_CASES, compare_ranks, draw_ranks, is_apart
from benchmarks._record import known_rows, record
from benchmarks._schedules import KEPT, RANKS, SHAPES, Bench, Shapes
from benchmarks.overlap import benches
from hf_veomni.dryrun import dry_run
from hf_veomni.planner import Device
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.memory import memory_of
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.time import Time, time_of
from hf_veomni.planner.traffic import exchanges

PICTURE = Path(__file__).parents[1] / "docs/images/foresight.svg"
PARTS = ["memory", "time", "ranks"]
RATIOS = (0.3, 0.6, 0.9)  # of the link's time to the compute
WITHIN = 0.05


def compare_memory(case: Case) -> dict[str, Any]:
    """Peak and bytes of one case, by formulas and by dry run."""
    config, layout, job = CONFIGS[case.name], case.layout, case.job
    run = dry_run(
        config,
        layout.plan,
        layout.world,
        tokens=[case.tokens // 2] * 2,
        checkpointing=layout.checkpointing,
        lora=case.lora,
        dtype=torch.float32 if case.fp32 else torch.bfloat16,
        mixed_precision=case.mixed,
        accumulation=case.accumulation,
    )
    shape = Shape.of(config)
    memory = memory_of(shape, layout, job)
    sent: Counter[str] = Counter()
    for exchange in exchanges(shape, layout, job):
        sent[exchange.axis] += case.accumulation * exchange.sent
    found = {axis: size for axis, size in run.traffic.items() if size > 1e5 and axis != "world"}
    return {
        "part": "memory",
        "case": str(case),
        "plan": str(layout),
        "dry_run_bytes": run.peak.total,
        "formula_bytes": memory.total,
        "error": memory.total / run.peak.total - 1,
        "dry_run": run.peak.categories,
        "formula": memory.categories,
        "moment": memory.moment,
        "place": list(run.peak.place),
        "dry_run_sent": found,
        "formula_sent": dict(sent),
        "sent_error": sum(sent.values()) / sum(found.values()) - 1 if found else float(bool(sent)),
    }


def _blank(node: int, rate: float = 1e-3) -> Device:
    """A device that computes all kinds of work alike."""
    rates: dict[str, Any] = dict.fromkeys(
        ("matmul_tflops", "grouped_tflops", "attention_tflops", "whole_tflops", "peak_tflops"), rate
    )
    links: dict[str, Any] = {"intra_gbs": 1e9, "intra_us": 1e-9, "inter_gbs": 1e9, "inter_us": 1e-9}
    return Device("this CPU", memory_gib=1, memory_gbs=1e9, node=node, **rates, **links)


def _between(plain: Bench) -> tuple[float, float]:
    """Seconds of compute of a step between the ways in and out (attention, or experts), and of all the rest."""
    most = max(size for *_, size in plain.link.transfers)
    begins = [begin for begin, _, size in plain.link.transfers if 2 * size > most]  # not counts and weights
    inside = sum(b - a for a, b in zip(begins[::2], begins[1::2], strict=True))
    return inside, plain.link.compute - inside


def _job(shapes: Shapes, options: argparse.Namespace) -> Job:
    tokens = (options.tokens or shapes.tokens) * (RANKS if shapes.axis == "sp" else 1)
    return Job(tokens, tokens, accumulation=2)


def calibrate(shapes: Shapes, options: argparse.Namespace) -> Device:
    """This CPU's rates: those at which the plain schedule takes as long as it does."""
    shape, job, found = Shape.of(shapes.config(num_hidden_layers=options.layers)), _job(shapes, options), []
    with benches(shapes, "balanced", False, options) as (plain, *_):
        plain.step()  # warm
        for _ in range(options.repeats):
            plain.step()
            found.append(_between(plain))
    inside, rest = median(x for x, _ in found), median(x for _, x in found)
    device = _blank(RANKS)
    time = time_of(shape, _layout(shapes, "none", False), job, device)
    if shapes.axis == "sp":
        work, name = time.parts["attention"], "whole_tflops"
        others = time.parts["matmul"] + time.parts["loss"]
    else:
        alone = time_of(shape, _layout(shapes, "none", False), job, replace(device, grouped_tflops=1e9))
        work, name = time.parts["matmul"] - alone.parts["matmul"], "grouped_tflops"
        others = alone.parts["matmul"] + time.parts["loss"] + time.parts["attention"]
    other = 1e-3 * others / rest
    rates: dict[str, Any] = {"matmul_tflops": other, "whole_tflops": other, name: 1e-3 * work / inside}
    return replace(device, **rates)


def _layout(shapes: Shapes, overlap: str, checkpointing: bool) -> Layout:
    sizes = (1, RANKS) if shapes.axis == "sp" else (RANKS, 1)
    return Layout(1, *sizes, 1 if shapes.axis == "sp" else RANKS, checkpointing, overlap)


def _as_fast_as(own: float, shape: Shape, layout: Layout, job: Job, device: Device) -> Device:
    """The device at which a step computes for `own` seconds: chunks make experts slower, and nothing else."""
    names: tuple[str, ...] = ("matmul_tflops", "grouped_tflops", "attention_tflops", "whole_tflops")
    computed = _computed(time_of(shape, layout, job, device))
    others = 0.0
    if layout.overlap == "chunks" and layout.ep > 1:
        names = ("grouped_tflops",)
        others = _computed(time_of(shape, layout, job, replace(device, grouped_tflops=1e9)))
    slower = (own - others) / (computed - others)
    rates: dict[str, Any] = {name: getattr(device, name) / slower for name in names}
    return replace(device, **rates)


def _computed(time: Time) -> float:
    return sum(time.parts[name] for name in ("matmul", "attention", "rest", "loss"))


def compare_time(
    shapes: Shapes, device: Device, checkpointing: bool, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Step times of each schedule behind links of several speeds, foreseen and simulated."""
    job, shape = _job(shapes, options), Shape.of(shapes.config(num_hidden_layers=options.layers))
    with benches(shapes, "balanced", checkpointing, options) as made:
        found = [bench for bench in made if not bench.label.endswith(KEPT)]  # a rule that the formulas do not have
        link, plain = found[0].link, found[0]
        for bench in found:
            bench.step()  # warm
        link.bandwidth = float("inf")
        alone: dict[str, list[float]] = {bench.schedule: [] for bench in found}
        for _ in range(options.repeats):
            for bench in found:
                bench.step()
                alone[bench.schedule].append(link.compute)
        plain.step()
        sent, compute = sum(count for *_, count in link.transfers), median(alone["plain"])
        for ratio in RATIOS:
            link.bandwidth = sent / (ratio * compute)
            for bench in found:
                layout = _layout(shapes, "none" if bench.schedule == "plain" else bench.schedule, checkpointing)
                own = median(alone[bench.schedule])
                # The link's numbers have 4 bytes where the formulas have 2.
                mine = replace(_as_fast_as(own, shape, layout, job, device), intra_gbs=link.bandwidth / 2e9)
                time = time_of(shape, layout, job, mine)
                waits = []
                for _ in range(options.repeats):
                    bench.step()
                    waits.append(link.waited)
                foreseen = _computed(time) + time.parts["sp"] + time.parts["ep"]
                simulated = own + median(waits)
                yield {
                    "part": "time",
                    "case": f"{shapes.model}, {shapes.axis}={RANKS}{', checkpointing' * checkpointing}",
                    "schedule": bench.schedule,
                    "link_over_compute": ratio,
                    "simulated_seconds": simulated,
                    "foreseen_seconds": foreseen,
                    "simulated_exposed": median(waits),
                    "foreseen_exposed": time.parts["sp"] + time.parts["ep"],
                    "error": foreseen / simulated - 1,
                }


def show(row: dict[str, Any]) -> None:
    if row["part"] == "memory":
        sizes = f"{row['dry_run_bytes'] / 2**30:7.3f} GiB, formula {row['formula_bytes'] / 2**30:7.3f}"
        print(f"{row['case']:60s} {sizes} ({row['error']:+.1%}), sent {row['sent_error']:+.1%}", flush=True)
        return
    if row["part"] == "ranks":
        print(f"{row['case']:60s} {row['error']:+.2%} at most, sent {row['sent_error']:+.1%}", flush=True)
        return
    seconds = f"{row['simulated_seconds']:.3f} s, foreseen {row['foreseen_seconds']:.3f} ({row['error']:+.1%})"
    exposed = f"exposed {row['simulated_exposed']:.3f}, foreseen {row['foreseen_exposed']:.3f}"
    print(f"{row['case']:36s} {row['schedule']:7s} {row['link_over_compute']:.1f}  {seconds}  {exposed}", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The differences, case by case."""
    from matplotlib.figure import Figure

    memory = [row for row in rows if row["part"] == "memory"]
    times = [row for row in rows if row["part"] == "time"]
    figure = Figure(figsize=(11 if times else 5.5, 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + bool(times), squeeze=False)[0]
    gib = 2**30
    sizes = [row["dry_run_bytes"] / gib for row in memory], [row["formula_bytes"] / gib for row in memory]
    left.scatter(*sizes, s=18, color="#4c78a8", zorder=3)
    left.set(xlabel="peak of a rank by dry run, GiB", ylabel="by formulas, GiB", title=f"Memory: {len(memory)} cases")
    title = f"Time: {len(times)} cases"
    for right in others:
        for name, color in (("plain", "#e45756"), ("chunks", "#f58518"), ("pairs", "#54a24b")):
            some = [row for row in times if row["schedule"] == name]
            at = [row["simulated_seconds"] for row in some], [row["foreseen_seconds"] for row in some]
            right.scatter(*at, s=18, color=color, label=name, zorder=3)
        right.set(xlabel="step of the simulated cluster, s", ylabel="by formulas, s", title=title)
        right.legend(fontsize=8)
    for axis in (left, *others):
        low, high = (f(*axis.get_xlim(), *axis.get_ylim()) for f in (min, max))
        line = [max(low, 0), high]
        axis.plot(line, line, color="black", linewidth=0.8)
        axis.fill_between(line, [x * (1 - WITHIN) for x in line], [x * (1 + WITHIN) for x in line], color="#dddddd")
        axis.text(0.98, 0.03, "grey: within 5 %", transform=axis.transAxes, ha="right", fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--schedules", nargs="+", default=["plain", "chunks", "pairs"], help="plain first")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="of a rank and sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="memory and ranks: cases whose name has this, without a result")
    return parser.parse_args()


def main() -> None:
    """Compare, write the json, draw, and say what is further apart than it may be."""
    options = parse()
    torch.set_num_threads(1)
    rows = [row for row in known_rows("foresight") if row["part"] not in options.parts]
    for case in CASES if "memory" in options.parts else []:
        if options.only in str(case):
            rows.append(compare_memory(case))
            show(rows[-1])
    for shapes in SHAPES.values() if "time" in options.parts else []:
        device = calibrate(shapes, options)
        for checkpointing in (False, True):
            for row in compare_time(shapes, device, checkpointing, options):
                rows.append(row)
                show(row)
    there = [case for case in RANK_CASES if options.only in str(case)]
    for row in compare_ranks(there) if "ranks" in options.parts else []:
        rows.append(row)
        show(row)
    if not options.only:
        record("foresight", rows)
        draw(rows, PICTURE)
        if on_ranks := [row for row in rows if row["part"] == "ranks"]:
            draw_ranks(on_ranks)
    wrong = [row for row in rows if _is_wrong(row)]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} cases are further apart than they may be")


def _is_wrong(row: dict[str, Any]) -> bool:
    if row["part"] == "ranks":
        return is_apart(row)
    return abs(row["error"]) > WITHIN or abs(row.get("sent_error", 0)) > WITHIN


if __name__ == "__main__":
    main()
