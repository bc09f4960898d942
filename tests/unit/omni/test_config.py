"""What an `OmniConfig` takes, and how it refuses the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_veomni import OmniConfig, build_omni_model
from tests.unit.omni.parts import SIGLIP, TEXT, build, settings


def test_defaults_and_parts() -> None:
    config = OmniConfig(**settings())
    assert config.encoders["vision"] == {"token_id": 90, "projector": "mlp", "freeze": False}
    assert config.decoders["image"] == {"token_id": 92, "loss_weight": 1.0, "freeze": False}
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.vision_config.hidden_size == 16
    assert config.get_text_config(decoder=True).hidden_size == 32


def test_yaml_dict_and_config_build_the_same(tmp_path: Path) -> None:
    path = tmp_path / "omni.yaml"
    path.write_text(yaml.safe_dump(settings()))
    from_yaml, from_dict = OmniConfig.from_yaml(path), OmniConfig.parse(settings())
    assert from_yaml.to_dict() == from_dict.to_dict() == OmniConfig(**settings()).to_dict()
    names = {key: value.shape for key, value in build().state_dict().items()}
    for config in (path, str(path), from_dict):
        assert {key: value.shape for key, value in build_omni_model(config).state_dict().items()} == names


def test_a_saved_config_is_the_same(tmp_path: Path) -> None:
    config = OmniConfig(**settings(vision={"freeze": True, "projector": "linear"}, image={"loss_weight": 0.5}))
    config.save_pretrained(tmp_path)
    loaded = OmniConfig.from_pretrained(tmp_path)
    for name in ("foundation", "encoders", "decoders", "text_config", "vision_config", "audio_config", "image_config"):
        one, other = getattr(config, name), getattr(loaded, name)
        if not isinstance(one, dict):
            one, other = one.to_dict(), other.to_dict()
        assert one == other, name


def changed(path: str, value: Any) -> dict[str, Any]:
    """The settings with one entry replaced; None takes it out."""
    values = copy.deepcopy(settings())
    *way, last = path.split(".")
    at = values
    for key in way:
        at = at[key]
    at[last] = value
    if value is None:
        del at[last]
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("encoder", {}, "Unknown key 'encoder' in `OmniConfig`: did you mean 'encoders'"),
        ("encoders.visoin", {}, "Unknown key 'visoin' in `encoders`: did you mean 'vision'"),
        ("encoders.vision.freze", True, "Unknown key 'freze' in `encoders.vision`: did you mean 'freeze'"),
        ("decoders.image.loss_wieght", 1, "Unknown key 'loss_wieght' in `decoders.image`: did you mean 'loss_weight'"),
        ("foundation.config.hiden_size", 8, "Unknown key 'hiden_size' in `foundation.config`: .* 'hidden_size'"),
        ("foundation.config.model_type", "lama", "needs a `model_type` of transformers, not 'lama': such as 'llama'"),
        ("foundation.checkpoint", "x", "`foundation` must have one of 'config' and 'checkpoint'"),
        ("foundation.config", None, "`foundation` .None. must be given|must have one of"),
        ("encoders.vision.token_id", None, r"`encoders.vision` lacks \['token_id'\]"),
        ("encoders.vision.token_id", -1, r"`encoders.vision.token_id` \(-1\) must be the id"),
        ("encoders.vision.token_id", 97, r"`token_id` \(97\) of vision must be below .* \(97\)"),
        ("encoders.vision.token_id", 91, r"`token_id` \(91\) stands for vision and for audio"),
        ("encoders.vision.projector", "conv", r"`encoders.vision.projector` \('conv'\) must be one of"),
        ("encoders.vision.freeze", "yes", r"`encoders.vision.freeze` \('yes'\) must be true or false"),
        ("decoders.image.loss_weight", -1, r"`decoders.image.loss_weight` \(-1\) must be a number from 0"),
        ("encoders.audio.config", SIGLIP, "audio encoder must be of type 'whisper', not 'siglip_vision_model'"),
        ("decoders.image.config", TEXT, "image decoder must be of type 'janus_vqgan', not 'llama'"),
        ("encoders.vision.config", TEXT, "vision encoder of type 'llama' has `image_size` None"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_omni_model(changed(path, value))


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml' does not exist"):
        build_omni_model(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="must be an OmniConfig, a mapping or the path"):
        build_omni_model(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "granite"])
def test_an_inline_foundation_takes_what_its_model_reads(kind: str) -> None:
    config = OmniConfig(foundation={"config": {"model_type": kind, "head_dim": 24, "num_hidden_layers": 1}})
    assert config.text_config.head_dim == 24
    with pytest.raises(ValueError, match="Unknown key 'head_dims'"):
        OmniConfig(foundation={"config": {"model_type": kind, "head_dims": 24}})
