"""Everything that is to be known on a GPU, in minutes.

    benchmarks/on_gpu.sh                        all parts, on a CUDA device
    benchmarks/on_gpu.sh dense loss             these parts
    benchmarks/on_gpu.sh --device cpu --small   all parts end to end on a CPU, small

Into --output go on_gpu.json, written anew after each row, and on_gpu.log. A table is printed last. The exit status is
1 if a check failed, or if a part did not come to its end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.on_gpu import BUDGET, PARTS
from benchmarks.on_gpu.part import Settings
from benchmarks.on_gpu.runner import Runner
from benchmarks.on_gpu.table import line, passed, table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them if none is named"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/on_gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for everything (%(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument(
        "--jobs", type=int, help="parts at once, of those that measure no time (default: by the cores)"
    )
    parser.add_argument("--commit", help="for the json, where there is no git checkout")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}: they are {', '.join(PARTS)}")
    if options.budget < 30:
        parser.error(f"--budget ({options.budget:.0f}) must be 30 seconds or more")
    options.small = options.small or options.device == "cpu"
    options.jobs = options.jobs or max(1, min(5, (os.cpu_count() or 2) // 2))
    return options


def main() -> int:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    parts = {name: spec for name, spec in PARTS.items() if not options.parts or name in options.parts}
    header = {"budget": options.budget, "small": options.small}
    header |= {"commit": options.commit} if options.commit else {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/datasets"
        if options.device == "cpu":
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        runner = Runner(
            parts,
            Settings(options.device, options.small),
            options.output,
            Path(scratch),
            budget=options.budget,
            jobs=options.jobs,
            header=header,
            show=lambda name, row: print(line(name, row), flush=True),
        )
        records = runner.run()
    print(table(records), flush=True)
    print(f"{options.output / 'on_gpu.json'} and {options.output / 'on_gpu.log'} are written", flush=True)
    return 0 if passed(records) else 1


if __name__ == "__main__":
    sys.exit(main())
