"""Model flops of a training step on a packed sequence, and what devices can do at best.

T tokens, N weights of all matmuls in the layers, V x H the head, Hq query heads of width D, documents L_i:

    forward = 2 T N  +  2 T_scored V H  +  layers * 4 Hq D * sum(L_i^2) / 2;      step = 3 * forward

so attention counts the causal half within each document, and recomputation counts nothing. Of a mixture of experts, N
holds the router and the K experts that a token goes to.
"""

from __future__ import annotations

import argparse

from hf_veomni.flops import device_peak


def flops_of_step(options: argparse.Namespace, lengths: list[int]) -> dict[str, float]:
    """Model flops of one step by part; see the formula at the top of this file.

    Args:
        options: sizes; a model with experts has `experts`, `top_k` and `head_dim` too.
    """
    tokens, scored = sum(lengths), sum(lengths) - len(lengths)
    width = getattr(options, "head_dim", None) or options.hidden // options.heads
    router, active = options.hidden * getattr(options, "experts", 0), getattr(options, "top_k", 1)
    projections = 2 * options.hidden * width * (options.heads + options.kv_heads)
    pairs = sum(length**2 for length in lengths) / 2
    forward = {
        "projections": 2 * tokens * options.layers * projections,
        "attention": options.layers * 4 * options.heads * width * pairs,
        "mlp": 2 * tokens * options.layers * (3 * active * options.hidden * options.intermediate + router),
        "loss": 2 * scored * options.hidden * options.vocab,
    }
    return {part: 3.0 * flops for part, flops in forward.items()}


def peak_flops(device: str) -> float | None:
    """From the data sheet; None for a device that is not listed, the CPU among them."""
    return device_peak(device)
