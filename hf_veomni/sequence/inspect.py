"""Can this model be cut along its sequence? Finds the places to cut, or says which rule the model breaks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Mapping, Set
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.sequence.attention import merges_keys
from hf_veomni.sequence.backbone import asks_interface, attends, find_layers, notes_shape, own_names, views_as_row
from hf_veomni.sequence.hints import attention_paths, backbone_paths, hint_rule
from hf_veomni.sequence.mixers.table import Mixer, find_mixers, find_unknown
from hf_veomni.sequence.ulysses import head_layout

# Modules that carry a state along the sequence, or pick tokens, outside of the attention interface: by their names, so
# that one without a rule (`families.MIXERS`) is refused and not overlooked.
_LOOKS_LIKE_A_MIXER = re.compile(
    r"Mamba|SSM|DeltaNet|LinearAttention|LightningAttention|Recurrent|R(?i:wkv)|Hyena|TimeMix|ShortConv|Conv1d$|Indexer"
    r"|R(?i:glru)|Retention|(?i:xlstm)"
)
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# What layers of hybrid models are called besides; their mixers are looked at one by one.
_HYBRID_TYPES = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "recurrent", "moe", "mlp"}


@dataclass(frozen=True)
class ShardPoints:
    """Where a decoder-only backbone is cut.

    Attributes:
        decoder: the backbone; embeddings, masks and rope are made at full length at its top.
        layers: its layers, which see this rank's tokens only.
        attentions: the attention modules inside the layers.
        rotary: the modules at the top of the backbone that make rope tables.
        container: the module whose forward runs the layers: the backbone, or one inside of it (`BertModel.encoder`).
        mixers: modules inside the layers that carry a state along the sequence, and how they can be run.
        max_counted: tokens up to which layers that count positions themselves change nothing; None if none does.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    attentions: tuple[nn.Module, ...]
    rotary: tuple[nn.Module, ...]
    container: nn.Module
    mixers: tuple[Mixer, ...] = ()
    max_counted: int | None = None


def _refuse(model: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} has no shard points for sequence parallelism or packed sequences: {reason}. Use "
        "sp_size=1 with one document a row for it."
    )


def _decoder(
    model: PreTrainedModel, gathered: Container[nn.Module], names: Mapping[nn.Module, str]
) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    decoder = hf.find_backbone(model)
    # For what is no decoder, transformers' lookup may lead to the head (`decoder` of ModernBERT's).
    stacks = [decoder, model.base_model] if not getattr(model.config, "is_encoder_decoder", False) else [decoder]
    decoder, found = next(((s, f) for s in stacks if (f := find_layers(s, gathered)) is not None), (decoder, None))
    if found is None:
        hint = hint_rule(backbone_paths(decoder, names))
        raise _refuse(
            model,
            f"its backbone ({type(decoder).__name__}) has no list of layers, or several, in which attention asks "
            f"transformers' AttentionInterface{hint}",
        )
    return decoder, *found


# A layer that counts its tokens itself would count those of its slice. Llama 4's query scaling is known to leave the
# first `max_counted` tokens as they are.
_COUNTERS = {"arange", "cumsum"}


def _check_layer(
    model: nn.Module, name: str, layer: nn.Module, attentions: list[nn.Module], mixers: list[Mixer]
) -> None:
    known = {module for mixer in mixers for module in mixer.module.modules()}
    if (path := find_unknown(layer, _LOOKS_LIKE_A_MIXER, known.union(attentions))) is not None:
        raise _refuse(
            model,
            f"`{'.'.join(filter(None, (name, path)))}` ({type(layer.get_submodule(path)).__name__}) mixes tokens "
            f"outside of the attention interface, and no adapter knows it{hint_rule([f'*.{path}'])}",
        )
    for path, module in layer.named_modules(prefix=name):
        kind = type(module).__name__
        if module in known:
            continue
        if hasattr(module, "expert_capacity") and "cumsum" in own_names(type(module)):
            raise _refuse(model, f"`{path}` ({kind}) drops tokens by their place in the row (expert capacity)")
        if not any(part in attentions or part in known for part in module.modules()):
            continue
        counters = _COUNTERS & own_names(type(module))
        if counters and not hasattr(module, "attn_temperature_tuning"):
            hint = hint_rule([path] if module is not layer else [])
            raise _refuse(model, f"`{path}` ({kind}) counts positions inside the layer ({sorted(counters)}){hint}")
        if module in attentions and merges_keys(module):
            raise _refuse(model, f"`{path}` ({kind}) attends to its own row and to another one in one call")
        if module in attentions and asks_interface(module) and hf.reads_attention_mask(module):
            raise _refuse(
                model, f"`{path}` ({kind}) makes an attention mask of its own from that of the row{hint_rule([path])}"
            )
    left = _unseen(layer, name, known.union(attentions)) if attentions or mixers else []
    if left:
        kind = type(layer.get_submodule(left[0].removeprefix(f"{name}."))).__name__
        raise _refuse(
            model,
            f"`{left[0]}` ({kind}) attends, by its name, without asking transformers' AttentionInterface"
            f"{hint_rule(left)}",
        )
    if not attentions and not mixers and getattr(layer, "block_type", None) not in ("moe", "mlp"):
        raise _refuse(
            model,
            f"`{name}` ({type(layer).__name__}) has no module that asks transformers' AttentionInterface for its "
            f"attention{hint_rule(attention_paths(layer, name))}",
        )


