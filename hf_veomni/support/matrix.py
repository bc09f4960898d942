"""The result of the sweep over all model families, read from the json file in this folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

OUTCOMES = {
    "works": "loss, outputs and all gradients are those of one rank",
    "refused": "`prepare_omni` or the first call says why",
    "crashes": "stops with an error of a library below, not with a clear refusal",
    "not_applicable": "no row of tokens to cut",
    "unbuildable": "the sweep has no tiny model of it",
    "wrong": "runs and differs: a bug",
}


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        model_type: key of transformers' CONFIG_MAPPING.
        folder: of transformers/models.
        kind: causal, multimodal, seq2seq, masked or base.
        outcome: a key of OUTCOMES.
        reason: why, where it does not work.
        loss: "model" where the model's own loss was compared, "sweep" where one of its outputs was.
        dtype: fp64 where the family's own rounding exceeds 1e-5 in fp32.
        error: the largest, relative to the largest entry.
        exact_error: the largest in fp64, with the casts to fp32 of the family's own code taken out; None where it does
            not run so.
        padded, packed: "works", or why not; a packed sequence is compared with each of its documents alone.
        trainer: the same of what OmniTrainer logs, compared with the stock Trainer in one process.
        stages: number of pipeline stages -> "works", or why not; where that was swept.
        rule: modules that run under the plan's rule "sp: gather" (at up to sp times their compute), or none.
    """

    model_type: str
    folder: str
    kind: str
    model_class: str
    outcome: str
    reason: str
    loss: str
    dtype: str
    error: float
    padded: str
    packed: str
    rule: str = ""
    exact_error: float | None = None
    trainer: str = ""
    stages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """All families, and what they were swept with."""

    versions: dict[str, str]
    date: str
    plan: str
    families: dict[str, Family]
    again: tuple[str, ...] = ()  # model types swept later than the rest, by a later version of the package

    def counts(self) -> Counter[str]:
        """Model types by outcome."""
        return Counter(family.outcome for family in self.families.values())

    def folders(self, outcome: str) -> int:
        """How many folders of transformers/models have a model type with this outcome."""
        return len({family.folder for family in self.families.values() if family.outcome == outcome})


def parse_matrix(content: dict[str, Any], staged: dict[str, Any] | None = None) -> Matrix:
    """The matrix from the json of the sweep, and from that of its pipeline stages if there is one."""
    names = [each.name for each in fields(Family) if each.name != "stages"]
    stages = {} if staged is None else staged["families"]
    families = {
        name: Family(
            **{key: row[key] for key in names if key in row},
            stages={size: found["outcome"] for size, found in stages.get(name, {}).items()},
        )
        for name, row in content["families"].items()
    }
    return Matrix(content["versions"], content["date"], content["plan"], families, tuple(content.get("again", ())))


def load_matrix() -> Matrix:
    """The matrix that was committed with this version of the package."""
    families, stages = (files("hf_veomni.support") / name for name in ("families.json", "stages.json"))
    return parse_matrix(json.loads(families.read_text()), json.loads(stages.read_text()))
