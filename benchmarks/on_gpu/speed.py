"""A step at real layer shapes on a packed sequence, by `benchmarks/step.py`: as many layers as fit, one row a
contender."""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from benchmarks import step
from benchmarks._rows import ragged_lengths
from benchmarks.on_gpu.part import FAILED, NOTE, OK, Part

# Of the free memory; the rest is for what the allocator cannot use.
USABLE = 0.85
ADAMW_BYTES = 8  # a parameter in bf16: weight, gradient and two moments


def layers_that_fit(options: argparse.Namespace, tokens: int, parameters: int, most: int, stock: bool) -> int:
    """Layers whose weights, optimizer state and activations fit into the free memory; 2 on the CPU.

    Args:
        parameters: of one layer.
        stock: leave room for the full logits of the stock model too.
    """
    if options.device == "cpu":
        return 2
    free = torch.cuda.mem_get_info()[0] * USABLE
    ends = 2 * options.vocab * options.hidden * ADAMW_BYTES
    logits = tokens * options.vocab * 12 if stock else 3 * 2**30  # bf16, fp32, their gradient
    active = options.intermediate * getattr(options, "top_k", 1)
    width = getattr(options, "head_dim", None) or options.hidden // options.heads
    heads = (options.heads + options.kv_heads) * width
    copies = 2 * options.hidden * getattr(options, "top_k", 0)  # tokens on the way to their experts and back
    activations = tokens * 2 * (10 * options.hidden + 4 * heads + 5 * active + copies)
    if options.checkpointing:  # the input of each layer, and all of one
        ends, activations = ends + activations, tokens * 2 * options.hidden
    return max(1, min(most, int((free - ends - logits) / (parameters * ADAMW_BYTES + activations))))


def make_options(part: Part, sizes: dict[str, Any], **more: Any) -> argparse.Namespace:
    """What `step.Bench` reads."""
    fixed = {"device": part.device, "dtype": "bfloat16" if part.cuda else "float32", "checkpointing": False}
    fixed |= {"rounds": 1, "steps": 1} if part.small else {"rounds": 3, "steps": 2}
    fixed |= {"contenders": None, "peak_tflops": None}
    return argparse.Namespace(**fixed | sizes | more)


def measure(part: Part, kind: type[step.Bench], options: argparse.Namespace, tokens: int, median: int) -> None:
    """One row of `tokens`, all contenders in turns; with half the layers where ours has run out of memory."""
    lengths = ragged_lengths(tokens, median) if median else [tokens]
    options.tokens = [tokens]
    while True:
        bench = kind(options)
        rows = step.measure_row(bench, lengths, bench.matmul_rate())
        full = rows[0]["out_of_memory"]
        del bench
        gc.collect()
        if part.cuda:
            torch.cuda.empty_cache()
        if not full or options.layers == 1:
            break
        part.row(NOTE, f"out of memory with {options.layers} layers")
        options.layers //= 2
    for row in rows:
        step.show(row)
        report(part, row, rows[-1]["check"])


def passes(check: dict[str, Any], stock: dict[str, Any] | None) -> bool:
    """Within the tolerance, or near the stock model's own error on the same row: bf16 may route a token elsewhere."""
    errors = ("loss_error", "gradient_error")
    return check["passed"] or (stock is not None and all(check[name] <= 1.5 * stock[name] for name in errors))


def report(part: Part, row: dict[str, Any], stock: dict[str, Any] | None) -> None:
    """One contender's row, against the check of the stock contender, if it had one."""
    name = f"{row['contender']}, {row['layers']} layers"
    if row["out_of_memory"]:
        part.row(FAILED if row["contender"] == "ours" else NOTE, f"{name}: out of memory", **row)
        return
    mfu = f"MFU {100 * row['mfu']['p50']:.1f} %, " if row["mfu"] else ""
    ratio = f", ours {row['ours_is_faster']['p50']:.2f} x faster" if "ours_is_faster" in row else ""
    summary = (
        f"{name}: {row['seconds']['p50']:.3g} s, {row['tokens_per_second']['p50']:.0f} tokens/s, {mfu}"
        f"{100 * row['floor_over_time']:.0f} % of the matmul rate, {row['peak_bytes'] / 2**30:.1f} GiB{ratio}"
    )
    check = row["check"]
    if check is not None:
        summary += f", gradient off by {check['gradient_error']:.0e}"
    ours = row["contender"].startswith("ours")
    status = NOTE if check is None or not ours else OK if passes(check, stock) else FAILED
    part.row(status, summary, **row)
    phases = row.get("phases", {})
    if phases:
        shares = (
            f"{name} {1000 * values['seconds']:.3g} ms"
            + (f" ({100 * values['of_matmul_rate']:.0f} %)" if "of_matmul_rate" in values else "")
            for name, values in phases.items()
        )
        part.row(NOTE, f"phases, of the matmul rate: {', '.join(shares)}")
