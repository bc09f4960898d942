"""Lightning attention (MiniMax) on this rank's heads, by the family's own forward.

Its recurrence stands in the forward itself, so that there is no function to replace. The forward runs on a substitute
for the module instead: queries, keys and values are those of the local heads over full documents, and what is done to
every token alone (output norm, gate, projection) is left out there and done to the local tokens after.

Shapes: B rows; S, s tokens of the full row and of this rank; H, h heads; D head width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_veomni.sequence.mixers.exchange import heads_to_tokens, tokens_to_heads
from hf_veomni.sequence.mixers.functions import DEFAULT_CHUNK, MixerCall, by_document
from hf_veomni.sequence.ulysses import head_layout

_DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
# All of the module that its forward may touch: the substitute has no more.
_MEMBERS = {"qkv_proj", "act_fn", "norm", "output_gate", "out_proj", "block_size", "head_dim", "num_attention_heads"}
_MEMBERS |= {"layer_idx", *_DECAYS}


class _Core:
    """The module as its forward sees it: local heads, nothing before and after the recurrence."""

    def __init__(self, module: Any, low: int, high: int) -> None:
        self.block_size, self.head_dim, self.num_attention_heads = module.block_size, module.head_dim, high - low
        self.layer_idx = module.layer_idx
        self.slope_rate, self.query_decay, self.key_decay = (getattr(module, name)[low:high] for name in _DECAYS[:3])
        self.diagonal_decay = module.diagonal_decay[:, low:high]

    def qkv_proj(self, qkv: Tensor) -> Tensor:
        return qkv

    act_fn = norm = out_proj = qkv_proj

    def output_gate(self, qkv: Tensor) -> Tensor:
        return qkv.new_full((), torch.inf)  # its sigmoid is 1


def run_lightning(
    call: MixerCall, module: Any, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, None]:
    """The output [B, s, *] for local hidden states [B, s, *].

    Args:
        attention_mask: local [B, s], zeros for padding.

    Collectives: two all-to-alls over the SP group, and as many in the backward.
    """
    forward = inspect.unwrap(type(module).forward)
    heads = module.num_attention_heads
    split = head_layout(heads, heads, call.size).query
    # Activation and mask before the exchange, as the forward does them: the mask is that of the local tokens.
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[..., None]).to(qkv.dtype)
    (qkv,) = tokens_to_heads((qkv.unflatten(-1, (heads, -1)),), (split,), call.group, call.rank)
    low, high = split[call.rank]
    core = _Core(module, low, high)

    def scan(qkv: Tensor) -> Tensor:
        out, _ = forward(core, qkv.flatten(2), position_embeddings=None, attention_mask=None)
        return out

    out = by_document(call, scan, (qkv,), DEFAULT_CHUNK)
    out = heads_to_tokens(out.unflatten(-1, (high - low, -1)), split, call.group, call.rank).flatten(2)
    out = torch.sigmoid(module.output_gate(hidden_states)) * module.norm(out)
    return module.out_proj(out), None


def check_lightning(module: nn.Module, names: set[str]) -> bool:
    """Whether the forward, which uses `names`, is one that the substitute can run."""
    held = vars(module).keys() | {name for name, _ in module.named_children()} | {n for n, _ in module.named_buffers()}
    return held & names == _MEMBERS - {"layer_idx"} or held & names == _MEMBERS
