"""Two sequences with images in flight: towers run for one after the other, backbones at once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multimodal import build, samples_of
from tests.ranks.modality.test_packed_multimodal import summed_loss
from tests.ranks.parity import relative_error, whole

ULYSSES = {"modules": {"*.visual": {"sp": "ulysses"}}}


def _compare(family: str, plan: dict[str, Any], checkpointing: bool) -> tuple[float, float]:
    """Relative errors of the sum of both losses and of its gradients; the stock model takes each sample alone."""
    from hf_veomni import OmniDataCollatorWithPacking, prepare_omni, run_pair

    model: Any
    model, processor = build(family)
    samples = samples_of(family)
    parts = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    alone = [summed_loss(model, processor, sample) for sample in samples]
    items = sum(count for _, count in alone)
    expected = sum(loss for loss, _ in alone) / items
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p for name, p in wanted.items() if not name.endswith("k_proj.bias")}  # 0: softmax cancels it
    model.zero_grad(set_to_none=True)

    collator = OmniDataCollatorWithPacking(processor=processor, model_config=model.config)
    rows = [collator(part) for part in parts]
    prepare_omni(model, {**plan, "overlap": "pairs"})
    if checkpointing:
        model.gradient_checkpointing_enable()
    first, second = run_pair(lambda row: model(**row, num_items_in_batch=items).loss, *rows)
    (first + second).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() <= gradients.keys() and len(wanted) > 30
    error = max(relative_error(gradients[name], gradient) for name, gradient in wanted.items())
    return relative_error(first + second, expected), error


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
@pytest.mark.parametrize(
    ("family", "plan"),
    [("qwen3_vl", {"sp": 2}), ("qwen2_5_vl", {"sp": 2}), ("qwen2_5_vl", {"sp": 2, **ULYSSES})],
    ids=["qwen3_vl", "qwen2_5_vl", "patches"],
)
def test_a_pair_of_rows_with_images_equals_its_samples(ranks, family: str, plan: Any, checkpointing: bool) -> None:
    for errors in ranks(2).run(_compare, family, plan, checkpointing, timeout=180):
        assert max(errors) < 1e-5, errors
