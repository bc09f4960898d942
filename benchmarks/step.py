"""A training step at real layer shapes: tokens/s, MFU and peak memory, next to stock transformers.

    python -m benchmarks step                           on a CUDA device: 4 layers of Llama-3-8B, packed sequences 8K
    to 64K python -m benchmarks step --device cpu              the same code, small

Step = forward, backward and AdamW on one packed sequence. The contenders share one model and take turns in blocks:

    ours          prepare_omni with a plan of ones: varlen attention, loss without the full logits
    stock sdpa    transformers as it comes: an S x S mask for the packed sequence, full logits
    stock flash_attention_2, _3    the same with that package's varlen kernel, where it is installed

MFU is model flops (`_flops.py` has the formula: attention counts the causal half of each document) over the peak of
the data sheet (bf16, dense). `floor_seconds` are these flops at the rate of a large matmul that is measured here. On
the CPU, seconds are CPU time of one thread, so that other work on the machine does not count.

Checked, on the first layers: loss and gradients against stock transformers with one document a call, whose gradients
are summed in fp32.
The learning rate is 0, so every step computes the same.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from benchmarks._flops import flops_of_step, peak_flops
from benchmarks._memory import MemoryLog
from benchmarks._options import device_parser, parse_for_device
from benchmarks._phases import PhaseClock
from benchmarks._record import quantiles, record
from benchmarks._rows import packed_row, ragged_lengths
from benchmarks._timing import matmul_rate, timed
from hf_veomni import ParallelPlan, detach_omni, prepare_omni

# Shapes and lengths by device; the CUDA ones are Llama-3-8B's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "intermediate": 14_336,
        "vocab": 128_256,
        "layers": 4,
        "tokens": [8192, 16_384, 32_768, 65_536],
        "median": 1024,
        "dtype": "bfloat16",
        "rounds": 5,
        "steps": 3,
    },
    "cpu": {
        "hidden": 512,
        "heads": 8,
        "kv_heads": 2,
        "intermediate": 1792,
        "vocab": 8192,
        "layers": 2,
        "tokens": [2048, 4096, 8192],
        "median": 256,
        "dtype": "float32",
        "rounds": 3,
        "steps": 1,
    },
}
# Checks run on the first layers alone: roundings of bf16 grow with depth.
CHECKED_LAYERS = 4
# Largest relative error of the loss, and of the watched gradients (norm of the difference / norm).
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-3, 4e-2)}


def build(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=max(options.tokens),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).train()
    if options.checkpointing:
        model.activation_checkpointing_enable()
    return model


def contenders(wanted: list[str] | None) -> list[str]:
    names = ["ours", "stock sdpa"]
    names += ["stock flash_attention_2"] if is_flash_attn_2_available() else []
    names += ["stock flash_attention_3"] if is_flash_attn_3_available() else []
    return [name for name in names if wanted is None or name in wanted]


@contextmanager
def installed(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model as this contender has it."""
    if name == "ours":
        model.set_attn_implementation("sdpa")
        prepare_omni(model, ParallelPlan())
        try:
            yield
        finally:
            detach_omni(model)
    else:
        model.set_attn_implementation(name.removeprefix("stock "))
        yield


@contextmanager
def first_layers(model: PreTrainedModel) -> Iterator[None]:
    """The model with `CHECKED_LAYERS` of its layers."""
    decoder, config = model.get_decoder(), model.config
    layers = decoder.layers
    decoder.layers, config.num_hidden_layers = layers[:CHECKED_LAYERS], min(len(layers), CHECKED_LAYERS)
    try:
        yield
    finally:
        decoder.layers, config.num_hidden_layers = layers, len(layers)


