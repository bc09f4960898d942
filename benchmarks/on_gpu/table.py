"""Rows for people: a line each, and all of them by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.on_gpu.part import FAILED

WIDTH = 200


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row of a part."""
    text = f"{row['status']:7} {name:8} {row['case']:28} {' '.join(row['summary'].split())}"
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows, the parts in their order with status and seconds, and what failed once more at the end."""
    lines, failed = [], []
    for name, record in records.items():
        lines.append(f"== {name}: {record['status']}, {record['seconds']:.0f} s")
        rows = [line(name, row) for row in record["rows"]]
        lines += rows
        failed += [text for text, row in zip(rows, record["rows"], strict=True) if row["status"] == FAILED]
    rest = [f"{name} is not done: {record['status']}" for name, record in records.items() if not _ended(record)]
    lines += ["", f"{len(failed)} failed" if failed or rest else "all checks passed", *failed, *rest]
    return "\n".join(["", *lines])


def _ended(record: Mapping[str, Any]) -> bool:
    return record["status"] == "done"


def passed(records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every part came to its end and no check failed."""
    rows = [row for record in records.values() for row in record["rows"]]
    return all(_ended(record) for record in records.values()) and all(row["status"] != FAILED for row in rows)
