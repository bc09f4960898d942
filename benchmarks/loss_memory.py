"""Peak memory and time of a training step with the full logits and with the chunked loss.

    python -m benchmarks loss_memory [--device auto|cpu|cuda]

A Qwen3 of one layer with a vocabulary of 151,936, the head trained or frozen (as under LoRA). Three ways to the loss:

    stock   transformers' own: logits [S, V], their fp32 copy, their softmax, their gradient
    chunked    `attach_chunked_loss`
    torch   `torch.nn.functional.linear_cross_entropy`, what PyTorch has for the purpose

Rows "trace": most bytes that tensors take at once in head and loss of `--trace-tokens`, forward and backward, on the
meta device, so that a stock step that fits no machine at hand is counted too (`_memory.py`). Rows "measured": a real
step of `--tokens`; memory is the growth of the resident set (CPU) or of the allocator's peak (CUDA) in a process of
its own, seconds (of CPU time; wall time on CUDA) are of interleaved steps in one process, `step_ratio` is chunked /
stock of the same round. Rows "accuracy": loss and gradients in bf16 against fp64.

Exit status 1 if loss or gradients of the chunked step differ from stock's, or if it holds more than a third of stock's
bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks._memory import MemoryLog
from benchmarks._record import quantiles, record
from hf_veomni.loss import attach_chunked_loss
from hf_veomni.loss.head import default_chunk_tokens

# torch's own function came with 2.13; CUDA images still carry older ones.
LinearCrossEntropyOptions: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
VARIANTS = ("stock", "chunked", "torch") if LinearCrossEntropyOptions else ("stock", "chunked")
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-4}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def build(options: argparse.Namespace, device: str, frozen: bool) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=1,
        num_attention_heads=max(1, options.hidden // 128),
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=options.trace_tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, options.dtype)).train()
    model.lm_head.weight.requires_grad_(not frozen)
    model.model.embed_tokens.weight.requires_grad_(False)  # what it adds is the same in all variants
    return model


def make_step(model: PreTrainedModel, variant: str, ids: Tensor) -> Callable[[], Tensor]:
    """A step that leaves the gradients in the model and returns the loss."""
    hidden_bytes = ids.numel() * model.config.hidden_size * model.dtype.itemsize
    tokens = default_chunk_tokens(model.config.vocab_size, hidden_bytes, ids.device.type)  # as the chunked loss

    def step() -> Tensor:
        detach = attach_chunked_loss(model) if variant == "chunked" else None
        model.zero_grad(set_to_none=True)
        if variant == "torch":
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            chunks = LinearCrossEntropyOptions(batch_chunk_size=tokens, chunking_method=None)
            loss = F.linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten(), options=chunks)
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if detach is not None:
            detach()
        return loss.detach()

    return step


def random_ids(options: argparse.Namespace, tokens: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, options.vocab, (1, tokens), generator=generator).to(device)


def trace(options: argparse.Namespace, variant: str, frozen: bool) -> int:
    """Most live bytes of head and loss, without data."""
    model = build(options, "meta", frozen)
    if variant == "chunked":
        attach_chunked_loss(model)
    shape, dtype = (1, options.trace_tokens), model.lm_head.weight.dtype
    hidden = torch.empty(*shape, options.hidden, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(shape, dtype=torch.long, device="meta")
    with MemoryLog() as log:
        model.loss_function(model.lm_head(hidden), labels, options.vocab).backward()
    return log.peak()[0]


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_of_step(options: argparse.Namespace) -> None:
    """Print the memory that one step takes beyond the model's. Runs in a process of its own."""
    model = build(options, options.device, options.frozen)
    warm_up = random_ids(options, 64, options.device)
    make_step(model, options.variant, warm_up)()
    model.zero_grad(set_to_none=True)
    step = make_step(model, options.variant, random_ids(options, options.tokens, options.device))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        step()
        print(_status("VmHWM") - before)