class Bench:
    """One model and its optimizer on one device; what is done with a packed sequence."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.model = self.build()
        # No weight changes at a learning rate of 0, but all is computed.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=self.device.type == "cuda")
        layers = self.model.get_decoder().layers
        self.watched = [layers[0].self_attn.q_proj.weight, layers[0].self_attn.v_proj.weight]
        self.watched += [self.last_of(layers[:CHECKED_LAYERS][-1])]

    def build(self) -> PreTrainedModel:
        return build(self.options, self.device)

    def last_of(self, layer: Any) -> Tensor:
        """The parameter of the last checked layer that is compared."""
        return layer.mlp.down_proj.weight

    def contenders(self) -> list[str]:
        return contenders(self.options.contenders)

    def installed(self, name: str) -> AbstractContextManager[None]:
        """The model as this contender has it."""
        return installed(self.model, name)

    def gradients(self, batch: dict[str, Tensor], **kwargs: Any) -> float:
        """Forward and backward; returns the loss. Without a cache, or stock would not see the packed documents."""
        loss = self.model(**batch, use_cache=False, **kwargs).loss
        loss.backward()
        return float(loss.detach())

    def step(self) -> None:
        self.model(**self.batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, function: Callable[[], Any]) -> float:
        return timed(function, self.device)

    def load(self, lengths: list[int]) -> None:
        """Take the row of these documents."""
        self.lengths = lengths
        self.batch = {key: value.to(self.device) for key, value in packed_row(lengths, self.options.vocab).items()}

    def clean(self) -> None:
        self.optimizer.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reference(self) -> tuple[float, list[Tensor]]:
        """Loss and watched gradients of stock transformers with one document a call."""
        ids, begin, total = self.batch["input_ids"], 0, 0.0
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.watched]
        scored = sum(self.lengths) - len(self.lengths)
        with first_layers(self.model), self.installed("stock sdpa"):
            for length in self.lengths:
                row = ids[:, begin : begin + length]
                begin += length
                if length > 1:
                    total += self.gradients({"input_ids": row, "labels": row}, num_items_in_batch=scored)
                    for sum_, parameter in zip(sums, self.watched, strict=True):
                        sum_ += parameter.grad
                    self.optimizer.zero_grad()
        return total, sums

    def check(self, name: str, expected: tuple[float, list[Tensor]]) -> dict[str, Any]:
        """Relative errors of this contender, and whether they are within the tolerance."""
        with first_layers(self.model), self.installed(name):
            loss = self.gradients(self.batch)
        errors = [
            float((parameter.grad.float() - grad).norm() / grad.norm())
            for parameter, grad in zip(self.watched, expected[1], strict=True)
        ]
        self.optimizer.zero_grad()
        loss_error = abs(loss - expected[0]) / abs(expected[0])
        limits = TOLERANCE[self.options.dtype]
        passed = loss_error <= limits[0] and max(errors) <= limits[1]
        return {"loss": loss, "loss_error": loss_error, "gradient_error": max(errors), "passed": passed}

    def block(self, name: str, steps: int) -> list[float]:
        """Seconds of each step, after one that is not counted."""
        with self.installed(name):
            self.step()
            return [self.seconds(self.step) for _ in range(steps)]

    def peak_bytes(self, name: str) -> int:
        """Peak memory of a step: of the allocator on CUDA, else weights, optimizer and all tensors the step makes."""
        with self.installed(name):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                self.step()
                return torch.cuda.max_memory_allocated()
            with MemoryLog() as log:
                self.step()
        states = (tensor for state in self.optimizer.state.values() for tensor in state.values())
        held = [*self.model.parameters(), *(tensor for tensor in states if isinstance(tensor, Tensor))]
        return log.peak()[0] + sum(tensor.nbytes for tensor in held)

    def phases(self, steps: int) -> dict[str, float]:
        """Seconds of the parts of our step, means over `steps`."""
        with self.installed("ours"):
            self.step()
            clock = PhaseClock(self.device)
            clock.attach(self.model)
            for _ in range(steps):
                clock.mark("rest")
                loss = self.model(**self.batch, use_cache=False).loss
                clock.mark("loss")
                loss.backward()
                clock.mark("optimizer")
                self.optimizer.step()
                self.optimizer.zero_grad()
            clock.mark("rest")
            clock.detach()
        return {phase: seconds / steps for phase, seconds in clock.seconds().items()}

    def matmul_rate(self) -> float:
        """FLOP/s of one large matmul: what this device reaches."""
        size = 8192 if self.device.type == "cuda" else 2048
        return matmul_rate(self.device, getattr(torch, self.options.dtype), size)


def guarded(function: Callable[[], Any], clean: Callable[[], None]) -> tuple[Any, bool]:
    """The result, or None and True when the device's memory did not suffice."""
    try:
        return function(), False
    except torch.OutOfMemoryError:
        pass  # the traceback holds the tensors: it has to be gone before cleaning
    clean()
    return None, True


def check_all(bench: Bench) -> dict[str, dict[str, Any]]:
    """An empty result for every contender, checked where the reference fits into memory."""
    results: dict[str, dict[str, Any]] = {}
    expected, _ = guarded(bench.reference, bench.clean)
    for name in bench.contenders():
        check, full = None, False
        if expected is not None:
            check, full = guarded(partial(bench.check, name, expected), bench.clean)
        results[name] = {"seconds": [], "rounds": [], "check": check, "out_of_memory": full}
    return results


