"""Experts over ranks in the cases that are easily forgotten: odd groups, frozen parts, several adapters, bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.models import build_model, packed_batch
from tests.ranks.parity import documents, relative_error, whole

BATCH = packed_batch((9, 1, 14), seed=3)


def _freeze(part: str, model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((part in name) == (part != "experts."))
    return model


def _adapted(model: Any) -> Any:
    """Two adapters with different ranks, the second on one of the stacked parameters alone."""
    torch.manual_seed(1)
    stacked = ["experts.gate_up_proj", "experts.down_proj"]
    config = partial(LoraConfig, target_modules=["q_proj"], target_parameters=stacked, init_lora_weights=False)
    wrapped = get_peft_model(model, config(r=4, lora_alpha=16))
    wrapped.add_adapter("second", config(r=2, use_rslora=True))
    return wrapped


def _second(model: Any) -> Any:
    wrapped = _adapted(model)
    wrapped.set_adapter("second")
    return wrapped


def _one_parameter(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def _keep(model: Any) -> Any:
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "all": _keep,
    "router alone": partial(_freeze, "mlp.gate."),
    "attention alone": partial(_freeze, "self_attn"),
    "experts frozen": partial(_freeze, "experts."),
    "first of two adapters": _adapted,
    "second of two adapters": _second,
    "adapter on one parameter": _one_parameter,
}


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _reference(change: str, **config: Any) -> tuple[float, dict[str, Tensor]]:
    model = CHANGES[change](build_model("qwen3_moe", **config))
    items = int((BATCH["labels"][:, 1:] != -100).sum())
    losses = [model(**d, num_items_in_batch=items, use_cache=False).loss for _, _, d in documents(BATCH)]
    torch.stack(losses).sum().backward()
    return float(torch.stack(losses).sum()), _gradients(model)


def _compute(change: str, plan: str, config: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    from hf_veomni import prepare_omni
    from hf_veomni.expert import find_layouts

    model: Any = prepare_omni(CHANGES[change](build_model("qwen3_moe", **config)), plan)
    loss = model(**BATCH).loss
    loss.backward()
    layouts = find_layouts(model)
    found = {n: layouts[n].to_plain(g) if n in layouts else g for n, g in _gradients(model).items()}
    return float(loss), found


def _check(ranks: Any, world_size: int, plan: str, change: str, **config: Any) -> None:
    loss, expected = _reference(change, **config)
    for found_loss, found in ranks(world_size).run(_compute, change, plan, config, timeout=90):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        worst = {name: relative_error(found[name], gradient) for name, gradient in expected.items()}
        assert max(worst.values()) < 1e-5, {name: error for name, error in worst.items() if error >= 1e-5}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_trained_does_not_matter(ranks, change):
    _check(ranks, 4, "dp_replicate=2,sp=2,ep=2" if "adapter" in change else "sp=4,ep=2", change)


@pytest.mark.parametrize(("plan", "experts"), [("sp=3,ep=3", 6), ("sp=3", 5)])
def test_odd_groups_equal_one_rank(ranks, plan, experts):
    _check(ranks, 3, plan, "all", num_experts=experts)


def test_adapters_fit_the_grouped_kernel(monkeypatch):
    """It takes no matrix without a dimension of stride 1, as PEFT's lora_B is. Here on one rank in bf16."""
    from hf_veomni import prepare_omni
    from hf_veomni.expert import compute

    monkeypatch.setattr(compute, "_grouped_mm_fits", lambda x, weight: True)
    model: Any = get_peft_model(
        build_model("qwen3_moe", dtype=torch.bfloat16),  # type: ignore[arg-type]
        LoraConfig(r=8, target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False),
    )
    prepare_omni(model, "")(**BATCH).loss.backward()
    gradients = _gradients(model)
    assert len(gradients) == 4 and all(bool(gradient.any()) for gradient in gradients.values())


def _without_adapters(plan: str) -> tuple[float, float, float]:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(_adapted(build_model("qwen3_moe")), plan).eval()
    with torch.no_grad():
        adapted = float(model(**BATCH).loss)
        with model.disable_adapter():
            plain = float(model(**BATCH).loss)
        return adapted, plain, float(model(**BATCH).loss)


@pytest.mark.parametrize("plan", ["sp=2,ep=2", "dp_shard=2"])
def test_disabled_adapters_leave_the_base_model(ranks, plan):
    base, _ = _reference("all")
    adapted_loss, _ = _reference("first of two adapters")
    for adapted, plain, again in ranks(2).run(_without_adapters, plan, timeout=60):
        assert plain == pytest.approx(base, rel=1e-5)
        assert adapted == again == pytest.approx(adapted_loss, rel=1e-5)
        assert abs(adapted - plain) > 1e-3


def _bf16(plan: str) -> tuple[float, set[torch.dtype], float]:
    from hf_veomni import prepare_omni

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = prepare_omni(build_model("qwen3_moe"), plan, mp_policy=policy)
    loss = model(**BATCH).loss
    loss.backward()
    gate = whole(model.model.layers[1].mlp.experts.gate_up_proj.grad)
    return float(loss), {p.grad.dtype for p in model.parameters()}, float(gate.norm())


def _bf16_loss(family: str, plan: str) -> float:
    from hf_veomni import prepare_omni

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return float(prepare_omni(build_model(family), plan, mp_policy=policy)(**BATCH).loss)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_router_weights_in_fp32_stay_so_under_bf16(ranks, family):
    """As where the experts are part of their layer's unit, whose inputs they are not."""
    expected = ranks(2).run(_bf16_loss, family, "dp_shard=2", timeout=60)
    assert ranks(2).run(_bf16_loss, family, "dp_shard=2,ep=2", timeout=60) == pytest.approx(expected, rel=1e-6)


def test_mixed_precision_policy_reaches_the_experts(ranks):
    loss, gradients = _reference("all")
    norm = float(gradients["model.layers.1.mlp.experts.gate_up_proj"].norm())
    for found, dtypes, found_norm in ranks(4).run(_bf16, "dp_replicate=2,sp=2,ep=2", timeout=60):
        assert found == pytest.approx(loss, rel=2e-2)
        assert found != pytest.approx(loss, rel=1e-6), "bf16 must be in use"
        assert dtypes == {torch.float32}
        assert found_norm == pytest.approx(norm, rel=0.1)
