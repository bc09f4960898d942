"""How long the documents of a model may be, and ropes whose frequencies depend on the longest of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_veomni.errors import UnsupportedError
from hf_veomni.sequence.origin import Origin


@dataclass(frozen=True)
class Context:
    """What a model's config says of lengths in tokens.

    Attributes:
        limit: of a document, None for any. A rope that is scaled goes as far as the scale says.
        way_out, told_by: what a longer document needs, and what says so.
        switch: from more tokens on rope's frequencies are others, and a row has but one set of them; None: never.
        dynamic: whether they depend on the length itself then (dynamic NTK).
    """

    limit: int | None = None
    way_out: str = ""
    switch: int | None = None
    dynamic: bool = False
    told_by: str = "`max_position_embeddings`"

    @classmethod
    def of(cls, config: Any, origin: Origin | None) -> Context:
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None or limit <= 0:  # XLNet's -1 says that there is none
            return cls()
        if origin is not None and origin.limit is not None:
            return cls(min(limit, origin.limit), "split it")
        ropes = _ropes(config)
        kinds = [rope.get("rope_type") for rope in ropes]
        if "dynamic" in kinds:
            return cls(None, "", limit, dynamic=True)
        reach = max([limit, *(int(_original(rope, limit) * (rope.get("factor") or 1)) for rope in ropes)])
        long = [_original(rope, limit) for rope in ropes if rope.get("rope_type") == "longrope"]
        context = cls(reach, "split it, or raise the context in the model's config", min(long, default=None))
        if reach == limit:
            return context
        way_out = "split it, or raise `factor` of the config's `rope_parameters`"
        return replace(
            context, way_out=way_out, told_by="`original_max_position_embeddings` times its rope's `factor`"
        )

    def check(self, longest: int) -> None:
        """Raises UnsupportedError for a document of too many tokens."""
        if self.limit is not None and longest > self.limit:
            raise UnsupportedError(
                f"A document of {longest} tokens is longer than the model's context ({self.told_by}, {self.limit}): "
                f"{self.way_out}."
            )

    def mixes(self, lengths: Sequence[int]) -> bool:
        """Whether packed documents of these lengths would need several sets of frequencies in one row."""
        if self.switch is None or max(lengths) <= self.switch:
            return False
        return len(set(lengths)) > 1 if self.dynamic else min(lengths) <= self.switch


def _original(rope: Mapping[str, Any], limit: int) -> int:
    return rope.get("original_max_position_embeddings") or limit


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Rope parameters of a config: one set, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, Mapping):
        return []
    if "rope_type" in given:
        return [given]
    return [value for value in given.values() if isinstance(value, Mapping)]
