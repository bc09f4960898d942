"""bf16 is what modules compute in, not what the model is given: float inputs reach its own arithmetic as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PatchTSTConfig, PatchTSTForPrediction, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.ranks.training import tiny_model


def _video_model() -> nn.Module:
    torch.manual_seed(0)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=2)
    vision |= dict(temporal_patch_size=1, fullatt_block_indexes=[0], window_size=8, tokens_per_second=25)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    text |= dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    ids = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def _video() -> dict[str, Tensor]:
    frames = 12
    grid = torch.tensor([[frames, 4, 4]])
    ids = torch.tensor([[5, 62, *[61] * (frames * 4), 63, 6, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 61).long() * 2,
        "pixel_values_videos": torch.randn(frames * 16, 3 * 1 * 2 * 2, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([1 / 1.7]),
    }


def _series_model() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(num_input_channels=2, context_length=16, patch_length=4, patch_stride=4)
    sizes |= dict(prediction_length=4, norm_type="layernorm")  # batch norms have statistics in fp32
    return PatchTSTForPrediction(PatchTSTConfig(d_model=16, num_hidden_layers=1, num_attention_heads=2, **sizes))


def _series() -> dict[str, Tensor]:
    return {"past_values": 1000 + torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(1))}


def _embedded() -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))}


# Model, inputs, and where what became of them arrives: the module and the name of its argument.
_CASES: dict[str, Any] = {
    "seconds of a video": (_video_model, _video, "model.language_model", "position_ids"),
    "time series": (_series_model, _series, "model.scaler", 0),
    "embeddings": (tiny_model, _embedded, "model", "inputs_embeds"),
}


def _arrived(model: nn.Module, kind: str, autocast: bool) -> Tensor:
    """What arrives; the model runs to its end."""
    _, inputs, name, argument = _CASES[kind]
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[argument] if isinstance(argument, int) else kwargs[argument]).detach().clone())

    model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs())
    assert output[0].isfinite().all()
    return found[0]


def _on_ranks(kind: str, autocast: bool, plan: str) -> Tensor:
    from hf_veomni import prepare_omni

    model = prepare_omni(_CASES[kind][0](), plan, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return _arrived(model, kind, autocast)


@pytest.mark.parametrize("kind", _CASES)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "FSDP's precision alone"])
def test_float_inputs_arrive_as_they_are(ranks, kind, autocast):
    expected = _arrived(_CASES[kind][0](), kind, True)
    for found in ranks(2).run(_on_ranks, kind, autocast, "dp_shard=2"):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def _position_of_a_trainer(plan: str) -> Tensor:
    """As `bf16=True` of the arguments makes it."""
    from types import SimpleNamespace

    from hf_veomni import OmniParallelismConfig, prepare_omni
    from hf_veomni.trainer.trainer import _precision

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", parallelism_config=OmniParallelismConfig(plan))
    model = prepare_omni(_video_model(), plan, mp_policy=_precision(SimpleNamespace(bf16=True)))
    return _arrived(accelerator.prepare(model), "seconds of a video", False)


def test_positions_of_a_video_under_sequence_parallelism(ranks):
    expected = _arrived(_video_model(), "seconds of a video", True)
    for found in ranks(2).run(_position_of_a_trainer, "sp=2"):
        assert torch.equal(found[..., : expected.shape[-1]], expected)
