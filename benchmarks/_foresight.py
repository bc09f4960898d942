"""The cases in which the planner's formulas are compared with dry runs: families, layouts, and ways to train."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from hf_veomni.planner.layout import Job, Layout

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
_EXPERTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_FEW: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 1408,
    "sliding_window": None,
}
_MANY: dict[str, Any] = {
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "n_routed_experts": 64,
    "first_k_dense_replace": 1,
}
_GROUPS: dict[str, Any] = {"n_shared_experts": 1, "n_group": 8, "topk_group": 4}
_LATENT: dict[str, Any] = {
    **{name: size for name, size in _SIZES.items() if name != "head_dim"},
    **{"num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    **{"qk_nope_head_dim": 128, "v_head_dim": 128},
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "tied": LlamaConfig(**{**_SIZES, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "smollm3": SmolLM3Config(**_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "qwen3_moe": Qwen3MoeConfig(**{**_SIZES, **_EXPERTS}),
    "phi3": Phi3Config(**{k: v for k, v in _SIZES.items() if k != "head_dim"}, pad_token_id=0, eos_token_id=1),
    "glm4_moe": Glm4MoeConfig(**_SIZES, **_MANY, **_GROUPS, use_qk_norm=True),
    "deepseek_v2": DeepseekV2Config(**_LATENT, **_MANY, **_GROUPS, topk_method="group_limited_greedy"),
    "deepseek_v3": DeepseekV3Config(**_LATENT, **_MANY, **_GROUPS),
    "mla": DeepseekV3Config(**{**_LATENT, **_MANY, **_GROUPS, "q_lora_rank": None, "first_k_dense_replace": 3}),
    "mixtral": MixtralConfig(**{**_SIZES, **_FEW}),
}


class Case(NamedTuple):
    """What is compared: a model, one layer of which is as wide as a real one's, on one rank of a layout.

    Attributes:
        tokens: of a packed sequence of two documents.
    """

    name: str
    layout: Layout
    tokens: int
    lora: int | None = None
    mixed: bool = False
    fp32: bool = False
    accumulation: int = 1

    @property
    def job(self) -> Job:
        return Job(self.tokens, self.tokens // 2, None, self.accumulation, self.lora, self.mixed, self.fp32)

    def __str__(self) -> str:
        options = [f"lora={self.lora}"] * (self.lora is not None) + ["mixed"] * self.mixed + ["fp32"] * self.fp32
        options += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        return ", ".join([f"{self.name}, {self.tokens}, {self.layout}", *options])


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
    Case("llama", Layout(8, 1, 1, 1, True), 2048),
    Case("llama", Layout(8, 1, 1, 1, True), 2048, mixed=True),
    Case("llama", Layout(8, 1, 1, 1, True), 2048, mixed=True, fp32=True),
    Case("llama", Layout(2, 4, 1, 1, True), 2048, mixed=True),
    Case("tied", Layout(1, 8, 2, 1, True), 32768),
    Case("mistral", Layout(1, 8, 1, 1, False), 8192),
    Case("qwen2", Layout(1, 4, 2, 1, True), 32768),
    Case("qwen3", Layout(1, 4, 2, 1, False), 16384),
    Case("qwen3", Layout(1, 1, 8, 1, True), 65536),
    Case("smollm3", Layout(1, 4, 2, 1, False), 16384),
    Case("llama", Layout(1, 2, 4, 1, False), 32768, lora=16),
    Case("llama", Layout(1, 2, 4, 1, True), 32768, lora=16),
    Case("qwen3", Layout(1, 4, 1, 1, False), 8192, lora=16, mixed=True),
    Case("qwen3", Layout(1, 1, 1, 1, False), 8192, lora=16, mixed=True),
    Case("qwen3", Layout(1, 1, 1, 1, True), 8192, lora=16, mixed=True),
    Case("llama", Layout(1, 1, 1, 1, False), 8192, mixed=True, fp32=True),
    Case("llama", Layout(1, 1, 1, 1, True), 16384, mixed=True, fp32=True),
    Case("qwen3", Layout(1, 1, 1, 1, False), 8192, mixed=True, fp32=True),
    Case("qwen3", Layout(1, 1, 1, 1, False), 8192, lora=16, mixed=True, fp32=True),
    Case("qwen3", Layout(1, 1, 1, 1, True), 16384, lora=16, mixed=True, fp32=True),
    Case("qwen3_moe", Layout(1, 1, 1, 1, False), 4096, lora=16, mixed=True, fp32=True),
    Case("qwen3_moe", Layout(1, 1, 1, 1, True), 8192, lora=16, mixed=True, fp32=True),
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
    Case("phi3", Layout(1, 1, 1, 1, False), 8192),
    Case("phi3", Layout(1, 4, 2, 1, False), 16384),
    Case("phi3", Layout(1, 4, 2, 1, True), 32768),
    Case("phi3", Layout(1, 4, 2, 1, True), 32768, lora=16),
    Case("glm4_moe", Layout(1, 4, 2, 1, False), 16384),
    Case("glm4_moe", Layout(1, 4, 4, 8, True), 65536),
    Case("mla", Layout(1, 4, 2, 1, False), 16384),
    Case("deepseek_v2", Layout(1, 4, 2, 1, False), 16384),
    Case("deepseek_v2", Layout(1, 4, 4, 8, True), 65536),
    Case("deepseek_v3", Layout(1, 1, 1, 1, False), 4096),
    Case("deepseek_v3", Layout(1, 4, 2, 1, True), 16384),
    Case("deepseek_v3", Layout(1, 4, 4, 8, False), 32768),
    Case("deepseek_v3", Layout(1, 4, 4, 8, True), 65536),
    Case("deepseek_v3", Layout(1, 4, 4, 8, True), 65536, lora=16),
    Case("llama", Layout(1, 4, 2, 1, False, "pairs"), 16384, accumulation=2),
    Case("llama", Layout(1, 4, 2, 1, True, "pairs"), 32768),
    Case("qwen3_moe", Layout(1, 4, 4, 8, False, "pairs"), 32768),
    Case("qwen3_moe", Layout(1, 4, 4, 8, True, "pairs"), 32768, accumulation=2),
]
