"""More stock families of vision and audio equal one process on rows of images, videos and audio, some or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.omni_models import FAMILIES, build
from tests.ranks.parity import relative_error, whole

# Items of each row, as places in the family's list (everything, nothing, the first, the last two), or a list of items.
ALL, NONE, FIRST, LAST = slice(None), slice(0), slice(1), slice(-2, None)


def _row(family: str, seed: int, part: Any) -> dict[str, Any]:
    """One row, or for a tuple of parts a batch of as many, padded on the right."""
    found = FAMILIES[family]
    if isinstance(part, (slice, list)):
        return found.row(seed, part if isinstance(part, list) else found.items[part])
    rows = [found.row(seed + i, found.items[one]) for i, one in enumerate(part)]
    longest = max(row["input_ids"].shape[1] for row in rows)
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        for name in ("input_ids", "labels", "mm_token_type_ids", "attention_mask"):
            if name in row:
                padding = (0, longest - row[name].shape[1])
                row[name] = F.pad(row[name], padding, value=-100 if name == "labels" else 0)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def _step(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Mean over the rows, each in a backward of its own."""
    total = torch.zeros(())
    for row in rows:
        loss = model(**row).loss / len(rows)
        loss.backward()
        total += loss.detach()
    return total


def _reverse_assignments() -> Any:
    """Items go to the SP ranks in the opposite order; a function that puts that right again."""
    from hf_veomni.modality import towers
    from hf_veomni.modality.balance import Assignment, assign_items

    def reverse(costs: Any, num_ranks: int) -> Assignment:
        return Assignment.from_ranks(num_ranks - 1 - assign_items(costs, num_ranks).rank_of, num_ranks)

    towers.assign_items = reverse
    return lambda: setattr(towers, "assign_items", assign_items)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of full parameters. Collective."""
    from hf_veomni.expert import find_layouts

    layouts = find_layouts(model)
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {name: layouts[name].to_plain(grad) if name in layouts else grad for name, grad in found.items()}


def _compare(family: str, plan: Any, split: Any, options: dict[str, Any]) -> dict[str, float]:
    """`split`: for each data rank, for each of its rows, which items."""
    from hf_veomni import gather_sequence, get_parallel_state, prepare_omni

    model = build(family)
    if options.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("language_model", "text_model", "lm_head")))
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    data = [[_row(family, 10 * i + j, part) for j, part in enumerate(parts)] for i, parts in enumerate(split)]
    losses = [_step(model, rows) for rows in data]
    wanted = {n: p.grad / len(data) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = [model.eval()(**rows[0]).logits for rows in data]
    prepare_omni(model, plan)
    state = get_parallel_state(model)
    restore = _reverse_assignments() if options.get("reversed") else lambda: None
    try:
        with torch.no_grad():
            found = gather_sequence(model.eval()(**data[state.dp_rank][0]).logits, model)
        loss = _step(model.train(), data[state.dp_rank])
    finally:
        restore()
    real = data[state.dp_rank][0].get("attention_mask", torch.ones(found.shape[:2])).bool()
    gradients = _gradients(model)
    wanted = {name: p for name, p in wanted.items() if not name.endswith(("k_proj.bias", "attn.qkv.bias"))}
    assert wanted.keys() <= gradients.keys() and len(wanted) > 15, wanted.keys() - gradients.keys()
    errors = {name: relative_error(gradients[name], gradient) for name, gradient in wanted.items()}
    norms = [
        torch.stack([g.norm() for g in grads]).norm() for grads in ([gradients[n] for n in wanted], wanted.values())
    ]
    worst = max(errors, key=errors.__getitem__)
    return {
        "loss": relative_error(loss, losses[state.dp_rank]),
        "logits": relative_error(found[real], logits[state.dp_rank][real]),
        f"gradients ({worst})": errors[worst],
        "norm": relative_error(*norms),
    }


def check_towers(ranks: Any, world: int, family: str, plan: Any, *split: Any, **options: Any) -> None:
    for errors in ranks(world).run(_compare, family, plan, split, options, timeout=120):
        print(family, plan, options, errors)
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_every_modality(ranks, family):
    check_towers(ranks, 2, family, "sp=2", [ALL])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_a_padded_batch(ranks, family):
    """Features of two rows come one after the other, but the slices of both have tokens of each."""
    check_towers(ranks, 2, family, "sp=2", [(ALL, LAST)])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_omni", "llava_onevision"])
def test_it_does_not_matter_who_encodes_what(ranks, family):
    check_towers(ranks, 2, family, "sp=2", [ALL], reversed=True)


# Data rank 0 has something in its first row only, data rank 1 in its second.
BESIDE = ([ALL, NONE], [NONE, LAST])


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"checkpointing": True}], ids=lambda x: next(iter(x), ""))
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "qwen3_omni" else pytest.mark.slow) for f in FAMILIES]
)
def test_rows_of_some_modalities_under_accumulation(ranks, family, options):
    check_towers(ranks, 2, family, "dp_shard=2", *BESIDE, **options)


PLANS = ["sp=2,dp_shard=2", "sp=2,dp_replicate=2", "sp=4", "sp=2,dp_shard=2,ep=2", "sp=4,ep=4"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(ranks, family, plan, checkpointing):
    if "ep" in plan.split(",")[-1] and family not in ("qwen3_vl_moe", "qwen3_omni"):
        pytest.skip("a dense model")
    split = BESIDE if "dp" in plan else ([ALL, NONE, FIRST],)
    check_towers(ranks, 4, family, plan, *split, checkpointing=checkpointing)


def test_a_video_is_no_second_document():
    """Positions go back after a video, whose frames count in seconds; a document begins at 0 on all axes."""
    from hf_veomni.sequence.checks import begins_again

    video = torch.tensor([[0, 1, 2, 52, 3, 4], [0, 1, 2, 2, 3, 4], [0, 1, 2, 2, 3, 4]])[:, None]
    assert not begins_again(video, None)
    two = torch.cat([video, video], dim=-1)
    assert begins_again(two, None) and begins_again(two, torch.ones(1, 12))
    assert not begins_again(two, torch.tensor([[1] * 6 + [0] * 6]))


def _prepare(family: str, modules: dict[str, dict[str, str]]) -> str:
    from hf_veomni import ParallelPlan, prepare_omni

    with pytest.raises(ValueError) as error:
        prepare_omni(build(family), ParallelPlan(sp_size=2, modules=modules))
    return str(error.value)


def test_a_rule_that_names_no_tower_is_refused(ranks):
    for found in ranks(2).run(_prepare, "internvl", {"model.language_model": {"sp": "balance"}}):
        assert "no tower whose items can be told apart" in found and "model.language_model" in found


def test_a_replicated_tower(ranks):
    from hf_veomni import ParallelPlan

    plan = ParallelPlan(sp_size=2, modules={"*.visual": {"sp": "replicate"}, "lm_head": {"fsdp": "keep"}})
    check_towers(ranks, 2, "qwen3_vl", plan, [ALL])
