"""Speed of packing and of the collator, in tokens a second of one core, and how full the rows are.

    python -m benchmarks.packing [--checkpoint outputs/checkpoints/smollm2-135m]

Two corpora: the pydoc topics (real, ragged, few) and log-normal documents (as many as asked for). Time is CPU time of
the process, so that other work on the machine does not count. What is timed is checked: every token is there again.
`fill_ratio` is tokens / (rows * max_tokens); `fill_ratio_bound` is what a perfect packer reaches, whose last row is
not full either.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithFlattening

from benchmarks._record import measure, quantiles, record
from hf_veomni import OmniDataCollatorWithPacking, pack_dataset
from hf_veomni.data.planning import STRATEGIES

STREAMED_DOCUMENTS = 20_000  # a stream is slower, and its speed does not depend on its length
COLLATED_TOKENS = 2**20  # tokens that each collator call set works through: enough to time, quick enough to repeat


def pydoc_documents(checkpoint: str | None) -> Dataset:
    """The documentation topics of this Python, as tokens of the checkpoint's tokenizer, or as bytes."""
    if checkpoint is None:
        return Dataset.from_list([{"input_ids": list(text.encode())} for text in topics.values()])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return Dataset.from_list([{"input_ids": tokenizer(text, verbose=False)["input_ids"]} for text in topics.values()])


def log_normal_documents(number: int) -> Dataset:
    """Random tokens; lengths with median 245, mean 400 and a tail up to 100,000."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 1.0, number).astype(np.int64), 1, 100_000)
    ids = pa.array(random.integers(0, 49_152, lengths.sum(), dtype=np.int32))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)}))


def lengths_of(dataset: Dataset) -> np.ndarray:
    lists = dataset.with_format("arrow")[:].column("input_ids")
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists.chunks]).astype(np.int64)


def sum_of(arrays: Iterable[Any]) -> int:
    return sum(int(np.asarray(array, dtype=np.int64).sum()) for array in arrays)


def speed(function: Callable[[], Any], tokens: int, repeats: int) -> dict[str, float]:
    seconds = measure(function, repeats, clock=time.process_time)
    return quantiles([tokens / second for second in seconds])


def packing_rows(corpus: str, source: Dataset, max_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Planning alone, the whole of pack_dataset, and a stream, for each strategy."""
    lengths = lengths_of(source)
    checksum = sum_of(source.with_format("numpy")["input_ids"])
    rows = []
    for strategy, plan in STRATEGIES.items():
        packed = pack_dataset(source, max_tokens, strategy, overlong="split")
        assert sum_of(packed.with_format("numpy")["input_ids"]) == checksum, "packing lost tokens"
        read = source.select(range(min(len(source), STREAMED_DOCUMENTS)))
        stream = pack_dataset(read.to_iterable_dataset(), max_tokens, strategy, overlong="split")
        streamed = [len(row["input_ids"]) for row in stream]
        assert sum(streamed) == lengths[: len(read)].sum(), "the stream lost tokens"
        cases = (
            ("plan", lambda plan=plan: plan(np.minimum(lengths, max_tokens), max_tokens), lengths, len(packed)),
            (
                "pack_dataset",
                lambda s=strategy: pack_dataset(source, max_tokens, s, overlong="split"),
                lengths,
                len(packed),
            ),
            ("stream", lambda stream=stream: sum(1 for _ in stream), lengths[: len(read)], len(streamed)),
        )
        for what, function, documents, num_rows in cases:
            tokens = int(documents.sum())
            rows.append(
                {
                    "what": what,
                    "corpus": corpus,
                    "strategy": strategy,
                    "documents": len(documents),
                    "tokens": tokens,
                    "max_tokens": max_tokens,
                    "rows": num_rows,
                    "fill_ratio": round(tokens / (num_rows * max_tokens), 5),
                    "fill_ratio_bound": round(tokens / (-(-tokens // max_tokens) * max_tokens), 5),
                    "tokens_per_core_second": speed(function, tokens, repeats),
                }
            )
            show(rows[-1])
    return rows


def collator_rows(corpus: str, source: Dataset, max_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Batches already in memory, as a Dataset hands them out (lists) and as numpy; the stock collator beside it."""
    packed = pack_dataset(source, max_tokens, overlong="split")
    packed = packed.select(range(min(len(packed), max(1, COLLATED_TOKENS // max_tokens))))
    lists, arrays = [[row] for row in packed], [[row] for row in packed.with_format("numpy")]
    ends = [np.cumsum(row["document_lengths"])[:-1] for row in packed]
    raw = [
        [{"input_ids": ids.tolist()} for ids in np.split(batch[0]["input_ids"], end)]
        for batch, end in zip(arrays, ends, strict=True)
    ]
    tokens = sum(len(row["input_ids"]) for row in packed)
    ours, stock = OmniDataCollatorWithPacking(max_tokens), DataCollatorWithFlattening()
    for batches in (lists, arrays, raw):
        for batch, reference in zip(batches, raw, strict=True):
            made, expected = ours(batch), stock(reference)
            assert all(torch.equal(made[key], expected[key]) for key in made), "not what the stock collator makes"
    rows = []
    for what, collator, batches in (
        ("collate packed sequences, lists", ours, lists),
        ("collate packed sequences, numpy", ours, arrays),
        ("collate documents, lists", ours, raw),
        ("collate documents, lists, stock DataCollatorWithFlattening", stock, raw),
    ):
        row = {"what": what, "corpus": corpus, "tokens": tokens, "max_tokens": max_tokens, "rows": len(packed)}
        calls = speed(lambda c=collator, b=batches: [c(batch) for batch in b], tokens, repeats)
        rows.append(row | {"tokens_per_core_second": calls})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    fill = f"{100 * row['fill_ratio']:.2f} % full" if "fill_ratio" in row else ""
    million = row["tokens_per_core_second"]["p50"] / 1e6
    print(f"{row['corpus']:24} {row.get('strategy', ''):11} {row['what']:60} {million:9.1f} M tokens/s  {fill}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="folder or Hub id whose tokenizer cuts the topics (default: bytes)")
    parser.add_argument("--documents", type=int, default=200_000, help="log-normal documents")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    unit = "bytes" if options.checkpoint is None else "tokens"
    corpora = {
        f"pydoc topics, {unit}": pydoc_documents(options.checkpoint),
        "log-normal": log_normal_documents(options.documents),
    }
    rows = []
    for corpus, source in corpora.items():
        rows += packing_rows(corpus, source, options.max_tokens, options.repeats)
        rows += collator_rows(corpus, source, options.max_tokens, options.repeats)
    record("packing", rows)


if __name__ == "__main__":
    main()
