"""Families whose stacked experts transformers calls in a way of its own: taught to take routes, one small patch each.

Llama 4 hands every token, scaled by the router's score, to every expert in one batched matmul, with zeros where the
router did not choose it. Patched, only the chosen pairs go to the experts; outputs and gradients are the same.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def can_convert(experts: nn.Module) -> bool:
    """Whether `convert` knows these experts."""
    return type(experts).__name__ in _FORWARDS


def convert(block: nn.Module, experts: nn.Module) -> None:
    """Make a block call its experts as (hidden states, expert ids, weights), and give them transformers' flags."""
    flags = dict(has_gate=True, has_bias=False, is_transposed=True, has_post_expert_norm=False)
    vars(experts).update(
        flags, _is_expert_parallel=False, config=SimpleNamespace(_experts_implementation="grouped_mm")
    )
    vars(experts)["_apply_gate"] = partial(_gate, experts)
    vars(block)["forward"] = partial(_FORWARDS[type(experts).__name__], block)


def _gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _llama4(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`Llama4TextMoe.forward` (transformers 5.23): the score scales what goes into an expert, not what comes out."""
    tokens = hidden_states.reshape(-1, block.hidden_dim)
    _, logits = block.router(tokens)
    values, index = torch.topk(logits, block.top_k, dim=1)
    scores = values.float().sigmoid().to(logits.dtype)
    pairs = (tokens.unsqueeze(1) * scores.unsqueeze(-1)).flatten(0, 1)
    routed = block.experts(pairs, index.reshape(-1, 1), pairs.new_ones(len(pairs), 1))
    return block.shared_expert(tokens) + routed.view(*index.shape, -1).sum(1), logits


_FORWARDS = {"Llama4TextExperts": _llama4}
