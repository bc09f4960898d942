"""A tiny model of any family of the installed transformers, with random weights and fixed seeds.

Sizes are set by the names of a config's fields, on the config and on everything inside of it; what a family needs
besides stands in `overrides.OVERRIDES`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep.overrides import CLASSES, OVERRIDES

VOCABULARY = 97
MAX_PARAMETERS = 100_000_000

# (pattern of a field's name, new value for an int that is larger); the first match decides.
_SIZES: list[tuple[str, int]] = [
    (r"_token_id$|_token_index$|_id$|_index$|_seconds$|^chunk_size_feed_forward$|_layer_start_index$", -1),
    (r"query_pre_attn_scalar", 16),
    (r"vocab_size$|_vocab_size|^vocab|^num_embeddings$", VOCABULARY),
    (r"max_position_embeddings$|^n_positions$|^n_ctx$|max_source_positions|max_target_positions|^max_seq_len$", 512),
    (r"experts_per_tok|moe_top_?k$|^moe_k$|num_selected|num_experts_per_token", 2),
    (r"n_routed_experts|num_experts$|num_local_experts|moe_num_experts$|^n_experts$", 4),
    (r"n_shared_experts|num_shared_experts|topk_group|first_k_dense_replace", 1),
    (r"^n_group$|num_expert_group", 2),
    (r"linear_num_key_heads|num_key_value_heads|kv_n_heads|num_kv_heads|kv_heads$", 2),
    (r"linear_num_value_heads|index_n_heads|linear_num_heads", 4),
    (r"rope_head_dim", 8),
    (r"v_head_dim", 12),
    (r"kv_lora_rank|index_topk$|o_lora_rank|^rotary_dim$", 16),
    (r"q_lora_rank", 24),
    (r"linear_.*head_dim", 8),
    (r"head_dim$|^d_kv$|kv_channels|^d_head$|dim_head$|head_size$", 16),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"d_state$|state_size", 16),
    (r"heads?$", 4),
    (r"(layers|^n_layers?|depth|^num_blocks|^encoder_depth)$", 2),
    (
        r"intermediate|ffn_dim|ffn_hidden|^d_ff$|^dff$|mlp_dim|^d_inner$|dim_ff|inner_dim|feedforward_dim|expert_dim",
        96,
    ),
    (r"sliding_window(_size)?$|attention_chunk_size|local_attention$", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$|emb_dim|embedding_size|projection_dim|proj_dim", 64),
    (r"out_hidden_size|output_dim|projector.*dim|vision_output_dim|embedding_dim|width$", 64),
]
# Fields that are None by default where a model needs a number.
_UNSET = {
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
_PATTERNS = [(re.compile(pattern), value) for pattern, value in _SIZES]
_RANDOM = re.compile(r"drop|jitter")
_PREFERENCE = (
    ("causal", "MODEL_FOR_CAUSAL_LM"),
    ("multimodal", "MODEL_FOR_IMAGE_TEXT_TO_TEXT"),
    ("multimodal", "MODEL_FOR_MULTIMODAL_LM"),
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    ("seq2seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    ("masked", "MODEL_FOR_MASKED_LM"),
    ("base", "MODEL"),
)
# Classes whose base CausalLM form is not how anybody uses them: their own kind is swept instead.
_ENCODERS = re.compile(r"^(MaskedLM|base)$")


class Unbuildable(Exception):
    """Why the sweep has no model of a family."""


class NoText(Exception):
    """Why sequence parallelism has nothing to do in a family."""


def folder_of(model_type: str) -> str:
    """The folder of transformers/models that a config type comes from."""
    return CONFIG_MAPPING[model_type].__module__.split(".")[-2]


def choose_class(model_type: str) -> tuple[str, type[PreTrainedModel]]:
    """(kind, class): from the Auto mappings, masked before causal for encoders; else from the modeling module."""
    if model_type in CLASSES:
        kind, name = CLASSES[model_type]
        return kind, _find(model_type, name)
    found = []
    for kind, mapping in _PREFERENCE:
        names = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type)
        for name in [names] if isinstance(names, str) else list(names or ()):
            found.append((kind, name))
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    speech = modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.get(model_type)
    if speech or seq2seq:  # bart and whisper have a causal class too
        return "seq2seq", _find(model_type, speech or seq2seq)
    if masked and found and found[0][0] == "causal":  # bert
        return "masked", _find(model_type, masked)
    if found:  # rather a class with the config of this type than the text part of one
        own = [(kind, c) for kind, name in found if _fits(c := _find(model_type, name), model_type)]
        return own[0] if own else (found[0][0], _find(model_type, found[0][1]))
    return _search(model_type)


def _find(model_type: str, name: str) -> type[PreTrainedModel]:
    found = getattr(transformers, name, None)
    if found is None:
        found = getattr(_module(model_type), name)
    if not (inspect.isclass(found) and issubclass(found, PreTrainedModel)):
        raise Unbuildable(f"{name} needs a package that is not installed")
    return found


def _fits(found: type[PreTrainedModel], model_type: str) -> bool:
    return getattr(found, "config_class", None) is CONFIG_MAPPING[model_type]


def _module(model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type]
    return importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))


def _search(model_type: str) -> tuple[str, type[PreTrainedModel]]:
    config = CONFIG_MAPPING[model_type]
    try:
        module = _module(model_type)
    except ImportError as error:
        raise NoText(f"has no modeling module ({str(error).splitlines()[0][:80]})") from error
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and getattr(c, "config_class", None) is config
        and "forward" in dir(c) and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    for wanted, kind in (("ForConditionalGeneration", "multimodal"), ("ForCausalLM", "causal"), ("", "base")):
        for found in classes:
            if wanted in found.__name__ and "input_ids" in inspect.signature(found.forward).parameters:
                return kind, found
    raise NoText("has no class that takes token ids")


def _small(name: str, value: int) -> int:
    for pattern, size in _PATTERNS:
        if pattern.search(name):
            return value if size < 0 or value <= size else size
    return value


def _pick(values: list[list[Any]]) -> list[int]:
    """Indices of layers such that each combination of per-layer values appears once, and at least two layers."""
    seen: dict[Any, int] = {}
    for index, key in enumerate(zip(*[map(repr, v) for v in values], strict=True)):
        seen.setdefault(key, index)
    picked = sorted(seen.values())[:6]
    extra = [i for i in range(len(values[0])) if i not in picked]
    return sorted(picked + extra[: max(0, 2 - len(picked))])


def _rope(value: dict[str, Any], fields: dict[str, Any], mrope: bool) -> dict[str, Any]:
    """Rope parameters for a head width of 16."""
    value = dict(value)
    if mrope and "rope_theta" in value:
        partial = value.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
        half = int(16 * partial) // 2
        value["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    for key, inner in value.items():
        if isinstance(inner, dict):
            value[key] = _rope(inner, fields, mrope)
    return value


def _has_mrope(config: PreTrainedConfig) -> bool:
    if "text" not in type(config).__name__.lower() and "talker" not in type(config).__name__.lower():
        return False
    try:
        return "mrope_section" in inspect.getsource(importlib.import_module(_modeling(type(config))))
    except (ImportError, OSError):
        return False


def _modeling(config_class: type[PreTrainedConfig]) -> str:
    return config_class.__module__.replace(".configuration_", ".modeling_")


def shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A small config of the same class; `overrides` by field, with dictionaries for configs inside."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in ("transformers_version",)}
    depth = next(
        (
            fields[k]
            for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(fields.get(k), int)
        ),
        -1,
    )
    per_layer = {
        k: list(v) for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 2
    }
    chosen = _pick(list(per_layer.values())) if per_layer else [0, 1]
    small = _customised(config, fields)
    heads = [fields.get(k) for k in ("num_attention_heads", "num_heads", "n_head")]
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            inner = overrides.get(name)
            small[name] = shrink(value, inner if isinstance(inner, dict) else {})
        elif name in per_layer:
            small[name] = [per_layer[name][i] for i in chosen]
        elif value is None and name in _UNSET:
            small[name] = _UNSET[name]
        elif isinstance(value, bool) or (name in ("head_dim", "qk_head_dim") and "qk_rope_head_dim" in fields):
            continue
        elif isinstance(value, dict) and "rope" in name:
            small[name] = _rope(value, fields, _has_mrope(config))
        elif isinstance(value, float) and _RANDOM.search(name):
            small[name] = 0.0
        elif isinstance(value, int):
            size = max(64, _small(name, value)) if name == "max_position_embeddings" else _small(name, value)
            if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value > 2:
                size = len(chosen)
            if name == "num_key_value_heads" and value in heads:
                size = min(value, 4)
            if size != value or name in small:
                small[name] = size
    _set_tokens(fields, small)
    kept = {k: v for k, v in overrides.items() if not isinstance(small.get(k), PreTrainedConfig)}
    return type(config)(**{**small, **kept})


def _customised(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields in which a config inside of another one differs from the defaults of its class."""
    try:
        own = vars(type(config)())
    except Exception:  # some configs cannot be made without arguments
        return {}
    skipped = ("head_dim", "qk_head_dim") if "qk_rope_head_dim" in fields else ()
    simple = {k: v for k, v in fields.items() if isinstance(v, (bool, int, float, str)) and k not in skipped}
    return {k: v for k, v in simple.items() if k in own and own[k] != v}


