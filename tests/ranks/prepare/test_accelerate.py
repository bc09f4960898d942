"""A plain Accelerate loop with `OmniParallelismConfig`: same numbers as one process, and state that comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from tests.ranks.training import (
    PackedRows,
    adapt_experts,
    collate,
    lora_model,
    relative,
    tiny_mixtral,
    tiny_model,
)

PLANS = [(2, "sp=2", 1), (2, "dp_shard=2", 2), (4, "sp=2,dp_shard=2", 2), (4, "dp_replicate=2,sp=2", 2)]
plans = pytest.mark.parametrize(("world", "plan", "data_ranks"), PLANS, ids=[plan for _, plan, _ in PLANS])
ACCUMULATION, ROWS, STEPS = 2, 16, 6


def _loader(shuffle: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(11)
    return DataLoader(PackedRows(ROWS), batch_size=1, shuffle=shuffle, collate_fn=collate, generator=generator)


def _objects(model: torch.nn.Module, data_ranks: int, shuffle: bool = True) -> tuple[Any, ...]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=0.1)
    # accelerate steps a scheduler once for each reader of the data.
    return (
        model,
        optimizer,
        _loader(shuffle),
        get_linear_schedule_with_warmup(optimizer, data_ranks, STEPS * data_ranks),
    )


def _epoch(accelerator: Accelerator, objects: tuple[Any, ...]) -> dict[str, list[float]]:
    model, optimizer, loader, scheduler = objects
    model.train()
    seen: dict[str, list[float]] = {"losses": [], "norms": [], "rates": []}
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                seen["rates"].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen["losses"].extend(accelerator.gather_for_metrics(loss.detach()[None]).tolist())
    return seen


def _model(kind: str) -> torch.nn.Module:
    if kind.startswith("experts"):
        return adapt_experts(tiny_mixtral()) if kind.endswith("lora") else tiny_mixtral()
    return lora_model() if kind == "lora" else tiny_model()


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """In full, adapters of experts in PEFT's layout."""
    from hf_veomni.checkpoint import gather_full_state

    return {name: tensor.clone() for name, tensor in gather_full_state(model, keep=True).items()}


def _reference(kind: str, data_ranks: int) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """One process, what the data ranks read at once read in turn."""
    model = _model(kind)
    model, optimizer, loader, scheduler = _objects(model, 1)
    seen: dict[str, list[float]] = {"losses": [], "norms": [], "rates": []}
    size = ACCUMULATION * data_ranks
    for index, batch in enumerate(loader, start=1):
        loss = model(**batch, use_cache=False).loss
        (loss / size).backward()
        seen["losses"].append(loss.item())
        if index % size == 0:
            norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            seen["norms"].append(norm.item())
            seen["rates"].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return seen, _weights(model)


def _prepared(plan: str, kind: str, data_ranks: int, shuffle: bool = True) -> tuple[Accelerator, tuple[Any, ...]]:
    from hf_veomni import prepare_omni
    from hf_veomni.trainer import OmniParallelismConfig

    set_seed(0)
    accelerator = Accelerator(
        cpu=True, parallelism_config=OmniParallelismConfig(plan), gradient_accumulation_steps=ACCUMULATION
    )
    model = prepare_omni(_model(kind), plan)
    objects = accelerator.prepare(*_objects(model, data_ranks, shuffle))
    assert objects[0] is model
    return accelerator, objects


def _loop(plan: str, kind: str, data_ranks: int) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    accelerator, objects = _prepared(plan, kind, data_ranks)
    return _epoch(accelerator, objects), _weights(objects[0])


EXPERTS = [(4, "sp=2,dp_shard=2,ep=2", 2, "experts"), (4, "dp_replicate=2,sp=2,ep=2", 2, "experts_lora")]


@pytest.mark.parametrize(
    ("world", "plan", "data_ranks", "kind"),
    [(*case, kind) for case in PLANS for kind in ("full", "lora")] + EXPERTS,
)
def test_loop_equals_one_process(ranks, world, plan, data_ranks, kind):
    expected, weights = _reference(kind, data_ranks)
    assert min(expected["norms"]) > 0.5
    for found, left in ranks(world).run(_loop, plan, kind, data_ranks, timeout=120):
        assert relative(found["losses"], expected["losses"]) < 1e-5
        assert relative(found["norms"], expected["norms"]) < 1e-5
        assert found["rates"] == pytest.approx(expected["rates"])
        assert all((left[name] - weight).abs().max() < 1e-5 for name, weight in weights.items())


def _gathers(plan: str) -> dict[str, Any]:
    from hf_veomni.mesh import init_parallel_state
    from hf_veomni.trainer import OmniParallelismConfig

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    state = init_parallel_state(plan)
    loader = accelerator.prepare(DataLoader(torch.arange(7), batch_size=2))
    mine = torch.tensor(state.dp_rank)
    return {
        "scalar": accelerator.gather(mine).tolist(),
        "nested": accelerator.gather({"flag": mine[None] > 0, "half": [mine[None].bfloat16()]}),
        "objects": accelerator.gather_for_metrics([f"data rank {state.dp_rank}"], use_gather_object=True),
        "rows": [row for batch in loader for row in accelerator.gather_for_metrics(batch).tolist()],
        "uneven": accelerator.gather(torch.full((state.dp_rank + 1, 2), state.dp_rank)).tolist(),
    }


