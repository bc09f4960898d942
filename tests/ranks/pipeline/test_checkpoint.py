"""Checkpoints go from any number of stages to any other, and losses go on as those of the stock Trainer.

In double precision, so that only a wrong state or another sample can make a difference, not the order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_veomni import ParallelPlan
from hf_veomni.checkpoint.convert import convert
from tests.ranks.training import Run, adapt_experts, lora_model, relative, tiny_mixtral, tiny_model, train_stock
from tests.sweep.tiny import use_plain_experts

ROWS, STEPS = 4, 6  # rows of a step, on all data ranks
SAVINGS: dict[str, dict[str, Any]] = {"plain": {}, "sharded": {"sharded_weights": True}, "async": {"async_save": True}}
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class _Deep(Run):
    """Of four layers, so that there can be four stages."""

    kind: str = "dense"

    def model(self) -> Any:
        sizes: dict[str, Any] = {"num_hidden_layers": 4}
        if self.kind.startswith("experts"):
            model: Any = tiny_mixtral(**sizes)
            use_plain_experts(model.config)  # torch's grouped matmul has no fp64
            return (adapt_experts(model) if self.kind == "experts-lora" else model).double()
        if self.kind == "lora":
            return lora_model(**sizes).double()
        return tiny_model(**sizes, tie_word_embeddings=self.kind == "tied").double()


def _run(kind: str, world: int, plan: str, folder: Path, **more: Any) -> _Deep:
    resolved = ParallelPlan.from_string(plan).resolve(world)
    data_ranks = resolved.dp_replicate_size * (resolved.dp_shard_size or 1)
    arguments = {"gradient_accumulation_steps": ROWS // data_ranks, "max_steps": STEPS, "output_dir": str(folder)}
    arguments |= {"save_strategy": "steps", "save_steps": 1}
    return _Deep(num_rows=3 * ROWS, kind=kind, arguments=arguments | more)


def _resume(kind: str, world: int, plan: str, folder: Path, step: int, saving: dict[str, Any]) -> list[float]:
    """Train to the end from the checkpoint of `step`, 0: from the beginning. Returns the losses of all steps."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = _run(kind, world, plan, folder, **saving)
    arguments: Any = run.all_arguments(plan=plan)
    trainer = OmniTrainer(run.model(), OmniTrainingArguments(**arguments), **run.data())
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}") if step else None)
    return [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]


def _in_turn(kind: str, world: int, plans: list[str], folder: Path, saving: dict[str, Any]) -> list[list[float]]:
    """Each plan goes on from the checkpoint that the one before has written a step later."""
    return [_resume(kind, world, plan, folder, step, saving) for step, plan in enumerate(plans)]


def _expected(kind: str, folder: Path) -> list[float]:
    return train_stock(_run(kind, 1, "", folder, save_strategy="no")).losses


CHAIN = ["pp=2,dp_shard=2", "pp=4", "dp_shard=4", "pp=2,sp=2", "pp=4"]
EXPERTS = ["pp=2,dp_shard=2,ep=2", "pp=4", "sp=4,ep=2", "pp=2,sp=2,ep=2", "pp=4"]


@pytest.mark.parametrize(
    ("kind", "saving"),
    [
        pytest.param("tied", "plain", marks=SLOW),
        pytest.param("dense", "sharded", marks=SLOW),
        pytest.param("tied", "async", marks=SLOW),
        pytest.param("lora", "plain", marks=SLOW),
        pytest.param("lora", "sharded", marks=SLOW),
        pytest.param("experts", "plain", marks=SLOW),
        pytest.param("experts", "sharded", marks=SLOW),
        pytest.param("experts-lora", "plain", marks=SLOW),
        pytest.param("experts-lora", "async", marks=SLOW),
    ],
)
def test_training_goes_on_under_other_stages(ranks, tmp_path: Path, kind: str, saving: str) -> None:
    plans = EXPERTS if kind.startswith("experts") else CHAIN
    expected = _expected(kind, tmp_path)
    for found in ranks(4).run(_in_turn, kind, 4, plans, tmp_path, SAVINGS[saving], timeout=300):
        for plan, losses in zip(plans, found, strict=True):
            assert relative(losses, expected) < 1e-6, plan


@pytest.mark.parametrize("kind", ["tied", pytest.param("experts", marks=SLOW), pytest.param("lora", marks=SLOW)])
def test_stages_go_on_where_one_process_stopped_and_back(ranks, tmp_path: Path, kind: str) -> None:
    """One process writes its optimizer as the stock Trainer does, by the place of a parameter in its group."""
    expected = _expected(kind, tmp_path)
    assert relative(_resume(kind, 1, "", tmp_path, 0, {}), expected) < 1e-6
    for losses in ranks(2).run(_resume, kind, 2, "pp=2", tmp_path, 1, {}, timeout=120):
        assert relative(losses, expected) < 1e-6
    assert (tmp_path / "checkpoint-2/optimizer").is_dir()
    assert relative(_resume(kind, 1, "", tmp_path, 2, {}), expected) < 1e-6


@pytest.mark.parametrize("kind", ["tied", pytest.param("experts-lora", marks=SLOW)])
def test_shards_of_stages_convert_to_what_is_saved_plainly(ranks, tmp_path: Path, kind: str) -> None:
    for name, saving in SAVINGS.items():
        if name != "async":
            arguments = {"max_steps": 1, **saving}
            ranks(2).run(_resume, kind, 2, "pp=2", tmp_path / name, 0, arguments, timeout=120)
    convert(tmp_path / "sharded/checkpoint-1", tmp_path / "converted")
    files = sorted(path.name for path in (tmp_path / "plain/checkpoint-1").glob("*model*.safetensors"))
    assert files and files == sorted(path.name for path in (tmp_path / "converted").glob("*.safetensors"))
    from safetensors.torch import load_file

    for name in files:
        plain, found = (
            load_file(folder / name) for folder in (tmp_path / "plain/checkpoint-1", tmp_path / "converted")
        )
        assert plain.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())
    if kind == "tied":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config.tie_word_embeddings


def _other_stage(folder: Path) -> None:
    """A checkpoint of four layers into a model of three: some stages would find all that they have."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = _run("dense", 2, "pp=2", folder)
    arguments: Any = run.all_arguments(plan="pp=2")
    model = tiny_model(num_hidden_layers=3).double()
    trainer = OmniTrainer(model, OmniTrainingArguments(**arguments), **run.data())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.parametrize("saving", ["plain", pytest.param("sharded", marks=SLOW)])
def test_a_checkpoint_of_another_model_is_refused_on_all_stages(ranks, tmp_path: Path, saving: str) -> None:
    arguments = {"max_steps": 1, **SAVINGS[saving]}
    ranks(2).run(_resume, "dense", 2, "pp=2", tmp_path, 0, arguments, timeout=120)
    ranks(2).raises(_other_stage, tmp_path, match="of another model")
