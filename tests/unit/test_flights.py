"""Exchanges that are launched and never landed, as where activation checkpointing ends a recomputation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_veomni.comm import launch
from hf_veomni.context import within


class _Nowhere:
    """A transport to this rank alone."""

    def start(self, x: Tensor, group: object, send: Sequence[int], receive: Sequence[int]) -> Any:
        return x.clone()

    def wait(self, ticket: Tensor) -> Tensor:
        return ticket


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_what_is_never_landed_is_freed_at_once() -> None:
    group: Any = None
    leaf = torch.randn(4, 3, requires_grad=True)
    made = leaf * 2
    saved = made.exp()  # saves its result
    alive = weakref.ref(saved.untyped_storage())
    with within(transport=_Nowhere()):
        flight = launch(saved, group, [4], [4])
    ticket = weakref.ref(flight.phases.ticket)
    del made, saved, flight
    assert alive() is None and ticket() is None
