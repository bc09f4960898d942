"""A packed sequence of processed samples of images, videos and audio gives each sample the loss that it has
alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.omni_models import FAMILIES, build
from tests.ranks.parity import relative_error, whole

# Items of each sample, as places in the family's list.
SAMPLES = (slice(None), slice(0), slice(1), slice(1, 3), slice(-1, None))


def _loss(model: Any, row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Of one sample, summed over its targets, and their number."""
    labels = row["labels"][0, 1:]
    inputs = {name: value for name, value in row.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits[0, :-1], labels, reduction="sum"), int((labels != -100).sum())


def _compare(family: str, plan: str) -> dict[str, float]:
    """Relative errors of the packed sequence: losses by sample, loss of the row, gradients."""
    from hf_veomni import OmniDataCollatorWithPacking, gather_sequence, prepare_omni

    model, found = build(family), FAMILIES[family]
    samples = [found.row(seed, found.items[part]) for seed, part in enumerate(SAMPLES)]
    if family == "smolvlm":  # rows of images are known by the mask that its processor puts beside them
        samples = [
            {**x, "pixel_attention_mask": torch.ones_like(x["pixel_values"][:, :, 0]).long()}
            if "pixel_values" in x
            else x
            for x in samples
        ]
    alone = [_loss(model, sample) for sample in samples]
    expected = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    row = OmniDataCollatorWithPacking(model_config=model.config)(samples)
    prepare_omni(model, plan)
    out = model(**row)
    logits = gather_sequence(out.logits, model).detach()
    out.loss.backward()
    losses = F.cross_entropy(logits[0, :-1], row["labels"][0, 1:], reduction="none")
    sizes = [sample["input_ids"].shape[1] for sample in samples]
    assert sum(sizes) == row["input_ids"].shape[1]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [losses[end - size : end - 1].sum() for size, end in zip(sizes, ends, strict=True)]
    wanted = {name: p for name, p in wanted.items() if not name.endswith(("k_proj.bias", "attn.qkv.bias"))}
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {
        "samples": max(relative_error(part, loss) for part, (loss, _) in zip(parts, alone, strict=True)),
        "loss": relative_error(out.loss, expected),
        "gradients": max(relative_error(gradients[name], gradient) for name, gradient in wanted.items()),
    }


@pytest.mark.parametrize("plan", ["", "sp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_samples_alone(ranks: Any, family: str, plan: str) -> None:
    for errors in ranks(2 if plan else 1).run(_compare, family, plan, timeout=120):
        print(family, plan, errors)
        assert max(errors.values()) < 1e-5, errors
