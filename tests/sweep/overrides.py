"""What families need besides sizes by name. Keys: model types of transformers' CONFIG_MAPPING."""

from __future__ import annotations

from typing import Any

# "__init__" holds what the default config needs to be made at all.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [4, 2, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "clvp_encoder": {"hidden_size": 128},  # its rotary width is at least 32 a head
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}},
    "csm": {"codec_config": {"upsample_groups": 8}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 8}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "index_head_dim": 16,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "main": {**_ROPE, "partial_rotary_factor": 0.25},
            "compress": {**_ROPE, "partial_rotary_factor": 0.25},
        },
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 32],
    },
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": 97, "pad_token_id": 0, "mask_token_id": 90, "token_dropout": False},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},  # as published
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mistral4": {"head_dim": 16, "qk_head_dim": 24},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "mobilebert": {"embedding_size": 32, "hidden_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "reformer": {"axial_pos_embds": False},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,  # twice the hidden size
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
}
OVERRIDES["big_bird"] = OVERRIDES["bigbird_pegasus"] = {"attention_type": "original_full"}
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}
OVERRIDES["diffusion_gemma"] = {"text_config": OVERRIDES["diffusion_gemma_text"]}
OVERRIDES["deepseek_ocr2"] = {"text_config": OVERRIDES["deepseek_ocr2_text"]}
OVERRIDES["cohere_compass"] = {"text_config": OVERRIDES["cohere_compass_text"]}
OVERRIDES["ernie4_5_vl_moe"] = {"text_config": OVERRIDES["ernie4_5_vl_moe_text"]}
OVERRIDES["step3p7"] = {"text_config": OVERRIDES["step3p5"]}

# model type -> (kind, class): where the Auto mappings lead to a class that nobody trains.
CLASSES: dict[str, tuple[str, str]] = {
    "seamless_m4t": ("seq2seq", "SeamlessM4TForTextToText"),
    "seamless_m4t_v2": ("seq2seq", "SeamlessM4Tv2ForTextToText"),
}
