"""`OmniConfig`: which parts an omni model has, each with a transformers config of its own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_veomni import hf
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.yaml_files import read_mapping

# Modality -> the keyword of the model's forward that carries it.
ENCODERS = {"vision": "pixel_values", "audio": "input_features"}
DECODERS = {"image": "image_codes", "audio": "audio_codes"}
PROJECTORS = ("linear", "mlp")

# Part -> where its config is kept.
CONFIG_FIELDS = {
    "foundation": "text_config",
    "encoders.vision": "vision_config",
    "encoders.audio": "audio_config",
    "decoders.image": "image_config",
    "decoders.audio": "codec_config",
}
_ENCODER_KEYS: dict[str, Any] = {"token_id": None, "projector": "mlp", "freeze": False}
_DECODER_KEYS: dict[str, Any] = {"token_id": None, "loss_weight": 1.0, "freeze": False}
# Part -> its keys with their defaults; None: must be given.
_KEYS: dict[str, dict[str, Any]] = {
    "foundation": {"freeze": False},
    "encoders.vision": _ENCODER_KEYS,
    "encoders.audio": {**_ENCODER_KEYS, "pool": 1},
    "decoders.image": _DECODER_KEYS,
    "decoders.audio": {**_DECODER_KEYS, "frames": 25},
}
# What transformers itself hands to configs beside their fields.
_STOCK_KEYS = {
    "name_or_path", "attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "num_labels",
    "model_type", "transformers_version", "rope_theta", "rope_scaling", "partial_rotary_factor",
}  # fmt: skip


def _check_keys(values: object, valid: Iterable[str], where: str) -> None:
    valid = sorted(valid)
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` ({values!r}) must be a mapping with keys of {valid[:12]}.")
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
            raise ValueError(f"Unknown key '{key}' in `{where}`: did you mean '{near[0]}'?.")


def _config_keys(kind: type[PreTrainedConfig]) -> set[str]:
    """The keys that a config takes: its fields, and what the model's code reads of it beside them (`head_dim`)."""
    generation = GenerationConfig._get_default_generation_params()
    known = {f.name for f in fields(kind)} | set(kind.attribute_map) | set(generation) | _STOCK_KEYS
    return known | hf.keys_read_by_model(kind)


