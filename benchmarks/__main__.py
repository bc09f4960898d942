"""All benchmarks behind one command.

python -m benchmarks NAME [options of that script]      one of them; NAME --help lists its options
python -m benchmarks [--all] [--device auto|cpu|cuda]   all of them, each in a process of its own
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

# Whether a script takes --device. In the order of --all: those that a CUDA device is for come first.
SCRIPTS = {
    "step": True,
    "loss_memory": True,
    "packing_vs_padding": True,
    "expert_parallel": True,
    "syncs": True,
    "activation_memory": False,
    "pairs": False,
    "overhead": False,
    "linear_attention": False,
    "towers": False,
    "overlap": False,
    "bundles": False,
    "pipeline": False,
    "experiments": False,
    "packing": False,
    "collator": False,
    "balance": False,
    "saving": False,
    "headline": False,
    "foresight": False,
}


def run_one(name: str, options: list[str]) -> None:
    """Run a script in this process, as if it had been started by itself."""
    sys.argv = [f"python -m benchmarks {name}", *options]
    importlib.import_module(f"benchmarks.{name}").main()


def run_all(device: str) -> int:
    """Run every script in a process of its own and say which failed. Returns how many."""
    failed = []
    for name, takes_device in SCRIPTS.items():
        begin = time.perf_counter()
        print(f"== {name}", flush=True)
        options = ["--device", device] if takes_device else []
        status = subprocess.run(
            [sys.executable, "-m", "benchmarks", name, *options], cwd=Path(__file__).parent.parent
        ).returncode
        print(f"== {name}: exit status {status}, {time.perf_counter() - begin:.0f} s", flush=True)
        failed += [name] if status else []
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(SCRIPTS)} passed their checks")
    return len(failed)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        run_one(sys.argv[1], sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=[*SCRIPTS], help="the script; without it, all of them")
    parser.add_argument("--all", action="store_true", help="all of them (the default)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return run_all(parser.parse_args().device)


if __name__ == "__main__":
    sys.exit(main())
