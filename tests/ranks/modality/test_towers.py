"""Stock models of vision and audio, on ranks, equal one process: rows that mix images or audio, and rows without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multimodal import build, samples_of
from tests.ranks.modality.test_packed_multimodal import summed_loss
from tests.ranks.parity import relative_error, whole

# Samples of each data rank: 0 has one item, 1 has two, 2 has none, 3 has one at its end.
MIXED = ((0, 1, 2, 3),)
ONE_EACH = ((3,),)
BESIDE_TEXT = ((2,), (1, 0))


def _reference(model: Any, processor: Any, split: tuple[tuple[int, ...], ...], samples: list[Any]) -> torch.Tensor:
    """Mean over the data ranks of the mean over the targets of their samples, each run alone by the stock model."""
    means = []
    for indices in split:
        alone = [summed_loss(model, processor, samples[i]) for i in indices]
        means.append(sum(loss for loss, _ in alone) / sum(count for _, count in alone))
    return torch.stack(means)


def _compare(
    family: str, plan: str, split: tuple[tuple[int, ...], ...], frozen: bool, options: dict[str, Any]
) -> dict[str, float]:
    from hf_veomni import OmniDataCollatorWithPacking, gather_sequence, get_parallel_state, prepare_omni

    model, processor = build(family, **options)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name and "audio" not in name)
    samples = samples_of(family)
    expected = _reference(model, processor, split, samples)
    expected.mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = [summed_loss(model, processor, samples[i], logits=True) for i in split[0]]

    prepare_omni(model, plan)
    state = get_parallel_state(model)
    collate = OmniDataCollatorWithPacking(processor=processor, model_config=model.config)
    row = collate([samples[i] for i in split[state.dp_rank]])
    with torch.no_grad():
        found = gather_sequence(model.eval()(**row).logits, model)
    out = model.train()(**row)
    out.loss.backward()
    wanted = {name: p for name, p in wanted.items() if not name.endswith("k_proj.bias")}  # 0: softmax cancels it
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() <= gradients.keys() and len(wanted) > 20, wanted.keys() - gradients.keys()
    errors = {name: relative_error(gradients[name], gradient) for name, gradient in wanted.items()}
    norms = [
        torch.stack([g.norm() for g in grads]).norm() for grads in ([gradients[n] for n in wanted], wanted.values())
    ]
    worst = max(errors, key=errors.__getitem__)
    return {
        "loss": relative_error(out.loss, expected[state.dp_rank]),
        "logits": relative_error(found[0], torch.cat(logits)) if state.dp_rank == 0 else 0.0,
        f"gradients ({worst})": errors[worst],
        "norm": relative_error(*norms),
    }


def _check(ranks: Any, world: int, family: str, plan: str, split: Any, frozen: bool = False, **options: Any) -> None:
    for errors in ranks(world).run(_compare, family, plan, split, frozen, options, timeout=120):
        print(family, plan, errors)
        assert max(errors.values()) < 1e-5, errors


FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen2_audio", "idefics3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_row(ranks, family):
    _check(ranks, 2, family, "sp=2", MIXED)


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_row_of_one_document(ranks, family):
    _check(ranks, 2, family, "sp=2", ((1,),))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2,dp_shard=2", "dp_replicate=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_data_rank_without_pictures_or_sounds(ranks, family, plan, frozen):
    _check(ranks, 4 if "sp" in plan else 2, family, plan, BESIDE_TEXT, frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks_share_a_row(ranks, family):
    _check(ranks, 4, family, "sp=4", MIXED)
