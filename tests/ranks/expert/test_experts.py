"""Stock mixture-of-experts models under EP x SP x FSDP2 equal one rank: loss, logits, every gradient, the norm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.ranks.parity import Run, Setting

# Family -> what its setting needs. Qwen3-Next is apart: linear attention cannot be cut along the row.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "mixtral": {},
    "gpt_oss": {},
    "deepseek_v3": {},
    "glm4_moe": {},
    "olmoe": {},
    "granitemoe": {},
    "minimax_m2": {},
    "ernie4_5_moe": {},
    "llama4": {"overrides": {"num_local_experts": 4}},
    "qwen3_vl_moe": {"packed": False},
}
PLANS = [
    "sp=2,ep=2",
    "dp_shard=2,ep=2",
    "sp=4,ep=2",
    "sp=4,ep=4",
    "dp_shard=4,ep=2",
    "dp_shard=4,ep=4",
    "dp_shard=2,sp=2,ep=2",
    "dp_shard=2,sp=2,ep=4",
    "dp_replicate=2,dp_shard=2,ep=2",
    "dp_replicate=2,sp=2,ep=2",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_sp2_ep2_equals_one_rank(check, family):
    check(Setting(family, **FAMILIES[family]), Run("sp=2,ep=2"))


@pytest.mark.parametrize("plan", PLANS[1:])
def test_every_plan_equals_one_rank(check, plan):
    check(Setting("qwen3_moe"), Run(plan))


@pytest.mark.parametrize("plan", ["dp_shard=2,ep=2", "dp_shard=4,ep=2"])
def test_experts_beside_linear_attention_equal_one_rank(check, plan):
    check(Setting("qwen3_next", packed=False), Run(plan))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("plan", ["dp_shard=2,sp=2,ep=4", "dp_replicate=2,sp=2,ep=2"])
def test_llama4_equals_one_rank(check, plan, top_k):
    overrides = {"num_local_experts": 4, "num_experts_per_tok": top_k}
    check(Setting("llama4", overrides=overrides), Run(plan, checkpointing=top_k == 2))


@pytest.mark.parametrize(
    ("family", "plan", "setting", "run"),
    [
        ("qwen3_moe", "sp=2,dp_shard=2,ep=4", {"micro_batches": 2}, {"checkpointing": True}),
        ("qwen3_moe", "dp_replicate=2,dp_shard=2,ep=2", {"micro_batches": 2}, {"synchronize_each": False}),
        ("qwen3_moe", "sp=2,ep=2", {"packed": False}, {}),
        ("gpt_oss", "dp_shard=2,sp=2,ep=2", {"packed": False, "micro_batches": 2}, {"checkpointing": True}),
        ("deepseek_v3", "dp_shard=2,sp=2,ep=4", {}, {"checkpointing": True, "chunked_loss": False}),
    ],
)
def test_options_equal_one_rank(check, family, plan, setting, run):
    check(Setting(family, **setting), Run(plan, **run))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_selected_kernels_equal_one_rank(check, implementation):
    overrides = {"experts_implementation": implementation}
    check(Setting("qwen3_moe", overrides=overrides), Run("sp=2,ep=2"))


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("mixtral", "sp=2,ep=2"),
        ("qwen3_moe", "dp_shard=2,sp=2,ep=2"),
        ("qwen3_moe", "dp_shard=2,sp=2,ep=4"),
        ("qwen3_moe", "dp_replicate=2,sp=2,ep=2"),
        ("qwen3_moe", "sp=2"),
        ("gpt_oss", "sp=2,ep=2"),  # weights stored [E, in, out], and biases
        ("deepseek_v3", "dp_shard=2,ep=2"),
    ],
)
def test_adapters_on_experts_and_attention_equal_one_rank(check, family, plan):
    check(Setting(family, lora=True), Run(plan))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "plan"), list(itertools.product(FAMILIES, PLANS)))
def test_product_equals_one_rank(check, family, plan):
    check(Setting(family, **FAMILIES[family]), Run(plan))
