"""Tiny models with linear attention, state spaces or short convolutions: entries for `tests.models.build_model`.

Heads and groups differ, so that heads of a rank share a key head or a group; documents exceed the chunks of scans.
A norm divides what a delta rule reads from its state, which is next to nothing where a query is at right angles to the
keys: the larger epsilon keeps that from raising the last bits of fp32 to where others begin. Widths are such that the
stock model repeats its own gradients to 1e-5 when documents are batched in another way: those of decays nearly cancel.
"""

from __future__ import annotations

from typing import Any

_TYPES = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rms_norm_eps": 1e-3,
    **_TYPES,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

_KIMI = {
    "num_key_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
    **_TYPES,
    **_EXPERTS,
}

# name -> (model type, what differs from the common configuration, attention of the stock model)
HYBRIDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_5": ("qwen3_5_text", {"head_dim": 16, **_DELTA}, "sdpa"),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            **_DELTA,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **_EXPERTS,
        },
        "sdpa",
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_DELTA, "linear_num_key_heads": 4}, "sdpa"),
    "kimi_linear": ("kimi_linear", _KIMI, "sdpa"),
    "bailing_hybrid": ("bailing_hybrid", _KIMI, "sdpa"),
    "bamba": ("bamba", {"attn_layer_indices": [1], **_MAMBA2}, "sdpa"),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 128, **_MAMBA2}, "sdpa"),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2, **_MAMBA2},
        "sdpa",
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
        "sdpa",
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
        "sdpa",
    ),
    "zamba2": (
        "zamba2",
        {
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
        "sdpa",
    ),
    # No adapter: a selective scan of its own.
    "zamba": (
        "zamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "n_mamba_heads": 2,
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 4,
            "attention_head_dim": 32,
            "attention_hidden_size": 128,
        },
        "sdpa",
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 8, "expand": 2}, "eager"),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 8, "expand": 2}, "eager"),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8, "expand": 2},
        "eager",
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1, **_EXPERTS},
        "sdpa",
    ),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention"]}, "sdpa"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}, "sdpa"),
    "minimax": (
        "minimax",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8, **_TYPES},
        "sdpa",
    ),
}
