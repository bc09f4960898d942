"""The table of docs/attention.md: what stock models of released widths ask for, and which path takes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_veomni.attention import flex, varlen
from hf_veomni.attention.blocks import Formula
from hf_veomni.attention.varlen import VARLEN_NAME, choose_path, register_varlen_attention
from tests.unit.attention.dense import FUNCTIONS, Rows, make_spec, random_inputs

PAGE = (Path(__file__).parents[3] / "docs/attention.md").read_text()
ROW = r"^\| `(\w+)`[^|]*\| `(\w+)` \| (\d+), (\d+) \| `(\w+)` \| `(\w+)` \|$"

BASE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
GEMMA = {**SLIDING, "head_dim": 256}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128},
    "qwen3": {"head_dim": 128, "use_sliding_window": True, **SLIDING},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": {**GEMMA, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8},
    "gemma3": {"text_config": {**BASE, **GEMMA, "model_type": "gemma3_text"}, "vision_config": VISION},
    "paligemma": {
        "text_config": {**BASE, "model_type": "gemma", "head_dim": 256},
        "vision_config": VISION,
        "projection_dim": 32,
    },
    "gpt_oss": {"head_dim": 64, **EXPERTS, **SLIDING},
    "deepseek_v3": {
        **MLA,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "mimo_v2_flash": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "llama4_text": {
        "head_dim": 128,
        **EXPERTS,
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 40,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "modernbert": {"hidden_size": 256},
    "bert": {"hidden_size": 256},
    "t5": {"d_model": 32, "d_ff": 40, "num_layers": 2, "num_heads": 4, "d_kv": 64},
}


def asked(model_type: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, ...]]:
    """Kind of layer, widths and the paths in bf16 and in fp32 of every layer of a tiny model in training."""
    found: list[tuple[str, ...]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str:
        paths = [
            choose_path(query.to(dtype), key.to(dtype), value.to(dtype), *args, **kwargs)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        found.append((str(query.shape[-1]), str(value.shape[-1]), *paths))
        return "blocks"

    monkeypatch.setattr(varlen, "choose_path", record)
    monkeypatch.setattr(varlen, "has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "_is_one_document_a_row", lambda spec: False)  # the page is about packed sequences
    monkeypatch.setattr(flex, "has_flex", lambda device: True)
    monkeypatch.setattr(flex, "flex_works", lambda *args: True)
    register_varlen_attention()
    base = {} if "text_config" in OPTIONS[model_type] else BASE
    config = AutoConfig.for_model(model_type, **{**base, **OPTIONS[model_type]})
    model = AutoModel.from_config(config, attn_implementation=VARLEN_NAME).train()
    ids = torch.arange(1, 21)[None]
    inputs = {"input_ids": ids}
    if model_type == "gemma3":
        inputs["token_type_ids"] = ((ids > 3) & (ids < 9)).long()  # 1 for an image
    if model_type == "paligemma":
        inputs["token_type_ids"] = (ids > 9).long()  # 0 for the prefix
    if model_type == "t5":
        inputs["decoder_input_ids"] = ids
    model(**inputs)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"] * len(found)
    return {(kind, *row) for kind, row in zip(kinds, found, strict=True)}


@pytest.mark.parametrize("model_type", OPTIONS)
def test_page_says_which_path_takes_each_layer(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row[1:] for row in re.findall(ROW, PAGE, flags=re.M) if row[0] == model_type}
    assert asked(model_type, monkeypatch) == rows


@pytest.mark.parametrize(
    ("lengths", "name", "options", "path"),
    [
        (((20,), (20,)), "causal", {}, "fused"),
        (((20,), (20,)), "bidirectional", {}, "fused"),
        (((20,), (20,)), "sliding", {}, "kernel"),
        (((20,), (20,)), "causal", {"sinks": torch.zeros(4)}, "kernel"),
        (((20,), (20,)), "causal", {"softcap": 2.0}, "flex"),
        (((20,), (12, 8)), "causal", {}, "kernel"),
    ],
)
def test_rows_of_one_document(
    lengths: Rows, name: str, options: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "has_kernel", lambda device: True)
    monkeypatch.setattr(flex, "has_flex", lambda device: True)
    monkeypatch.setattr(flex, "flex_works", lambda *args: True)
    query, key, value = (x.bfloat16() for x in random_inputs(lengths, 4, 2, 64, 64))
    formula = Formula(0.1, options.get("softcap"), 0.0)
    spec = make_spec(FUNCTIONS[name], lengths)
    assert choose_path(query, key, value, spec, formula, sinks=options.get("sinks")) == path


def test_every_row_of_the_page_is_asked() -> None:
    rows = re.findall(ROW, PAGE, flags=re.M)
    assert {row[0] for row in rows} == set(OPTIONS)
    assert len(rows) == PAGE.count("_attention` |") == 23
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (Path(__file__).parents[3] / path).exists(), path
