"""Packing against padding: useful tokens/s of the stock Trainer and of ours on the same documents.

    python -m benchmarks packing_vs_padding [--tokenizer outputs/checkpoints/smollm2-135m]

The pydoc topics as questions and answers, longer ones cut into pieces for everybody. A block is one epoch:

    padding            stock Trainer, rows padded to the longest of the batch; as many rows as the token budget takes
    padding, grouped   the same with train_sampling_strategy="group_by_length"
    packing            OmniTrainer, pack_dataset and OmniDataCollatorWithPacking, one row of the token budget a step

Useful tokens are targets (labels that are scored). The epoch is one accumulation window at a learning rate of 0, so
all contenders must have the same loss and gradient norm, and that is checked. `slots` are the tokens that a contender
computes, padding included; slots of padding / slots of packing is the gain that arithmetic linear in tokens allows.
On the CPU, seconds are CPU time of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks._options import device_parser, parse_for_device
from benchmarks._record import quantiles, record
from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset

IGNORED = -100
# Sizes by device: tokens of a step, longest piece, layers of SmolLM2-135M that are kept, every n-th topic.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"budget": 16_384, "longest": 4096, "layers": 30, "every": 1, "dtype": "bfloat16", "rounds": 5},
    "cpu": {"budget": 8192, "longest": 2048, "layers": 2, "every": 8, "dtype": "float32", "rounds": 3},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss and of the gradient norm, relative
STOCK, GROUPED, OURS = "padding", "padding, grouped", "packing"


def documents(tokenizer: str | None, every: int) -> tuple[list[dict[str, list[int]]], int]:
    """Topics as tokens and labels (the question is not scored), and the size of the vocabulary; bytes by default."""
    encode: Any = lambda text: list(text.encode())  # noqa: E731
    vocabulary = 256
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        encode, vocabulary = (lambda text: loaded(text, verbose=False)["input_ids"]), len(loaded)
    samples = []
    for name in sorted(topics)[::every]:
        question, answer = encode(f"Explain Python's {name}\n"), encode(topics[name].strip())
        samples.append({"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer})
    return samples, vocabulary


def cut(samples: Sequence[dict[str, list[int]]], longest: int) -> list[dict[str, list[int]]]:
    """Pieces of at most `longest` tokens, in order; those without a target are left out."""
    pieces = [
        {key: values[begin : begin + longest] for key, values in sample.items()}
        for sample in samples
        for begin in range(0, len(sample["input_ids"]), longest)
    ]
    return [piece for piece in pieces if targets(piece["labels"])]


def targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def pad(features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What DataCollatorForSeq2Seq makes: rows padded on the right to the longest, labels with -100."""
    length = max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": 0, "labels": IGNORED}
    batch = {
        key: torch.tensor([list(f[key]) + [fill] * (length - len(f[key])) for f in features])
        for key, fill in fills.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
    )
    return batch


class Counting:
    """A collator that counts the tokens of what it hands out."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.slots = collator, 0

    def __call__(self, features: Any) -> dict[str, Tensor]:
        batch = self.collator(features)
        self.slots += batch["input_ids"].numel()
        return batch


class Stopwatch(TrainerCallback):
    """Seconds of the training loop, without what Trainer sets up before."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds -= self._now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += self._now()