@plans
def test_gather_counts_each_row_once(ranks, world, plan, data_ranks):
    for found in ranks(world).run(_gathers, plan, timeout=60):
        numbers = list(range(data_ranks))
        assert found["scalar"] == numbers
        assert found["nested"]["flag"].tolist() == [n > 0 for n in numbers]
        assert found["nested"]["half"][0].dtype == torch.bfloat16
        assert found["objects"] == [f"data rank {n}" for n in numbers]
        assert found["rows"] == list(range(7))
        assert found["uneven"] == [[n, n] for n in numbers for _ in range(n + 1)]


def _save_and_load(plan: str, other: str, kind: str, data_ranks: int, directory: Path) -> tuple[Any, ...]:
    """Train, save, train on; then load into fresh objects, under `other`, and train on again."""
    accelerator, objects = _prepared(plan, kind, data_ranks, shuffle=False)
    _epoch(accelerator, objects)
    saved = _weights(objects[0])
    accelerator.save_state(str(directory))
    went_on = _epoch(accelerator, objects)
    reset_accelerate()
    again, fresh = _prepared(other, kind, data_ranks, shuffle=False)
    with torch.no_grad():
        for parameter in fresh[0].parameters():
            if parameter.requires_grad:
                parameter.zero_()
    again.load_state(str(directory))
    loaded = _weights(fresh[0])
    return saved, loaded, went_on, _epoch(again, fresh)


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("world", "plan", "other", "data_ranks", "kind"),
    [
        (2, "sp=2", "sp=2", 1, "full"),
        (4, "sp=2,dp_shard=2", "dp_replicate=2,sp=2", 2, "lora"),
        (4, "sp=2,dp_shard=2,ep=2", "dp_replicate=2,sp=2,ep=2", 2, "experts_lora"),
        *(
            pytest.param(4, plan, other, 2, kind, marks=pytest.mark.slow)
            for plan, other, kind in [
                ("sp=2,dp_shard=2", "sp=2,dp_shard=2", "full"),
                ("sp=2,dp_shard=2", "sp=2,dp_shard=2", "lora"),
                ("sp=2,dp_shard=2", "dp_replicate=2,sp=2", "full"),
                ("sp=2,dp_shard=2,ep=4", "sp=2,dp_shard=2,ep=4", "experts"),
            ]
        ),
    ],
)
def test_state_comes_back(ranks, tmp_path, world, plan, other, data_ranks, kind):
    results = ranks(world).run(_save_and_load, plan, other, kind, data_ranks, tmp_path / "state", timeout=120)
    tolerance = 0.0 if plan == other else 1e-5
    for saved, loaded, went_on, resumed in results:
        assert all(torch.equal(saved[name], weight) for name, weight in loaded.items())
        for key in ("losses", "norms", "rates"):
            assert relative(resumed[key], went_on[key]) <= tolerance


def _plain_files(plan: str, directory: Path) -> dict[str, torch.Tensor]:
    accelerator, objects = _prepared(plan, "full", 1)
    model = objects[0]
    accelerator.save_model(model, str(directory / "save_model"))
    accelerator.unwrap_model(model).save_pretrained(
        directory / "save_pretrained",
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )
    accelerator.wait_for_everyone()
    return _weights(model)


def test_saved_models_are_plain(ranks, tmp_path):
    weights = ranks(2).run(_plain_files, "sp=2", tmp_path, timeout=60)[0]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "save_model/model.safetensors")
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "save_pretrained")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def _unprepared(plan: str) -> None:
    from hf_veomni.trainer import OmniParallelismConfig

    Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan)).prepare(tiny_model())


def _with_plugin(plan: str) -> None:
    from hf_veomni.trainer import OmniParallelismConfig

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan), fsdp_plugin=plugin)


def _other_world(plan: str) -> None:
    from hf_veomni.trainer import OmniParallelismConfig

    Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))


def _missing_state(plan: str, directory: Path) -> None:
    accelerator, _ = _prepared(plan, "full", 1)
    accelerator.save_state(str(directory))
    if accelerator.is_main_process:
        (directory / "omni_optimizer_0/index.json").unlink()
    accelerator.wait_for_everyone()
    accelerator.load_state(str(directory))


def test_what_does_not_go_with_a_plan_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2).raises(_unprepared, "sp=2", match="is not prepared for the plan", timeout=60)
    ranks(2).raises(_with_plugin, "sp=2", match="leave the plugin out", timeout=60)
    ranks(2).raises(_other_world, "sp=3", match="must divide the number of ranks", timeout=60)
    ranks(2).raises(_missing_state, "sp=2", tmp_path / "state", match="missing or incomplete", timeout=60)


def test_one_process_needs_no_plan():
    """The same lines with a plan of ones."""
    reset_accelerate()
    try:
        expected, weights = _reference("full", 1)
        accelerator, objects = _prepared("", "full", 1)
        found = _epoch(accelerator, objects)
        assert relative(found["losses"], expected["losses"]) < 1e-6
        assert relative(found["norms"], expected["norms"]) < 1e-6
        assert all((tensor - weights[name]).abs().max() < 1e-6 for name, tensor in objects[0].state_dict().items())
    finally:
        reset_accelerate()


def test_config_can_be_copied_and_shown():
    from hf_veomni.trainer import OmniParallelismConfig

    config = copy.deepcopy(OmniParallelismConfig("sp=2,dp_shard=2"))
    assert config.plan.sp_size == 2 and config.total_size == 4
    assert "sp=2" in repr(config) and config.to_json()["sp_size"] == 2
