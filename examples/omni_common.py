"""What the examples of composed models share: arguments, the trainer, the score of answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import Tensor
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IGNORED = -100

# What differs from the defaults of TrainingArguments in all of the examples.
DEFAULTS = {
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}


def parse_arguments(script: type, description: str, **defaults: Any) -> tuple[Any, OmniTrainingArguments]:
    """Script and training arguments from the command line; one progress bar, whatever the number of ranks."""
    parser = HfArgumentParser((script, OmniTrainingArguments), description=description)
    parser.set_defaults(**(DEFAULTS | defaults))
    options, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.process_index > 0:
        transformers.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return options, args


def likeliest(logits: Any, labels: Tensor) -> Tensor:
    """[B, S, V] -> the likeliest next tokens [B, S]: all that the score needs of the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the learnt tokens that are the likeliest of the whole vocabulary: what greedy decoding would say."""
    found, wanted = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    learnt = wanted != IGNORED
    return {"accuracy": float((found == wanted)[learnt].mean())}


def make_trainer(model: Any, args: OmniTrainingArguments, train: Any, held_out: Any, **options: Any) -> OmniTrainer:
    """A trainer that packs each batch into one row and scores answers."""
    return OmniTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=OmniDataCollatorWithPacking(item_columns=("image_codes",)),
        compute_metrics=share_right,
        preprocess_logits_for_metrics=likeliest,
        **options,
    )


def save_metrics(args: OmniTrainingArguments, metrics: Mapping[str, Any]) -> None:
    (Path(args.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
