"""Where the output of a cut stack is put together again, for what works on whole rows behind it.

    encoder of an encoder-decoder     cross-attention reads all of its tokens
    encoder with a pooler             picks a token (`BertModel`)
    heads that are not tokenwise      classification, or a loss that the model computes itself from whole logits

The ranks then hold the same whole tensor, all-gathered; the backward adds their gradients up (reduce-scatter), so that
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
from hf_veomni.sequence.inspect import Seam

_POOLERS = ("pooler",)


def find_exit(model: nn.Module, seam: Seam, whole_output: bool) -> nn.Module | None:
    """The module whose output is made whole: the holder of the layers or the stack; None: outputs stay slices.

    Args:
        whole_output: whether what follows the stack needs whole rows. An encoder used alone gets them in any case
            where its layers stand in a module of their own, since what follows there may pool.
    """
    if seam.holder is not seam.decoder:
        return seam.holder if whole_output or seam.decoder is model else None
    return seam.decoder if whole_output else None


def pooling_modules(seam: Seam, exit_module: nn.Module | None) -> list[nn.Module]:
    """Modules behind the layers that pick tokens of the row, where the row is not whole yet."""
    if exit_module is not None:
        return []
    return [child for name, child in seam.decoder.named_children() if name in _POOLERS]


def text_encoder(model: Any, seam: Seam) -> PreTrainedModel | None:
    """The encoder of an encoder-decoder that takes token ids; others (audio, pictures) run whole on every rank."""
    if not getattr(model.config, "is_encoder_decoder", False) or model is seam.decoder:
        return None
    encoder = model.get_encoder()
    if encoder is model or encoder is seam.decoder or not isinstance(encoder, PreTrainedModel):
        return None
    return encoder if "input_ids" in inspect.signature(encoder.forward).parameters else None


def map_hidden(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The output of a stack with its last hidden states replaced.

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
            f"A stack returned {type(output).__name__} without `last_hidden_state`, so its output cannot be put "
            "together again: use sp_size=1."
        )
    whole = function(hidden)
    states = output.get("hidden_states")
    if isinstance(states, tuple) and states and states[-1] is hidden:  # which DeBERTa's model reads instead
        output["hidden_states"] = (*states[:-1], whole)
    output["last_hidden_state"] = whole
    return output
