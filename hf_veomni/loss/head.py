"""One call of the output head, kept so that it can be made for some tokens at a time, or late."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_veomni.errors import UnsupportedError

Op = tuple[Callable[..., Tensor], tuple[Any, ...]]


@dataclass
class HeadCall:
    """One call of the output head on hidden states [..., s, C], kept so that it can be made for some tokens, or late.

    `weight` and `bias` are set for a plain linear head; any other head is called through `forward`.
    """

    hidden: Tensor
    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None
    sharded: bool
    dtype: torch.dtype  # of the head's output
    autocast: torch.dtype | None
    vocabulary: int
    chunk_tokens: int
    versions: list[int]
    # Set once a gradient has gone through the head; the list is shared with detached copies.
    spent: list[bool] = field(default_factory=list)
    # FSDP2's pre-backward hooks, which gather the weight again if another backward has freed it.
    hooks: list[Callable[[Tensor], Any]] = field(default_factory=list)

    def run(self, hidden: Tensor) -> Tensor:
        """The head's output for `hidden` [..., C], under the autocast of the original call."""
        with autocast(hidden.device.type, self.autocast):
            if self.weight is not None:
                return F.linear(hidden, self.weight, self.bias)
            return self.forward(hidden)

    def detach(self) -> HeadCall:
        """The same call without the graph of its hidden states."""
        return replace(self, hidden=self.hidden.detach())

    def before_backward(self, grad: Tensor) -> None:
        """To be called when a gradient arrives, before it goes through the head."""
        for hook in self.hooks:
            hook(grad)
        self.spent.append(True)

    def check_gathered(self) -> None:
        """Raise if FSDP has freed the head's weight."""
        if any(p.numel() and p.untyped_storage().size() == 0 for p in self.parameters):
            raise UnsupportedError(
                "The head's weight has been freed by FSDP, so its logits cannot be computed any more. For the loss: "
                "keep the head gathered between forward and backward (plan rule {'lm_head': {'fsdp': 'keep'}}, or "
                "fully_shard(..., reshard_after_forward=False)). For logits in training: look at them before "
                "backward, use model.eval(), or prepare_omni(..., chunked_loss=False)."
            )

    def check_fresh(self) -> None:
        """Raise if the logits of this call would be computed from other weights than the loss was."""
        self.check_gathered()
        if (self.sharded and self.spent) or self.versions != [p._version for p in self.parameters]:
            raise UnsupportedError(
                "These logits were not computed in the forward (the loss did not need them), and the head's weight "
                "has changed or been freed since. Look at them before backward and before the optimizer steps, use "
                "model.eval(), or prepare_omni(..., chunked_loss=False)."
            )


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype`, or none; also on devices that know no autocast."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def record_head_call(
    head: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor, sharded: bool, chunk_tokens: int | None
) -> HeadCall | None:
    """Describe the call `forward(hidden)` of `head`, or None where it has to be made at once (a DTensor head)."""
    parameters: list[Tensor] = list(head.parameters())
    if any(isinstance(p, DTensor) for p in (hidden, *parameters)):
        return None
    kind = hidden.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    cast = torch.get_autocast_dtype(kind) if enabled else None
    weight = bias = None
    if getattr(forward, "__func__", None) is nn.Linear.forward and isinstance(head, nn.Linear):
        weight, bias = head.weight, head.bias
        vocabulary = weight.shape[0]
        dtype = hidden.dtype if cast is None or hidden.dtype == torch.float64 else cast
        parameters = [p for p in (weight, bias) if p is not None]
    else:
        probe = forward(hidden[..., :1, :])
        vocabulary, dtype = probe.shape[-1], probe.dtype
    return HeadCall(
        hidden=hidden,
        forward=forward,
        parameters=parameters,
        weight=weight,
        bias=bias,
        sharded=sharded or isinstance(head, FSDPModule),
        dtype=dtype,
        autocast=cast,
        vocabulary=vocabulary,
        chunk_tokens=chunk_tokens or default_chunk_tokens(vocabulary, hidden.numel() * hidden.element_size(), kind),
        versions=[p._version for p in parameters],
    )


# Bytes of fp32 logits that are held at once at most, and the fewest and the most tokens whose logits these are. The
# CPU's: 128 MiB were as fast as more. On an H100 (C = 4096, V = 152K, 16K tokens) the full logits take 126 ms; chunks
# of 2,048 tokens take as long, 1,024 take 135, 512 take 146. Compiled, a logit takes 2 bytes, not 4.
_CHUNKS = {"cpu": (128 << 20, 64, 1 << 30), "accelerator": (1280 << 20, 512, 2048)}


def default_chunk_tokens(vocabulary: int, hidden_bytes: int, device_type: str = "cpu") -> int:
    """Tokens whose fp32 logits are held at once: as many as take eight times the head's input, within `_CHUNKS`.

    A decoder layer keeps about that much, so the chunk does not show in the peak at any sequence length or cut.
    """
    limit, fewest, most = _CHUNKS["cpu" if device_type in ("cpu", "meta") else "accelerator"]
    return min(most, max(fewest, min(limit, 8 * hidden_bytes) // (4 * vocabulary)))


def replay(ops: tuple[Op, ...], logits: Tensor) -> Tensor:
    """Apply the recorded functions to (some of) the head's output."""
    for function, operands in ops:
        logits = function(logits, *operands)
    return logits
