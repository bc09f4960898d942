"""Gradients over several micro-batches, before they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_veomni import hf


@contextmanager
def deferred_reduction(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients over micro-batches with as little communication as memory allows.

    Gradients that no rank has reduced are as large as the parameters they belong to. A few of them (LoRA) wait
    unsharded for the last micro-batch. All of them would cost what sharding saved, so a full fine-tune reduce-scatters
    every time and puts off only the all-reduce over the replicas. The sums are the same.
    """
    root = hf.base_model(model)
    if not isinstance(root, FSDPModule):
        yield
        return
    sizes = [(p.numel(), p.requires_grad) for p in root.parameters()]
    few = 4 * sum(n for n, trained in sizes if trained) <= sum(n for n, _ in sizes)
    switch: Callable[[bool], None] = root.set_requires_gradient_sync if few else root.set_requires_all_reduce
    switch(False)
    try:
        yield
    finally:
        switch(True)
