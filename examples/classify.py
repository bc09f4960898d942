r"""Sequence classification: LoRA and a new head on a language model, under whatever plan the launcher passes on.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/classify.py
    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/classify.py \
        --model Qwen/Qwen3-0.6B --data reviews.jsonl --max_tokens 8192 --bf16

The samples are passages of Python's documentation, whose label is the text that they are taken from, or lines of a
jsonl with `text` and `label`. Every option of `TrainingArguments` can be given too. Into `--output_dir` go the adapter
with the head, which opens in plain PEFT, and a model card.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from hf_veomni import OmniTrainer, OmniTrainingArguments
from make_checkpoint import DEFAULT_OUTPUT

NUM_TOPICS = 4  # the longest texts


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    data: str | None = field(default=None, metadata={"help": "A jsonl with `text` and `label` in each line."})
    max_tokens: int = field(default=128, metadata={"help": "Longer texts are cut."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})


DEFAULTS = {
    "output_dir": "outputs/classify",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_steps": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def read_samples(path: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Samples with `text` and the number of their label, and the names of the labels.

    Raises:
        ValueError: no such file, or fewer than two labels in it.
    """
    if path is None:
        longest = sorted(topics, key=lambda name: -len(topics[name]))[:NUM_TOPICS]
        passages = {name: [p for p in topics[name].split("\n\n") if len(p) > 200][:40] for name in longest}
        samples = [{"text": passage, "label": name} for name in longest for passage in passages[name]]
    elif Path(path).is_file():
        samples = [json.loads(line) for line in Path(path).read_text().splitlines()]
    else:
        raise ValueError(f"`data` ({path}) is no file: give a jsonl with `text` and `label` in each line.")
    names = sorted({str(sample["label"]) for sample in samples})
    if len(names) < 2:
        raise ValueError(f"`data` ({path}) has the labels {names}: two or more are needed.")
    return [{"text": sample["text"], "label": names.index(str(sample["label"]))} for sample in samples], names


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    samples, names = read_samples(script.data)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [
        {**tokenizer(sample["text"], truncation=True, max_length=script.max_tokens), "labels": sample["label"]}
        for sample in samples
    ]
    parts = Dataset.from_list(rows).train_test_split(0.2, seed=0)
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        dtype=script.dtype,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = OmniTrainer(
        model=model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        peft_config=LoraConfig(
            r=script.lora_r, lora_alpha=2 * script.lora_r, task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"held-out samples: {found['eval_accuracy']:.0%} right, chance is {1 / len(names):.0%}")
        print(f"adapter and model card are in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
