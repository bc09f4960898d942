"""Where the output of a cut backbone is put together again, for what works on full rows behind it.

    encoder of an encoder-decoder     cross-attention reads all of its tokens
    encoder with a pooler             picks a token (`BertModel`)
    heads that are not tokenwise      classification, or a loss that the model computes itself from full logits

The ranks then hold the same full tensor, all-gathered; the backward adds their gradients up (reduce-scatter), so that
gradients averaged over the ranks are those of one rank. Only what stands behind is computed on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_veomni.errors import UnsupportedError
from hf_veomni.sequence.inspect import ShardPoints

_POOLERS = ("pooler",)


def find_gather_point(model: nn.Module, points: ShardPoints, full_output: bool) -> nn.Module | None:
    """The module whose output is made full again: the container of the layers or the backbone; None: outputs stay
    slices.

    Args:
        full_output: whether what follows the backbone needs full rows. An encoder used alone gets them in any case
            where its layers stand in a module of their own, since what follows there may pool.
    """
    if points.container is not points.decoder:
        return points.container if full_output or points.decoder is model else None
    return points.decoder if full_output else None


def pooling_modules(points: ShardPoints, gather_point: nn.Module | None) -> list[nn.Module]:
    """Modules behind the layers that pick tokens of the row, where the row is not full yet."""
    if gather_point is not None:
        return []
    return [child for name, child in points.decoder.named_children() if name in _POOLERS]


def text_encoder(model: Any, points: ShardPoints) -> PreTrainedModel | None:
    """The encoder of an encoder-decoder that takes token ids; others (audio, images) run in full on every rank."""
    if not getattr(model.config, "is_encoder_decoder", False) or model is points.decoder:
        return None
    encoder = model.get_encoder()
    if encoder is model or encoder is points.decoder or not isinstance(encoder, PreTrainedModel):
        return None
    return encoder if "input_ids" in inspect.signature(encoder.forward).parameters else None


def map_hidden(output: object, function: Callable[[Tensor], Tensor]) -> Any:
    """The output of a backbone with its last hidden states replaced.

    Raises:
        UnsupportedError: no hidden states where transformers puts them.
    """
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (function(output[0]), *output[1:])
    hidden = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
    if not isinstance(output, ModelOutput) or not isinstance(hidden, Tensor):
        raise UnsupportedError(
            f"A backbone returned {type(output).__name__} without `last_hidden_state`, so its output cannot be put "
            "together again: use sp_size=1."
        )
    full = function(hidden)
    states = output.get("hidden_states")
    if isinstance(states, tuple) and states and states[-1] is hidden:  # which DeBERTa's model reads instead
        output["hidden_states"] = (*states[:-1], full)
    output["last_hidden_state"] = full
    return output
