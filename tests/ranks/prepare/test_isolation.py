"""Packed documents do not see each other: what changes in one changes nothing in the others, to the last bit."""

from __future__ import annotations

import pytest
import torch

from tests.models import VOCABULARY, build_model, packed_batch

LENGTHS = (11, 1, 17, 8)  # 37 tokens: under sp=2 the third document lies on both ranks
# Experts multiply the tokens that are routed to them together, and the shape of a matmul decides its rounding.
ROUNDING = {"gpt_oss": 3e-6, "qwen3_moe": 3e-6, "deepseek_v3": 3e-6}
VARLEN = ["llama", "llama_uneven", "qwen3_sliding", "gemma2", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3"]
KEPT = [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("qwen3_sliding", "eager"), ("gemma2", "eager")]
PLANS = ["dp_shard=2", "sp=2"]  # sp_size 1 and 2


def _logits(model, batch):
    from hf_veomni import gather_sequence

    with torch.no_grad():
        return gather_sequence(model(**batch).logits, model)


def _changed(batch, begin, length):
    ids = batch["input_ids"].clone()
    ids[:, begin : begin + length] = (ids[:, begin : begin + length] - 3 + 7) % (VOCABULARY - 3) + 3
    return {**batch, "input_ids": ids}


def _change_each_document(name: str, plan: str, attention: str, kept: str | None) -> list[tuple[float, float]]:
    """For each document that is changed: the largest change of its own logits, and of all other ones."""
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model(name, attention=kept).eval(), plan, attention=attention)
    batch = packed_batch(LENGTHS)
    before = _logits(model, batch)
    changes, begin = [], 0
    for length in LENGTHS:
        difference = (_logits(model, _changed(batch, begin, length)) - before).abs().amax(dim=(0, 2))
        inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
        inside[begin : begin + length] = True
        changes.append((difference[inside].max().item(), difference[~inside].max().item()))
        begin += length
    return changes


def _gradients_by_document(name: str, plan: str, attention: str, kept: str | None) -> list[float]:
    """The loss has targets in the third document only: largest gradient of each document's embeddings."""
    import torch.distributed as dist

    from hf_veomni import prepare_omni

    model = build_model(name, attention=kept)
    batch = packed_batch(LENGTHS)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch["labels"][:, :12], batch["labels"][:, 29:] = -100, -100
    prepare_omni(model, plan, attention=attention)
    model(inputs_embeds=embeddings, **batch).loss.backward()
    gradient = embeddings.grad
    dist.all_reduce(gradient)
    return [part.abs().max().item() for part in gradient[0].split(LENGTHS)]


def _check_changes(found, limit):
    for changes in found:
        for own, others in changes:
            assert own > 0.01 and others <= limit, changes


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", VARLEN)
def test_changing_a_document_changes_no_other_under_varlen(ranks, model, plan):
    found = ranks(2).run(_change_each_document, model, plan, "auto", None)
    _check_changes(found, ROUNDING.get(model, 0.0))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("model", "kept"), KEPT)
def test_changing_a_document_changes_no_other_under_kept_attention(ranks, model, kept, plan):
    _check_changes(ranks(2).run(_change_each_document, model, plan, "keep", kept), 0.0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("model", "attention", "kept"),
    [("llama", "auto", None), ("gpt_oss", "auto", None), ("gemma2", "auto", None), ("llama", "keep", "sdpa")],
)
def test_gradients_stay_inside_their_document(ranks, model, attention, kept, plan):
    for gradients in ranks(2).run(_gradients_by_document, model, plan, attention, kept):
        assert gradients[2] > 1e-4 and gradients[0] == gradients[1] == gradients[3] == 0.0, gradients


def _packed_where_masks_ignore_positions(plan: str) -> None:
    _change_each_document("gpt_oss", plan, "keep", "eager")


@pytest.mark.parametrize("plan", PLANS)
def test_kept_attention_that_would_leak_is_refused(ranks, plan):
    ranks(2).raises(
        _packed_where_masks_ignore_positions, plan, match="Packed documents are not kept apart by the masks"
    )


def _packed_beside_mask(plan: str) -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama").eval(), plan, attention="keep")
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    mask[0, 0] = 0
    _logits(model, {**packed_batch(LENGTHS), "attention_mask": mask})


@pytest.mark.parametrize("plan", PLANS)
def test_packing_beside_a_mask_is_refused_under_kept_attention(ranks, plan):
    ranks(2).raises(_packed_beside_mask, plan, match="Packed documents are not kept apart beside an `attention_mask`")


def _all_ones_mask(plan: str, attention: str) -> float:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama").eval(), plan, attention=attention)
    batch = packed_batch(LENGTHS)
    return (_logits(model, {**batch, "attention_mask": torch.ones(1, 37)}) - _logits(model, batch)).abs().max().item()


@pytest.mark.parametrize("attention", ["auto", "keep"])
@pytest.mark.parametrize("plan", PLANS)
def test_mask_of_ones_does_not_switch_packing_off(ranks, plan, attention):
    assert ranks(2).run(_all_ones_mask, plan, attention) == [0.0, 0.0]
