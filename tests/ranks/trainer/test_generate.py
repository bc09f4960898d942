"""`predict_with_generate` of Seq2SeqTrainer under a plan: the same tokens and losses as in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.ranks.trainer.test_losses import HEADS, _each, _Rows, _spread
from tests.ranks.training import Run, tiny_model

PLANS = [(2, "sp=2"), (2, "dp_shard=2"), (4, "sp=2,dp_shard=2")]


def _model(name: str) -> nn.Module:
    return tiny_model() if name == "llama" else _spread(HEADS[name][0]())


def _arguments(**more: Any) -> dict[str, Any]:
    return Run().all_arguments(
        predict_with_generate=True, generation_max_length=12, per_device_eval_batch_size=1, max_steps=2, **more
    )


def _tokens(prediction: Any) -> dict[str, float]:
    tokens = np.where(prediction.predictions < 0, 0, prediction.predictions)
    return {"rows": float(len(tokens)), "sum": float((tokens * np.arange(1, tokens.shape[1] + 1)).sum())}


def _evaluated(trainer: Any, rows: Any) -> tuple[dict[str, float], Any, float]:
    metrics = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_rows", "eval_sum")}
    predicted = trainer.predict(rows).predictions
    return metrics, predicted, trainer.train().training_loss


def _rows(name: str, count: int) -> Any:
    if name != "llama":
        return _Rows(count, "target")
    rows = _Rows(count, "row")
    for row in rows.rows:
        row["labels"] = list(row["input_ids"])
    return rows


def _options(name: str) -> dict[str, Any]:
    data = {"train_dataset": _rows(name, 4), "eval_dataset": _rows(name, 3), "data_collator": _each}
    return data | {"model": _model(name), "compute_metrics": _tokens}


def _omni(plan: str, name: str) -> Any:
    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments

    config = dataclass(type("Arguments", (OmniTrainingArguments, Seq2SeqTrainingArguments), {}))
    kind = type("OmniSeq2Seq", (OmniTrainerMixin, Seq2SeqTrainer), {"__module__": __name__})
    return _evaluated(kind(args=config(**_arguments(plan=plan)), **_options(name)), _rows(name, 3))


@pytest.mark.parametrize(("world", "plan"), PLANS, ids=[plan for _, plan in PLANS])
@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_generated_predictions_equal_one_process(ranks, name, world, plan):
    torch.manual_seed(0)
    stock = Seq2SeqTrainer(args=Seq2SeqTrainingArguments(**_arguments()), **_options(name))
    metrics, predicted, _ = _evaluated(stock, _rows(name, 3))
    rows = _rows(name, 3)
    shift = 1 if name == "llama" else 0
    counts = [len(row["labels"]) - shift for row in rows.rows]
    fresh = Seq2SeqTrainer(args=Seq2SeqTrainingArguments(**_arguments()), **_options(name))
    losses = [fresh.evaluate([row])["eval_loss"] for row in rows.rows]  # type: ignore[arg-type]
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    for found, tokens, _ in ranks(world).run(_omni, plan, name, timeout=240):
        assert found["eval_rows"] == metrics["eval_rows"] and found["eval_sum"] == metrics["eval_sum"]
        assert np.array_equal(tokens, predicted)
        assert found["eval_loss"] == pytest.approx(wanted, rel=1e-5)
