"""benchmarks/on_gpu.sh: its runner loses nothing when parts go wrong, and its parts run end to end on a CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.on_gpu import PARTS, Spec, dense, experts, kernels, rates
from benchmarks.on_gpu.compare import compare, limits_of, run_prepared, run_stock
from benchmarks.on_gpu.families import build, inputs_of
from benchmarks.on_gpu.parity import reference
from benchmarks.on_gpu.part import Settings
from benchmarks.on_gpu.runner import Runner, share, total_seconds
from benchmarks.on_gpu.table import passed, table
from hf_veomni import prepare_omni
from tests.e2e.launching import run
from tests.e2e.on_gpu_parts import LEFT_BEHIND


@pytest.fixture
def measure(tmp_path: Path) -> Any:
    """`measure(parts, budget)` runs parts and returns their records; the files are in `tmp_path / "out"`."""
    (tmp_path / "out").mkdir()

    def start(parts: dict[str, Spec], budget: float, show: Any = lambda name, row: None) -> dict[str, Any]:
        runner = Runner(
            parts, Settings("cpu", small=True), tmp_path / "out", tmp_path, budget=budget, jobs=2, header={}, show=show
        )
        records = runner.run()
        assert json.loads((tmp_path / "out" / "on_gpu.json").read_text())["parts"] == records
        return records

    return start


def rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["case"], row["status"]) for row in record["rows"]]


def test_a_part_that_goes_wrong_costs_one_case(measure: Any, tmp_path: Path) -> None:
    names = ("good", "wrong", "error", "memory", "crash", "hang")
    records = measure({name: Spec("tests.e2e.on_gpu_parts", 60) for name in names}, budget=900)
    whole = [("before", "ok"), ("bad", "FAILED"), ("after", "ok")]
    assert rows(records["good"]) == [("before", "ok"), ("bad", "ok"), ("after", "ok")]
    assert all(rows(records[name]) == whole for name in ("wrong", "memory", "crash", "hang"))
    assert rows(records["error"]) == [whole[0], ("bad", "-"), *whole[1:]]
    assert {record["status"] for record in records.values()} == {"done"}
    assert records["crash"]["rows"][1]["summary"].startswith("crashed with signal SIGABRT")
    assert records["error"]["rows"][2]["summary"].startswith("RuntimeError: nothing works")
    log = (tmp_path / "out" / "on_gpu.log").read_text()
    assert "hang    |   File" in log and "in hang" in log and "crash   | Fatal Python error: Aborted" in log
    assert "good    | this is the output of good" in log and "error   | RuntimeError: nothing works" in log
    left = subprocess.run(["pgrep", "-f", re.escape(LEFT_BEHIND)], capture_output=True, text=True).stdout
    assert not left, "what a part has started outlives it"
    assert not passed(records) and "RuntimeError: nothing works at all" in table(records)


def test_time_that_is_up_ends_the_run_with_what_there_is(measure: Any) -> None:
    parts = {
        "slow": Spec("tests.e2e.on_gpu_parts", 25, alone=True),
        "good": Spec("tests.e2e.on_gpu_parts", 1, alone=True),
    }
    begin = time.monotonic()
    records = measure(parts, budget=16)
    assert time.monotonic() - begin < 60
    assert {name: record["status"] for name, record in records.items()} == {"slow": "stopped", "good": "no time left"}
    assert records["slow"]["rows"][-1]["status"] == "FAILED" and not passed(records)


def test_shares_of_the_budget() -> None:
    parts = {"a": Spec("", 40, alone=True), "b": Spec("", 30), "c": Spec("", 60)}
    assert total_seconds(parts, jobs=2) == 100 and total_seconds(parts, jobs=1) == 130
    assert share(parts["a"], parts, 2, left=200.0, scale=2.0) == 80
    rest = {name: parts[name] for name in ("b", "c")}
    assert share(parts["c"], rest, 2, left=180.0, scale=2.0) == 180, "a was done in 20 seconds of its 80"
    assert share(parts["c"], rest, 2, left=90.0, scale=2.0) == 120, "a took longer"


def test_tests_of_the_kernels_are_found() -> None:
    """Without the import of all others."""
    found = {Path(path).name for path in kernels.files()}
    assert {"test_varlen_kernel.py", "test_chunked_compiled.py"} <= found and len(found) < 10


def test_a_kernel_that_cannot_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise IndexError("Dimension out of range")

    whole = {"broken": broken, "full": lambda q, k, v: q + k.repeat_interleave(2, 1) * v.repeat_interleave(2, 1)}
    monkeypatch.setattr(rates, "attention_kernels", lambda ends, document: whole)
    found = []
    part = SimpleNamespace(cuda=False, device="cpu", small=True, row=lambda status, text, **_: found.append(text))
    rates.attention_of(part, 64, 32, 4, 2, 16)
    assert len(found) == 2 and "broken: Dimension out of range" in found[0] and "TFLOP/s" in found[1]


@pytest.mark.parametrize("module", [dense, experts])
def test_layers_are_chosen_by_the_free_memory(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 78 GiB free: more at 8K than at 64K, never all of a model whose weights alone fill the device."""
    chosen = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * 2**30, 80 * 2**30))
    monkeypatch.setattr(module, "measure", lambda part, kind, options, tokens, _: chosen.update({tokens: options}))
    part = SimpleNamespace(cuda=True, device="cuda", small=False)
    for tokens, median, stock, *more in module.CASES:
        getattr(module, module.__name__.rpartition(".")[2])(part, tokens, median, stock, *more[:-1])
    layers = {tokens: options.layers for tokens, options in chosen.items()}
    assert 32 >= layers[8192] > layers[max(layers)] >= 2, layers


