"""`use_liger_kernel`, where liger-kernel is installed: parity with the stock model, and a step of Llama-3-8B's layers
with Liger's norm, rotary and MLP kernels next to the same step without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from benchmarks import step
from benchmarks.on_gpu.compare import compare, limits_of, run_prepared, yardstick
from benchmarks.on_gpu.dense import LARGE
from benchmarks.on_gpu.families import FAMILIES, build, inputs_of
from benchmarks.on_gpu.parity import DTYPES, reference
from benchmarks.on_gpu.part import SKIPPED, Part
from benchmarks.on_gpu.speed import layers_that_fit, make_options, measure
from hf_veomni import ParallelPlan, detach_omni, prepare_omni
from hf_veomni.trainer.liger import KERNELS, liger_kernels

ON = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None)


class LigerBench(step.Bench):
    """`step.Bench` with Liger's kernels and without."""

    def contenders(self) -> list[str]:
        return ["ours", "ours liger"]

    @contextmanager
    def installed(self, name: str) -> Iterator[None]:
        if name != "ours liger":
            with step.installed(self.model, name):
                yield
            return
        self.model.set_attn_implementation("sdpa")
        with liger_kernels(self.model, ON):
            prepare_omni(self.model, ParallelPlan())
        try:
            yield
        finally:
            detach_omni(self.model)


def run(part: Part) -> None:
    if not part.cuda or find_spec("liger_kernel") is None:
        why = "Liger's kernels need CUDA" if not part.cuda else "liger-kernel is not installed"
        part.case("installed", part.row, SKIPPED, why)
        return
    for family in FAMILIES:
        for dtype in DTYPES:
            part.case(f"{family} {str(dtype).removeprefix('torch.')}", parity, part, family, dtype)
    for tokens in (8192, 32_768):
        part.case(f"{tokens} packed", speed, part, tokens, seconds=45.0)


def parity(part: Part, family: str, dtype: torch.dtype) -> None:
    """As `parity.parity`, with Liger's kernels on the prepared model."""
    model = build(family, part.small, dtype, part.device)
    kind = model.config.model_type
    if kind not in KERNELS:
        part.row(SKIPPED, f"'{kind}' has no kernels of Liger here")
        return
    wanted = reference(family, part.small)
    documents, row = inputs_of(family, part.small, model)
    stock = yardstick(family, model, documents, row, part.device, wanted)
    with liger_kernels(model, ON):
        prepare_omni(model, "sp=1")
    errors = compare(run_prepared(model, row, part.device), wanted)
    limits = limits_of(stock, dtype)
    values = {"errors": asdict(errors), "stock": asdict(stock), "limits": asdict(limits)}
    part.check(errors.within(limits), f"{errors} (stock {stock.numbers()}) {errors.parameter}", **values)


def speed(part: Part, tokens: int) -> None:
    options = make_options(part, LARGE)
    width = options.hidden // options.heads
    attention = 2 * options.hidden * width * (options.heads + options.kv_heads)
    options.layers = layers_that_fit(
        options, tokens, attention + 3 * options.hidden * options.intermediate, 32, stock=tokens <= 8192
    )
    measure(part, LigerBench, options, tokens, 1024)
