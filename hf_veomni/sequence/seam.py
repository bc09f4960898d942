"""Can this model be cut along its sequence? Finds the places to cut, or says which rule the model breaks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.sequence.cross import merges_keys
from hf_veomni.sequence.linear import Mixer, find_mixers, find_unknown
from hf_veomni.sequence.stack import asks_interface, attends, find_layers, notes_shape, own_names, views_as_row
from hf_veomni.sequence.ulysses import head_layout

# Modules that carry a state along the sequence, or pick tokens, outside of the attention interface.
_MIXERS = re.compile(
    r"Mamba|SSM|DeltaNet|LinearAttention|LightningAttention|Recurrent|R(?i:wkv)|Hyena|TimeMix|ShortConv|Conv1d$|Indexer"
    r"|R(?i:glru)|Retention|(?i:xlstm)"
)
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# What layers of hybrid stacks are called besides; their mixers are looked at one by one.
_HYBRID_TYPES = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "recurrent", "moe", "mlp"}


@dataclass(frozen=True)
class Seam:
    """Where a decoder-only stack is cut.

    Attributes:
        decoder: the stack; embeddings, masks and rope are made at full length at its top.
        layers: its layers, which see this rank's tokens only.
        attentions: the attention modules inside the layers.
        rotary: the modules at the top of the stack that make rope tables.
        holder: the module whose forward runs the layers: the stack, or one inside of it (`BertModel.encoder`).
        mixers: modules inside the layers that carry a state along the sequence, and how they can be run.
        max_counted: tokens up to which layers that count positions themselves change nothing; None if none does.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    attentions: tuple[nn.Module, ...]
    rotary: tuple[nn.Module, ...]
    holder: nn.Module
    mixers: tuple[Mixer, ...] = ()
    max_counted: int | None = None


def _refuse(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no seam for sequence parallelism or packed rows: {reason}. Use sp_size=1 with "
        "one document a row for it."
    )


def _decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    decoder = hf.decoder_stack(model)
    # For what is no decoder, transformers' lookup may lead to the head (`decoder` of ModernBERT's).
    stacks = [decoder, model.base_model] if not getattr(model.config, "is_encoder_decoder", False) else [decoder]
    decoder, found = next(((s, f) for s in stacks if (f := find_layers(s)) is not None), (decoder, None))
    if found is None:
        raise _refuse(
            model,
            f"its stack ({type(decoder).__name__}) has no list of layers, or several, in which attention asks "
            "transformers' AttentionInterface",
        )
    return decoder, *found


# A layer that counts its tokens itself would count those of its slice. Llama 4's query scaling is known to leave the
# first `max_counted` tokens as they are.
_COUNTERS = {"arange", "cumsum"}


def _check_layer(
    model: nn.Module, name: str, layer: nn.Module, attentions: list[nn.Module], mixers: list[Mixer]
) -> None:
    known = {module for mixer in mixers for module in mixer.module.modules()}
    if (path := find_unknown(layer, _MIXERS, known.union(attentions))) is not None:
        raise _refuse(
            model,
            f"`{'.'.join(filter(None, (name, path)))}` ({type(layer.get_submodule(path)).__name__}) mixes tokens "
            "outside of the attention interface, and no adapter knows it (a causal one runs under a rule of the plan, "
            f"modules={{'*.{path}': {{'sp': 'gather'}}}}, which computes the row up to sp times)",
        )
    for path, module in layer.named_modules():
        kind = type(module).__name__
        if module in known:
            continue
        if hasattr(module, "expert_capacity") and "cumsum" in own_names(type(module)):
            raise _refuse(model, f"`{name}.{path}` ({kind}) drops tokens by their place in the row (expert capacity)")
        if not any(part in attentions for part in module.modules()):
            continue
        counters = _COUNTERS & own_names(type(module))
        if counters and not hasattr(module, "attn_temperature_tuning"):
            raise _refuse(model, f"`{name}.{path}` ({kind}) counts positions inside the layer ({sorted(counters)})")
        if module in attentions and merges_keys(module):
            raise _refuse(model, f"`{name}.{path}` ({kind}) attends to its own row and to another one in one call")
        if module in attentions and asks_interface(module) and hf.reads_attention_mask(module):
            raise _refuse(model, f"`{name}.{path}` ({kind}) makes an attention mask of its own from that of the row")
    if not attentions and not mixers and getattr(layer, "block_type", None) not in ("moe", "mlp"):
        raise _refuse(
            model,
            f"`{name}` ({type(layer).__name__}) has no module that asks transformers' AttentionInterface for its "
            "attention",
        )


def find_seam(model: PreTrainedModel, gathered: Iterable[str] = ()) -> Seam:
    """The places to cut a transformers model.

    Args:
        gathered: names of the modules that the plan runs on whole documents.

    Raises:
        ValueError: names the rule that the model breaks.
    """
    decoder, holder, layers = _decoder(model)
    if notes_shape(decoder) and not views_as_row(decoder):
        raise _refuse(model, "its stack reshapes what its layers return to the shape of the full row")
    if "pooling_mask" in inspect.unwrap(type(decoder).forward).__code__.co_varnames:
        raise _refuse(model, "its stack pools the tokens of the full row under a mask of its own")
    if any(getattr(module, "trigram_input", False) for module in decoder.modules()):
        raise _refuse(model, "its embeddings mix neighbours, so the last token would see the filler behind it")
    types = set(getattr(getattr(decoder, "config", None), "layer_types", None) or ())
    if unknown := sorted(types - _LAYER_TYPES - _HYBRID_TYPES):
        raise _refuse(model, f"its `layer_types` hold {unknown}, which are not attention over the row")
    names = {module: name for name, module in model.named_modules()}
    attentions: list[nn.Module] = []
    mixers = find_mixers([(names[layer], layer) for layer in layers], gathered)
    for layer in layers:
        found = [module for module in layer.modules() if attends(module)]
        inside = set(layer.modules())
        _check_layer(model, names[layer], layer, found, [mixer for mixer in mixers if mixer.module in inside])
        attentions.extend(found)
    inside = {module for layer in layers for module in layer.modules()}
    rotary = [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if any(module in inside for module in rotary):
        raise _refuse(model, "its positions enter through rotary embeddings inside of the layers")
    counted = [limit for module in attentions if (limit := hf.first_scaled_position(module)) is not None]
    return Seam(decoder, layers, tuple(attentions), tuple(rotary), holder, tuple(mixers), min(counted, default=None))


def check_heads(model: PreTrainedModel, sp_size: int) -> None:
    """Raises ValueError where `sp_size` exceeds the number of query heads."""
    heads = getattr(hf.text_config(model), "num_attention_heads", None)
    if heads is not None:
        head_layout(heads, heads, sp_size)