def test_parity_notices_documents_that_see_each_other() -> None:
    torch.set_num_threads(1)
    wanted = reference("dense", small=True)
    model = build("dense", True, torch.float32, "cpu")
    documents, row = inputs_of("dense", True, model)
    limits = limits_of(compare(run_stock(model, documents, "cpu"), wanted), torch.float32)
    model.zero_grad(set_to_none=True)
    prepare_omni(model, "sp=1")
    assert compare(run_prepared(model, row, "cpu"), wanted).within(limits)
    model.zero_grad(set_to_none=True)
    row["position_ids"] = torch.arange(row["input_ids"].shape[1])[None]
    errors = compare(run_prepared(model, row, "cpu"), wanted)
    assert not errors.within(limits) and errors.logits > 1e-2


def test_the_parts_that_measure(measure: Any) -> None:
    names = ("limits", "experts", "loss")
    records = measure({name: PARTS[name] for name in names}, budget=900)
    assert passed(records), table(records)
    contenders = [row.get("contender") for row in records["experts"]["rows"]]
    assert [name for name in contenders if name] == ["ours", "ours ep", "stock sdpa"]
    assert all(
        row["status"] == "ok" for row in records["loss"]["rows"] if row.get("contender", "full logits")[:4] != "full"
    )


@pytest.mark.slow
def test_one_command_runs_every_part(tmp_path: Path) -> None:
    command = ["benchmarks/on_gpu.sh", "--device", "cpu", "--small", "--output", str(tmp_path), "--budget", "540"]
    _, output = run(*command, limit=560)
    found = json.loads((tmp_path / "on_gpu.json").read_text())
    assert list(found["parts"]) == list(PARTS) and found["commit"] and found["versions"]["torch"] == torch.__version__
    assert all(part["status"] == "done" and part["rows"] for part in found["parts"].values())
    assert "all checks passed" in output


def test_an_unknown_part_is_named() -> None:
    status, output = run("benchmarks/on_gpu.sh", "denes", "--device", "cpu", check=False)
    assert status == 2 and "no part is called 'denes': they are limits, rates, liger, kernels" in output


def test_a_signal_ends_the_run_with_what_there_is(measure: Any) -> None:
    parts = {name: Spec("tests.e2e.on_gpu_parts", 60, alone=True) for name in ("slow", "good")}
    records = measure(parts, budget=900, show=lambda name, row: os.kill(os.getpid(), signal.SIGTERM))
    assert rows(records["slow"])[0] == ("before", "ok") and records["slow"]["status"] == "stopped"
    assert records["good"]["status"] == "waiting" and not passed(records)