def _part_config(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The config of a part from its `config` or its `checkpoint`."""
    if ("config" in values) == ("checkpoint" in values):
        raise ValueError(f"`{where}` must have one of 'config' and 'checkpoint', and has {sorted(values)}.")
    given = values.get("config")
    if "checkpoint" in values:
        config = AutoConfig.from_pretrained(values["checkpoint"])
        config.name_or_path = ""  # else it is saved with the composed model
        return config
    if isinstance(given, PreTrainedConfig):
        return given
    kind = str(given.get("model_type")) if isinstance(given, Mapping) else "none"
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=1, cutoff=0.0)
        raise ValueError(f"`{where}.config` needs a `model_type` of transformers, not {kind!r}: such as '{near[0]}'.")
    assert given is not None
    _check_keys(given, _config_keys(CONFIG_MAPPING[kind]), f"{where}.config")
    return CONFIG_MAPPING[kind](**{key: value for key, value in given.items() if key != "model_type"})


def _check_options(options: Mapping[str, Any], where: str) -> None:
    token = options.get("token_id", 0)
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise ValueError(f"`{where}.token_id` ({token!r}) must be the id of the placeholder token, a number from 0.")
    if options.get("projector", "mlp") not in PROJECTORS:
        raise ValueError(f"`{where}.projector` ({options['projector']!r}) must be one of {list(PROJECTORS)}.")
    if not isinstance(options["freeze"], bool):
        raise ValueError(f"`{where}.freeze` ({options['freeze']!r}) must be true or false.")
    for name in {"pool", "frames"} & set(options):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{where}.{name}` ({value!r}) must be an integer from 1.")
    weight = options.get("loss_weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
        raise ValueError(f"`{where}.loss_weight` ({weight!r}) must be a number from 0.")


class OmniConfig(PreTrainedConfig):
    """Encoders, foundation and decoders of an `OmniModel`, by modality.

    Args:
        foundation: `config` (with a `model_type`) or `checkpoint` of a causal LM, and `freeze`.
        encoders: modality ("vision", "audio") -> `config` or `checkpoint` of the tower; `token_id` of the placeholder
            that stands for one feature; `projector` ("linear" or "mlp", default) from the tower's width to the
            foundation's; `freeze` for the tower (the projector is trained). Of "audio" also `pool`, neighbouring
            features whose mean is one token.
        decoders: modality ("image", "audio") -> `config` or `checkpoint` of the VQ model or codec; `token_id` of the
            placeholder that stands for one code; `loss_weight`; `freeze` for the embedding and the head of the codes
            (the VQ model itself is never trained). Of "audio" also `frames`, the length of what is generated.
        text_config, vision_config, audio_config, image_config, codec_config: where the configs of the parts are kept;
            a saved config has them in place of `config` and `checkpoint`.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a missing or impossible value.
    """

    model_type = "veomni"
    base_model_fsdp_plan = {}  # the foundation has its own
    keys_to_ignore_at_inference = [*hf.CACHE_NAMES]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model", optional=True),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "image_config": SubConfigSpec(config_class=AutoConfig, model_type="janus_vqgan", optional=True),
        "codec_config": SubConfigSpec(config_class=AutoConfig, model_type="mimi", optional=True),
    }

    foundation: dict | None = None
    encoders: dict | None = None
    decoders: dict | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_config: dict | PreTrainedConfig | None = None
    codec_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = False

    @override
    def __post_init__(self, **kwargs: object) -> None:
        public = {key: value for key, value in kwargs.items() if not key.startswith("_")}
        _check_keys(public, _config_keys(type(self)), "OmniConfig")
        # Where the weights of each part come from: for `build_omni_model`, not kept in files.
        self._checkpoints: dict[str, str] = {}
        self.foundation = self._part("foundation", self.foundation or {})
        self.encoders = self._parts("encoders", self.encoders or {}, ENCODERS)
        self.decoders = self._parts("decoders", self.decoders or {}, DECODERS)
        super().__post_init__(**kwargs)
        for name in ("vision_config", "audio_config"):  # of a model with a text side: its tower
            full = getattr(self, name)
            setattr(self, name, getattr(full, name, full))
        if self.text_config is not None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
            self._check_tokens()

    def _part(self, where: str, values: Any) -> dict[str, Any]:
        keys, field = _KEYS[where], CONFIG_FIELDS[where]
        _check_keys(values, [*keys, "config", "checkpoint"], where)
        if "config" in values or "checkpoint" in values:
            setattr(self, field, _part_config(values, where))
            if "checkpoint" in values:
                self._checkpoints[where] = str(values["checkpoint"])
        elif values and getattr(self, field) is None:
            raise ValueError(f"`{where}` must have one of 'config' and 'checkpoint', and has {sorted(values)}.")
        missing = [key for key, default in keys.items() if default is None and key not in values]
        if missing:
            raise ValueError(f"`{where}` lacks {missing}: it has {sorted(values)}.")
        options = {key: values.get(key, default) for key, default in keys.items()}
        _check_options(options, where)
        return options

    def _parts(self, group: str, parts: Any, known: Iterable[str]) -> dict[str, Any]:
        _check_keys(parts, known, group)
        return {name: self._part(f"{group}.{name}", part) for name, part in parts.items()}

    def _check_tokens(self) -> None:
        seen: dict[int, str] = {}
        size = getattr(self.get_text_config(decoder=True), "vocab_size", None)
        for name, part in (*(self.encoders or {}).items(), *(self.decoders or {}).items()):
            token = part["token_id"]
            if token in seen:
                raise ValueError(f"`token_id` ({token}) stands for {seen[token]} and for {name}: give each its own.")
            if size is not None and token >= size:
                raise ValueError(f"`token_id` ({token}) of {name} must be below the foundation's vocab_size ({size}).")
            seen[token] = name

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> OmniConfig:
        """A config from a yaml file of the constructor's arguments."""
        return cls.parse(read_mapping(path, "Config file", "foundation: {checkpoint: folder}"))

    @classmethod
    def parse(cls, config: OmniConfig | Mapping[str, Any] | str | os.PathLike[str]) -> OmniConfig:
        """A config from an `OmniConfig`, a mapping or a yaml path. A foundation is needed."""
        if isinstance(config, (str, os.PathLike)):
            return cls.from_yaml(config)
        if isinstance(config, Mapping):
            config = cls(**config)
        if not isinstance(config, cls):
            raise ValueError(f"`config` ({config!r}) must be an OmniConfig, a mapping or the path of a yaml file.")
        if config.text_config is None:
            raise ValueError("`foundation` (None) must be given: `config` or `checkpoint` of a causal LM.")
        return config

    @override
    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, without the checkpoints that the parts came from."""
        values = super().to_dict()
        values.pop("_checkpoints", None)
        return values


require_overrides(OmniConfig)


__all__ = ["CONFIG_FIELDS", "DECODERS", "ENCODERS", "PROJECTORS", "OmniConfig"]
