"""What the doctor makes of a report's numbers, and of a run that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from hf_veomni.cli import app
from hf_veomni.doctor import PARTS, Row, diagnose
from hf_veomni.planner import plan_layouts

DENSE = LlamaConfig(num_hidden_layers=8, vocab_size=32000, max_position_embeddings=8192)
RANK = {"forward": 0.3, "backward": 0.5, "exchange": 0.1, "data": 0.05, "optimizer": 0.1, "other": 0.05, "work": 0.2}
RANK |= {"tokens": 4096.0, "flops": 1e14, "memory": 2.0**31, "compiled": 0.0}


def write(folder: Path, rows: list[Row], **changes: Any) -> Path:
    record: dict[str, Any] = {
        "model": "LlamaForCausalLM", "config": DENSE.to_dict(), "plan": "dp_shard=8", "world_size": 8, "sp_size": 1,
        "ep_size": 1, "device": {"name": "NVIDIA L40S", "memory_gib": 44.4}, "checkpointing": False,
        "accumulation": 1, "lora": None, "mixed": True, "fp32": False, "context": 32768, "document": 4096,
        "error": None,
    }  # fmt: skip
    record |= changes | {"rows": [row.to_dict() for row in rows]}
    (folder / "step_report.json").write_text(json.dumps(record, default=str))
    return folder


def test_a_row_is_the_mean_of_ranks() -> None:
    row = Row.of(5, 2, [RANK, {**RANK, "work": 0.8}], 2, 1e15, {})
    assert sum(row.parts.values()) == pytest.approx(0.5) and set(row.parts) == set(PARTS)
    assert row.parts["exchange"] == pytest.approx(0.05)
    assert row.parts["forward"] == pytest.approx(0.15 - 0.05 * 3 / 8)
    assert row.tokens_per_second == pytest.approx(4096 / 2 / 0.5)
    assert row.mfu == pytest.approx(2e14 / 2 / 2 / 0.5 / 1e15 / 2)
    assert row.slowest[0] == 1 and row.slowest[1] == pytest.approx(0.8 / 0.5)
    assert row.memory_gib == 2 and row.balance == 1


def test_smallest_change_that_fits(tmp_path: Path) -> None:
    error = {"kind": "out of memory", "message": "CUDA out of memory. Tried to allocate 2.00 GiB"}
    (found,) = diagnose(write(tmp_path, [], error=error))
    assert found.name == "out of memory" and "activations" in found.advice
    assert "of dp_shard=8 is" in found.advice
    assert "The smallest change that fits: dp_shard=4,sp=2 (" in found.advice
    assert found.advice.endswith(" with `gradient_accumulation_steps=2`.")  # as many sequences a step as before


@pytest.mark.parametrize(("plan", "named"), [("", False), ("overlap=pairs", True)])
def test_pairs_and_stages_are_named_where_the_run_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, named: bool
) -> None:
    from hf_veomni import planner

    seen: list[Any] = []
    monkeypatch.setattr(planner, "plan_layouts", lambda *a, **k: seen.append(plan_layouts(*a, **k)) or seen[-1])
    error = {"kind": "out of memory", "message": "CUDA out of memory."}
    (found,) = diagnose(write(tmp_path, [], error=error, world_size=2, plan=plan))
    assert "The smallest change" in found.advice or "No plan fits" in found.advice
    layouts = [entry.layout for entry in seen[0].entries]
    assert any(layout.overlap == "pairs" for layout in layouts) is named
    assert not any(layout.pp > 1 for layout in layouts)


def test_failures_without_words(tmp_path: Path) -> None:
    (found,) = diagnose(write(tmp_path, [], error={"kind": "out of memory", "message": ""}))
    assert found.name == "out of memory" and "without a message" in found.measured
    (found,) = diagnose(write(tmp_path, [], error={"kind": "AssertionError", "message": ""}))
    assert found.name == "failed" and "AssertionError" in found.measured
    error = {"kind": "out of memory", "message": "CUDA out of memory."}
    (found,) = diagnose(write(tmp_path, [], error=error, context=0, document=0))
    assert "before its first batch" in found.advice


def test_nothing_was_measured(tmp_path: Path) -> None:
    (found,) = diagnose(write(tmp_path, []))
    assert found.name == "nothing measured"


@pytest.mark.parametrize("whole", [True, False])
def test_failures_of_other_ranks(tmp_path: Path, whole: bool) -> None:
    """What the others report of a rank that is gone is not the cause; the first one may have written nothing."""
    row = Row.of(1, 1, [RANK], 1, None, {})
    write(
        tmp_path, [row], error={"kind": "RuntimeError", "message": "Connection closed by peer", "rank": 2, "time": 1}
    )
    (tmp_path / "step_report.json").rename(tmp_path / "step_report.error.2.json")
    write(tmp_path, [row], error={"kind": "out of memory", "message": "CUDA out of memory.", "rank": 3, "time": 2})
    (tmp_path / "step_report.json").rename(tmp_path / "step_report.error.3.json")
    if whole:
        write(tmp_path, [row])
    (found,) = diagnose(tmp_path)
    assert found.name == "out of memory" and found.measured == "on rank 3: CUDA out of memory."


def test_few_rows_for_an_expert(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8).to_dict()
    row = Row.of(1, 1, [RANK] * 8, 1, None, {})
    names = [f.name for f in diagnose(write(tmp_path, [row], config=config, ep_size=2, context=1024))]
    assert names == ["small matmuls"]
    assert not diagnose(write(tmp_path, [row], config=config, ep_size=8, context=1024))


@pytest.mark.parametrize(
    ("context", "load", "words"),
    [
        (8192, 1.0, "Neither imbalance, nor exchanges"),
        (8192, 3.0, "It comes from uneven experts and exposed exchange: see there."),
        (1024, 1.0, "It comes from exposed exchange and small matmuls"),
    ],
)
def test_low_mfu_at_high_ep(tmp_path: Path, context: int, load: float, words: str) -> None:
    config = Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8).to_dict()
    exchange = 0.1 if "Neither" in words else 0.5
    rank = {**RANK, "exchange": exchange}
    found = []
    for peak in (1e15, 3e14):  # of a device: 9 % and 30 % of it
        row = Row.of(1, 1, [rank] * 8, 1, peak, {"expert_load_max": load})
        found.append(diagnose(write(tmp_path, [row], config=config, ep_size=2, context=context)))
    low = next(one for one in found[0] if one.name == "low MFU")
    assert low.measured.startswith("10% of what the device could do, with ep=2") and words in low.advice
    assert "low MFU" not in [one.name for one in found[1]]


def test_uneven_batches(tmp_path: Path) -> None:
    ranks = [{**RANK, "flops": 4e14, "work": 0.8}, *[RANK] * 3]
    assert [f.name for f in diagnose(write(tmp_path, [Row.of(1, 1, ranks, 1, None, {})]))] == ["uneven batches"]


def test_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2 and "step_report=True" in result.output.replace("\n", " ")
    write(tmp_path, [Row.of(1, 1, [RANK], 1, None, {})])
    assert "Nothing stands out" in CliRunner().invoke(app, ["doctor", str(tmp_path)]).output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: it must be the `output_dir`"),
        ("", "has no step_report.json"),
        ("{", "is no step report that this version reads .JSONDecodeError"),
        ("[1]", "is no step report that this version reads .TypeError"),
        ('{"rows": []}', "is no step report that this version reads .KeyError: .'accumulation'"),
        ('{"rows": [{"step": 1}]}', "is no step report that this version reads"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path: Path, content: str | None, message: str) -> None:
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
    if content:
        (run / "step_report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        diagnose(run)
