"""AdamW of torchao with moments of 8 or 4 bits on shards: the steps that it makes on full parameters in one process.

Moments are coded in blocks of a rank's shard. These shapes put the borders of shards on borders of blocks, so that the
blocks are those of the whole, and with the same gradients every bit of a step is. Where the borders differ, moments
differ by the rounding of their codes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import build_model
from tests.ranks.parity import whole
from tests.ranks.training import Run, outcome, relative

pytest.importorskip("torchao.optim")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 31,
}
# In codes over both meshes; and in full, since it is small and does not divide (31 rows).
TRAINED = ("experts", "o_proj", "lm_head")
STEPS, SAVED = 4, 2


def _optimizer(parameters: list[nn.Parameter], name: str, **options: Any) -> Any:
    return getattr(import_module("torchao.optim"), name)(parameters, lr=1e-2, weight_decay=0.1, **options)


def _steps(named: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Tensor]:
    """Steps with gradients that have nothing to do with the model. Collective on ranks."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        for p in named.values():
            gradient: Any = torch.randn(p.shape, generator=generator)
            shard = getattr(p, "placements", None)
            p.grad = gradient if shard is None else distribute_tensor(gradient, p.device_mesh, shard)  # type: ignore
        optimizer.step()
    return {name: whole(p.detach()).clone() for name, p in named.items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if any(part in name for part in TRAINED)}


def _on_ranks(plan: str, name: str) -> dict[str, Tensor]:
    from accelerate import Accelerator

    from hf_veomni import OmniParallelismConfig, prepare_omni

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    model = prepare_omni(build_model("qwen3_moe", **SIZES), plan)
    named = _parameters(model)
    optimizer = accelerator.prepare(_optimizer(list(named.values()), name))
    found = _steps(named, optimizer)
    coded = {n for n, p in named.items() if hasattr(optimizer.optimizer.state[p]["exp_avg"].to_local(), "codes")}
    assert coded == {n for n in named if "lm_head" not in n}
    return found


@pytest.mark.parametrize(
    ("plan", "name"),
    [("dp_shard=2", "AdamW8bit"), ("sp=2,ep=2", "AdamW8bit"), ("dp_shard=2,ep=2", "AdamW4bit")],
)
def test_steps_on_shards_are_those_of_one_process(ranks, plan, name):
    named = _parameters(build_model("qwen3_moe", **SIZES))
    expected = _steps(named, _optimizer(list(named.values()), name))
    for found in ranks(2).run(_on_ranks, plan, name, timeout=300):
        off = {n: float((found[n] - weight).abs().max()) for n, weight in expected.items()}
        assert not any(off.values()), off


def _run(optim: str) -> Run:
    config = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 1}
    arguments = {"optim": optim, "max_steps": STEPS, "gradient_accumulation_steps": 1}
    return Run(config=config, arguments=arguments, num_rows=2 * STEPS)


def _train(plan: str, folder: Path, optim: str, resume: str | None, **saving: Any) -> Any:
    from hf_veomni import OmniTrainer, OmniTrainingArguments

    run = _run(optim)
    args = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(folder), **saving))
    trainer = OmniTrainer(run.model(), args, **run.data())
    return outcome(trainer, trainer.train(resume_from_checkpoint=resume).training_loss)


def _resume(plan: str, other: str, folder: Path, optim: str, saving: dict[str, Any]) -> Any:
    undisturbed = _train(plan, folder, optim, None, save_strategy="steps", save_steps=SAVED, **saving)
    return undisturbed, _train(other, folder, optim, str(folder / f"checkpoint-{SAVED}"))


@pytest.mark.parametrize(
    ("other", "optim", "saving"),
    [
        ("dp_shard=2", "adamw_torch_8bit", {"async_save": True}),
        ("dp_replicate=2", "adamw_torch_8bit", {}),
        ("dp_shard=2", "adamw_torch_4bit", {}),
    ],
)
def test_resume_with_the_codes_that_were_written(ranks, tmp_path, other, optim, saving):
    for undisturbed, resumed in ranks(2).run(_resume, "dp_shard=2", other, tmp_path, optim, saving, timeout=300):
        assert relative(resumed.losses[-(STEPS - SAVED) :], undisturbed.losses[SAVED:]) < 1e-6
        for name, weight in undisturbed.weights.items():
            assert (resumed.weights[name] - weight).abs().max() < 1e-6, name
