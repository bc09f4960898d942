"""How the values of a raw dataset are stored: files that need not be decoded, and JSON text.

`datasets` keeps a structure that differs from row to row (`load_dataset("json")` on conversations, most often) as JSON
text under a feature `Json()`, anywhere inside of a column. Such text is always read; files never are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json


def parts(feature: object) -> Iterator[Any]:
    """A feature and all that are inside of it."""
    yield feature
    for inner in _inside(feature):
        yield from parts(inner)


def _inside(feature: object) -> Sequence[Any]:
    if isinstance(feature, Mapping):
        return list(feature.values())
    if isinstance(feature, list | tuple):
        return feature
    inner = getattr(feature, "feature", None)
    return [] if inner is None else [inner]


def _is_file(feature: object) -> bool:
    return hasattr(feature, "decode") and not isinstance(feature, Json)


def holds_json(feature: object) -> bool:
    """Whether a part of this feature is JSON, at any depth."""
    return any(isinstance(part, Json) for part in parts(feature))


def as_shown(what: str, dataset: Dataset) -> Dataset:
    """A dataset with the columns that its format shows, which are those that a Trainer reads.

    Args:
        what: to call it in messages.

    Raises:
        ValueError: a transform of the user's (`with_transform`), since what is packed is read as it is stored.
    """
    shown: Any = dataset.format
    if shown["type"] == "custom":
        raise ValueError(
            f"{what} has a transform (`with_transform` or `set_transform`), and samples are read as they are stored, "
            "without it: apply it with dataset.map(transform, batched=True), or take it off with "
            "dataset.with_format(None)."
        )
    if shown["output_all_columns"] or set(shown["columns"]) == set(dataset.column_names):
        return dataset
    return dataset.select_columns(list(shown["columns"]))


def undecoded(stream: IterableDataset) -> IterableDataset:
    """A stream that hands out files as they are stored, and what JSON text says."""
    found = list(parts(stream.features or {}))
    unread = any(isinstance(part, Json) and not part.decode for part in found)
    if not unread and not any(_is_file(part) and part.decode for part in found):
        return stream
    stream = stream.decode(False)
    features: Any = copy.deepcopy(dict(stream.features or {}))
    for part in parts(features):
        if isinstance(part, Json):
            part.decode = True
    return stream.cast(Features(features))


def read_json(feature: Any, value: Any) -> Any:
    """A value as arrow stores it, with its JSON text read.

    Args:
        feature: of the value; of a row a mapping by column.
    """
    if value is None or not holds_json(feature):
        return value
    if isinstance(feature, Json):
        return Json().decode_example(value)
    if isinstance(feature, Mapping):
        return {name: read_json(feature.get(name), inner) for name, inner in value.items()}
    return [read_json(_inside(feature)[0], one) for one in value]


def common_feature(first: Any, second: Any) -> Any | None:
    """The feature of a column that two sources store in different ways, None if they cannot share it: structures can
    as JSON text, unless they hold files or bytes."""
    found = [*parts(first), *parts(second)]
    scalar = not _inside(first) and not _inside(second) and not any(isinstance(part, Json) for part in found)
    if scalar or any(_is_file(part) or "binary" in str(getattr(part, "dtype", "")) for part in found):
        return None
    return Json()
