"""Which layers each stage gets: contiguous runs of them, so that the most expensive stage costs as little as can be.

A layer costs its matmuls for a token: the entries of its matrices, of experts only those that a token is sent to. The
head counts with the last stage, and encoders, as if each token were one of theirs, with the first; looking up an
embedding costs nothing. Attention grows with the length of rows, which nobody knows here; its share is the same for
layers of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.pipeline.chain import Chain

_CHOSEN = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "top_k_experts", "moe_topk")


def matmul_cost(module: nn.Module, config: Any) -> int:
    """Entries of a module's matrices that work on one token."""
    chosen = next((n for name in _CHOSEN if isinstance(n := getattr(config, name, None), int)), None)
    total = 0
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        size = parameter.numel()
        if parameter.dim() == 3 and "experts" in name.split(".") and chosen is not None:
            size = size // parameter.shape[0] * min(chosen, parameter.shape[0])
        total += size
    return total


def split_layers(
    costs: Sequence[int], last: int, stages: int, first: int = 0, least: int = 1, per_rank: int = 1
) -> list[range]:
    """The layers of each stage.

    Args:
        costs: of each layer.
        last: what the last stage computes besides.
        first: what the first stage computes besides.
        least: layers of the first stage.
        per_rank: how many of the stages a rank has, for the message.

    Raises:
        UnsupportedError: too few layers.
    """
    count = len(costs)
    asked = f"`pp_size` ({stages})"
    if per_rank > 1:
        asked = f"`pp_size * pp_stages` ({stages // per_rank} * {per_rank} = {stages})"
    if stages + least - 1 > count and stages <= count:
        raise UnsupportedError(
            f"{asked} is too large for {count} layers, of which the first stage has {least} at least: "
            f"their output takes features of its encoders. Use {max(count - least + 1, 1)} or fewer."
        )
    if stages > count:
        raise UnsupportedError(
            f"{asked} must not exceed the number of layers ({count}): each stage runs at least one."
        )
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def best(begin: int, left: int) -> tuple[int, int]:
        """Of layers from `begin` over `left` stages: the cost of the most expensive one, and where the first ends."""
        if left == 1:
            return sums[count] - sums[begin] + last, count
        options = range(begin + (1 if begin else least), count - left + 2)
        extra = 0 if begin else first
        # Of equal ones the longest first stage: the last one waits for all others in the first micro-batches.
        return min(
            ((max(sums[end] - sums[begin] + extra, best(end, left - 1)[0]), end) for end in options),
            key=lambda option: (option[0], -option[1]),
        )

    found, begin = [], 0
    for left in range(stages, 0, -1):
        end = best(begin, left)[1]
        found.append(range(begin, end))
        begin = end
    return found


def given_layers(numbers: Sequence[int], count: int, least: int) -> list[range]:
    """The layers of each stage as `pp_layers` says.

    Args:
        count: of the model's layers.
        least: layers of the first stage.

    Raises:
        ValueError: other numbers of layers than the model has.
        UnsupportedError: too few in the first stage.
    """
    text = "+".join(map(str, numbers))
    if sum(numbers) != count:
        raise ValueError(f"`pp_layers` ({text}) adds up to {sum(numbers)} layers, and the model has {count}.")
    if numbers[0] < least:
        raise UnsupportedError(
            f"`pp_layers` ({text}) gives the first stage {numbers[0]} layers, and the output of the first {least} "
            f"takes features of its encoders: give it {least} or more."
        )
    ends = list(accumulate(numbers))
    return [range(end - number, end) for end, number in zip(ends, numbers, strict=True)]


def split_model(
    model: Any, chain: Chain, stages: int, given: Sequence[int] | None = None, per_rank: int = 1
) -> list[range]:
    """`given_layers`, or `split_layers` by the costs of the layers and of what runs before and after them."""
    least = max(chain.deep, 1)
    if given is not None:
        return given_layers(given, len(chain.layers), least)
    config = hf.text_config(model)

    def costs(modules: Iterable[nn.Module]) -> list[int]:
        return [matmul_cost(module, config) for module in modules]

    heads, encoders = (costs(getattr(*place) for place in found) for found in (chain.after, chain.encoders))
    return split_layers(costs(chain.layers), sum(heads), stages, sum(encoders), least, per_rank)
