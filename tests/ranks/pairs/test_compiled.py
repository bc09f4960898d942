"""torch.compile by hand with two sequences in flight: refused where one lets the other run inside of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import build_model, packed_batch
from tests.ranks.parity import relative_error, whole


def _train(what: str) -> Any:
    from hf_veomni import prepare_omni, run_pair

    model: Any = build_model("llama", dtype=torch.float64)
    if what == "before":
        model.model.layers[1].compile(backend="eager")
    call = prepare_omni(model, "dp_shard=2,overlap=pairs")
    for layer in model.model.layers:
        if what == "layers":
            layer.compile(backend="eager")
        if what == "forwards":
            layer.forward = torch.compile(layer.forward, backend="eager")
        if what == "inside":
            layer.self_attn.compile(backend="eager")
    if what == "model":
        call = torch.compile(model, backend="eager")
    losses: Any = run_pair(lambda batch: call(**batch).loss, packed_batch((9, 5, 14)), packed_batch((20, 8)))
    (losses[0] + losses[1]).backward()
    gradients = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    return [loss.item() for loss in losses], gradients


def test_a_layer_that_is_compiled_already_is_refused(ranks) -> None:
    ranks(2).raises(_train, "before", match="`overlap`.*'model.layers.1', which is compiled")


@pytest.mark.parametrize("what", ["layers", "model"])
def test_what_is_compiled_around_layers_is_refused(ranks, what: str) -> None:
    ranks(2).raises(_train, what, match="`overlap`.*torch.compile around layers")


def test_what_is_compiled_inside_of_layers_runs(ranks) -> None:
    expected = ranks(2).run(_train, "", timeout=60)
    for (losses, gradients), (wanted, others) in zip(
        ranks(2).run(_train, "inside", timeout=100), expected, strict=True
    ):
        assert losses == pytest.approx(wanted, rel=1e-12)
        assert max(relative_error(a, b) for a, b in zip(gradients, others, strict=True)) < 1e-12
