"""The planner's formulas against dry runs: memory within 5 %, bytes of each axis within 5 %."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from hf_veomni.dryrun import dry_run
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.memory import memory_of
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.traffic import exchanges

_SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1 << 18,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_attention_heads": 32, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_FEW = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1408, "sliding_window": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "tied": LlamaConfig(**{**_SIZES, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "smollm3": SmolLM3Config(**_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "qwen3_moe": Qwen3MoeConfig(**{**_SIZES, **_EXPERTS}),
    "mixtral": MixtralConfig(**{**_SIZES, **_FEW}),
}


class Case(NamedTuple):
    name: str
    layout: Layout
    tokens: int  # of two documents
    lora: int | None = None
    mixed: bool = False
    fp32: bool = False
    accumulation: int = 1


CASES = [
    Case("llama", Layout(1, 1, 1, 1, False), 8192),
    Case("llama", Layout(1, 1, 1, 1, True), 16384),
    Case("llama", Layout(1, 2, 4, 1, False), 32768),
    Case("llama", Layout(1, 2, 4, 1, True), 65536),
    Case("llama", Layout(2, 4, 1, 1, True), 16384),
    Case("llama", Layout(1, 8, 1, 1, True), 2048),
    Case("llama", Layout(1, 8, 1, 1, True), 8192, accumulation=2),
    Case("llama", Layout(1, 4, 2, 1, True), 16384, mixed=True),
    Case("llama", Layout(1, 4, 2, 1, False), 16384, mixed=True, fp32=True),
    Case("tied", Layout(1, 8, 2, 1, True), 32768),
    Case("mistral", Layout(1, 8, 1, 1, False), 8192),
    Case("qwen2", Layout(1, 4, 2, 1, True), 32768),
    Case("qwen3", Layout(1, 4, 2, 1, False), 16384),
    Case("qwen3", Layout(1, 1, 8, 1, True), 65536),
    Case("smollm3", Layout(1, 4, 2, 1, False), 16384),
    Case("llama", Layout(1, 2, 4, 1, False), 32768, lora=16),
    Case("llama", Layout(1, 2, 4, 1, True), 32768, lora=16),
    Case("qwen3", Layout(1, 4, 1, 1, False), 8192, lora=16, mixed=True),
    Case("qwen3_moe", Layout(1, 1, 1, 1, False), 4096),
    Case("qwen3_moe", Layout(1, 4, 4, 1, False), 32768),
    Case("qwen3_moe", Layout(1, 4, 4, 1, True), 65536),
    Case("qwen3_moe", Layout(1, 8, 1, 1, True), 4096),
    Case("qwen3_moe", Layout(1, 4, 4, 8, False), 32768),
    Case("qwen3_moe", Layout(1, 4, 4, 8, True), 65536),
    Case("qwen3_moe", Layout(1, 8, 1, 8, True), 4096),
    Case("qwen3_moe", Layout(2, 2, 8, 4, True), 65536),
    Case("qwen3_moe", Layout(1, 4, 4, 1, False), 32768, lora=16),
    Case("qwen3_moe", Layout(1, 4, 4, 8, True), 65536, lora=16),
    Case("qwen3_moe", Layout(1, 4, 4, 8, True), 65536, mixed=True),
    Case("mixtral", Layout(1, 8, 1, 1, True), 8192),
    Case("mixtral", Layout(1, 8, 1, 4, False), 8192),
    Case("llama", Layout(1, 2, 4, 1, False, "chunks"), 32768),
    Case("llama", Layout(1, 2, 4, 1, True, "chunks"), 65536),
    Case("qwen3_moe", Layout(1, 4, 4, 8, False, "chunks"), 32768),
    Case("qwen3_moe", Layout(1, 4, 4, 8, True, "chunks"), 65536),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(tuple(case)).replace(" ", ""))
def test_formulas_equal_the_dry_run(case: Case) -> None:
    config, layout = CONFIGS[case.name], case.layout
    job = Job(case.tokens, case.tokens // 2, None, case.accumulation, case.lora, case.mixed, case.fp32)
    shape = Shape.of(config)
    run = dry_run(
        config,
        layout.plan,
        layout.world,
        tokens=[case.tokens // 2] * 2,
        checkpointing=layout.checkpointing,
        lora=case.lora,
        dtype=torch.float32 if case.fp32 else torch.bfloat16,
        mixed_precision=case.mixed,
        accumulation=case.accumulation,
    )
    memory = memory_of(shape, layout, job)
    gib = 2**30
    print(f"{case}: {memory.total / run.peak.total - 1:+.1%}")
    print(f"  dry run {run.peak.total / gib:.3f}", {k: round(v / gib, 3) for k, v in run.peak.categories.items()})
    print(f"  formula {memory.total / gib:.3f}", {k: round(v / gib, 3) for k, v in memory.categories.items()})
    print(f"  {run.peak.place} {memory.moment}")
    sent: Counter[str] = Counter()
    for exchange in exchanges(shape, layout, job):
        sent[exchange.axis] += case.accumulation * exchange.sent
    found = {axis: size for axis, size in run.traffic.items() if size > 1e5 and axis != "world"}
    print("  ", dict(sent), found)
    assert memory.total == pytest.approx(run.peak.total, rel=0.05)
    assert sum(sent.values()) == pytest.approx(sum(found.values()), rel=0.05)
    if not any("/" in axis for axis in found):
        assert dict(sent) == pytest.approx(found, rel=0.05)
