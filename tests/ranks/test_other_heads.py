"""Heads without next-token labels keep working where rows are whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification


def _model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=50, pad_token_id=0, **sizes)
    config.num_labels = 3
    return LlamaForSequenceClassification(config).train()


def _loss(plan: str) -> float:
    from hf_veomni import prepare_omni

    ids = torch.arange(3, 15).view(2, 6)
    return float(prepare_omni(_model(), plan)(input_ids=ids, labels=torch.tensor([0, 2])).loss)


def test_sequence_classification_equals_one_process(ranks):
    expected = float(_model()(input_ids=torch.arange(3, 15).view(2, 6), labels=torch.tensor([0, 2])).loss)
    assert ranks(2).run(_loss, "dp_shard=2", timeout=60) == pytest.approx([expected] * 2, rel=1e-6)


def test_sequence_classification_is_refused_where_rows_are_cut(ranks):
    ranks(2).raises(_loss, "sp=2", match="a head that pools or picks tokens of the full row", timeout=30)
