"""Ctrl-C in a forward on every rank: what follows is what follows an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import build_model, packed_batch


def _goes_on(kind: type[BaseException]) -> tuple[Tensor, float, float, bool]:
    """After a forward that `kind` ended: the random stream, a loss, a penalty on weights, and embeddings alone."""
    from hf_veomni import prepare_omni, sharded_arithmetic
    from hf_veomni.context import current

    torch.manual_seed(3)
    model: Any = prepare_omni(build_model("llama", attention_dropout=0.5), "sp=2").train()
    batch = packed_batch((9, 5, 14))

    def stop(module: Any, args: Any) -> None:
        raise kind

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with sharded_arithmetic(model):
        try:
            model(**batch)
        except kind:
            handle.remove()
        penalty = sum(p.square().sum() for p in model.parameters())
    assert isinstance(penalty, Tensor) and not current().entries
    state = torch.get_rng_state()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
    return state, model(**batch).loss.item(), penalty.item(), bool(embedded.isfinite().all())


def test_what_follows_an_interrupt_is_what_follows_an_error(ranks) -> None:
    expected = ranks(2).run(_goes_on, KeyError, timeout=60)
    for found, wanted in zip(ranks(2).run(_goes_on, KeyboardInterrupt, timeout=60), expected, strict=True):
        assert torch.equal(found[0], wanted[0]) and found[1:] == wanted[1:] and found[3]
