"""Stages of a pipeline give loss, gradients, norm and optimizer steps of the stock model in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.ranks.parity import Setting, make_batches, make_model, relative_error, whole
from tests.ranks.pipeline.staged import check, compute_reference

TWICE = {"layer_types": ["sliding_attention", "full_attention"] * 2}
DEEP = {"gemma2": TWICE, "gemma3": TWICE, "gpt_oss": TWICE, "llama4": {"no_rope_layers": [1, 0, 1, 0]}}
DEEP["qwen3_next"] = {"layer_types": ["linear_attention", "full_attention"] * 2}
FAST = ["llama", "gemma3", "gpt_oss", "qwen3_moe"]
MORE = ["qwen3", "qwen3_sliding", "qwen2", "llama_uneven", "mistral", "gemma2", "deepseek_v3", "qwen2_moe", "mixtral"]
MORE += ["glm4_moe", "olmoe", "granitemoe", "minimax_m2", "ernie4_5_moe", "llama4", "phi3", "olmo2"]
MORE += ["cohere", "granite"]
SLOW = pytest.mark.slow
# In one process too, fp32 of documents packed in a row differs by more than 2e-6 from that of documents alone.
ALONE = ("mixtral", "qwen3_next")


def _deep(model: str, **options: object) -> Setting:
    """Of four layers, so that the kinds of layers are on more than one stage."""
    overrides = {"num_hidden_layers": 4, **DEEP.get(model, {})}
    if model == "qwen3_sliding":
        overrides |= TWICE
    if model in ALONE:
        options |= {"lengths": ((31,), (23,), (40,), (19,))}
    return Setting(model, micro_batches=4, overrides=overrides, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [*FAST, *(pytest.param(model, marks=SLOW) for model in MORE)])
def test_families_in_two_stages_equal_one_process(ranks, tmp_path, model: str) -> None:
    check(ranks, tmp_path, _deep(model), "pp=2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", [*FAST, *MORE])
def test_families_in_four_stages_equal_one_process(ranks, tmp_path, model: str) -> None:
    check(ranks, tmp_path, _deep(model), "pp=4", 4)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
def test_linear_attention_equals_one_process(ranks, tmp_path, stages: int) -> None:
    # One step, and the tolerance of `check` elsewhere: in one process too, the fp32 of a chunked delta rule differs.
    check(ranks, tmp_path, _deep("qwen3_next"), f"pp={stages}", stages, 1e-5, steps=1)


@pytest.mark.parametrize("model", ["stablelm", pytest.param("llama", marks=SLOW)])
def test_fp64_equals_one_process_to_ten_digits(ranks, tmp_path, model: str) -> None:
    limit = 1e-10 if model == "stablelm" else 2e-6
    check(ranks, tmp_path, _deep(model, dtype=torch.float64), "pp=2", 2, limit)


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("qwen3_moe", "pp=2,sp=2,ep=2"),
        pytest.param("gemma3", "pp=2,sp=2", marks=SLOW),
        pytest.param("gpt_oss", "pp=2,sp=2", marks=SLOW),
        pytest.param("llama", "pp=2,dp_shard=2", marks=SLOW),
        pytest.param("llama_tied", "pp=2,dp_shard=2", marks=SLOW),
        pytest.param("llama", "pp=2,dp_replicate=2", marks=SLOW),
        pytest.param("qwen3_moe", "pp=2,dp_shard=2,ep=2", marks=SLOW),
        pytest.param("glm4_moe", "pp=2,dp_shard=2,ep=2", marks=SLOW),
        pytest.param("ernie4_5_moe", "pp=2,sp=2,ep=2", marks=SLOW),
    ],
)
def test_products_equal_one_process(ranks, tmp_path, model: str, plan: str) -> None:
    check(ranks, tmp_path, _deep(model), plan, 4, checkpointing=model == "qwen3_moe")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=SLOW), pytest.param(7, marks=SLOW)])
def test_tied_embeddings_equal_one_process(ranks, tmp_path, count: int) -> None:
    setting = Setting("llama_tied", micro_batches=count, lengths=((11, 1, 17), (5, 23), (29,), (8, 9, 7)) * 2)
    check(ranks, tmp_path, setting, "pp=2", 2)


@pytest.mark.parametrize("packed", [pytest.param(True, marks=SLOW), False])
def test_adapters_and_padded_rows_equal_one_process(ranks, tmp_path, packed: bool) -> None:
    check(ranks, tmp_path, _deep("llama", lora=True, packed=packed), "pp=2", 2, checkpointing=packed)


def _in_bf16(setting: Setting, plan: str, path: str, mixed: bool) -> tuple[float, float]:
    """Relative errors of loss and gradients against the stock model in fp32: weights in bf16, or computed in it."""
    from hf_veomni import prepare_omni, run_window

    wanted = torch.load(path)
    model: Any = make_model(replace(setting, dtype=torch.float32 if mixed else torch.bfloat16))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    prepare_omni(model, plan, mp_policy=policy)
    loss = run_window(model, make_batches(setting)[0])
    gradients = {name: whole(p.grad).float() for name, p in model.named_parameters()}
    errors = [relative_error(gradient, wanted["gradients"][name]) for name, gradient in gradients.items()]
    return abs(loss.item() / wanted["losses"][0] - 1), max(errors)


@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=SLOW)], ids=["weights", "policy"])
def test_bf16_is_as_near_to_fp32_as_the_stock_model_in_bf16(ranks, tmp_path, mixed: bool) -> None:
    setting = _deep("llama")
    compute_reference(setting, tmp_path / "fp32.pt", 1)
    compute_reference(replace(setting, dtype=torch.bfloat16), tmp_path / "bf16.pt", 1)
    wanted, stock = torch.load(tmp_path / "fp32.pt"), torch.load(tmp_path / "bf16.pt")
    errors = [relative_error(g.float(), wanted["gradients"][name]) for name, g in stock["gradients"].items()]
    assert max(errors) > 1e-3
    for loss, gradient in ranks(2).run(_in_bf16, setting, "pp=2", str(tmp_path / "fp32.pt"), mixed, timeout=120):
        print(loss, gradient, max(errors))
        assert loss < 5e-3 and gradient < 1.5 * max(errors)
