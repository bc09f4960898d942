"""Heads that pool or pick tokens, and cross-attention: the same numbers as one process, the sequence cut or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPTJConfig,
    GPTJForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MllamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

_SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
_IDS = torch.arange(3, 17).view(2, 7)

# Backbones of GPT-2's kind view what their last norm returns as full sequences.
_GPT: dict[str, Any] = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, num_labels=3)
_GPT |= dict(bos_token_id=1, eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
_NEO: dict[str, Any] = dict(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, pad_token_id=0, num_labels=3)
_NEO |= dict(attention_types=[[["global", "local"], 1]], window_size=3, bos_token_id=1, eos_token_id=2)
_MODERN: dict[str, Any] = dict(
    _SIZES, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=4
)
_HEADS = {
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_labels=3)),
    "gpt2 classifier": lambda: GPT2ForSequenceClassification(GPT2Config(**_GPT)),
    "gpt2 tagger": lambda: GPT2ForTokenClassification(GPT2Config(**_GPT, classifier_dropout=0.0)),
    "gptj classifier": lambda: GPTJForSequenceClassification(GPTJConfig(**_GPT, rotary_dim=8)),
    "qwen3 tagger": lambda: Qwen3ForTokenClassification(
        Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=8, num_labels=3, classifier_dropout=0.0)
    ),
    "modernbert masked LM": lambda: ModernBertForMaskedLM(ModernBertConfig(**_MODERN)),
    "modernbert tagger": lambda: ModernBertForTokenClassification(ModernBertConfig(**_MODERN, num_labels=3)),
    "gpt_neo classifier": lambda: GPTNeoForSequenceClassification(GPTNeoConfig(**_NEO)),
}

_PADDED = ("qwen3 tagger", "modernbert masked LM", "modernbert tagger")


def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family in _HEADS:
        return _HEADS[family]().train()
    config = MllamaTextConfig(
        **_SIZES, num_key_value_heads=1, cross_attention_layers=[1], bos_token_id=1, eos_token_id=2
    )
    model = MllamaForCausalLM._from_config(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.constant_(parameter, 0.7)  # its own zeros would hide the cross-attention
    return model.train()


def _inputs(family: str) -> dict[str, Tensor]:
    if family in _PADDED:
        mask = torch.ones_like(_IDS)
        mask[1, 5:] = 0
        labels = (_IDS if "masked" in family else _IDS % 3).masked_fill(mask == 0, -100)
        return {"input_ids": _IDS, "labels": labels.masked_fill(_IDS % 4 == 0, -100), "attention_mask": mask}
    if family in _HEADS:
        return {"input_ids": _IDS, "labels": _IDS % 3 if "tagger" in family else torch.tensor([0, 2])}
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(2, 1, 7, 5)
    seen[1, :, :3, 2:] = torch.finfo(torch.float32).min  # its first tokens do not see all of the image
    rows = torch.ones(2, 1, 7, 1)
    rows[0, 0, 2:4] = 0
    return {
        "input_ids": _IDS,
        "labels": _IDS,
        "cross_attention_states": states,
        "cross_attention_mask": seen,
        "full_text_row_masked_out_mask": rows,
    }


def _train(family: str, plan: str | None) -> tuple[float, dict[str, Tensor]]:
    from hf_veomni import prepare_omni

    model = _model(family)
    if plan is not None:
        prepare_omni(model, plan)
    loss = model(**_inputs(family), **({} if family in _HEADS else {"use_cache": False})).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


@pytest.mark.parametrize(
    ("family", "plan"), [("classifier", "dp_shard=2"), *((family, "sp=2") for family in [*_HEADS, "mllama"])]
)
def test_other_heads_equal_one_process(ranks, family, plan):
    expected, gradients = _train(family, None)
    for loss, found in ranks(2).run(_train, family, plan, timeout=60):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, wanted in gradients.items():
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
