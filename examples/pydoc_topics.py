"""Instruction data that needs no download: the documentation topics of the Python that runs this.

The standard library ships the texts behind `help("lambda")` in `pydoc_data.topics`: 79 of them in Python 3.11, from 57
to 15,122 SmolLM2 tokens, 113,030 in all. Each becomes a question and an answer, in the tokenizer's chat format.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100
EVAL_EVERY = 8


def question(topic: str) -> str:
    """What the user asks about one topic."""
    return f"Explain Python's {topic}"


def tokenize(topic: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """One topic as `input_ids` and `labels`; the question's labels are -100.

    Raises:
        ValueError: the chat template is not one that continues a question with its answer.
    """
    asked = [{"role": "user", "content": question(topic)}]
    answered = [*asked, {"role": "assistant", "content": topics[topic].strip()}]
    prompt: Any = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    dialog: Any = tokenizer.apply_chat_template(answered, tokenize=False)
    if not dialog.startswith(prompt):
        raise ValueError(
            f"The chat template of '{tokenizer.name_or_path}' changes a question once it is answered, so the answer's "
            "tokens cannot be told from it: use a model with a plain chat template."
        )
    # Tokenised apart, so that the prompt has the tokens that it has in generation.
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(dialog[len(prompt) :].rstrip("\n"), add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


def pydoc_datasets(tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Train and evaluation samples (every eighth topic by name), the same at each call under one Python version."""
    names = sorted(topics)
    held_out = names[::EVAL_EVERY]
    train = [tokenize(name, tokenizer) for name in names if name not in held_out]
    return Dataset.from_list(train), Dataset.from_list([tokenize(name, tokenizer) for name in held_out])
