"""Lines of stock loops on a prepared model: accelerate's accumulation recipe, `reduce`, and seeded dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config

from tests.ranks.parity import relative_error, whole
from tests.ranks.training import PackedRows, collate, tiny_model

PLANS = [(2, "sp=2", 1), (2, "dp_shard=2", 2), (4, "sp=2,dp_shard=2", 2), (4, "dp_replicate=2,sp=2", 2)]
plans = pytest.mark.parametrize(("world", "plan", "data_ranks"), PLANS, ids=[plan for _, plan, _ in PLANS])
ACCUMULATION, ROWS = 2, 8


def _accelerator(plan: str) -> Accelerator:
    from hf_veomni import OmniParallelismConfig

    return Accelerator(
        cpu=True, parallelism_config=OmniParallelismConfig(plan), gradient_accumulation_steps=ACCUMULATION
    )


def _recipe(plan: str) -> tuple[float, dict[str, Tensor]]:
    """Gradients of one step, by the recipe of accelerate's documentation, line by line."""
    from hf_veomni import prepare_omni

    accelerator = _accelerator(plan)
    model = prepare_omni(tiny_model(), plan)
    loader = DataLoader(PackedRows(ROWS), batch_size=1, collate_fn=collate)
    model, loader = accelerator.prepare(model, loader)
    batches = [batch for _, batch in zip(range(ACCUMULATION), loader, strict=False)]
    mine = sum((batch["labels"][..., 1:] != -100).sum() for batch in batches)
    num_items = accelerator.gather(torch.as_tensor(mine)).sum().item()
    assert accelerator.reduce(torch.as_tensor(mine), "sum").item() == num_items
    for index, batch in enumerate(batches):
        accelerator.sync_gradients = index == len(batches) - 1
        loss = model(**batch, num_items_in_batch=1, use_cache=False).loss  # the sum over its tokens
        loss = (loss * accelerator.gradient_accumulation_steps * accelerator.num_processes) / num_items
        accelerator.backward(loss)
    return num_items, {name: whole(p.grad) for name, p in model.named_parameters()}


@plans
def test_the_recipe_for_accumulation(ranks, world, plan, data_ranks):
    model, rows = tiny_model(), PackedRows(ROWS)
    batches = [collate([rows[index]]) for index in range(ACCUMULATION * data_ranks)]
    num_items = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=num_items, use_cache=False).loss.backward()
    for counted, found in ranks(world).run(_recipe, plan, timeout=90):
        assert counted == num_items
        for name, parameter in model.named_parameters():
            assert relative_error(found[name], parameter.grad) < 1e-5, name


def _counted(plan: str) -> dict[str, Any]:
    accelerator = _accelerator(plan)
    rank = accelerator.process_index
    mine = torch.tensor([1.0 + rank // (accelerator.state.num_processes // accelerator.num_processes)])
    nested = accelerator.reduce({"n": [mine]}, reduction="mean")
    with accelerator.split_between_processes(list(range(6))) as part:
        mine_of_six = list(part)
    return {
        "num_processes": accelerator.num_processes,
        "world": accelerator.state.num_processes,
        "sum": accelerator.reduce(mine).item(),
        "mean": nested["n"][0].item(),
        "max": accelerator.reduce(mine, "max").item(),
        "none": accelerator.reduce(mine, "none").item() == mine.item(),
        "part": mine_of_six,
        "last": accelerator.is_last_process,
        "main": accelerator.is_main_process,
    }


@plans
def test_each_data_rank_counts_once(ranks, world, plan, data_ranks):
    for rank, found in enumerate(ranks(world).run(_counted, plan, timeout=60)):
        reader = rank // (world // data_ranks)
        size = 6 // data_ranks
        assert found == {
            "num_processes": data_ranks,
            "world": world,
            "sum": sum(range(1, data_ranks + 1)),
            "mean": sum(range(1, data_ranks + 1)) / data_ranks,
            "max": data_ranks,
            "none": True,
            "part": list(range(reader * size, (reader + 1) * size)),
            "last": rank == world - 1,
            "main": rank == 0,
        }


def _refused_reduction() -> None:
    _accelerator("sp=2").reduce(torch.ones(1), "average")


def test_an_unknown_reduction_is_refused(ranks):
    ranks(2).raises(_refused_reduction, match="`reduction` .'average'. must be 'sum'")


# ---------------------------------------------------------------- dropout

_KINDS = ["residual", "LoRA", "none"]


def _dropping(kind: str) -> nn.Module:
    rate = 0.5 if kind == "residual" else 0.0
    drop = dict(resid_pdrop=rate, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, bos_token_id=1, eos_token_id=2, **drop)
    )
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.5))
    return model


def _masks(kind: str, checkpointing: bool) -> dict[str, Any]:
    """Which elements each call of a dropout in training zeroes, over two forwards, again after seeding, and after."""
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(_dropping(kind), "sp=2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    masks: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, args, out: masks.append((out == 0) & (args[0] != 0)))
    ids = torch.arange(3, 27)[None]
    found: dict[str, Any] = {}
    for turn in ("first", "second", "again"):
        if turn != "second":
            set_seed(5)
        before = torch.get_rng_state()
        masks.clear()
        loss = model(input_ids=ids, labels=ids).loss
        found[turn] = list(masks)
        loss.backward()
        found[f"{turn} recomputed"] = list(masks)[len(found[turn]) :]
        found[f"{turn} moved"] = not torch.equal(before, torch.get_rng_state())
    found["next"] = torch.rand(3)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    return found


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ranks_of_a_group_drop_different_elements(ranks, kind, checkpointing):
    one, other = ranks(2).run(_masks, kind, checkpointing, timeout=60)
    assert torch.equal(one["next"], other["next"])  # what the process draws itself stays the same on both
    if kind == "none":
        assert not one["first moved"] and not one["second moved"]
        return
    dropped = [i for i, mask in enumerate(one["first"]) if mask.any()]
    assert dropped and one["first moved"]
    for index in dropped:
        assert not torch.equal(one["first"][index], other["first"][index])
        assert not torch.equal(one["first"][index], one["second"][index])
        assert torch.equal(one["first"][index], one["again"][index])  # `set_seed` gives the same masks again
    if checkpointing and one["first recomputed"]:
        drawn = sorted(mask.sum().item() for mask in one["first"] if mask.any())
        again = sorted(mask.sum().item() for mask in one["first recomputed"] if mask.any())
        assert set(again) <= set(drawn)
