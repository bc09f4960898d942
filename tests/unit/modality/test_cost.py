import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen3MoeConfig,
    Qwen3OmniMoeConfig,
    SiglipVisionConfig,
)

from hf_veomni.modality import Coefficients, CostModel

# Omni config: modality -> where transformers has the part's model (module of the family, class).
FAMILIES = {
    "Qwen2VL": {"image": ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel")},
    "Qwen2_5_VL": {
        "image": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
        "text": ("qwen2_5_vl", "Qwen2_5_VLTextModel"),
    },
    "Qwen3VL": {"image": ("qwen3_vl", "Qwen3VLVisionModel"), "text": ("qwen3_vl", "Qwen3VLTextModel")},
    "Gemma3": {"image": ("siglip", "SiglipVisionModel"), "text": ("gemma3", "Gemma3TextModel")},
    "LlavaOnevision": {"image": ("siglip", "SiglipVisionModel"), "text": ("qwen2", "Qwen2Model")},
    "InternVL": {"image": ("internvl", "InternVLVisionModel"), "text": ("qwen2", "Qwen2Model")},
    "SmolVLM": {"image": ("smolvlm", "SmolVLMVisionTransformer"), "text": ("llama", "LlamaModel")},
    "Qwen2Audio": {"audio": ("qwen2_audio", "Qwen2AudioEncoder"), "text": ("qwen2", "Qwen2Model")},
    "Voxtral": {"audio": ("voxtral", "VoxtralEncoder"), "text": ("llama", "LlamaModel")},
    "Whisper": {"audio": ("whisper", "WhisperEncoder")},
    "Qwen2_5OmniThinker": {
        "audio": ("qwen2_5_omni", "Qwen2_5OmniAudioEncoder"),
        "image": ("qwen2_5_omni", "Qwen2_5OmniVisionEncoder"),
    },
    "Qwen3OmniMoeThinker": {
        "audio": ("qwen3_omni_moe", "Qwen3OmniMoeAudioEncoder"),
        "image": ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder"),
    },
}


def weights_of_layers(model):
    """Elements of the linear weights in the longest stack of layers."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=len)
    return sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize(
    ("family", "modality", "place"), [(f, m, place) for f, parts in FAMILIES.items() for m, place in parts.items()]
)
def test_flops_of_a_patch_equal_the_weights_of_the_layers(family, modality, place):
    config = getattr(transformers, f"{family}Config")()
    part = getattr(config, {"image": "vision_config"}.get(modality, f"{modality}_config"), config)
    module = importlib.import_module(f"transformers.models.{place[0]}.modeling_{place[0]}")
    with torch.device("meta"):
        model = getattr(module, place[1])._from_config(part)
    coefficients = CostModel.from_config(config, "frozen").coefficients[modality]
    assert coefficients.per_patch == 2 * weights_of_layers(model)


def test_experts_of_one_token_count():
    config = Qwen3MoeConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4, mlp_only_layers=[0], intermediate_size=100,
    )  # fmt: skip
    projections, mlp = 3 * 2 * 8 * 4 * 3, 3 * 8 * (2 * 2 * 16 + 100)
    assert Coefficients.from_config(config, "text", "frozen").per_patch == 2 * (projections + mlp)


def test_attention_is_quadratic_in_the_window_only():
    vision = Qwen2_5_VLConfig().vision_config
    one = Coefficients.from_config(vision, "image")
    (full, none), (windowed, window) = one.attention
    assert none is None and window == 64 and full * 28 == windowed * 4 and not one.causal
    assert full == 3 * 4 * 3584 * 4
    small, large = one.costs([64, 640]) - one.per_patch * np.array([64, 640])
    assert small == (full + windowed) * 64**2
    assert large == full * 640**2 + windowed * 640 * 64
    assert Coefficients.from_config(SiglipVisionConfig(), "image").attention[0][1] is None


def test_windows_of_audio():
    assert Coefficients.from_config(Qwen2_5OmniThinkerConfig().audio_config, "audio").attention[0][1] == 100
    audio = CostModel.from_config(Qwen3OmniMoeConfig()).coefficients["audio"]
    assert audio.attention[0][1] == 13 * 8  # transformers 5.23, get_audio_cu_seqlens


def test_text_counts_the_causal_pairs_of_its_window():
    config = Gemma3TextConfig(
        num_hidden_layers=6, sliding_window=8, hidden_size=8, head_dim=4, num_attention_heads=2, intermediate_size=16
    )
    one = Coefficients.from_config(config, "text", "frozen")
    (full, _), (sliding, window) = one.attention
    assert (full * 5, window) == (sliding, 8)
    seen = np.tril(np.ones((1000, 1000))) - np.tril(np.ones((1000, 1000)), -8)
    pairs = (one.costs([1000])[0] - one.per_patch * 1000 - full * 1000**2 / 2) / sliding
    assert pairs == pytest.approx(seen.sum(), rel=1e-2)
    llama = Coefficients.from_config(LlamaConfig(), "text", "frozen")
    assert llama.costs([10])[0] - llama.costs([5])[0] * 2 == llama.attention[0][0] * (50 - 25)


@pytest.mark.parametrize(
    ("training", "checkpointed", "linear", "attention"),
    [("frozen", False, 1, 1), ("passed", False, 2, 3), ("trained", False, 3, 3), ("trained", True, 4, 4),
     ("frozen", True, 1, 1)],
)  # fmt: skip
def test_backward_passes(training, checkpointed, linear, attention):
    config = SiglipVisionConfig()
    forward = Coefficients.from_config(config, "image", "frozen")
    both = Coefficients.from_config(config, "image", training, checkpointed)
    assert both.per_patch == linear * forward.per_patch
    assert both.attention[0][0] == attention * forward.attention[0][0]


def test_frames_do_not_see_each_other():
    model = CostModel.from_config(Qwen2_5_VLConfig(), {"image": "frozen", "video": "frozen", "text": "passed"})
    frames = model.costs("image", [400] * 3).sum()
    mixed = model.costs(["video", "image", "text"], [1200, 400, 400], [3, 1, 1])
    assert mixed[0] == pytest.approx(frames) and mixed[1] == pytest.approx(frames / 3) and mixed[2] > mixed[1]


@pytest.mark.parametrize("linear, pair", [(2e-6, 3e-9), (0.0, 1e-9), (1e-6, 0.0)])
def test_fit_finds_the_coefficients(linear, pair):
    patches = np.array([64, 100, 500, 1024, 4096.0])
    found = Coefficients.fit(patches, linear * patches + pair * patches**2)
    assert found.per_patch == pytest.approx(linear, abs=1e-12)
    assert found.attention[0][0] == pytest.approx(pair, abs=1e-15)
    noisy = Coefficients.fit([10, 20], [10.0, 15.0])  # grows slower than linear: no negative coefficient
    assert noisy.attention == ((0.0, None),) and noisy.per_patch == pytest.approx(0.85, abs=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CostModel.from_config(GPT2Config(n_embd=0)), "GPT2Config (gpt2) has none of"),
        (lambda: CostModel.from_config(SimpleNamespace()), "SimpleNamespace (no model_type) has no text_config"),
        (lambda: Coefficients.from_config(transformers.Gemma3nConfig().vision_config, "image"), "Gemma3nVisionConfig"),
        (lambda: Coefficients.from_config(LlamaConfig(layer_types=["linear_attention"] * 32), "text"), "linear_att"),
        (lambda: CostModel.from_config(LlamaConfig(), "half"), "`training` ('half') must be one of frozen"),
        (lambda: CostModel.from_config(LlamaConfig(), {"image": "frozen"}), "`training` names ['image']"),
        (lambda: Coefficients.from_config(LlamaConfig(), "smell"), "`modality` ('smell') must be one of text"),
        (lambda: CostModel({"smell": Coefficients(1.0)}), "Modalities ['smell'] must be some of"),
        (lambda: CostModel({"text": Coefficients(1.0)}).costs("image", [1]), "No coefficients for modality 'image'"),
        (lambda: CostModel({"video": Coefficients(1.0)}).costs("video", [1]), "`segments` is missing for video"),
        (lambda: CostModel({"text": Coefficients(1.0)}).costs(["text"], [1, 2]), "must be equally many"),
        (lambda: Coefficients(1.0).costs([1.0, -2.0]), "`patches` ([1.0, -2.0]) must be"),
        (lambda: Coefficients(1.0).costs([1.0], 0), "`segments` (0.0) must be a number"),
        (lambda: Coefficients(-1.0), "Coefficient -1.0 must be finite"),
        (lambda: Coefficients(1.0, ((1.0, 0),)), "Window (0) must be above 0"),
        (lambda: Coefficients.fit([5, 5], [1.0, 1.0]), "at least two different sizes"),
        (lambda: Coefficients.fit([5, 6], [1.0, 0.0]), "must be finite and above 0"),
    ],
)  # fmt: skip
def test_errors_name_value_rule_and_way_out(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_no_items_cost_nothing():
    assert CostModel.from_config(Qwen2_5_VLConfig()).costs("image", []).shape == (0,)