def measured_peak(options: argparse.Namespace, variant: str, frozen: bool) -> int:
    command = [sys.executable, "-m", "benchmarks", "loss_memory", "--variant", variant, "--device", options.device]
    for name in ("tokens", "trace_tokens", "hidden", "vocab", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run([*command, *["--frozen"] * frozen], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def seconds_and_difference(options: argparse.Namespace, frozen: bool) -> dict[str, Any]:
    """Interleaved steps of all variants: seconds, and how far chunked is from stock."""
    model = build(options, options.device, frozen)
    ids = random_ids(options, options.tokens, options.device)
    steps = {variant: make_step(model, variant, ids) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    found: dict[str, tuple[float, list[Tensor]]] = {}
    # One thread: CPU time leaves out what else runs on the machine.
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    for turn in range(options.repeats + 1):
        for variant, step in steps.items():
            begin = clock()
            loss = step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[variant].append(clock() - begin)
            elif variant != "torch":
                found[variant] = float(loss), [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    (stock, expected), (chunked, gradients) = found["stock"], found["chunked"]
    errors = [float((x - y).float().norm() / y.float().norm()) for x, y in zip(gradients, expected, strict=True)]
    return {
        "seconds": {variant: quantiles(values) for variant, values in seconds.items()},
        "step_ratio": quantiles([x / y for x, y in zip(seconds["chunked"], seconds["stock"], strict=True)]),
        "loss_difference": abs(chunked - stock) / stock,
        "gradient_difference": max(errors),
    }


def accuracy(device: str) -> list[dict[str, Any]]:
    """bf16 against fp64 on a trained head: relative errors of the summed loss and of both gradients."""
    tokens, hidden, vocabulary = 2048, 256, 8192
    generator = torch.Generator().manual_seed(0)
    options = argparse.Namespace(vocab=vocabulary, hidden=hidden, trace_tokens=tokens, dtype="bfloat16")
    model = build(options, device, frozen=False)
    h = torch.randn(1, tokens, hidden, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.05).to(device, torch.bfloat16)
    targets = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(device)
    model.lm_head.weight.data.copy_(weight)

    def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, inputs))]

    x, w = h.double().requires_grad_(), weight.double().requires_grad_()
    exact = gradients(F.cross_entropy(F.linear(x, w)[0], targets[0], reduction="sum"), x, w)
    rows = []
    for variant in VARIANTS:
        x, w = h.clone().requires_grad_(), model.lm_head.weight
        if variant == "torch":
            chunks = LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None)
            loss = F.linear_cross_entropy(x[0], w, targets[0], reduction="sum", options=chunks)
        else:
            detach = attach_chunked_loss(model, chunked=variant == "chunked", chunk_tokens=64)
            loss = model.loss_function(model.lm_head(x), None, shift_labels=targets, num_items_in_batch=1)
            detach()
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(gradients(loss, x, w), exact, strict=True)]
        rows.append(
            {"kind": "accuracy", "variant": variant, "dtype": "bfloat16", "tokens": tokens, "chunk_tokens": 64}
            | dict(zip(("loss_error", "hidden_gradient_error", "weight_gradient_error"), errors, strict=True))
        )
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loss_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tokens", type=int, help="of the measured step: 1024 on the CPU, 8192 on CUDA")
    parser.add_argument("--trace-tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, help="256 on the CPU, 4096 on CUDA")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device == "cuda"
    options.tokens = options.tokens or (8192 if on_gpu else 1024)
    options.hidden = options.hidden or (4096 if on_gpu else 256)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    return options


def main() -> None:
    options = parse_options()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.variant:
        return peak_of_step(options)
    shape = {"hidden": options.hidden, "vocab": options.vocab, "dtype": options.dtype}
    rows: list[dict[str, Any]] = []
    for frozen in (False, True):
        head = {"head": "frozen" if frozen else "trained"} | shape
        peaks = {variant: trace(options, variant, frozen) for variant in ("stock", "chunked")}
        rows.append({"kind": "trace", **head, "tokens": options.trace_tokens, "peak_bytes": peaks})
        peaks = {variant: measured_peak(options, variant, frozen) for variant in VARIANTS}
        row = {"kind": "measured", **head, "tokens": options.tokens, "peak_bytes": peaks}
        rows.append(row | seconds_and_difference(options, frozen))
        for row in rows[-2:]:
            print(json.dumps(row), flush=True)
    rows += accuracy(options.device)
    for row in rows[-len(VARIANTS) :]:
        print(json.dumps(row))
    record("loss_memory", rows)
    sys.exit(0 if passed(rows, getattr(torch, options.dtype)) else 1)


def passed(rows: list[dict[str, Any]], dtype: torch.dtype) -> bool:
    """Whether the chunked step is the stock step, and takes less than a third of its memory."""
    measured = [row for row in rows if row["kind"] == "measured"]
    same = all(
        row["loss_difference"] < LOSS_TOLERANCE[dtype] and row["gradient_difference"] < GRADIENT_TOLERANCE[dtype]
        for row in measured
    )
    traces = [row["peak_bytes"] for row in rows if row["kind"] == "trace"]
    return same and all(3 * peak["chunked"] < peak["stock"] for peak in traces)


if __name__ == "__main__":
    main()
