"""Composed models on disk, and parts that come from checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    JanusVQVAE,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    WhisperModel,
)

from hf_veomni import OmniModel, build_omni_model
from tests.unit.omni.parts import SIGLIP, build, mixed_row, settings


def _same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    wanted, found = one.state_dict(), other.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("auto", [OmniModel, AutoModel, AutoModelForCausalLM])
def test_round_trip_is_bit_equal(auto: type, tied: bool, tmp_path: Path) -> None:
    values = settings(vision={"freeze": True})
    values["foundation"]["config"] = {**values["foundation"]["config"], "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = build_omni_model(values)
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is OmniModel
    assert not any(info.values()), info
    _same(model, loaded)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1]
    assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
    batch = mixed_row()
    assert torch.equal(model.eval()(**batch).loss, loaded.eval()(**batch).loss)


def test_parts_come_from_checkpoints(tmp_path: Path) -> None:
    model = build()
    parts = {
        "foundation": model.foundation,
        "vision": model.encoders["vision"].tower,
        "image": model.decoders["image"].vq,
        "audio": WhisperModel(model.config.audio_config),
    }
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    values = settings()
    for group, name in (("encoders", "vision"), ("encoders", "audio"), ("decoders", "image")):
        values[group][name] = {"checkpoint": str(tmp_path / name), "token_id": values[group][name]["token_id"]}
    values["foundation"] = {"checkpoint": str(tmp_path / "foundation")}
    built = build_omni_model(values)
    assert isinstance(built.foundation, LlamaForCausalLM)
    assert isinstance(built.decoders["image"].vq, JanusVQVAE)
    _same(parts["foundation"], built.foundation)
    _same(parts["vision"], built.encoders["vision"].tower)
    _same(parts["image"], built.decoders["image"].vq)
    _same(parts["audio"].get_encoder(), built.encoders["audio"].tower)
    built.save_pretrained(tmp_path / "whole")
    assert str(tmp_path) not in (tmp_path / "whole/config.json").read_text()
    _same(built, OmniModel.from_pretrained(tmp_path / "whole"))
    built.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert OmniModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_of_a_model_with_text_the_tower_is_taken(tmp_path: Path) -> None:
    tower = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    text = {**tower, "vocab_size": 20, "max_position_embeddings": 8}
    whole = SiglipModel(SiglipConfig(vision_config=tower, text_config=text))
    whole.save_pretrained(tmp_path)
    built = build_omni_model(settings() | {"encoders": {"vision": {"checkpoint": str(tmp_path), "token_id": 90}}})
    mine = built.encoders["vision"].tower.state_dict()
    assert mine and all(torch.equal(value, whole.vision_model.state_dict()[name]) for name, value in mine.items())
    other = settings()["foundation"]["config"]
    build_omni_model({"foundation": {"config": {**other, "hidden_size": 64}}}).foundation.save_pretrained(
        tmp_path / "l"
    )
    (tmp_path / "l/model.safetensors").rename(tmp_path / "l/x")
    with pytest.raises(OSError):
        build_omni_model({"foundation": {"checkpoint": str(tmp_path / "l")}})
