"""Runs that go wrong in one way each, and what the doctor says of them; and the report of one that goes well."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_veomni.comm.all_to_all import running_transport
from hf_veomni.context import within
from hf_veomni.doctor import PARTS, diagnose, read_record
from tests.ranks.training import PackedRows, tiny_mixtral, tiny_model

ROWS = 8
LAYERS = "model.layers.1.mlp"


def _train(folder: Path, plan: str, case: str) -> list[str]:
    """Names of what the doctor finds after a run with this fault."""
    from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments

    model = tiny_mixtral() if case == "experts" else tiny_model()
    arguments = OmniTrainingArguments(
        str(folder), plan=plan, num_train_epochs=1, per_device_train_batch_size=1, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, step_report=True, log_expert_load=case == "experts",
    )  # fmt: skip
    data = PackedRows(ROWS)
    if case == "data":
        data = SlowRows(data.rows)
    trainer = OmniTrainer(model, arguments, train_dataset=data, data_collator=OmniDataCollatorWithPacking())
    FAULTS.get(case, lambda model: None)(trainer.model)
    try:
        with within(transport=SlowLink()) if case == "exchange" else within():
            trainer.train()
    except (torch.OutOfMemoryError, ValueError):
        assert case in ("memory", "features")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return [found.name for found in diagnose(folder)]


class SlowRows(PackedRows):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.2)
        return super().__getitem__(index)


class SlowLink:
    """The link of the process groups, and 20 ms on top."""

    def __init__(self) -> None:
        self.inner = running_transport()

    def start(self, x: Tensor, group: Any, send: Sequence[int], receive: Sequence[int]) -> Any:
        return self.inner.start(x, group, send, receive)

    def wait(self, ticket: Any) -> Tensor:
        time.sleep(0.02)
        return self.inner.wait(ticket)


def _slow(model: nn.Module) -> None:
    if torch.distributed.get_rank() == 1:
        model.get_submodule(LAYERS).register_forward_hook(lambda *_: time.sleep(0.05))


def _full(model: nn.Module) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.get_submodule(LAYERS).register_forward_hook(fail)


def _misaligned(model: nn.Module) -> None:
    def fail(*_: Any) -> None:  # what transformers says of a sample that was cut
        raise ValueError("Image features and image tokens do not match, tokens: 12, features: 16")

    model.get_submodule(LAYERS).register_forward_hook(fail)


def _recompiles(model: nn.Module) -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    model.get_submodule(LAYERS).register_forward_hook(lambda m, a, out: compiled(out) / 2)


def _uneven(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            with torch.no_grad():
                parameter.zero_()  # equal scores: the first experts get everything


FAULTS = {"slow rank": _slow, "memory": _full, "features": _misaligned, "recompiles": _recompiles, "experts": _uneven}


@pytest.mark.parametrize(
    ("plan", "case", "wanted"),
    [
        ("", "data", "slow data"),
        ("", "memory", "out of memory"),
        ("", "features", "features not aligned"),
        ("", "recompiles", "recompiles"),
        ("", "experts", "uneven experts"),
        ("sp=2", "exchange", "exposed exchange"),
        ("dp_shard=2", "slow rank", "slow rank"),
        ("sp=2", "slow rank", "slow rank"),
    ],
)
def test_a_fault_is_found(ranks, tmp_path: Path, plan: str, case: str, wanted: str) -> None:
    found = ranks(2 if plan else 1).run(_train, tmp_path, plan, case, timeout=120)
    assert wanted in found[0], found


def test_a_good_run_has_a_report(ranks, tmp_path: Path) -> None:
    found = ranks(2).run(_train, tmp_path, "sp=2", "good", timeout=120)
    assert not {"slow data", "out of memory", "features not aligned", "recompiles"} & set(found[0])
    record = read_record(tmp_path)
    assert len(record["rows"]) == ROWS and record["plan"] == "sp=2" and record["error"] is None
    for row in record["rows"]:
        assert set(row.parts) == set(PARTS) and all(seconds >= 0 for seconds in row.parts.values()), row
        assert row.parts["forward"] > 0 and row.parts["exchange"] > 0 and row.tokens_per_second > 0
    page = (tmp_path / "step_report.html").read_text()
    assert page.count("<rect") == ROWS * len(PARTS) and "http" not in page
    assert json.loads((tmp_path / "step_report.json").read_text())["rows"][0]["step"] == 1
