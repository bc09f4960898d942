"""Loss, logits and gradients of a packed sequence against the stock model in fp64, family by family, in fp32 and
bf16."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import torch

from benchmarks.on_gpu.compare import Found, compare, limits_of, run_prepared, run_stock, yardstick
from benchmarks.on_gpu.families import FAMILIES, build, inputs_of
from benchmarks.on_gpu.part import Part
from hf_veomni import prepare_omni

DTYPES = (torch.float32, torch.bfloat16)


def run(part: Part) -> None:
    for family in FAMILIES:
        for dtype in DTYPES:
            # The first call of a compiled kernel takes its time.
            part.case(f"{family} {str(dtype).removeprefix('torch.')}", parity, part, family, dtype, seconds=60.0)


@lru_cache(maxsize=1)
def reference(family: str, small: bool) -> Found:
    """The stock model in fp64, on the CPU."""
    model = build(family, small, torch.float64, "cpu")
    return run_stock(model, inputs_of(family, small, model)[0], "cpu")


def parity(part: Part, family: str, dtype: torch.dtype) -> None:
    wanted = reference(family, part.small)
    model = build(family, part.small, dtype, part.device)
    documents, row = inputs_of(family, part.small, model)
    stock = yardstick(family, model, documents, row, part.device, wanted)
    errors = compare(run_prepared(prepare_omni(model, "sp=1"), row, part.device), wanted)
    limits = limits_of(stock, dtype)
    values = {"errors": asdict(errors), "stock": asdict(stock), "limits": asdict(limits)}
    summary = f"{errors} (stock {stock.numbers()}) {errors.parameter}"
    part.check(errors.within(limits), summary, tokens=row["input_ids"].shape[1], **values)
