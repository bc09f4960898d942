"""What was made from parameters before `prepare_omni` would train nothing: it says so, wherever it is used."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

from tests.ranks.training import PackedRows, collate, lora_model, tiny_model


def _late(plan: str, use: str, lora: bool) -> float:
    from hf_veomni import OmniParallelismConfig, prepare_omni
    from hf_veomni import clip_grad_norm_ as omni_clip

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    model = lora_model() if lora else tiny_model()
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(held, lr=0.1) if use == "sgd" else torch.optim.AdamW(held, lr=0.1)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 10)
    if use == "prepared alone":
        optimizer = accelerator.prepare(optimizer)
    model = prepare_omni(model, plan)
    match use:
        case "prepare":
            accelerator.prepare(model, optimizer)
        case "scheduler":
            accelerator.prepare(model, scheduler)
    model(**collate([PackedRows(1)[0]])).loss.backward()
    match use:
        case "clip":
            clip_grad_norm_(held, 1.0)
        case "omni clip":
            omni_clip(held, 1.0)
        case "accelerate's clip":
            accelerator.clip_grad_norm_(held, 1.0)
        case "zero_grad":
            optimizer.zero_grad()
        case _:
            optimizer.step()
    return sum(float(parameter.detach().abs().sum()) for parameter in held)


USES = ["prepare", "scheduler", "step", "sgd", "prepared alone", "zero_grad", "clip", "omni clip", "accelerate's clip"]


@pytest.mark.parametrize("use", USES)
def test_what_holds_replaced_parameters_is_refused(ranks, use):
    ranks(2).raises(_late, "sp=2", use, use == "step", match="replaced by a shard in `prepare_omni`.*after the call")


def test_one_rank_takes_either_order(ranks):
    """Nothing is replaced there."""
    from tests.ranks.prepare.test_accelerate import reset_accelerate

    reset_accelerate()
    try:
        before = sum(float(p.detach().abs().sum()) for p in tiny_model().parameters())
        assert _late("", "step", False) != before
    finally:
        reset_accelerate()
