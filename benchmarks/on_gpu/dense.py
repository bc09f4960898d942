"""Llama-3-8B's layers with AdamW in bf16: packed sequences, and one document, next to stock in the same run."""

from __future__ import annotations

from benchmarks import step
from benchmarks.on_gpu.part import Part
from benchmarks.on_gpu.speed import layers_that_fit, make_options, measure

LARGE = {"hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14_336, "vocab": 128_256}
SMALL = {"hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocab": 128}
# tokens, tokens of the median document (0: one document fills the row), room for stock's logits, checkpointing,
# seconds
CASES = (
    (8192, 1024, True, False, 40),
    (65_536, 1024, False, False, 60),
    (8192, 0, True, False, 40),
    (32_768, 1024, False, True, 50),
    (32_768, 1024, False, False, 50),
)
FEW = ((96, 16, True, False, 30), (96, 16, True, True, 30))


def run(part: Part) -> None:
    for tokens, median, stock, checkpointing, seconds in FEW if part.small else CASES:
        kind = ("packed" if median else "one document") + ", checkpointing" * checkpointing
        part.case(f"{tokens} {kind}", dense, part, tokens, median, stock, checkpointing, seconds=seconds)


def dense(part: Part, tokens: int, median: int, stock: bool, checkpointing: bool) -> None:
    options = make_options(part, SMALL if part.small else LARGE, checkpointing=checkpointing)
    width = options.hidden // options.heads
    attention = 2 * options.hidden * width * (options.heads + options.kv_heads)
    parameters = attention + 3 * options.hidden * options.intermediate
    options.layers = layers_that_fit(options, tokens, parameters, 32, stock)
    measure(part, step.Bench, options, tokens, median)
