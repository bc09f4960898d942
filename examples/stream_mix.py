r"""Continue pre-training on a stream that draws from several sources by weight, packed while it is read.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/stream_mix.py
    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/stream_mix.py \
        --model Qwen/Qwen3-0.6B --sources '{"code/*.jsonl": 3, "books/*.parquet": 1}' --max_tokens 16384 --bf16

Sources are files with a column `text`; by default two halves of Python's documentation. Nothing is tokenised ahead,
and a checkpoint holds the place in the stream. Every option of `TrainingArguments` can be given too; `--max_steps`
ends the run. Into `--output_dir` go the model and a model card.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, mix_datasets, pack_dataset
from make_checkpoint import DEFAULT_OUTPUT

FORMATS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "txt": "text"}


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    sources: str | None = field(default=None, metadata={"help": "json: a pattern of files to its weight, in samples."})
    max_tokens: int = field(default=1024, metadata={"help": "Length of a packed sequence, in tokens."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})


DEFAULTS = {
    "output_dir": "outputs/stream",
    "per_device_train_batch_size": 1,
    "max_steps": 8,
    "learning_rate": 2e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def read_sources(sources: str | None) -> tuple[dict[str, Any], dict[str, float]]:
    """Streams with a column `text`, and the weight of each.

    Raises:
        ValueError: no json of patterns and weights, or files of another kind.
    """
    if sources is None:
        names = sorted(topics)
        halves = {"first half": names[: len(names) // 2], "second half": names[len(names) // 2 :]}
        found = {name: Dataset.from_list([{"text": topics[t]} for t in half]) for name, half in halves.items()}
        return found, {"first half": 3.0, "second half": 1.0}
    try:
        weights = {str(name): float(weight) for name, weight in json.loads(sources).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"`sources` ({sources}) must be json such as '{{\"code/*.jsonl\": 3}}': {error}") from error
    streams: dict[str, Any] = {}
    for name in weights:
        kind = FORMATS.get(name.rpartition(".")[2])
        if kind is None:
            raise ValueError(f"`sources` names '{name}': its ending must be one of {', '.join(FORMATS)}.")
        streams[name] = load_dataset(kind, data_files=name, split="train", streaming=True)
    return streams, weights


def packed_stream(script: ScriptArguments, tokenizer: Any, seed: int) -> IterableDataset:
    """Packed sequences of the sources, drawn by their weights, without an end that comes too early."""
    streams, weights = read_sources(script.sources)
    texts = {name: stream.select_columns(["text"]) for name, stream in streams.items()}
    mixed = mix_datasets(texts, weights, seed=seed, stop="all")

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    tokenized = mixed.map(tokenize, batched=True, batch_size=16, remove_columns=["text"])
    return pack_dataset(tokenized, script.max_tokens, overlong="split")


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    trainer = OmniTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype),
        args=args,
        train_dataset=packed_stream(script, tokenizer, args.seed),
        data_collator=OmniDataCollatorWithPacking(script.max_tokens),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"train loss {losses[0]:.3f} -> {losses[-1]:.3f}, model and card in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
