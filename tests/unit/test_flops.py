"""The FLOP model against torch's own counter on stock models: forward and backward, nothing of ours in the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from hf_veomni.errors import UnsupportedError
from hf_veomni.flops import StepFlops, device_peak, token_places
from tests.models import build_model, packed_batch, padded_batch

# Eager attention multiplies every query with every key of its row, whatever the mask: pairs of 2 rows of 24 tokens.
ROWS, SIZE = 2, 24
FAMILIES = ["llama", "llama_tied", "llama_uneven", "llama_mqa", "qwen3_sliding", "mistral", "gemma2", "gpt_oss"]
FAMILIES += ["deepseek_v3", "qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "minimax_m2", "ernie4_5_moe"]
FAMILIES += ["qwen3_vl_moe", "phi3", "olmo2", "granitemoe"]


def plain(name: str) -> Any:
    model = build_model(name, attention="eager")
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    for module in modules:
        module.config._experts_implementation = "eager"
    return model


def counted(model: nn.Module, batch: dict[str, Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    return float(counter.get_total_flops())


def rows() -> dict[str, Any]:
    ids = torch.randint(3, 97, (ROWS, SIZE), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def with_all_pairs(flops: StepFlops) -> float:
    """As eager attention computes it: rows of SIZE tokens, all pairs."""
    return ROWS * (flops.per_token * SIZE + sum(kind.per_pair for kind in flops.attention) * SIZE**2)


@pytest.mark.parametrize("name", FAMILIES)
def test_step_equals_the_counter(name: str) -> None:
    model = plain(name)
    flops = StepFlops.from_model(model)
    # Rotary tables are a matmul of positions and frequencies to torch.
    assert with_all_pairs(flops) == pytest.approx(counted(model, rows()), rel=2e-3)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_moe"])
def test_lora_pays_no_weight_gradients_of_frozen_weights(name: str) -> None:
    model: Any = plain(name)
    targets = ["q_proj", "v_proj"] if name != "deepseek_v3" else ["q_b_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    model.enable_input_require_grads()
    flops = StepFlops.from_model(model)
    assert with_all_pairs(flops) == pytest.approx(counted(model, rows()), rel=2e-3)
    trained = StepFlops.from_model(plain(name))
    assert flops.per_token < 0.75 * trained.per_token
    assert [kind.per_pair for kind in flops.attention] == [kind.per_pair for kind in trained.attention]


def test_nothing_goes_back_below_the_lowest_trained_layer() -> None:
    model = plain("llama")
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    assert with_all_pairs(StepFlops.from_model(model)) == pytest.approx(counted(model, rows()), rel=2e-3)


def test_experts_count_those_that_a_token_goes_to() -> None:
    """Llama 4's own code runs every token through every expert: of 2 the model counts 1."""
    model = plain("llama4")
    unused = 2 * 3 * 2 * ROWS * SIZE * (3 * 64 * 80)  # layers, passes, FLOPs a weight
    assert with_all_pairs(StepFlops.from_model(model)) + unused == pytest.approx(counted(model, rows()), rel=2e-3)


def test_attention_counts_the_causal_half_of_each_document() -> None:
    flops = StepFlops.from_model(plain("llama"))
    (kind,) = flops.attention
    tokens, total = flops.of_batch(packed_batch([5, 8, 3]))
    pairs = sum(n * (n + 1) / 2 for n in (5, 8, 3))
    assert tokens == 16 and total == 16 * flops.per_token + pairs * kind.per_pair
    tokens, total = flops.of_batch(padded_batch([5, 8, 3]))
    assert tokens == 16 and total == 16 * flops.per_token + pairs * kind.per_pair


def test_windows_and_chunks_count_what_is_seen() -> None:
    flops = StepFlops.from_model(plain("qwen3_sliding"))
    sliding, full = sorted(flops.attention, key=lambda kind: kind.size, reverse=True)
    assert (sliding.kind, sliding.size, full.kind) == ("sliding", 7, "causal")
    _, total = flops.of_batch(packed_batch([12, 4]))
    seen = sum(min(i + 1, 7) for i in range(12)) + 10
    assert total == 16 * flops.per_token + seen * sliding.per_pair + (78 + 10) * full.per_pair
    chunked = next(kind for kind in StepFlops.from_model(plain("llama4")).attention if kind.kind == "chunked")
    place, length = token_places(packed_batch([16]))
    assert chunked.flops(place, length) == (28 + 28 + 3) * chunked.per_pair


def test_padding_on_the_left_has_no_place() -> None:
    place, length = token_places({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[0, 0, 1, 1]])})
    assert place[length > 0].tolist() == [0, 1] and length.tolist() == [[0, 0, 2, 2]]


def test_cumulative_lengths_tell_documents() -> None:
    batch = {"input_ids": torch.ones(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}
    place, length = token_places(batch)
    assert place.tolist() == [[0, 1, 0, 1, 2]] and length.tolist() == [[2, 2, 3, 3, 3]]


def test_encoders_count_their_patches() -> None:
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 200}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]}},
        vision_config={**vision, "fullatt_block_indexes": [0, 1], "window_size": 112, "patch_size": 14},
        image_token_id=150,
        vision_start_token_id=151,
    )
    config._attn_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config)
    ids = torch.full((1, 30), 7)
    ids[0, 3], ids[0, 4:20] = 151, 150
    batch = {"input_ids": ids, "labels": ids, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    batch["pixel_values"] = torch.randn(64, 3 * 2 * 14 * 14)
    with FlopCounterMode(display=False) as counter:
        model(**batch, mm_token_type_ids=(ids == 150).int(), use_cache=False).loss.backward()
    found = counter.get_flop_counts()
    blocks = sum(sum(v.values()) for k, v in found.items() if ".blocks." in k and k.count(".") == 4)
    flops = StepFlops.from_model(model)
    assert flops.encoders["image"].costs([64]).sum() == pytest.approx(blocks, rel=2e-2)
    _, without = flops.of_batch({"input_ids": ids})
    _, total = flops.of_batch(batch)
    assert total - without == flops.encoders["image"].costs([64]).sum()


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(UnsupportedError, match="conv1d.weight.* are not counted"):
        StepFlops.from_model(build_model("qwen3_next"))
    with pytest.raises(UnsupportedError, match="audio encoder is unknown"):
        StepFlops.from_model(plain("llama")).of_batch({**rows(), "input_features": torch.ones(1, 80, 30)})


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_go_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert device_peak("cuda") == peak
    assert device_peak("cpu") is None