def measure_row(bench: Bench, lengths: list[int], rate: float) -> list[dict[str, Any]]:
    """All contenders on one packed sequence, in turns. One mapping a contender."""
    options = bench.options
    bench.load(lengths)
    results = check_all(bench)
    for _ in range(options.rounds):
        for name, result in results.items():
            if not result["out_of_memory"]:
                block, result["out_of_memory"] = guarded(partial(bench.block, name, options.steps), bench.clean)
                result["seconds"] += block or []
                result["rounds"] += [sorted(block)[len(block) // 2]] if block else []
            bench.clean()
    for name, result in results.items():
        if not result["out_of_memory"]:
            result["peak_bytes"] = bench.peak_bytes(name)
            bench.clean()
    rows = [row_of(name, result, results["ours"], options, lengths, rate) for name, result in results.items()]
    if not options.checkpointing and not results["ours"]["out_of_memory"]:
        flops = flops_of_step(options, lengths)
        rows[0]["phases"] = {
            phase: {"seconds": float(f"{seconds:.4g}")}
            | ({"of_matmul_rate": round(flops[phase] / seconds / rate, 3)} if phase in flops else {})
            for phase, seconds in bench.phases(options.steps).items()
        }
    return rows


def row_of(
    name: str,
    result: dict[str, Any],
    ours: dict[str, Any],
    options: argparse.Namespace,
    lengths: list[int],
    rate: float,
) -> dict[str, Any]:
    flops = sum(flops_of_step(options, lengths).values())
    row: dict[str, Any] = {
        "contender": name,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "longest": max(lengths),
        **{key: getattr(options, key) for key in ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")},
        **{key: getattr(options, key) for key in ("dtype", "checkpointing", "device")},
        "check": result["check"],
        "out_of_memory": result["out_of_memory"],
        "step_tflop": float(f"{flops / 1e12:.5g}"),
        "matmul_tflops": float(f"{rate / 1e12:.4g}"),
        "floor_seconds": float(f"{flops / rate:.4g}"),
    }
    if result["out_of_memory"]:
        return row
    seconds = result["seconds"]
    row["seconds"] = quantiles(seconds)
    row["tokens_per_second"] = quantiles([sum(lengths) / second for second in seconds])
    row["floor_over_time"] = round(flops / rate / row["seconds"]["p50"], 4)
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops(options.device)
    row["mfu"] = quantiles([flops / second / peak for second in seconds]) if peak else None
    row["peak_bytes"] = result["peak_bytes"]
    if name != "ours" and not ours["out_of_memory"]:
        row["ours_is_faster"] = quantiles([a / b for a, b in zip(result["rounds"], ours["rounds"], strict=False)])
        row["memory_over_ours"] = round(result["peak_bytes"] / ours["peak_bytes"], 3)
    return row


def show(row: dict[str, Any]) -> None:
    head = f"{row['tokens']:6} tokens in {row['documents']:3} documents  {row['contender']:24}"
    if row["out_of_memory"]:
        print(f"{head} out of memory", flush=True)
        return
    mfu = f"MFU {100 * row['mfu']['p50']:.1f} %" if row["mfu"] else ""
    check = "not checked" if row["check"] is None else f"gradient error {row['check']['gradient_error']:.1e}"
    ratio = f"ours is {row['ours_is_faster']['p50']:.2f} x faster" if "ours_is_faster" in row else ""
    print(
        f"{head} {row['tokens_per_second']['p50']:9.0f} tokens/s  {mfu}  {100 * row['floor_over_time']:.0f} % of the "
        f"matmul rate  {row['peak_bytes'] / 2**30:.2f} GiB  {check}  {ratio}",
        flush=True,
    )
    for phase, values in row.get("phases", {}).items():
        share = f"{100 * values['of_matmul_rate']:.0f} % of the matmul rate" if "of_matmul_rate" in values else ""
        print(f"{'':36}{phase:12} {values['seconds']:8.4f} s  {share}", flush=True)


def parse() -> argparse.Namespace:
    parser = device_parser(__doc__.split("\n")[0], TOLERANCE)
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the packed sequences")
    parser.add_argument("--median", type=int, help="tokens of the median document; 0: one document fills the row")
    for name in ("layers", "hidden", "heads", "kv-heads", "intermediate", "vocab", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing for all contenders")
    parser.add_argument("--contenders", nargs="+", help="some of them, 'ours' among them")
    parser.add_argument("--peak-tflops", type=float, help="for the MFU, where the device is not in the table")
    return parse_for_device(parser, DEFAULTS)


def main() -> None:
    options = parse()
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(options)
    rate = bench.matmul_rate()
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        lengths = ragged_lengths(tokens, options.median) if options.median else [tokens]
        for row in measure_row(bench, lengths, rate):
            show(row)
            rows.append(row)
        record("step", rows, plan=ParallelPlan())  # after each length, so that a time limit loses one row only
    wrong = [r for r in rows if r["contender"] == "ours" and r["check"] is not None and not r["check"]["passed"]]
    if wrong:
        sys.exit(f"wrong at {[row['tokens'] for row in wrong]} tokens: {[row['check'] for row in wrong]}")


if __name__ == "__main__":
    main()
