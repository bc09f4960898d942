"""The rule `sp: gather`: any module on full documents, chosen by name and equal to one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import build_model
from tests.ranks.parity import Run, Setting

# 142 tokens: sp=2 and sp=4 cut through documents that are longer than a scan's chunk.
LENGTHS = ((60, 1, 2, 70, 9), (1, 3, 90, 1, 14))
# What a family calls its mixer; Zamba's has no adapter, the last three are attentions.
NAMES = {
    "qwen3_next": "*.linear_attn",
    "bamba": "*.mamba",
    "lfm2": "*.conv",
    "minimax": "*.layers.0.self_attn",
    "zamba": "*.mamba",
    "llama": "*.self_attn",
    "gpt_oss": "*.self_attn",
    "gemma2": "*.self_attn",
}


def gathered(pattern: str, **sizes: int) -> dict[str, Any]:
    return {**sizes, "modules": {pattern: {"sp": "gather"}}}


@pytest.mark.parametrize("model", NAMES)
def test_gathered_mixer_equals_one_rank(check, model):
    check(Setting(model, lengths=LENGTHS), Run(gathered(NAMES[model], sp_size=2), checkpointing=True))


def test_gathered_mixer_equals_documents_on_one_rank_each(check):
    check(Setting("zamba", lengths=LENGTHS), Run(gathered("*.mamba", dp_shard_size=2)))


def test_gathered_mixer_equals_one_rank_on_padded_rows(check):
    check(Setting("qwen3_next", packed=False), Run(gathered("*.linear_attn", sp_size=2)))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("sizes", [{"sp_size": 4}, {"sp_size": 2, "dp_shard_size": 2}], ids=str)
@pytest.mark.parametrize("model", NAMES)
def test_product_equals_one_rank(check, model, sizes, packed):
    setting = Setting(model, packed=packed, lengths=LENGTHS * 2 if packed else None, micro_batches=2)
    check(setting, Run(gathered(NAMES[model], **sizes), checkpointing=True))


def _prepare(name: str, plan: Any, overrides: dict[str, Any] | None = None) -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model(name, **(overrides or {})), plan)


@pytest.mark.parametrize(
    ("model", "plan", "message"),
    [
        ("zamba", {"sp_size": 2}, r"`model.layers.0.mamba` \(ZambaMambaMixer\).*'\*.mamba': \{'sp': 'gather'\}"),
        ("bamba", gathered("*.embed_tokens", sp_size=2), "`model.embed_tokens`, which is no module inside"),
        ("qwen3_next", gathered("*.mlp", sp_size=2), "`model.layers.0.mlp.experts` .* in a way of its own"),
        ("bamba", gathered("*.mlp", sp_size=2), "matches no module"),
        ("bamba", {"sp_size": 2, "modules": {"*.mamba": {"sp": "x"}}}, r"'sp' \('x'\) is unknown"),
        ("llama", gathered("model.layers.0", sp_size=2), "no module inside"),
    ],
    ids=str,
)
def test_rule_without_effect_is_refused(ranks, model, plan, message):
    ranks(2).raises(_prepare, model, plan, match=message)


def test_rule_without_effect_is_refused_on_one_rank(ranks):
    ranks(1).raises(_prepare, "openai-gpt", gathered("*.mlp"), match="no shard points")


class HomeMadeAttention(nn.Module):
    """Mixes tokens and asks nobody."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states).cumsum(1)


def _prepare_home_made(rules: dict[str, Any]) -> float:
    from hf_veomni import gather_sequence, prepare_omni

    torch.manual_seed(0)
    model = build_model("llama")
    for layer in model.model.layers:
        layer.mlp = HomeMadeAttention(model.config.hidden_size)
    ids = torch.arange(1, 16)[None]
    wanted = model(input_ids=ids).logits
    prepare_omni(model, {"sp_size": 2, "modules": rules})
    return float((gather_sequence(model(input_ids=ids).logits, model) - wanted).abs().max())


def test_a_module_that_attends_by_its_name_is_not_overlooked(ranks):
    match = (
        r"`model.layers.0.mlp` \(HomeMadeAttention\) attends.*modules=\{'model.layers.\*.mlp': \{'sp': 'gather'\}\}"
    )
    ranks(2).raises(_prepare_home_made, {}, match=match)
    for error in ranks(2).run(_prepare_home_made, {"model.layers.*.mlp": {"sp": "gather"}}):
        assert error < 1e-5


def test_more_ranks_than_heads_are_refused(ranks):
    overrides = {"linear_num_key_heads": 1, "linear_num_value_heads": 1}
    ranks(2).raises(_prepare, "qwen3_next", "sp=2", overrides, match=r"1 heads of `model.layers.0.linear_attn`")
