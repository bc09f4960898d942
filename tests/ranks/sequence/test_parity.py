"""Loss, logits, every gradient and the gradient norm of a prepared model equal those of the stock model on one rank.

The reference runs each document alone, so packing, padding, sharding and the loss are all compared with neither. fp32,
relative to the largest value of each tensor. `make test` runs a choice that has every model, plan and option once;
`make test-slow` their product.
"""

from __future__ import annotations

import pytest
import torch

from tests.models import ZOO
from tests.ranks.parity import Run, Setting

MODELS = [name for name in ZOO if name not in ("openai-gpt", "qwen3_next", "qwen3_vl_moe")]
PLANS = {
    2: ["sp=2", "dp_shard=2", "dp_replicate=2"],
    3: ["sp=3", "dp_shard=3"],
    4: ["sp=4", "sp=2,dp_shard=2", "sp=2,dp_replicate=2", "dp_shard=4", "dp_shard=2,dp_replicate=2"],
}


@pytest.mark.parametrize("model", MODELS)
def test_sp2_equals_one_rank(check, model):
    check(Setting(model), Run("sp=2"))


@pytest.mark.parametrize("plan", [plan for plans in PLANS.values() for plan in plans])
@pytest.mark.parametrize("model", ["llama", "llama_uneven"])
def test_every_plan_equals_one_rank(check, model, plan):
    check(Setting(model), Run(plan))


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("llama_mqa", "sp=4"),
        ("qwen3_sliding", "sp=3"),
        ("gemma2", "sp=4"),
        ("gemma3", "sp=2,dp_shard=2"),
        ("gpt_oss", "sp=4"),
        ("gpt_oss", "sp=2,dp_shard=2"),
        ("deepseek_v3", "sp=3"),
        ("qwen3_moe", "sp=2,dp_replicate=2"),
        ("llama_tied", "sp=2,dp_shard=2"),
    ],
)
def test_families_equal_one_rank_under_larger_plans(check, model, plan):
    check(Setting(model), Run(plan))


@pytest.mark.parametrize("plan", ["sp=2", "sp=3", "dp_shard=2"])
@pytest.mark.parametrize("attention", ["auto", "keep"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_chunked_attention_equals_one_rank(check, plan, attention, packed):
    check(Setting("llama4", packed=packed), Run(plan, attention=attention))


@pytest.mark.parametrize("plan", ["sp=2", "sp=3", "sp=2,dp_shard=2", "dp_shard=2"])
@pytest.mark.parametrize("model", ["llama", "qwen3_sliding"])
def test_padded_rows_equal_one_rank(check, model, plan):
    check(Setting(model, packed=False), Run(plan))


@pytest.mark.parametrize("model", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_padded_rows_of_families_equal_one_rank(check, model):
    check(Setting(model, packed=False), Run("sp=2"))


@pytest.mark.parametrize("plan", ["sp=2", "sp=2,dp_shard=2"])
@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt_oss", "qwen3_moe"])
def test_activation_checkpointing_equals_one_rank(check, model, plan):
    check(Setting(model), Run(plan, checkpointing=True))


@pytest.mark.parametrize("synchronize_each", [True, False], ids=["each", "last"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2", "sp=4", "sp=2,dp_shard=2", "sp=2,dp_replicate=2"])
def test_accumulated_uneven_micro_batches_equal_one_rank(check, plan, synchronize_each):
    check(Setting("llama_uneven", micro_batches=2), Run(plan, synchronize_each=synchronize_each))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2", "sp=3"])
@pytest.mark.parametrize(
    ("model", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa"), ("qwen3_sliding", "eager")],
)
def test_kept_attention_equals_one_rank(check, model, attention, plan):
    check(Setting(model, attention=attention), Run(plan, attention="keep"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", ["llama", "gpt_oss"])
def test_kept_attention_equals_one_rank_on_padded_rows(check, model, attention):
    if (model, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("gpt-oss has no sdpa")
    check(Setting(model, attention=attention, packed=False), Run("sp=2", attention="keep"))


@pytest.mark.parametrize("plan", ["sp=2", "sp=3"])
def test_kept_attention_equals_one_rank_on_one_document(check, plan):
    """gpt-oss's own masks do not know documents, but the tokens that fill the row up to sp are none of the user's."""
    check(Setting("gpt_oss", attention="eager", lengths=((31,),)), Run(plan, attention="keep"))


@pytest.mark.parametrize("model", ["llama", "gemma2", "cohere", "granite", "gpt_oss"])
def test_loss_from_full_logits_equals_one_rank(check, model):
    check(Setting(model), Run("sp=2", chunked_loss=False))


@pytest.mark.parametrize("plan", ["sp=2", "sp=3", "sp=4", "sp=2,dp_shard=2", "dp_shard=2,dp_replicate=2"])
def test_fp64_equals_one_rank_to_ten_digits(check, plan):
    check(Setting("stablelm", dtype=torch.float64), Run(plan))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2", "sp=2,dp_shard=2", "sp=2,dp_replicate=2", "sp=4"])
def test_lora_equals_one_rank(check, plan, checkpointing):
    check(Setting("llama_uneven", lora=True, micro_batches=2), Run(plan, checkpointing=checkpointing))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2", "sp=2,dp_shard=2", "sp=2,dp_replicate=2"])
def test_lora_in_fp32_on_a_base_in_bf16_follows_one_rank(check, plan):
    check(Setting("llama_uneven", lora=True, dtype=torch.bfloat16), Run(plan))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("plan", [plan for plans in PLANS.values() for plan in plans])
@pytest.mark.parametrize("model", MODELS)
def test_product_equals_one_rank(check, model, plan, packed, checkpointing):
    check(Setting(model, packed=packed, micro_batches=2), Run(plan, checkpointing=checkpointing))
