"""The load-balancing loss is that of the whole batch: all data ranks, all shards of a row, without padding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import build_model, count_targets
from tests.ranks.parity import Setting, compare_gradients, documents, make_batches, num_items

COEFFICIENT = 0.5  # large, so that a wrong gradient shows
MODELS = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe", "minimax_m2", "ernie4_5_moe"]


def _build(setting: Setting) -> Any:
    """A stock model that adds its router's loss."""
    return build_model(setting.model, output_router_logits=True, router_aux_loss_coef=COEFFICIENT, **setting.overrides)


def _stock_function(model: Any) -> Any:
    return sys.modules[type(model).__module__].load_balancing_loss_func


def _reference(setting: Setting, path: Path) -> None:
    """One rank: each document alone, the routers of all of them together, one loss for each micro-batch."""
    model = _build(setting)
    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or text.moe_num_experts
    top_k = getattr(text, "num_experts_per_tok", None) or text.moe_k
    batches = make_batches(setting)
    losses: dict[tuple[int, int], float] = {}
    for micro in range(setting.micro_batches):
        routers, total, weight = [], torch.zeros(()), 0.0
        for rank, rows in enumerate(batches):
            items = num_items(rows) or count_targets(rows[micro])
            for _, _, document in documents(rows[micro]):
                out = model(**document, num_items_in_batch=items, use_cache=False)
                routers.append(out.router_logits)
                own = out.loss - COEFFICIENT * out.aux_loss
                losses[rank, micro] = losses.get((rank, micro), 0.0) + own.item()
                total = total + own / setting.dp_size
            weight += count_targets(rows[micro]) / items / setting.dp_size
        layers = tuple(torch.cat(parts) for parts in zip(*routers, strict=True))
        router = _stock_function(model)(layers, experts, top_k)
        (total + COEFFICIENT * weight * router).backward()
        for rank, rows in enumerate(batches):
            share = count_targets(rows[micro]) / (num_items(rows) or count_targets(rows[micro]))
            losses[rank, micro] += COEFFICIENT * share * router.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.save({"losses": losses, "gradients": gradients, "norm": norm}, path)


def _compare(setting: Setting, plan: str, path: str, checkpointing: bool) -> dict[str, float | str]:
    from hf_veomni import get_parallel_state, prepare_omni
    from tests.ranks.parity import Errors

    reference = torch.load(path)
    model = prepare_omni(_build(setting), plan)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rank, errors = get_parallel_state(model).dp_rank, Errors()
    rows = make_batches(setting)[rank]
    for micro, batch in enumerate(rows):
        total = num_items(rows)
        out = model(**batch, **({} if total is None else {"num_items_in_batch": torch.tensor(total)}))
        out.loss.backward()
        expected = reference["losses"][rank, micro]
        errors.loss = max(errors.loss, abs(out.loss.item() - expected) / abs(expected))
    compare_gradients(model, reference, errors)
    assert not errors.one_sided, errors.one_sided
    return {"loss": errors.loss, "gradient": errors.gradient, "norm": errors.norm, "parameter": errors.parameter}


def _check(ranks: Any, tmp_path: Path, setting: Setting, plan: str, checkpointing: bool = False) -> None:
    path = tmp_path / "reference.pt"
    _reference(setting, path)
    world_size = {"sp=2,ep=2": 2, "dp_shard=2": 2, "sp=2": 2}.get(plan, 4)
    found = ranks(world_size).run(_compare, setting, plan, str(path), checkpointing, timeout=120)
    assert max(errors[key] for errors in found for key in ("loss", "gradient", "norm")) < 1e-5, found


@pytest.mark.parametrize("model", MODELS)
def test_sp2_ep2_equals_one_rank(ranks, tmp_path, model):
    _check(ranks, tmp_path, Setting(model), "sp=2,ep=2")


@pytest.mark.parametrize(
    ("plan", "dp_size", "micro_batches", "packed", "checkpointing"),
    [
        ("sp=2", 1, 1, True, False),
        ("dp_shard=2", 2, 1, True, False),
        ("dp_shard=2", 2, 2, True, True),
        ("dp_shard=2,sp=2,ep=2", 2, 1, True, False),
        ("dp_shard=2,sp=2,ep=4", 2, 2, True, True),
        ("dp_replicate=2,sp=2,ep=2", 2, 2, True, False),
        ("dp_shard=2,sp=2,ep=2", 2, 2, False, False),
        ("sp=4,ep=4", 1, 1, False, True),
    ],
)
def test_every_plan_equals_one_rank(ranks, tmp_path, plan, dp_size, micro_batches, packed, checkpointing):
    setting = Setting("qwen3_moe", dp_size=dp_size, micro_batches=micro_batches, packed=packed)
    _check(ranks, tmp_path, setting, plan, checkpointing)


def test_another_model_keeps_the_stock_function():
    from hf_veomni import detach_omni, prepare_omni

    setting = Setting("granitemoe")  # a family that no other test prepares in this process: it may still be alive
    stock = _stock_function(_build(setting))
    other, prepared = _build(setting), prepare_omni(_build(setting), "")
    batch = make_batches(setting)[0][0]
    batch = {key: value for key, value in batch.items() if key != "position_ids"}
    expected = float(other(**batch, use_cache=False).loss)
    assert float(prepared(**batch).loss) == pytest.approx(expected, rel=1e-6)
    assert float(other(**batch, use_cache=False).loss) == expected
    detach_omni(prepared)
    assert _stock_function(other) is stock


def test_accumulation_does_not_multiply_it():
    """Two half windows add up to the loss of one: the stock model would count the router's loss twice."""
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(_build(Setting("qwen3_moe")), "")
    batch = make_batches(Setting("qwen3_moe"))[0][0]
    items = count_targets(batch)
    whole = model(**batch, num_items_in_batch=items)
    twice = [model(**batch, num_items_in_batch=2 * items).loss for _ in range(2)]
    difference: Tensor = sum(twice) - whole.loss
    assert abs(float(difference)) < 1e-6