def build(options: argparse.Namespace, vocabulary: int) -> PreTrainedModel:
    """SmolLM2-135M, cut to some layers, random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))


def epoch(
    name: str, model: PreTrainedModel, rows: Dataset, options: argparse.Namespace, seed: int, folder: str
) -> dict[str, Any]:
    """Train one epoch and return seconds, slots, loss and gradient norm."""
    size = 1 if name == OURS else options.budget // options.longest
    steps = -(-len(rows) // size)
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
        "seed": seed,
    }
    if name == GROUPED:
        arguments["train_sampling_strategy"] = "group_by_length"
    packed = OmniDataCollatorWithPacking(max_tokens=options.budget)
    collator, watch = Counting(packed if name == OURS else pad), Stopwatch(options.device)
    kinds: tuple[Any, Any] = (OmniTrainer, OmniTrainingArguments) if name == OURS else (Trainer, TrainingArguments)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = kinds[0](
        model=model, args=kinds[1](**arguments), train_dataset=rows, data_collator=collator, callbacks=[watch]
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    result = {"seconds": watch.seconds, "slots": collator.slots, "steps": steps, "loss": loss}
    result["grad_norm"] = next(float(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log)
    if options.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def compare(blocks: dict[str, list[dict[str, Any]]], useful: int, tolerance: float) -> tuple[list[dict], list[str]]:
    """A row a contender, and what differs from the stock Trainer by more than the tolerance."""
    rows, wrong = [], []
    for name, results in blocks.items():
        row: dict[str, Any] = {"contender": name, "useful_tokens": useful, "steps": results[0]["steps"]}
        row |= {key: quantiles([result[key] for result in results]) for key in ("seconds", "slots")}
        row["useful_tokens_per_second"] = quantiles([useful / result["seconds"] for result in results])
        row |= {key: results[0][key] for key in ("loss", "grad_norm", "peak_bytes") if key in results[0]}
        if name != OURS:
            pairs = list(zip(results, blocks[OURS], strict=True))
            row["packing_is_faster"] = quantiles([a["seconds"] / b["seconds"] for a, b in pairs])
            row["slots_over_packing"] = quantiles([a["slots"] / b["slots"] for a, b in pairs])
        for result in results:
            for key in ("loss", "grad_norm"):
                expected = blocks[STOCK][0][key]
                if not abs(result[key] - expected) <= tolerance * abs(expected):
                    wrong.append(f"{key} of {name} is {result[key]}, of the stock Trainer {expected}")
        rows.append(row)
    return rows, wrong


def show(row: dict[str, Any]) -> None:
    gain = ""
    if "packing_is_faster" in row:
        faster, bound = row["packing_is_faster"]["p50"], row["slots_over_packing"]["p50"]
        gain = f"packing is {faster:.2f} x faster, {bound:.2f} x fewer slots"
    print(
        f"{row['contender']:18} {row['useful_tokens_per_second']['p50']:9.0f} useful tokens/s  "
        f"{row['slots']['p50']:9.0f} slots for {row['useful_tokens']}  loss {row['loss']:.5f}  {gain}"
    )


def parse() -> argparse.Namespace:
    parser = device_parser(__doc__.split("\n")[0], TOLERANCE)
    parser.add_argument("--tokenizer", help="checkpoint folder or Hub id (default: bytes)")
    parser.add_argument("--budget", type=int, help="tokens of a step, padding included")
    parser.add_argument("--longest", type=int, help="longest piece of a document; sizes the padded batch")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--every", type=int, help="take every n-th topic")
    parser.add_argument("--rounds", type=int)
    return parse_for_device(parser, DEFAULTS)


def main() -> None:
    options = parse()
    datasets.disable_progress_bars()
    if options.device == "cpu":
        torch.set_num_threads(1)
    samples, vocabulary = documents(options.tokenizer, options.every)
    pieces = cut(samples, options.longest)
    padded = Dataset.from_list(pieces)
    packed = pack_dataset(padded, max_tokens=options.budget)
    stock, ours = build(options, vocabulary), build(options, vocabulary)
    blocks: dict[str, list[dict[str, Any]]] = {STOCK: [], GROUPED: [], OURS: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(-1, options.rounds):  # the first is not counted
            for name, results in blocks.items():
                model, rows = (ours, packed) if name == OURS else (stock, padded)
                if seed < 0:
                    rows = rows.select(range(min(2, len(rows))))
                result = epoch(name, model, rows, options, max(seed, 0), folder)
                results += [result] if seed >= 0 else []
    rows, wrong = compare(blocks, sum(targets(piece["labels"]) for piece in pieces), TOLERANCE[options.dtype])
    facts = {"corpus": f"pydoc topics, {Path(options.tokenizer or 'bytes').name}", "pieces": len(pieces)}
    for row in rows:
        row |= facts | {key: value for key, value in vars(options).items() if key not in ("tokenizer", "rounds")}
        show(row)
    record("packing_vs_padding", rows, plan="ones")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
