"""Every benchmark runs, small, through the one command; and its check fails when what it times is wrong."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as entry
from benchmarks import (
    _record,
    activation_memory,
    experiments,
    expert_parallel,
    overhead,
    overlap,
    packing_vs_padding,
    pairs,
    step,
    syncs,
)
from benchmarks._flops import flops_of_step
from benchmarks._memory import MemoryLog
from benchmarks._phases import PHASES
from benchmarks._syncs import READ, UPLOAD, SyncCounter

SHAPE = ["--hidden", "32", "--heads", "4", "--kv-heads", "2", "--layers", "2", "--vocab", "128"]
TINY_STEP = [*SHAPE, "--intermediate", "48", "--tokens", "96", "--median", "16", "--rounds", "1", "--device", "cpu"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`bench(name, *options)` runs a benchmark in this process and returns its rows."""
    monkeypatch.setattr(_record, "RESULTS", tmp_path)

    def run(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["python -m benchmarks", *arguments])
        try:
            entry.main()
        except SystemExit as ended:
            assert not ended.code, ended.code
        (path,) = tmp_path.glob("*.json")
        content = json.loads(path.read_text())
        assert {"benchmark", "commit", "date", "versions", "hardware", "plan", "rows"} <= set(content)
        return content["rows"]

    return run


@pytest.fixture
def tiny_step(monkeypatch: pytest.MonkeyPatch) -> step.Bench:
    monkeypatch.setattr(sys, "argv", ["step", *TINY_STEP])
    return step.Bench(step.parse())


def test_step_is_checked_and_compared(bench: Any) -> None:
    ours, stock = bench("step", *TINY_STEP)
    assert (ours["contender"], stock["contender"]) == ("ours", "stock sdpa")
    assert ours["check"]["passed"] and stock["check"]["passed"]
    assert set(ours["phases"]) == set(PHASES) and ours["phases"]["attention"]["seconds"] > 0
    assert stock["ours_is_faster"]["p50"] > 0 and ours["peak_bytes"] > 0 and ours["mfu"] is None


def test_step_notices_documents_that_see_each_other(tiny_step: step.Bench) -> None:
    tiny_step.load([16, 16])
    expected = tiny_step.reference()
    assert tiny_step.check("ours", expected)["passed"]
    tiny_step.batch["position_ids"] = torch.arange(32)[None]  # one document
    assert not tiny_step.check("ours", expected)["passed"]


