"""`compile_layers` changes no numbers: of rows with other documents, in training, in evaluation and in generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from tests.models import build_model, packed_batch
from tests.ranks.parity import Run, Setting
from tests.ranks.training import Outcome, assert_same_training, train_omni, train_stock
from tests.ranks.training import Run as Training

# Equal shapes with other documents in them: what was compiled for one row must not serve another.
_SAME_SHAPE = ((11, 1, 17, 8), (20, 17))
_COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize(
    ("model", "run"),
    [
        ("qwen3_moe", Run("sp=2,ep=2", compiled="aot_eager", checkpointing=True)),
        ("llama", Run("sp=1", compiled="aot_eager")),
    ],
)
def test_parity(check, model, run):
    check(Setting(model, lengths=_SAME_SHAPE, micro_batches=2), run)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "gpt_oss", "gemma2", "deepseek_v3", "llama_uneven", "mixtral"])
@pytest.mark.parametrize("plan", ["sp=2", "sp=4", "sp=2,dp_shard=2"])
def test_parity_with_inductor(check, model, plan):
    setting = Setting(model, lengths=_SAME_SHAPE * (2 if "dp" in plan else 1), micro_batches=2)
    check(setting, Run(plan, compiled="inductor", checkpointing=True))


def _start_counting() -> None:
    """Forget what tests before have compiled in this process, which would be used again."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def _num_operations() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["calls_captured"]


def _generate_between() -> tuple[bool, list[bool], int]:
    """Cut rows, then whole ones in `generate`, then cut ones again, through the same compiled layers."""
    from hf_veomni import compile_layers, gather_sequence, prepare_omni

    _start_counting()
    ids = packed_batch((9,))["input_ids"]
    model: Any = build_model("llama").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted, logits = model.generate(input_ids=ids, **options), model(ids).logits
        prepare_omni(model, "sp=2")
        compile_layers(model, backend="aot_eager")
        found = [gather_sequence(model(ids).logits, model)]
        generated = model.generate(input_ids=ids, **options)
        found.append(gather_sequence(model(ids).logits, model))
    return torch.equal(wanted, generated), [torch.allclose(x, logits, atol=1e-5) for x in found], _num_operations()


def test_generation_between_cut_rows(ranks):
    for same, close, operations in ranks(2).run(_generate_between, timeout=120):
        assert same and all(close)
        assert operations > 20, "nothing was compiled"


def _train(run: Training) -> tuple[Outcome, int]:
    _start_counting()
    return train_omni("sp=2", replace(run, arguments=_COMPILED)), _num_operations()


def test_the_trainer_compiles_the_layers(ranks):
    run = Training(lora=True, num_rows=2)
    expected = train_stock(run)
    for found, operations in ranks(2).run(_train, run, timeout=120):
        assert_same_training(found, expected)
        assert operations > 20, "nothing was compiled"


class _Bare(PreTrainedModel):
    config_class = LlamaConfig


def test_a_model_without_layers_is_named():
    from hf_veomni import compile_layers

    with pytest.raises(ValueError, match="_Bare has no layers .*leave compilation off"):
        compile_layers(_Bare(LlamaConfig()))
