r"""Sentence embeddings: LoRA on a language model, trained to tell the passage of a query from those of other queries.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/embed.py
    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/embed.py \
        --model Qwen/Qwen3-0.6B --data pairs.jsonl --max_tokens 8192 --per_device_train_batch_size 32 --bf16

A text's embedding is the mean of its tokens' last hidden states, at length 1. Of each query in a batch the loss is the
cross entropy of its similarity to all passages of the batch (InfoNCE, arXiv 1807.03748), so the other passages of a
data rank's batch are the negatives. The pairs are sentences of Python's documentation and the rest of their paragraphs
(the inverse cloze task, arXiv 1906.00300), or lines of a jsonl with `query` and `passage`. Every option of
`TrainingArguments` can be given too. Into `--output_dir` go the adapter, which opens in plain PEFT, and a model card.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_veomni import OmniTrainer, OmniTrainingArguments
from make_checkpoint import DEFAULT_OUTPUT

HELD_OUT = 64


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    data: str | None = field(default=None, metadata={"help": "A jsonl with `query` and `passage` in each line."})
    max_tokens: int = field(default=96, metadata={"help": "Longer texts are cut."})
    temperature: float = field(default=0.05, metadata={"help": "Similarities are divided by it."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})


DEFAULTS = {
    "output_dir": "outputs/embed",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "max_steps": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}


def pydoc_pairs() -> list[dict[str, str]]:
    """The first sentence of each long paragraph of Python's documentation, and the rest of the paragraph."""
    found = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            query, _, passage = " ".join(paragraph.split()).partition(". ")
            if len(query) > 40 and len(passage) > 120:
                found.append({"query": query, "passage": passage})
    return found


def read_pairs(path: str | None, held_out: int = HELD_OUT) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs to learn from and held-out ones, drawn by a fixed seed.

    Raises:
        ValueError: no such file, or too few pairs in it.
    """
    if path is None:
        pairs = pydoc_pairs()
    elif Path(path).is_file():
        lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        pairs = [{"query": line["query"], "passage": line["passage"]} for line in lines]
    else:
        raise ValueError(f"`data` ({path}) is no file: give a jsonl with `query` and `passage` in each line.")
    if len(pairs) < 2 * held_out:
        raise ValueError(f"`data` ({path}) has {len(pairs)} pairs: {2 * held_out} or more are needed.")
    parts = Dataset.from_list(pairs).train_test_split(held_out, seed=0)
    return parts["train"].to_list(), parts["test"].to_list()


class Collator:
    """B pairs as one padded batch of 2B rows: the queries, then their passages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, pairs: list[dict[str, str]]) -> dict[str, Any]:
        texts = [pair["query"] for pair in pairs] + [pair["passage"] for pair in pairs]
        options = {"padding": True, "truncation": True, "max_length": self.max_tokens}
        return dict(self.tokenizer(texts, return_tensors="pt", **options))


def embed(hidden: Tensor, mask: Tensor) -> Tensor:
    """[N, S, C] and [N, S] -> [N, C]: the mean over the tokens of each text, at length 1."""
    weights = mask[..., None].float()
    return F.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


class ContrastiveTrainer(OmniTrainer):
    """Under a plan `compute_loss` sees what one process would: full rows, and hidden states of full length."""

    temperature = 0.05

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        vectors = embed(model(**inputs).last_hidden_state, inputs["attention_mask"])
        queries, passages = vectors.chunk(2)
        scores = queries @ passages.T / self.temperature  # [B, B]; the right ones on the diagonal
        loss = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        return (loss, {"queries": queries, "passages": passages}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss, and the embeddings of queries and passages, [B, C] each."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, found = self.compute_loss(model, inputs, return_outputs=True)
        labels = torch.zeros(len(found["queries"]), device=loss.device)  # no metrics without some
        return loss, (found["queries"], found["passages"]), labels


def found_first(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the queries whose own passage is the nearest of all held-out ones."""
    queries, passages = prediction.predictions
    nearest = (queries @ passages.T).argmax(-1)
    return {"recall_at_1": float((nearest == range(len(nearest))).mean())}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    train, held_out = read_pairs(script.data)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_seed(args.seed)
    trainer = ContrastiveTrainer(
        model=AutoModel.from_pretrained(script.model, dtype=script.dtype),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=Collator(tokenizer, script.max_tokens),
        processing_class=tokenizer,
        compute_metrics=found_first,
        peft_config=LoraConfig(
            r=script.lora_r,
            lora_alpha=2 * script.lora_r,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="FEATURE_EXTRACTION",
        ),
    )
    trainer.temperature = script.temperature
    before = trainer.evaluate()["eval_recall_at_1"]
    trainer.train()
    after = trainer.evaluate()["eval_recall_at_1"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"right passage found among {len(held_out)}: {before:.0%} of the queries before, {after:.0%} after")
        print(f"adapter and model card are in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