def _set_tokens(fields: dict[str, Any], small: dict[str, Any]) -> None:
    """Special tokens inside the small vocabulary: 0 to 2 for the usual three, from the end downwards for the rest."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    free = iter(range(VOCABULARY - 1, 79, -1))
    for name, value in fields.items():
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            if name in usual:
                small[name] = usual[name]
            elif isinstance(value, int) and value >= 80:
                small[name] = next(free, 80)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's own config, small."""
    base = OVERRIDES.get(model_type, {})
    default = CONFIG_MAPPING[model_type](**base.get("__init__", {}))
    config = shrink(default, {k: v for k, v in base.items() if k != "__init__"})
    for inner in _configs(config):
        for name in ("apply_spec_augment", "use_cache"):
            if hasattr(inner, name):
                setattr(inner, name, False)
    return config


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def build(config: PreTrainedConfig, model_class: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """The model in training mode, weights large enough that attention is not uniform and no gradient is tiny."""
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise Unbuildable(f"{size / 1e6:.0f} million parameters after shrinking")
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.empty(parameter.shape).normal_(0, 0.08, generator=generator)
                parameter.copy_(noise if parameter.dim() > 1 else noise + parameter)
    for module in model.modules():  # rates that no config field sets
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train()


def use_plain_experts(config: PreTrainedConfig) -> None:
    """Experts as a loop of matmuls, which every dtype has."""
    for inner in _configs(config):
        inner._experts_implementation = "eager"