def test_step_records_a_contender_that_runs_out_of_memory(
    tiny_step: step.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = step.Bench.block

    def full(self: step.Bench, name: str, steps: int) -> list[float]:
        if name == "stock sdpa":
            raise torch.OutOfMemoryError("full")
        return block(self, name, steps)

    monkeypatch.setattr(step.Bench, "block", full)
    ours, stock = step.measure_row(tiny_step, [16, 16], rate=1e9)
    assert not ours["out_of_memory"] and ours["tokens_per_second"]["p50"] > 0
    assert stock["out_of_memory"] and "seconds" not in stock


def test_flops_count_the_causal_half_of_each_document() -> None:
    options = argparse.Namespace(hidden=8, heads=2, kv_heads=1, intermediate=16, layers=3, vocab=10)
    whole, halves = flops_of_step(options, [64]), flops_of_step(options, [32, 32])
    assert whole["attention"] == 3 * 3 * 4 * 8 * 64**2 / 2 == 2 * halves["attention"]
    assert whole["mlp"] == halves["mlp"] == 3 * 2 * 64 * 3 * 3 * 8 * 16
    assert whole["projections"] == 3 * 2 * 64 * 3 * (8 * 8 * 2 + 2 * 8 * 4)
    assert whole["loss"] == 3 * 2 * 63 * 8 * 10


def test_flops_of_experts_count_those_that_a_token_goes_to() -> None:
    options = argparse.Namespace(hidden=8, heads=2, kv_heads=1, intermediate=16, layers=3, vocab=10)
    options.head_dim, options.experts, options.top_k = 6, 5, 2
    step = flops_of_step(options, [64])
    assert step["mlp"] == 3 * 2 * 64 * 3 * (2 * 3 * 8 * 16 + 8 * 5)
    assert step["projections"] == 3 * 2 * 64 * 3 * (2 * 8 * 12 + 2 * 8 * 6)
    assert step["attention"] == 3 * 3 * 4 * 2 * 6 * 64**2 / 2


def test_memory_log_counts_what_is_live() -> None:
    weight = torch.zeros(256, requires_grad=True)
    with MemoryLog() as log:
        weight.register_hook(lambda grad: log.label(grad, "gradient"))
        kept = (weight * 2).exp()  # the product dies, the exponential is saved
        log.mark("loss")
        kept.sum().backward()
        del kept
    assert log.at("loss", "activation") == 1024
    assert log.curve("activation")[-1] == 0  # the graph is gone
    assert log.curve("gradient")[-1] == weight.grad.nbytes == 1024
    assert log.peak("activation")[0] == 2048 + 8  # the exponential and its gradient; the sum and its gradient


@pytest.mark.slow
def test_activation_memory_falls_with_sp(bench: Any) -> None:
    rows = bench("activation_memory", *SHAPE, "--sp", "1", "2", "--tokens", "256", "--median", "32")
    assert [(row["sp_size"], row["checkpointing"]) for row in rows] == [(1, False), (1, True), (2, False), (2, True)]
    assert all(abs(row["held_times_sp"] - 1) < 0.1 and abs(row["peak_times_sp"] - 1) < 0.1 for row in rows)


@pytest.mark.slow
def test_halves_in_flight_need_no_more_than_their_row(bench: Any) -> None:
    rows = bench("pairs", *SHAPE, "--tokens", "512", "--repeats", "1")
    assert [row["checkpointing"] for row in rows] == [False, True]
    for row in rows:
        assert row["held_ratio"] <= 1.02 and row["peak_ratio"] <= 1.02 and row["cpu_ratio"] > 0
        assert row["pairs"]["gathers"] < row["turns"]["gathers"]


def test_pairs_notice_what_takes_more() -> None:
    def way(size: int, loss: float = 2.0) -> dict[str, Any]:
        return {"loss": loss, "held": size, "peak": 2 * size, "peak_with_gradients": 9, "cpu_seconds": {"p50": 1.0}}

    row = {"checkpointing": False, "plain": way(100), "pairs": way(101), "turns": way(50)}
    assert pairs.compare(row, 1.02) == [] and row["held_ratio"] == 1.01
    held, peak, loss = pairs.compare({**row, "pairs": way(103, 2.1)}, 1.02)
    assert "held" in held and "1.030" in held and "peak" in peak and "loss of pairs" in loss


@pytest.mark.slow
def test_overhead_runs_and_notices_what_takes_longer(bench: Any) -> None:
    options = ["--tokens", "64", "--rounds", "1", "--steps", "1", "--tolerance", "9"]
    rows = bench("overhead", *SHAPE, *options)
    assert [row["contender"] for row in rows] == [*overhead.CONTENDERS] and rows[1]["over_plain"]["p50"] > 0
    assert overhead.compare(rows, 9) == []
    slow = {**rows[2], "rounds": [10 * seconds for seconds in rows[0]["rounds"]], "loss": 0.0}
    loss, time = overhead.compare([*rows[:2], slow], 9)
    assert "the loss of prepared, same loss is 0.0" in loss and "takes 10.000 times" in time


def test_activation_memory_notices_what_does_not_fall() -> None:
    def row(sp_size: int, held: int, loss: float = 2.0) -> dict[str, Any]:
        rank = {"held": held, "peak": 100 // sp_size, "loss": loss, "left": 0}
        return {"sp_size": sp_size, "checkpointing": False, "ranks": [rank] * sp_size}

    assert activation_memory.compare([row(1, 100), row(2, 54)], 0.1, 1e-5) == []
    (held,) = activation_memory.compare([row(1, 100), row(2, 56)], 0.1, 1e-5)
    assert "held activations at sp=2" in held
    (loss,) = activation_memory.compare([row(1, 100), row(2, 50, loss=2.1)], 0.1, 1e-5)
    assert "loss at sp=2" in loss


def test_expert_exchange_equals_the_formula(bench: Any) -> None:
    options = ["--ranks", "2", "--intermediate", "16", "--experts", "4", "--top-k", "2", "--tokens", "64"]
    one, two = bench("expert_parallel", *SHAPE, *options, "--median", "16", "--rounds", "1", "--steps", "1")
    assert (one["ep_size"], two["ep_size"]) == (1, 2)
    rows = {"handed": 4 * 64 * 2 * 32 * 4, "left": 4 * 64 * 32 * 4}
    assert two["formula"] == {"calls": 4, **rows, "count_left": 16, "weight_left": 2 * 64 * 4}
    assert all(rank["left"] == two["formula"]["left"] and rank["count_calls"] == 1 for rank in two["even"])
    assert two["held"]["gathered"] * 2 == one["held"]["gathered"] == 4 * 3 * 32 * 16 * 4
    assert two["held"]["optimizer"] == 2 * two["held"]["parameters"] == 2 * two["held"]["gradients"]


def test_expert_benchmark_notices_what_is_off() -> None:
    def row(ep_size: int, **changes: Any) -> dict[str, Any]:
        held = {"parameters": 8, "gradients": 8, "optimizer": 16, "gathered": 8 // ep_size}
        counts = {"handed": 100.0, "left": 50.0} if ep_size > 1 else {"handed": 0.0, "left": 0.0}
        good = {"ep_size": ep_size, "held": held, "losses": [[2.0]], "rounds": [1.0], "formula": counts}
        good["bundled"] = False
        return good | {"even": [counts], "handed_over_formula": 1} | changes

    def off(**changes: Any) -> list[str]:
        return expert_parallel.compare([row(1), row(2, **changes)], 1e-5)

    assert off() == []
    assert "loss at ep=2" in off(losses=[[2.1]])[0]
    assert "left of rank 0 at ep=2 is 51 with even routing, not 50" in off(even=[{"handed": 100, "left": 51}])[0]
    assert "handed over at ep=2" in off(handed_over_formula=1.1)[0]
    assert "gathered experts at ep=2" in off(held=row(1)["held"])[0]
    assert "optimizer at ep=2" in off(held=row(2)["held"] | {"parameters": 16})[0]


def test_waits_notice_what_is_off() -> None:
    def row(**changes: Any) -> dict[str, Any]:
        good = {"model": "dense", "row": "packed", "contender": "sp=2", "checkpointing": True, "loss_error": 0.0}
        return good | {"forward": 2, "backward": 0, "goal": 2, "goal_backward": 0} | changes

    assert syncs.check([row(), row(contender="stock", forward=9, goal=None, goal_backward=None)]) == []
    assert "3 reads, the goal is 2" in syncs.check([row(forward=3)])[0]
    assert "1 reads in the backward" in syncs.check([row(forward=1, backward=1)])[0]
    assert "loss differs" in syncs.check([row(loss_error=1e-3)])[0]


def test_waits_are_counted_where_values_come_from_the_device() -> None:
    counter = SyncCounter(torch.device("cpu"))
    host = torch.arange(6)
    with counter:
        there = counter.place({"x": host})["x"]
        host.tolist(), bool(host.any()), host[host > 2], there[: len(host)] + 1  # ask nobody
        torch.tensor([1]).to(there.device, non_blocking=True)
        assert not counter.found
        mask = there > 2
        there.tolist(), there.cpu(), there.sum().item(), bool(mask.any()), there[mask], there.nonzero()
        torch.zeros(6, device=there.device).numpy()
        assert counter.count(READ) == 7
        known = there.cpu()
        known.tolist()
        assert counter.count(READ) == 8
        torch.tensor([1], device=there.device), host.to(there.device)
        assert counter.count(UPLOAD) == 2
        counter.phase = "backward"
        weight = torch.ones(6, requires_grad=True)
        weight.register_hook(lambda grad: grad.tolist() and None)
        (weight * there).sum().backward()
        assert counter.count(READ, "backward") == 1
    there.tolist()
    assert counter.count() == 11


@pytest.mark.slow
def test_chunks_leave_less_of_the_link_bare(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(overlap, "PICTURE", tmp_path / "shares.svg")
    monkeypatch.setattr(overlap, "TIMELINE", tmp_path / "timeline.svg")
    options = ["--tokens", "64", "--repeats", "1", "--ratios", "0.6", "--routing", "balanced"]
    rows = bench("overlap", *options, "--checkpointing", "0", "--slower", "1")
    for model, contenders in (("Qwen3-30B-A3B", 4), ("Llama-3-8B", 3)):
        exposed = {r["schedule"]: r["exposed"]["p50"] for r in rows if r["model"] == model and "schedule" in r}
        assert len(exposed) == contenders and exposed["plain"] > 0.95 and exposed.get("transformers", 1) > 0.95
        assert exposed["chunks"] < 0.75 and exposed["pairs"] < 0.4
    assert (tmp_path / "shares.svg").exists() and (tmp_path / "timeline.svg").exists()


def test_overlap_notices_what_is_off() -> None:
    def row(**changes: Any) -> dict[str, Any]:
        good = {"schedule": "pairs", "model": "m", "routing": "balanced", "checkpointing": False}
        return good | {"gradient_error": 0.0, "link_over_compute": 0.3, "seconds_over_plain": {"p50": 1.0}} | changes

    assert overlap.check([row()], 1e-5, 0.1) == []
    assert "gradients of pairs" in overlap.check([row(gradient_error=1e-3)], 1e-5, 0.1)[0]
    assert "1.200 times as long" in overlap.check([row(seconds_over_plain={"p50": 1.2})], 1e-5, 0.1)[0]


def test_experiments_run_and_are_drawn(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(experiments, "PICTURES", tmp_path)
    rows = bench("experiments", "--tiny")
    assert {path.stem.removeprefix("experiment_") for path in tmp_path.glob("*.svg")} == set(experiments.EXPERIMENTS)
    for name in experiments.EXPERIMENTS:
        here = [row for row in rows if row["experiment"] == name]
        assert here and all(row["contender"] for row in here), name
    one, *_, eight = (row for row in rows if row["experiment"] == "sp")
    assert one["longest"] == one["tokens"] and eight["longest"] > 4 * one["longest"]
    sent = {row["plan"]: row["sent"] for row in rows if row["experiment"] == "degrees"}
    assert sent["sp=1,ep=1"] == 0 < sent["sp=1,ep=2"] < sent["sp=1,ep=8"] < sent["sp=8,ep=8"]


def test_link_over_compute_of_devices() -> None:
    """By hand for a mixture: 4 exchanges of a token's rows of 2048 bf16, one for each of the 8 ranks that has some of
    its 8 of 128 experts; 7/8 of them sent."""
    found = overlap.ratio_of(overlap.SHAPES["experts"], "H100", 450e9)
    rows = 8 * (1 - math.prod((112 - i) / (128 - i) for i in range(8)))
    sent = 4 * rows * 2048 * 2 * 7 / 8 / (0.8 * 450e9)
    weights = 2048 * 128 * (32 + 4) * 2 + 8 * 3 * 2048 * 768 + 2048 * 128
    flops = 6 * weights + 3 * 4 * 4096 * 8192 / 2
    assert found == pytest.approx(sent / (flops / (0.5 * 989.4e12)))


def test_packing_equals_padding(bench: Any) -> None:
    options = ["--every", "60", "--layers", "1", "--longest", "64", "--budget", "256", "--rounds", "1"]
    padded, grouped, packed = bench("packing_vs_padding", *options, "--device", "cpu")
    assert [row["contender"] for row in (padded, grouped, packed)] == ["padding", "padding, grouped", "packing"]
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
    assert padded["slots"]["p50"] >= packed["slots"]["p50"] >= packed["useful_tokens"] > 0


def test_packing_notices_another_loss() -> None:
    result = {"seconds": 1.0, "slots": 10, "steps": 1, "loss": 2.0, "grad_norm": 1.0}
    blocks = {"padding": [result], "padding, grouped": [result], "packing": [{**result, "loss": 2.001}]}
    _, wrong = packing_vs_padding.compare(blocks, useful=10, tolerance=1e-4)
    assert len(wrong) == 1 and "loss of packing" in wrong[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("packing", "--documents", "200", "--max-tokens", "512", "--repeats", "1"),
        pytest.param(("headline",), marks=pytest.mark.slow),
        pytest.param(("syncs", "--layers", "1", "--device", "cpu"), marks=pytest.mark.slow),
        pytest.param(
            ("loss_memory", "--tokens", "128", "--vocab", "20000", "--hidden", "64", "--repeats", "1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda arguments: arguments[0],
)
def test_others_run(bench: Any, arguments: tuple[str, ...]) -> None:
    assert bench(*arguments)


def test_every_script_is_in_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(entry.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(entry.SCRIPTS)
    for name, takes_device in entry.SCRIPTS.items():
        monkeypatch.setattr(sys, "argv", ["python -m benchmarks", name, "--help"])
        with pytest.raises(SystemExit):
            entry.main()
        assert ("--device" in capsys.readouterr().out) == takes_device, name


def test_unknown_name_lists_the_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", "steps"])
    with pytest.raises(SystemExit):
        entry.main()
    assert "activation_memory" in capsys.readouterr().err


def test_balance_is_near_its_bound(bench: Any) -> None:
    rows = bench("balance", "--items", "24", "--batches", "2")
    assert rows and all(isinstance(row, dict) for row in rows)


def test_the_collator_makes_the_same_rows_with_and_without_workers(bench: Any) -> None:
    pytest.importorskip("espeakng_loader")
    rows = bench("collator", "--samples", "4", "--repeats", "1", "--workers", "0", "1")
    assert {(row["corpus"], row.get("workers")) for row in rows} == {
        (corpus, workers) for corpus in ("pictures", "sounds") for workers in (None, 0, 1)
    }


@pytest.mark.slow
def test_saving_stops_training_and_checks_what_it_wrote(bench: Any) -> None:
    rows = bench(
        "saving", "--hidden", "64", "--layers", "1", "--saves", "2", "--pause", "0", "--rounds", "1", "--no-goal"
    )
    assert [(row["contender"], row["ranks"]) for row in rows][0] == ("stock", 1) and len(rows) == 7
    assert all(row["stop"]["p50"] > 0 and row["difference"] < 1e-4 and not row.get("damage") for row in rows)
