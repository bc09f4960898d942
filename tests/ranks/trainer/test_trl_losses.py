"""TRL's losses over ranks: whatever a trainer of TRL logs in one process, the same class behind the mixin logs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

from tests.ranks.trl_runs import assert_same_logs, omni, stock

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SFT", "dense", {}),
    ("SFT", "lora", {"loss_type": "dft"}),
    ("SFT", "dense", {"label_smoothing_factor": 0.1}),
    ("SFT", "qwen3_moe", {}),
    ("SFT", "mixtral", {"router_aux_loss_coef": 0.5}),
    ("DPO", "lora", {"loss_type": ["sigmoid", "ipo"]}),
    ("DPO", "qwen3_moe", {"router_aux_loss_coef": 0.5}),
    ("Reward", "reward", {"center_rewards_coefficient": 0.1}),
    ("KTO", "dense", {"loss_type": "apo_zero_unpaired"}),
    ("KTO", "mixtral", {"loss_type": "apo_zero_unpaired"}),
]


@pytest.mark.parametrize(("kind", "model", "more"), [*CASES, ("KTO", "lora", {})], ids=lambda value: str(value))
def test_sp_logs_what_one_process_logs(ranks, tmp_path, kind, model, more):
    expected = stock(kind, str(tmp_path / "stock"), model, **more)
    for found in ranks(2).run(omni, kind, "sp=2", str(tmp_path / "omni"), model, **more, timeout=120):
        assert_same_logs(found, expected)


@pytest.mark.parametrize(("kind", "model", "more"), CASES, ids=lambda value: str(value))
def test_data_ranks_log_what_one_process_logs(ranks, tmp_path, kind, model, more):
    expected = stock(kind, str(tmp_path / "stock"), model, **more)
    # One process pads its batch as a whole; SFT evaluates the mean of its batches, of which each has a router loss.
    mixture = model in ("mixtral", "qwen3_moe")
    but = ("num_input_tokens_seen", *(["eval_loss"] if kind == "SFT" or mixture else []))
    but += ("eval_aux_loss",) if mixture else ()
    half = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    for found in ranks(2).run(omni, kind, "dp_shard=2", str(tmp_path / "omni"), model, **more, **half, timeout=120):
        assert_same_logs(found, expected, but=but)


def test_kto_pairs_rows_of_a_process(ranks, tmp_path):
    """KTO's KL term mixes the rows of a process: the right value is that of as many processes of the stock class."""
    expected = ranks(2).run(stock, "KTO", str(tmp_path / "stock"), "dense", timeout=120)
    found = ranks(2).run(omni, "KTO", "dp_shard=2", str(tmp_path / "omni"), "dense", timeout=120)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_logs(mine, theirs)
