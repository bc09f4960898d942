"""The step report of a run as one html page, without anything from elsewhere."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_veomni.doctor import PAGE, PARTS, Finding, Row, diagnose, read_record

_COLORS: dict[str, str] = dict(
    zip(PARTS, ("#e0a030", "#5b9bd5", "#c0392b", "#1f4e8c", "#4a9d5b", "#b0b0b0"), strict=True)
)
_MEANING = {
    "data": "waiting for a batch",
    "forward": "the model's forward",
    "exchange": "standing still for all-to-alls of sp and ep",
    "backward": "the model's backward",
    "optimizer": "clipping and the optimizer's step",
    "other": "logging, evaluation, saving",
}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1000px;padding:0 1em;color:#222}
h1{font-size:21px;margin:0}h2{font-size:16px;margin:1.8em 0 .5em}
.about,.note{color:#666;font-size:13px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:3px 8px;text-align:right;border-bottom:1px solid #e6e6e6}th{font-weight:600}
.bar{display:flex;height:26px;border-radius:3px;overflow:hidden}
.bar div{color:#fff;font-size:12px;text-align:center;line-height:26px;overflow:hidden}
.legend span{margin-right:1.3em;white-space:nowrap}
.legend i{display:inline-block;width:11px;height:11px;margin-right:5px;border-radius:2px}
li{margin:.35em 0}svg text{font-size:12px;fill:#555}
"""


def write_page(run: str | os.PathLike[str]) -> Path:
    """Write the report of a run beside its record. Returns the page's path."""
    record = read_record(run)
    rows: list[Row] = record["rows"]
    usual = rows[1:] or rows  # the first one has what happens once
    title = f"{record['model']}, {record['plan']}, {_count(record['world_size'], 'rank')}"
    device = record["device"]
    about = [device["name"] + (f" with {device['memory_gib']:.0f} GiB" if device["memory_gib"] else "")]
    about += [
        f"{record['context']:,} tokens a micro-batch, {_count(record['accumulation'], 'micro-batch', 'es')} a step"
    ]
    about += ["activation checkpointing"] * bool(record["checkpointing"])
    about += [f"LoRA of rank {record['lora']}"] * (record["lora"] is not None)
    body = [
        f"<h1>{html.escape(title)}</h1><p class=about>{html.escape('; '.join(about))}</p>",
        f"<h2>What stands out</h2>{_findings(diagnose(run))}",
    ]
    if rows:
        body += [f"<h2>Where a step's {_seconds(_mean(usual, None))} go</h2>{_share(usual)}"]
        body += [f"<h2>From log to log</h2>{_draw(rows)}{_table(rows)}"]
        body += [f"<p class=note>{html.escape(_NOTE)}</p>"]
    else:
        body += ["<p>The run ended before its first log.</p>"]
    path = Path(run) / PAGE
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    path.write_text(f"<!doctype html><html lang=en>{head}{''.join(body)}\n")
    return path


_NOTE = (
    "All seconds are those of one step, on average over the ranks and the steps since the log before. Balance: the "
    "work of the fullest data rank over the mean, 1 is even. Slowest rank: the one whose layers took longest for the "
    "same work, and how many times the median's."
)


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{plural if number != 1 else ''}"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def _mean(rows: Sequence[Row], part: str | None) -> float:
    return sum(row.seconds if part is None else row.parts[part] for row in rows) / len(rows)


def _findings(findings: Sequence[Finding]) -> str:
    said = "".join(
        f"<li><b>{html.escape(f.name)}</b>: {html.escape(f.measured)}. {html.escape(f.advice)}</li>" for f in findings
    )
    return f"<ul>{said or '<li>Nothing.</li>'}</ul>"


def _share(rows: Sequence[Row]) -> str:
    """One bar of the mean, and what its colours are."""
    total = _mean(rows, None) or 1.0
    shares = {part: _mean(rows, part) / total for part in PARTS}
    bar = "".join(
        f'<div style="width:{100 * share:.2f}%;background:{_COLORS[part]}">{f"{share:.0%}" if share > 0.04 else ""}'
        "</div>"
        for part, share in shares.items()
    )
    names = "".join(
        f'<span title="{_MEANING[part]}"><i style="background:{_COLORS[part]}"></i>{part} {share:.1%}, '
        f"{_MEANING[part]}</span> "
        for part, share in shares.items()
    )
    return f"<div class=bar>{bar}</div><p class=legend>{names}</p>"


def _draw(rows: Sequence[Row], width: int = 960, height: int = 220) -> str:
    """Stacked bars of seconds, one for each log, as svg."""
    most, left = max(row.seconds for row in rows) or 1.0, 60
    step = min((width - left) / len(rows), 90)
    bars = []
    for mark in (0.0, 0.5, 1.0):
        y = height - mark * (height - 20)
        bars.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e0e0e0"/>')
        label = _seconds(mark * most) if mark else "0"
        bars.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    every = max(1, -(-len(rows) // 16))
    for place, row in enumerate(rows):
        top, x = float(height), left + place * step
        for part in PARTS:
            size = row.parts[part] / most * (height - 20)
            top -= size
            bars.append(
                f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{max(step - 2, 1):.1f}" height="{size:.1f}" '
                f'fill="{_COLORS[part]}"><title>step {row.step}: {part} {_seconds(row.parts[part])}</title></rect>'
            )
        if place % every == 0:
            bars.append(f'<text x="{x + step / 2:.1f}" y="{height + 16}" text-anchor="middle">{row.step}</text>')
    end = f'<text x="{left}" y="{height + 32}">seconds of a step, by the step of the log</text>'
    return f'<svg viewBox="0 0 {width} {height + 36}" width="100%">{"".join(bars)}{end}</svg>'


def _table(rows: Sequence[Row], most: int = 50) -> str:
    """A line for each log; of many, the first ones and the last ones."""
    shown = [*rows[: most // 2], *rows[-most // 2 :]] if len(rows) > most else rows
    memory = any(row.memory_gib for row in rows)
    columns = ["step", *PARTS, "tokens/s", *["MFU"] * any(r.mfu is not None for r in rows), *["GiB"] * memory]
    columns += ["balance", "slowest rank"]
    head = "".join(f"<th>{name}</th>" for name in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(row, columns))}</tr>" for row in shown)
    hidden = len(rows) - len(shown)
    left = f"<p class=note>{hidden} logs in between are in the json.</p>" if hidden else ""
    return f"<table><tr>{head}</tr>{lines}</table>{left}"


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    made: Mapping[str, Any] = {
        "step": f"{row.step:,}",
        **{part: _seconds(row.parts[part]) for part in PARTS},
        "tokens/s": f"{row.tokens_per_second:,.0f}",
        "MFU": "" if row.mfu is None else f"{row.mfu:.1%}",
        "GiB": f"{row.memory_gib:.1f}",
        "balance": f"{row.balance:.2f}",
        "slowest rank": f"{row.slowest[0]} ({row.slowest[1]:.2f} x)",
    }
    return [made[name] for name in columns]
