"""Tiny stock models with fixed weights, and the batches that they are fed.

Shapes: B rows, S tokens of a row. Rows have odd lengths on purpose: no sp_size divides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.hybrids import HYBRIDS

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DENSE_FIRST = {"first_k_dense_replace": 1, **_EXPERTS}
_NO_DEEPSTACK = {"out_hidden_size": 64, "deepstack_visual_indexes": []}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "tie_word_embeddings": True, **_SLIDING}

# name -> (model type, what differs from _COMMON, attention of the stock model)
ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "sdpa"),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, "sdpa"),
    "llama_uneven": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        "sdpa",
    ),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}, "sdpa"),
    "llama_eager": ("llama", {}, "eager"),
    "qwen3": ("qwen3", {"head_dim": 16}, "sdpa"),
    "qwen3_sliding": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, **_SLIDING},
        "sdpa",
    ),
    "qwen2": ("qwen2", {}, "sdpa"),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 7}, "sdpa"),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}, "eager"),
    "gemma3": ("gemma3_text", {**_GEMMA, "final_logit_softcapping": None}, "sdpa"),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7, **_SLIDING},
        "eager",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            **_DENSE_FIRST,
        },
        "sdpa",
    ),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, **_EXPERTS}, "sdpa"),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 32, **_EXPERTS}, "sdpa"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, "sdpa"),
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **_DENSE_FIRST},
        "sdpa",
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "sdpa"),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0, "residual_multiplier": 0.7},
        "sdpa",
    ),
    "minimax_m2": ("minimax_m2", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "sdpa"),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
        "sdpa",
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "tie_word_embeddings": False,
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, **_NO_DEEPSTACK},
            "text_config": {**_COMMON, "head_dim": 16, "num_experts": 4, "rope_parameters": _MROPE, **_EXPERTS},
        },
        "sdpa",
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            **_EXPERTS,
        },
        "sdpa",
    ),
    # Chunks in the first layer; in the second neither rope nor chunks, but queries scaled from token `floor_scale` on.
    "llama4": (
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 80,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 7,
            "floor_scale": 48,
        },
        "sdpa",
    ),  # fmt: skip
    "phi3": ("phi3", {}, "sdpa"),
    "olmo2": ("olmo2", {}, "sdpa"),
    "cohere": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}, "sdpa"),
    "granite": (
        "granite",
        {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
        "sdpa",
    ),
    # Norms without a cast to fp32: the one whose fp64 run is fp64 throughout.
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}, "sdpa"),
    # No points: its backbone reshapes what its last layer returns.
    "openai-gpt": ("openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "eager"),
}


def build_model(
    name: str, *, attention: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A stock model of the zoo, in training mode. Weights depend on the name and the seed only.

    They are larger than a model's own initialisation, so that attention is not uniform and no gradient is tiny.

    Args:
        attention: attention implementation; None takes the zoo's.
        overrides: of the configuration.
    """
    model_type, differences, default = {**ZOO, **HYBRIDS}[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **differences, **overrides})
    config._attn_implementation = attention or default
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.08, generator=generator)
            parameter.copy_(noise + 1 if parameter.dim() == 1 and "norm" in key else noise)
    return model.train()


def packed_batch(lengths: Sequence[int], *, seed: int = 0) -> dict[str, Tensor]:
    """One packed sequence [1, S] of documents of the given lengths, as the collator makes it.

    Positions restart with each document, the first label of each is -100, and so are some more, as in a chat where
    only answers are learnt.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    ids = torch.randint(3, VOCABULARY, (1, size), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.3] = -100
    labels[positions == 0] = -100
    labels[0, -1] = ids[0, -1]  # the last token of the row is always learnt: no shard may lose it
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def padded_batch(lengths: Sequence[int], *, seed: int = 0) -> dict[str, Tensor]:
    """Rows [B, S], one document each, padded on the right; with a 2-D attention mask and no positions."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), size), generator=generator)
    mask = (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.rand(ids.shape, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def count_targets(batch: dict[str, Tensor]) -> int:
    """Tokens that are scored: the first label of a row has nothing before it."""
    return int((batch["labels"][:, 1:] != -100).sum())


def document_lengths(batch: dict[str, Tensor]) -> list[int]:
    """Tokens of each document of a packed sequence."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [end - begin for begin, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True)]
