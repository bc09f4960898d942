"""The loss in chunks against the full logits: time, memory, and which size of a chunk is the fastest here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._memory import MemoryLog
from benchmarks._record import quantiles
from benchmarks._timing import timed
from benchmarks.on_gpu.part import NOTE, Part
from hf_veomni.loss import attach_chunked_loss

CHUNKS = (None, 256, 512, 1024, 2048, 4096)  # tokens at once; None is the package's own choice
FULL = "full logits"
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run(part: Part) -> None:
    tokens, hidden, vocabulary = (64, 16, 256) if part.small else (16_384, 4096, 151_936)
    for trained in (True, False):
        name = f"head {'trained' if trained else 'frozen'}"
        part.case(name, loss, part, tokens, hidden, vocabulary, trained, seconds=30.0)


def make_model(part: Part, hidden: int, vocabulary: int, trained: bool) -> Any:
    """The head alone is called: one layer stands there so that it is a model."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(part.device):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16 if part.cuda else torch.float32).train()
    nn.init.normal_(model.lm_head.weight, 0, hidden**-0.5)
    model.lm_head.weight.requires_grad_(trained)
    return model


def loss(part: Part, tokens: int, hidden: int, vocabulary: int, trained: bool) -> None:
    """Forward and backward of head and loss from given hidden states, contenders in turns."""
    model = make_model(part, hidden, vocabulary, trained)
    states = torch.randn(1, tokens, hidden, device=part.device, dtype=model.dtype)
    labels = torch.randint(0, vocabulary, (1, tokens), device=part.device)

    def step(chunk: int | None, chunked: bool) -> tuple[Tensor, list[Tensor]]:
        detach = attach_chunked_loss(model, chunk_tokens=chunk) if chunked else lambda: None
        x, weight = states.detach().requires_grad_(), model.lm_head.weight
        value = model.loss_function(model.lm_head(x), labels, vocabulary)
        gradients = torch.autograd.grad(value, [x, weight] if trained else [x])
        detach()
        return value.detach(), list(gradients)

    steps: dict[str, Callable[[], Any]] = {FULL: lambda: step(None, False)}
    for chunk in CHUNKS:
        steps[f"chunks of {chunk}" if chunk else "as it is"] = lambda chunk=chunk: step(chunk, True)
    rate = 2 * (4 if trained else 2) * tokens * hidden * vocabulary
    found = measure(part, steps)
    for name, values in found.items():
        if "seconds" not in values:
            part.row(NOTE, f"{name}: out of memory")
            continue
        summary = f"{name}: {1000 * values['seconds']['p50']:.4g} ms, {values['peak_bytes'] / 2**30:.2f} GiB"
        error = values.get("error")
        if error is None:
            part.row(NOTE, summary, contender=name, tokens=tokens, **values)
        else:
            limit = GRADIENT_TOLERANCE[model.dtype]
            summary += f", off the full logits by {error:.0e}, {rate / values['seconds']['p50'] / 1e12:.4g} TFLOP/s"
            part.check(error <= limit, summary, contender=name, tokens=tokens, **values)


def measure(part: Part, steps: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Peak of memory, error against the first contender, and seconds of each."""
    at, found, wanted = torch.device(part.device), {name: {} for name in steps}, None
    for name, step in steps.items():
        try:
            peak, (value, gradients) = peak_of(step, at)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        found[name]["peak_bytes"] = peak
        if name == FULL:
            wanted = [value, *gradients]
        elif wanted is not None:
            pairs = zip([value, *gradients], wanted, strict=True)
            found[name]["error"] = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
    del wanted
    seconds: dict[str, list[float]] = {name: [] for name, values in found.items() if values}
    for _ in range(2 if part.small else 6):
        for name, values in seconds.items():
            values.append(timed(steps[name], at))
    for name, values in seconds.items():
        found[name]["seconds"] = quantiles(values[1:])
    return found


def peak_of(step: Callable[[], Any], at: torch.device) -> tuple[int, Any]:
    """Bytes that a step takes at once beside what is there, and what it returns."""
    if at.type == "cpu":
        with MemoryLog() as log:
            result = step()
        return log.peak()[0], result
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    return torch.cuda.max_memory_allocated() - before, result
