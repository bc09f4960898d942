"""Where models are cut, looked up on models built without memory: what transformers' own code says, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.sequence.inspect import find_shard_points
from tests.sweep.tiny import choose_class, tiny_config


def meta_model(family: str) -> Any:
    cls: Any = choose_class(family)[1]
    with torch.device("meta"):
        return cls._from_config(tiny_config(family))


# Family -> the backbone, the container of its layers, layers, attentions in them, the first of these, rope modules.
POINTS: dict[str, tuple[str, str, int, int, str, list[str]]] = {
    "llama": ("model", "model", 2, 2, "model.layers.0.self_attn", ["model.rotary_emb"]),
    "gpt2": ("transformer", "transformer", 2, 2, "transformer.h.0.attn", []),
    "gpt_neo": ("transformer", "transformer", 2, 2, "transformer.h.0.attn.attention", []),
    "falcon": ("transformer", "transformer", 2, 2, "transformer.h.0.self_attention", ["transformer.rotary_emb"]),
    "bert": ("bert", "bert.encoder", 2, 2, "bert.encoder.layer.0.attention.self", []),
    "distilbert": ("distilbert", "distilbert.transformer", 2, 2, "distilbert.transformer.layer.0.attention", []),
    "modernbert": ("model", "model", 2, 2, "model.layers.0.attn", ["model.rotary_emb"]),
    # One group of layers, run several times.
    "albert": (
        "albert",
        "albert.encoder",
        1,
        1,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
        [],
    ),
    # Cross-attention is an attention of the decoder's layer.
    "t5": ("decoder", "decoder", 2, 4, "decoder.block.0.layer.0.SelfAttention", []),
    "bart": ("model.decoder", "model.decoder", 2, 4, "model.decoder.layers.0.self_attn", []),
    "clip": ("text_model", "text_model.encoder", 2, 2, "text_model.encoder.layers.0.self_attn", []),
    "qwen2_5_vl": (
        "model.language_model",
        "model.language_model",
        2,
        2,
        "model.language_model.layers.0.self_attn",
        ["model.language_model.rotary_emb"],
    ),
    "llama4": (
        "language_model.model",
        "language_model.model",
        6,
        6,
        "language_model.model.layers.0.self_attn",
        ["language_model.model.rotary_emb"],
    ),
}


@pytest.mark.parametrize("family", POINTS)
def test_shard_points(family: str) -> None:
    model = meta_model(family)
    names = {module: name for name, module in model.named_modules()}
    points = find_shard_points(model)
    backbone, container, layers, attentions, first, rotary = POINTS[family]
    assert names[points.decoder] == names[hf.find_backbone(model)] == backbone
    assert names[points.container] == container
    assert len(points.layers) == layers
    assert [names[module] for module in points.attentions][0] == first and len(points.attentions) == attentions
    assert [names[module] for module in points.rotary] == rotary
    assert not points.mixers


def test_queries_scaled_by_position_are_counted_up_to_the_first_that_changes() -> None:
    assert find_shard_points(meta_model("llama4_text")).max_counted == 8191
    assert find_shard_points(meta_model("llama")).max_counted is None


@pytest.mark.parametrize(
    ("family", "mixers", "attentions"),
    [
        ("qwen3_next", {"model.layers.0.linear_attn": "functions"}, ["model.layers.1.self_attn"]),
        ("bamba", {"model.layers.0.mamba": "functions", "model.layers.1.mamba": "functions"}, []),
    ],
)
def test_token_mixers_stand_beside_attention(family: str, mixers: dict[str, str], attentions: list[str]) -> None:
    model = meta_model(family)
    names = {module: name for name, module in model.named_modules()}
    points = find_shard_points(model)
    assert {names[mixer.module]: mixer.scheme for mixer in points.mixers} == mixers
    assert [names[module] for module in points.attentions] == attentions


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("glm_moe_dsa", r"'indexed_attention'.*modules=\{'model\.layers\.\*\.self_attn': \{'sp': 'gather'\}\}"),
        ("openai-gpt", "reshapes what its layers return"),
        ("canine", "no list of layers, or several"),
        ("xlnet", "no list of layers, or several"),
        ("funnel", "`funnel.decoder.layers.0` .FunnelLayer. has no module that asks"),
        ("switch_transformers", "drops tokens by their place in the row"),
        ("mobilebert", "its embeddings mix neighbours"),
        ("t5gemma2", "attends to its own row and to another one in one call"),
    ],
)
def test_what_cannot_be_cut_names_the_rule(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        find_shard_points(meta_model(family))


def test_a_rule_puts_attention_on_full_documents() -> None:
    model = meta_model("glm_moe_dsa")
    gathered = {layer.self_attn for layer in model.model.layers}
    points = find_shard_points(model, gathered)
    assert not points.attentions
    assert {mixer.module for mixer in points.mixers} == gathered
    assert {mixer.scheme for mixer in points.mixers} == {"gather"}
