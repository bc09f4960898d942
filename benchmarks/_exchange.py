"""Count what an EP group exchanges: every all-to-all over it, wrapped while a step runs. Nothing is estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_veomni.expert.dispatch import rows_per_token


@dataclass
class Exchange:
    """Bytes that this rank handed to `all_to_all_single`, and the part of them that was for other ranks."""

    calls: int = 0
    handed: int = 0
    left: int = 0
    count_calls: int = 0  # of token counts, integers, which go ahead of the tokens
    count_left: int = 0
    weight_left: int = 0  # of router weights, which go with the tokens

    def add(self, sent: Tensor, splits: list[int] | None, group: dist.ProcessGroup) -> None:
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        splits = splits or [len(sent) // ranks] * ranks
        row_bytes = sent[:1].nbytes if len(sent) else 0
        left = row_bytes * sum(rows for rank, rows in enumerate(splits) if rank != me)
        if sent.dtype.is_floating_point and sent.dim() == 1:
            self.weight_left += left
        elif sent.dtype.is_floating_point:
            self.calls, self.handed, self.left = self.calls + 1, self.handed + sent.nbytes, self.left + left
        else:
            self.count_calls, self.count_left = self.count_calls + 1, self.count_left + left


@contextmanager
def counted(group: dist.ProcessGroup | None) -> Iterator[Exchange]:
    """Count the all-to-alls over `group` alone, so that Ulysses' over an SP group stay out."""
    exchange, original = Exchange(), dist.all_to_all_single

    def counting(
        output: Tensor, sent: Tensor, output_splits: Any = None, splits: Any = None, *args: Any, **options: Any
    ):
        if group is not None and options.get("group", args[0] if args else None) is group:
            exchange.add(sent, splits, group)
        return original(output, sent, output_splits, splits, *args, **options)

    dist.all_to_all_single = counting
    try:
        yield exchange
    finally:
        dist.all_to_all_single = original


SHARES = 8  # each number of ranks that divides it gets as many rows for each rank


@lru_cache(maxsize=16)
def even_index(tokens: int, top_k: int, num_experts: int) -> Tensor:
    """[tokens, top_k] different experts for each token: all get as many pairs, and all ranks as many rows in bundles.

    A token has experts in about as many of `SHARES` parts as at random, no fewer on average (top-8 of 128: in 5 and in
    6 of 8, and 5.3 at random); parts and experts take turns. Numbers are even in every 2 * `SHARES` tokens, if their
    pairs divide by the experts.
    """
    shares = gcd(SHARES, num_experts)
    each, used, found = num_experts // shares, [0] * shares, []
    usual = rows_per_token(top_k, num_experts, shares)
    for token in range(tokens):
        parts = (ceil if token // shares % 2 else int)(usual)
        chosen = []
        for choice in range(top_k):
            share = (token + 3 * (choice % parts)) % shares
            chosen.append(share * each + used[share] % each)
            used[share] += 1
        found.append(chosen)
    return torch.tensor(found).view(tokens, top_k)


@contextmanager
def even_routing(model: nn.Module) -> Iterator[None]:
    """The router's weights, but experts by `even_index`."""

    def route(router: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = output[-1]
        return (*output[:-1], even_index(*index.shape, router.num_experts).to(index.device))

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                stack.callback(module.register_forward_hook(route).remove)
        yield
