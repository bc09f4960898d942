"""Several stages on each rank give what the stock model gives in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_torch_version

from tests.models import build_model, padded_batch
from tests.ranks.parity import Setting, relative_error
from tests.ranks.pipeline.staged import check
from tests.ranks.pipeline.test_checkpoint import _expected, _resume
from tests.ranks.training import relative

SLOW = pytest.mark.slow
LENGTHS = ((11, 1, 17), (5, 23), (29,), (8, 9, 7), (29,), (29,))


pytestmark = pytest.mark.skipif(not is_torch_version(">=", "2.13"), reason="torch 2.11 crashes, and is refused")


def _deep(model: str, layers: int = 4, count: int = 4, **options: Any) -> Setting:
    overrides = {"num_hidden_layers": layers}
    if model == "gemma3":
        overrides["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return Setting(model, micro_batches=count, overrides=overrides, lengths=LENGTHS * 4, **options)


@pytest.mark.parametrize(
    ("model", "plan", "world", "layers", "count"),
    [
        ("llama_tied", "pp=2,pp_stages=2", 2, 4, 5),
        pytest.param("gemma3", "pp=2,pp_stages=2", 2, 4, 4, marks=SLOW),
        pytest.param("llama", "pp=2,pp_stages=2,pp_layers=1+2+2+3", 2, 8, 3, marks=SLOW),
        pytest.param("llama", "pp=2,pp_stages=4", 2, 8, 1, marks=SLOW),
        pytest.param("llama", "pp=4,pp_stages=2", 4, 8, 6, marks=SLOW),
        pytest.param("qwen3_moe", "pp=2,pp_stages=2,sp=2,ep=2", 4, 4, 4, marks=SLOW),
        pytest.param("llama", "pp=2,pp_stages=2,dp_shard=2", 4, 4, 6, marks=SLOW),
        pytest.param("llama", "pp=2,pp_stages=2,dp_replicate=2", 4, 4, 6, marks=SLOW),
    ],
)
def test_several_stages_a_rank_equal_one_process(ranks, tmp_path: Path, model, plan, world, layers, count) -> None:
    check(ranks, tmp_path, _deep(model, layers, count), plan, world, checkpointing=model == "gemma3")


@pytest.mark.slow
def test_adapters_equal_one_process(ranks, tmp_path: Path) -> None:
    check(ranks, tmp_path, _deep("llama", lora=True), "pp=2,pp_stages=2", 2)


def _evaluate(plan: str) -> tuple[float, torch.Tensor]:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(build_model("llama", num_hidden_layers=4), plan).eval()
    with torch.no_grad():
        model(**padded_batch((3, 7)))
        out = model(**padded_batch((23, 37)))
    return out.loss.item(), out.logits


def test_every_rank_has_the_answer_of_the_last_stage(ranks) -> None:
    batch = padded_batch((23, 37))
    with torch.no_grad():
        wanted = build_model("llama", num_hidden_layers=4).eval()(**batch)
    real = batch["attention_mask"].bool()
    for loss, logits in ranks(2).run(_evaluate, "pp=2,pp_stages=2", timeout=120):
        assert loss == pytest.approx(wanted.loss.item(), rel=1e-6)
        assert relative_error(logits[real], wanted.logits[real]) < 2e-6


def _goes_on(folder: Path) -> list[list[float]]:
    several = "pp=2,pp_stages=2"
    plans = [(several, {"sharded_weights": True}), ("pp=2", {"sharded_weights": True}), (several, {})]
    return [_resume("tied", 2, plan, folder, step, saving) for step, (plan, saving) in enumerate(plans)]


@pytest.mark.slow
def test_training_goes_on_with_other_stages(ranks, tmp_path: Path) -> None:
    expected = _expected("tied", tmp_path)
    for found in ranks(2).run(_goes_on, tmp_path, timeout=120):
        assert all(relative(losses, expected) < 1e-6 for losses in found)


@pytest.mark.slow
def test_training_goes_on_where_one_process_stopped(ranks, tmp_path: Path) -> None:
    expected = _expected("tied", tmp_path)
    _resume("tied", 1, "", tmp_path, 0, {})
    for losses in ranks(2).run(_resume, "tied", 2, "pp=2,pp_stages=2", tmp_path, 1, {}, timeout=120):
        assert relative(losses, expected) < 1e-6
