"""One row for all pairs of a token and a rank, against one row a pair: bytes on the link, what of them is bare, time.

    python -m benchmarks bundles          on the CPU, behind the link of `overlap`

The mixture of `overlap` (Qwen3-30B-A3B's layer shapes in ratio, top-8 of 128 experts, ep=8), each schedule with rows
of either kind, which take turns over one link. Its bandwidth is such that link over compute is 0.3, 0.6 and 0.9 for
the plain schedule with a row a pair; at 0 exchanges take no time. `sent_over_plain` is of bytes, `seconds_over_plain`
of a step, both over that plain schedule at the same bandwidth.

Exit status 1 if gradients of a schedule differ from the plain one's with the same kind of rows (`_link.py` has copies
of ranks, which hold other values for other rows; `tests/ranks/expert/test_bundles.py` compares the two on real ranks),
or if bundles send more than `rows_per_token` says by more than a tenth.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks._link import Link, linked
from benchmarks._record import record
from benchmarks._schedules import RANKS, SHAPES, UNBUNDLED, Bench, busiest_rank, skewed_routing
from benchmarks.overlap import RATIOS, even_routing, sweep
from hf_veomni.expert.dispatch import rows_per_token

SCHEDULES = ("plain", "chunks", "pairs")


def measure(routing: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each schedule, kind of rows and ratio."""
    shapes = SHAPES["experts"]
    config = shapes.config(num_hidden_layers=options.layers)
    skewed = routing == "skewed"
    with ExitStack() as stack:
        link = Link()
        stack.enter_context(linked(link, RANKS, busiest_rank(config.num_experts) if skewed else 0, equal=not skewed))
        found = []
        for name in options.schedules:
            for kind in (UNBUNDLED, ""):
                found.append(Bench(config, {"ep_size": RANKS}, name + kind, False, link, options.tokens))
                stack.enter_context((skewed_routing if skewed else even_routing)(found[-1].model))
        about = {"model": shapes.model, "axis": f"ep={RANKS}", "routing": routing, "checkpointing": False}
        return sweep(found, options.ratios, options.repeats, about)


def check(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """What is wrong with the rows."""
    config = SHAPES["experts"].config()
    share = rows_per_token(config.num_experts_per_tok, config.num_experts, RANKS) / config.num_experts_per_tok
    wrong = []
    for row in rows:
        name = f"{row['schedule']} ({row['routing']})"
        if row["gradient_error"] > tolerance:
            wrong.append(f"gradients of {name} are off by {row['gradient_error']:.1e}")
        sent = row["sent_over_plain"]["p50"]
        if not row["schedule"].endswith(UNBUNDLED) and sent > 1.1 * share:
            wrong.append(f"{name} sends {sent:.3f} of the bytes of a row a pair, not {share:.3f}")
    return list(dict.fromkeys(wrong))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="plain first")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="link / compute")
    parser.add_argument("--routing", nargs="+", choices=["balanced", "skewed"], default=["balanced", "skewed"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a rank and sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    return parser.parse_args()


def main() -> None:
    """Measure, write the json, and say what is wrong."""
    options = parse()
    torch.set_num_threads(1)
    rows = [row for routing in options.routing for row in measure(routing, options)]
    for row in rows:
        if row["link_over_compute"] == RATIOS[-1]:
            sent = row["sent_over_plain"]["p50"]
            print(f"{row['routing']:9s}{row['schedule']:20s} bytes x {sent:.3f} of a row a pair's")
    record("bundles", rows, f"ep={RANKS}; schedules {', '.join(options.schedules)}")
    if wrong := check(rows, options.tolerance):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
