"""How often a micro-batch waits for the device, and that what saves waits changes no number.

`benchmarks/_syncs.py` says what is counted on a machine without a device. The goals are those of the benchmark.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import syncs
from tests.models import build_model, packed_batch
from tests.ranks.parity import documents, relative_error, whole

LAYERS = 2
CASES = [case for case in syncs.CASES if case[2] in ("sp=2", "sp=2,ep=2")]
CASES = [case for case in CASES if not (case[0] == "experts" and case[2] == "sp=2")]  # as dense ones


def _options() -> argparse.Namespace:
    return argparse.Namespace(layers=LAYERS, device="cpu")


def _count(case: tuple) -> dict[str, Any]:
    return syncs.run(case, _options(), torch.device("cpu"))


def _name(case: tuple) -> str:
    return f"{case[0]} {case[1]} {case[2]}{' checkpointing' * case[3]}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_waits_for_the_device_stay_within_the_goal(ranks: Any, case: tuple) -> None:
    stock = _count((case[0], case[1], None, case[3]))
    for found in ranks(2).run(_count, case, timeout=120):
        row = syncs.make_row(case, found, stock, _options())
        assert syncs.check([row]) == [], row["sites"]


def test_dense_rows_of_the_collator_wait_for_nothing(ranks: Any) -> None:
    for found in ranks(2).run(_count, ("dense", "packed", "sp=2", True), timeout=120):
        assert (found["forward"], found["backward"]) == (0, 0), found["sites"]


def test_a_mask_of_whole_numbers_is_read_once(ranks: Any) -> None:
    for found in ranks(2).run(_count, ("dense", "padded", "sp=2", False), timeout=120):
        assert found["forward"] == 1, found["sites"]


BATCHES = [packed_batch(lengths, seed=seed) for seed, lengths in enumerate([(9, 1, 14), (20, 3), (5, 6, 7)])]


def _gradients_in_the_order_of_the_forwards(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    from hf_veomni import prepare_omni
    from hf_veomni.expert import dispatch

    model: Any = prepare_omni(build_model("qwen3_moe"), "sp=2,ep=2")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    exchanges, stock = [0], dispatch.dist.all_to_all_single

    def exchange(out: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        exchanges[0] += x.dtype == torch.int64  # counts
        return stock(out, x, *args, **kwargs)

    dispatch.dist.all_to_all_single = exchange
    try:
        losses = [model(**batch).loss for batch in BATCHES]
        for loss in losses:  # not the newest first
            loss.backward()
    finally:
        dispatch.dist.all_to_all_single = stock
    assert exchanges[0] == len(BATCHES) * 2, "the recomputation has exchanged counts again"
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_each_recomputation_has_the_routes_of_its_forward(ranks: Any, reentrant: bool) -> None:
    """Three rows are under way at once; layers run again in another order than they ran in."""
    model: Any = build_model("qwen3_moe")
    for batch in BATCHES:
        items = int((batch["labels"][:, 1:] != -100).sum())
        for _, _, document in documents(batch):
            model(**document, num_items_in_batch=items, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for found in ranks(2).run(_gradients_in_the_order_of_the_forwards, {"use_reentrant": reentrant}, timeout=120):
        assert found.keys() == expected.keys()
        assert max(relative_error(found[name], gradient) for name, gradient in expected.items()) < 1e-5
