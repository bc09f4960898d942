"""OmniTrainer on the device: its losses against a loop around the stock model, and the job of `make demo`."""

from __future__ import annotations

import json
import math
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.on_gpu.families import VOCABULARY, build
from benchmarks.on_gpu.part import NOTE, Part

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "outputs" / "checkpoints" / "smollm2-135m"
STEPS, RATE, ROW = 4, 1e-3, 128
LENGTHS = (40, 70, 18, 90, 38, 128) * 2  # of the samples; they fill rows of 128 in this order


def run(part: Part) -> None:
    part.case("steps fp32", steps, part, "moe", "float32")
    part.case("steps bf16 autocast", steps, part, "moe", "bfloat16")
    part.case("demo", demo, part, seconds=100.0)


def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def stock_losses(family: str, small: bool, rows: list[list[list[int]]]) -> list[float]:
    """A loop around the stock model in fp64 on the CPU: each document alone, AdamW after each row."""
    model = build(family, small, torch.float64, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for row in rows:
        targets, total = sum(len(document) - 1 for document in row), 0.0
        for document in row:
            ids = torch.tensor([document])
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def steps(part: Part, family: str, dtype: str) -> None:
    """The trainer's losses in fp32 or under autocast."""
    from datasets import Dataset

    from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset

    packed = pack_dataset(Dataset.from_dict({"input_ids": samples()}), max_tokens=ROW).select(range(STEPS))
    rows = [_documents(row) for row in packed]
    with tempfile.TemporaryDirectory() as folder:
        arguments = OmniTrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, weight_decay=0.0,
            lr_scheduler_type="constant", max_grad_norm=0, bf16=dtype == "bfloat16", logging_steps=1, report_to=[],
            save_strategy="no", train_sampling_strategy="sequential", plan="sp=1", disable_tqdm=True,
            use_cpu=not part.cuda,
        )  # fmt: skip
        model = build(family, part.small, torch.float32, "cpu")
        collator = OmniDataCollatorWithPacking(max_tokens=ROW)
        trainer = OmniTrainer(model, arguments, train_dataset=packed, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        at = next(trainer.model.parameters()).device.type
    wanted = stock_losses(family, part.small, rows)
    # Logged losses are rounded; AdamW takes the sign of gradients that are next to nothing, so bf16 drifts.
    limit = 2e-4 if dtype == "float32" else 2e-2
    error = max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))
    summary = f"{losses[0]:.4f} -> {losses[-1]:.4f} on {at}, off stock in fp64 by {error:.1e} (limit {limit:.0e})"
    part.check(error <= limit and at == part.device, summary, losses=losses, wanted=wanted)


def _documents(row: dict[str, Any]) -> list[list[int]]:
    found, begin = [], 0
    for length in row["document_lengths"]:
        found.append(row["input_ids"][begin : begin + length])
        begin += length
    return found


def demo(part: Part) -> None:
    """examples/finetune_lora.py, on SmolLM2 if its checkpoint is here, else on random weights of its shapes."""
    from tests.checkpoints import make_llama

    real = (CHECKPOINT / "config.json").exists() and not part.small
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "max_position_embeddings": 2048}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = CHECKPOINT if real else make_llama(Path(folder, "model"), **({} if part.small else shapes))
        output = Path(folder, "adapter")
        few = ["--max_tokens", "512", "--max_steps", "2", "--dtype", "float32"]
        sizes = few if part.small else ["--max_steps", "8"]
        sys.argv = ["finetune_lora.py", "--model", str(checkpoint), "--output_dir", str(output), *sizes]
        sys.argv += ["--disable_tqdm", "True", *([] if part.cuda else ["--use_cpu", "True"])]
        sys.path.insert(0, str(ROOT / "examples"))
        runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")
        metrics = json.loads((output / "metrics.json").read_text())
    losses, before, after = metrics["train_losses"], metrics["eval_loss_before"], metrics["eval_loss_after"]
    summary = (
        f"{'SmolLM2-135M' if real else 'random weights'}, {len(losses)} steps in {metrics['train_seconds']:.1f} s"
    )
    summary += f", evaluation {before:.3f} -> {after:.3f}"
    part.check(all(map(math.isfinite, losses)) and after < before, summary, **metrics)
    for peak in metrics["peak_memory"]:
        part.row(NOTE, ", ".join(f"peak {key} {value:.2f}" for key, value in peak.items()))