def _unseen(layer: nn.Module, name: str, known: Set[nn.Module]) -> list[str]:
    """Names of what attends in a layer and is not in `known`; cross-attention looks at full keys for each token."""
    found = []
    for path in attention_paths(layer, name):
        module = layer.get_submodule(path.removeprefix(f"{name}."))
        inside = any(module in other.modules() for other in known)
        if not inside and known.isdisjoint(module.modules()) and "Cross" not in type(module).__name__:
            found.append(path)
    return found


def _check_backbone(model: nn.Module, decoder: nn.Module, container: nn.Module, layers: nn.ModuleList) -> None:
    """Raises UnsupportedError where the backbone does more with full rows than to run its layers on them."""
    if notes_shape(decoder) and not views_as_row(decoder):
        raise _refuse(model, "its backbone reshapes what its layers return to the shape of the full row")
    if "pooling_mask" in inspect.unwrap(type(decoder).forward).__code__.co_varnames:
        raise _refuse(model, "its backbone pools the tokens of the full row under a mask of its own")
    if any(getattr(module, "trigram_input", False) for module in decoder.modules()):
        raise _refuse(model, "its embeddings mix neighbours, so the last token would see the padding behind it")
    if any("Reversible" in name for name in own_names(type(container))):
        raise _refuse(model, "its layers are reversible: their backward computes the inputs from the outputs")
    if any("block_states" in inspect.signature(type(layer).forward).parameters for layer in layers):
        raise _refuse(model, "its backbone collects the states of earlier blocks, at the length of the full row")


def _check_types(
    model: nn.Module, config: object, layers: Mapping[str, nn.Module], gathered: Container[nn.Module]
) -> None:
    """Raises UnsupportedError for layers of an unknown type in which some attention is not on full documents."""
    types = getattr(config, "layer_types", None) or ()
    for (name, layer), kind in zip(layers.items(), types, strict=False):
        if kind in _LAYER_TYPES | _HYBRID_TYPES:
            continue
        open_paths = [p for p in attention_paths(layer, name) if not _is_gathered(p, name, layer, gathered)]
        if open_paths or not any(module in gathered for module in layer.modules()):
            raise _refuse(
                model,
                f"its `layer_types` hold '{kind}', which is not attention over the row{hint_rule(open_paths)}",
            )


def _is_gathered(path: str, name: str, layer: nn.Module, gathered: Container[nn.Module]) -> bool:
    module = layer
    for part in path.removeprefix(f"{name}.").split("."):
        module = getattr(module, part)
        if module in gathered:
            return True
    return False


def find_shard_points(
    model: PreTrainedModel, gathered: Set[nn.Module] = frozenset(), names: Mapping[nn.Module, str] | None = None
) -> ShardPoints:
    """The places to cut a transformers model.

    Args:
        gathered: the modules that the plan runs on full documents.
        names: of all modules, as the plan knows them; an encoder's are those in the full model.

    Raises:
        UnsupportedError: names the rule that the model breaks.
    """
    names = {module: name for name, module in model.named_modules()} if names is None else names
    decoder, container, layers = _decoder(model, gathered, names)
    _check_backbone(model, decoder, container, layers)
    _check_types(model, getattr(decoder, "config", None), {names[layer]: layer for layer in layers}, gathered)
    attentions: list[nn.Module] = []
    mixers = find_mixers([(names[layer], layer) for layer in layers], gathered)
    full = {module for mixer in mixers if mixer.scheme == "gather" for module in mixer.module.modules()}
    for layer in layers:
        found = [module for module in layer.modules() if attends(module) and module not in full]
        inside = set(layer.modules())
        _check_layer(model, names[layer], layer, found, [mixer for mixer in mixers if mixer.module in inside])
        attentions.extend(found)
    inside = {module for layer in layers for module in layer.modules()}
    rotary = [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding") and m not in full]
    if (module := next((m for m in rotary if m in inside), None)) is not None:
        hint = hint_rule([names[module].rpartition(".")[0]])
        raise _refuse(model, f"its positions enter through rotary embeddings inside of the layers{hint}")
    counted = [limit for module in attentions if (limit := hf.first_scaled_position(module)) is not None]
    return ShardPoints(
        decoder, layers, tuple(attentions), tuple(rotary), container, tuple(mixers), min(counted, default=None)
    )


def check_heads(model: PreTrainedModel, sp_size: int) -> None:
    """Raises UnsupportedError where `sp_size` exceeds the number of query heads, for layers that share them out."""
    heads = getattr(hf.text_config(model), "num_attention_heads", None)
    if heads is not None:
        head_layout(heads, heads, sp_size)
