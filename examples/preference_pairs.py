"""Preferences that need no download: the right and a wrong answer about topics of Python's documentation.

`read_pairs(None)` makes them; `read_pairs("pairs.jsonl")` reads your own, a line each with `prompt`, `chosen` and
`rejected` in any layout that TRL reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset

from pydoc_topics import question


def _answer(topic: str) -> str:
    """The first paragraphs of a topic's text, as one."""
    return " ".join(topics[topic].split("\n\n", 3)[1:3]).replace("\n", " ").strip()[:400]


def pydoc_pairs() -> list[dict[str, list[dict[str, str]]]]:
    """One pair for each topic: its own text is chosen, that of the next topic is rejected."""
    names = [name for name in sorted(topics) if _answer(name)]
    pairs = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        answers = [[{"role": "assistant", "content": _answer(topic)}] for topic in (name, other)]
        prompt = [{"role": "user", "content": question(name)}]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return pairs


def read_pairs(path: str | None, held_out: int = 8) -> tuple[Dataset, Dataset]:
    """Pairs to train and to evaluate on: the last `held_out` are those.

    Raises:
        ValueError: no such file, or too few pairs in it.
    """
    if path is None:
        pairs = pydoc_pairs()
    elif Path(path).is_file():
        pairs = [json.loads(line) for line in Path(path).read_text().splitlines()]
    else:
        raise ValueError(
            f"`data` ({path}) is no file: give a jsonl with `prompt`, `chosen` and `rejected` in each line."
        )
    if len(pairs) <= held_out:
        raise ValueError(f"`data` ({path}) has {len(pairs)} pairs, of which {held_out} are held out: give more.")
    return Dataset.from_list(pairs[:-held_out]), Dataset.from_list(pairs[-held_out:])
