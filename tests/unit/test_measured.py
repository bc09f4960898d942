"""What docs/gpu.md says was measured is what the result says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gpu.md").read_text()
PARTS: dict[str, Any] = json.loads((ROOT / "benchmarks/results/on_gpu_nvidia-h100-80gb-hbm3.json").read_text())[
    "parts"
]


def rows(part: str, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in PARTS[part]["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def gib(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**30:.1f} GiB"


def steps() -> Iterator[str]:
    for part, model in (("dense", "Llama-3-8B"), ("experts", "Qwen3-30B-A3B, 16 of 128 experts")):
        for ours in rows(part, contender="ours"):
            (stock,) = rows(part, contender="stock sdpa", case=ours["case"])
            kind = "packed" if ours["documents"] > 1 else "one document"
            cells = [f"{model}: {ours['layers']}", f"{ours['tokens']:,} {kind}"]
            full = stock["out_of_memory"]
            for show in (lambda row: f"{100 * row['mfu']['p50']:.1f} %", lambda row: f"{tokens(row):,.0f}", gib):
                cells += [show(ours), "out of memory" if full else show(stock)]
            yield line(*cells, "-" if full else f"{stock['ours_is_faster']['p50']:.2f}")


def tokens(row: dict[str, Any]) -> float:
    return row["tokens_per_second"]["p50"]


def losses() -> Iterator[str]:
    for head in ("trained", "frozen"):
        found = [rows("loss", case=f"head {head}", contender=name)[0] for name in ("chunks of 2048", "full logits")]
        yield line(head, *(f"{1000 * row['seconds']['p50']:.0f} ms, {gib(row)}" for row in found))


def parities() -> Iterator[str]:
    for row in PARTS["ranks"]["rows"]:
        if row["status"] == "ok":
            model, plan, precision = row["case"].split()
            yield line(model, f"`{plan}`", precision, *(f"{row[key]['worst']:.0e}" for key in ("errors", "stock")))


def waits() -> Iterator[str]:
    for model, plan in (("dense", "sp=2"), ("experts", "sp=2,ep=2"), ("vision", "sp=2")):
        for ours in rows("syncs", model=model, row="packed", contender=plan):
            again = ours["checkpointing"]
            (stock,) = rows("syncs", model=model, row="packed", contender="stock", checkpointing=again)
            counts = (str(row["forward"] + row["backward"]) for row in (stock, ours))
            yield line(model, "yes" if again else "no", *counts)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def test_tables_of_the_page_are_those_of_the_result() -> None:
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)*)", PAGE, flags=re.M)
    wanted = [list(make()) for make in (steps, losses, parities, waits)]
    assert [table.splitlines() for table in tables] == wanted
    assert all(wanted)


def test_limits_of_the_page_are_those_of_the_result() -> None:
    (matmul,) = rows("limits", case="matmul")
    rate = matmul["tflops"]["p50"]
    peak = matmul["peak"] / 1e12
    assert f"{rate:.0f} TFLOP/s there, {100 * rate / peak:.0f} % of the data sheet's {peak:.0f}" in " ".join(
        PAGE.split()
    )


def test_failures_of_the_page_are_those_of_the_result() -> None:
    """Each is named: another result brings other ones."""
    failed = [(part, row["case"]) for part in PARTS for row in PARTS[part]["rows"] if row["status"] == "FAILED"]
    wanted = {("kernels", "pytest -m gpu"), ("rates", "attention"), ("dense", "32768 packed, checkpointing")}
    wanted |= {("ranks", "vlm sp=2 float32"), ("ranks", "sinks sp=2,ep=2 float32")}
    assert set(failed) == wanted
    (counts,) = [row["counts"] for row in PARTS["kernels"]["rows"] if "counts" in row]
    assert f"{counts['failed']} tests of FlexAttention" in PAGE
