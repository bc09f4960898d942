"""What is known of single model families, as data: names of classes and model types, and what each of them claims.

Everything that names a family is here, or is code: patched forwards under `sequence/families/` (and one of experts,
`expert/families.py`), functions that stand in for scans in `sequence/mixers/functions.py`. `docs/adding-a-family.md`
walks through one of each kind. On the ground floor, since data, sequence and modality all read it.

Verified by reading the code of transformers 5.23 and 5.24, and by tests against one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Token mixers whose forward does nothing along the sequence but call functions of `sequence/mixers/functions.py`: the
# class -> the attribute that holds how many heads (or channels) a scan shares out; None for a convolution alone, which
# any number of ranks can share.
MIXERS: Mapping[str, str | None] = {
    "BailingHybridDeltaAttention": "num_heads",
    "BambaMixer": "num_heads",
    "FalconH1Mixer": "num_heads",
    "FalconMambaMixer": "intermediate_size",
    "GraniteMoeHybridMambaLayer": "num_heads",
    "JambaMambaMixer": "intermediate_size",
    "KimiLinearDeltaAttention": "num_heads",
    "Lfm2MoeShortConv": None,
    "Lfm2ShortConv": None,
    "Lfm3ShortConv": None,
    "Mamba2Mixer": "num_heads",
    "MambaMixer": "intermediate_size",
    "NemotronHMamba2Mixer": "num_heads",
    "OlmoHybridGatedDeltaNet": "num_v_heads",
    "Qwen3NextGatedDeltaNet": "num_v_heads",
    "Qwen3_5GatedDeltaNet": "num_v_heads",
    "Qwen3_5MoeGatedDeltaNet": "num_v_heads",
    "Zamba2MambaMixer": "num_heads",
}
# Those whose recurrence stands in the forward itself (`sequence/families/lightning`): class -> the same attribute.
LIGHTNING: Mapping[str, str] = {"MiniMaxLightningAttention": "num_attention_heads"}


@dataclass(frozen=True)
class Tower:
    """A vision encoder whose temporal patches do not know of each other: a long video may be cut into runs of frames.

    Attributes:
        windows: some layers attend within windows, made from the grid.
        tables: positions are interpolated from a learned table, by the grid.
        counts: its `embeddings` count patches from the first one that they see.
    """

    windows: bool = False
    tables: bool = False
    counts: bool = False


# By model type. Other encoders merge frames (Ernie 4.5 VL), attend to the full clip (Kimi K2.5, MiniMax M3), have no
# videos (PaddleOCR-VL, HunYuan) or have not been tried (Video-Llama 3, dots3).
TOWERS: Mapping[str, Tower] = {
    "cohere_compass_vision": Tower(tables=True),
    "exaone4_5_vision": Tower(windows=True),
    "glm4v_moe_vision": Tower(counts=True),
    "glm4v_vision": Tower(counts=True),
    "glm5_next_vision": Tower(),
    "glm_ocr_vision": Tower(),
    "qwen2_5_omni_vision_encoder": Tower(windows=True),
    "qwen2_5_vl_vision": Tower(windows=True),
    "qwen2_vl_vision": Tower(),
    "qwen3_5_moe_vision": Tower(tables=True),
    "qwen3_5_vision": Tower(tables=True),
    "qwen3_omni_moe_vision_encoder": Tower(tables=True),
    "qwen3_vl_moe_vision": Tower(tables=True),
    "qwen3_vl_vision": Tower(tables=True),
    "qwen4_exp_vision": Tower(tables=True),
}
# Model types that scatter features in the order of their placeholders and look at them nowhere else: each rank needs
# those of its own tokens only.
SCATTER = frozenset({
    "gemma3", "idefics3", "internvl", "llava_onevision", "qwen2_5_omni_thinker", "qwen2_5_vl",
    "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "voxtral",
})  # fmt: skip
# Model types of vision encoders with a gate beside gelu; others with a gate have silu.
GATED = frozenset({"pixtral"})


@dataclass(frozen=True)
class Audio:
    """How the tokens of an audio clip follow from its mel frames.

    Attributes:
        rule: "pooled" (two halvings, Whisper's convolution and a pool) or "chunked" (13 tokens of each 100 frames).
        patches: of the encoder for a token.
    """

    rule: str
    patches: int = 1


# By model type.
AUDIO: Mapping[str, Audio] = {
    "qwen2_5_omni": Audio("pooled", 2),
    "qwen2_5_omni_thinker": Audio("pooled", 2),
    "qwen2_audio": Audio("pooled", 2),
    "qwen3_omni_moe": Audio("chunked"),
    "qwen3_omni_moe_thinker": Audio("chunked"),
}


@dataclass(frozen=True)
class Tiles:
    """How many tokens an image or tile becomes, all of them alike: names of keys of the model's config.

    Attributes:
        tokens: holds the number itself.
        over: the patches of a square image, divided by the square of this.
        times: the patches of a square image, times the square of this.
    """

    tokens: str | None = None
    over: str | None = None
    times: str | None = None


# By model type, and the processors that put so many placeholders for each tile.
TILES: Mapping[str, Tiles] = {
    "gemma3": Tiles(tokens="mm_tokens_per_image"),
    "gemma3n": Tiles(tokens="vision_soft_tokens_per_image"),
    "idefics3": Tiles(over="scale_factor"),
    "internvl": Tiles(times="downsample_ratio"),
    "smolvlm": Tiles(over="scale_factor"),
}
TILE_PROCESSORS = frozenset({"Gemma3Processor", "Idefics3Processor", "InternVLProcessor", "SmolVLMProcessor"})
