"""Several sources in one stream, drawn by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset

from hf_veomni.data.features import as_shown, common_feature, undecoded

_STOP = {"first": "first_exhausted", "all": "all_exhausted"}


def mix_datasets(
    sources: Mapping[str, Any] | Sequence[Any],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    seed: int = 0,
    stop: str = "first",
) -> IterableDataset:
    """One stream from several datasets: each sample is drawn from a source chosen by its weight.

    `datasets.interleave_datasets` with what samples of several kinds need: sources may have different columns (those
    that a sample lacks are None, and `pack_dataset` leaves them out) and different structures in a column (content
    that is a string here and a list of parts there), and files are not decoded. The stream has a
    `state_dict`, through `pack_dataset` too: loaded into a stream that was made alike it goes on with the next row.

    Args:
        sources: `datasets.Dataset` or `IterableDataset`, by name or in a list.
        weights: of the sources, above 0, in any unit: samples, not tokens. Default: all alike.
        seed: of the draws.
        stop: at the end of the "first" source that ends, or when "all" have been read once; shorter ones begin anew.

    Raises:
        ValueError: no source, weights that do not fit the sources, or a column of different types.
    """
    if stop not in _STOP:
        raise ValueError(f"`stop` ({stop!r}) must be one of {', '.join(map(repr, _STOP))}.")
    named = dict(sources) if isinstance(sources, Mapping) else {str(i): source for i, source in enumerate(sources)}
    shares = _shares(named, weights)
    streams = {name: _undecoded(name, source) for name, source in named.items()}
    aligned = _align(streams)
    if len(aligned) == 1:
        return aligned[0]
    strategy: Any = _STOP[stop]
    return datasets.interleave_datasets(aligned, probabilities=shares, seed=seed, stopping_strategy=strategy)


def _shares(named: Mapping[str, Any], weights: Any) -> list[float]:
    if not named:
        raise ValueError("`sources` is empty: give at least one source.")
    if weights is None:
        weights = [1.0] * len(named)
    if isinstance(weights, Mapping):
        if weights.keys() != named.keys():
            raise ValueError(
                f"`weights` names {', '.join(weights)} and `sources` {', '.join(named)}: give one weight for each."
            )
        weights = [weights[name] for name in named]
    if len(weights) != len(named):
        raise ValueError(f"{len(weights)} weights for {len(named)} sources: give one for each.")
    for name, weight in zip(named, weights, strict=True):
        if not (np.isfinite(weight) and weight > 0):
            raise ValueError(f"Weight ({weight}) of source {name} must be above 0: leave the source out instead.")
    return (np.asarray(weights, dtype=np.float64) / np.sum(weights)).tolist()


def _undecoded(name: str, source: Any) -> IterableDataset:
    if isinstance(source, Dataset):
        source = as_shown(f"Source {name}", source)
        source = source.with_format(source.format["type"]).to_iterable_dataset()  # a stream knows no options of it
    if not isinstance(source, IterableDataset):
        raise ValueError(
            f"Source {name} is a {type(source).__name__}: give a datasets.Dataset or IterableDataset, for example "
            "datasets.Dataset.from_list(samples)."
        )
    return undecoded(source)


def _align(streams: Mapping[str, IterableDataset]) -> list[IterableDataset]:
    """The streams with the columns of all of them; streams of unknown columns need none."""
    union: dict[str, tuple[str, Any]] = {}
    for name, stream in streams.items():
        for column, feature in (stream.features or {}).items():
            first, known = union.setdefault(column, (name, feature))
            if known == feature:
                continue
            common = common_feature(known, feature)
            if common is None:
                raise ValueError(
                    f"Column `{column}` is {feature} in source {name} and {known} in source {first}: cast one of them "
                    "(`cast_column`)."
                )
            union[column] = first, common
    features = Features({column: feature for column, (_, feature) in union.items()})
    aligned = []
    for stream in streams.values():
        own = stream.features or features
        missing = [column for column in features if column not in own]
        changed = any(own[column] != features[column] for column in own)
        aligned.append(stream.map(partial(_fill, names=missing), features=features) if missing or changed else stream)
    return aligned


def _fill(sample: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return sample | dict.fromkeys(names)
