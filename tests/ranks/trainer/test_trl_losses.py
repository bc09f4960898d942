"""TRL's losses over ranks: whatever a trainer of TRL logs in one process, the same class behind the mixin logs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

from tests.ranks.training import Run
from tests.ranks.trl_runs import assert_same_logs, logged, omni, omni_trainer, stock, stock_trainer

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SFT", "dense", {}),
    ("SFT", "lora", {"loss_type": "dft"}),
    ("SFT", "dense", {"label_smoothing_factor": 0.1}),
    ("SFT", "qwen3_moe", {}),
    ("SFT", "mixtral", {"router_aux_loss_coef": 0.5}),
    ("SFT", "exaone_moe", {"router_aux_loss_coef": 0.5}),
    ("SFT", "dense", {"loss_type": "chunked_nll", "completion_only_loss": False}),
    ("DPO", "lora", {"loss_type": ["sigmoid", "ipo"]}),
    ("DPO", "dense", {"loss_type": ["hinge", "discopop"], "f_divergence_type": "js_divergence"}),
    ("DPO", "dense", {"padding_free": True, "use_weighting": True, "ld_alpha": 0.5}),
    ("DPO", "qwen3_moe", {"router_aux_loss_coef": 0.5}),
    ("Reward", "reward", {"center_rewards_coefficient": 0.1}),
    ("KTO", "dense", {"loss_type": "apo_zero_unpaired"}),
    ("KTO", "mixtral", {"loss_type": "apo_zero_unpaired"}),
]
MIXTURES = ("mixtral", "qwen3_moe", "exaone_moe")
BY_TOKEN = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
HALF = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}


@pytest.mark.parametrize(("kind", "model", "more"), [*CASES, ("KTO", "lora", {})], ids=lambda value: str(value))
def test_sp_logs_what_one_process_logs(ranks, tmp_path, kind, model, more):
    expected = stock(kind, str(tmp_path / "stock"), model, **more)
    for found in ranks(2).run(omni, kind, "sp=2", str(tmp_path / "omni"), model, **more, timeout=120):
        assert_same_logs(found, expected)


@pytest.mark.parametrize(("kind", "model", "more"), CASES, ids=lambda value: str(value))
def test_data_ranks_log_what_one_process_logs(ranks, tmp_path, kind, model, more):
    expected = stock(kind, str(tmp_path / "stock"), model, **more)
    # One process pads its batch as a whole; in evaluation each batch has losses of its own, see below.
    mixture = model in MIXTURES
    but = ("num_input_tokens_seen", *(["eval_loss"] if kind == "SFT" or mixture else []))
    but += ("eval_aux_loss",) if mixture else ()
    for found in ranks(2).run(omni, kind, "dp_shard=2", str(tmp_path / "omni"), model, **more, **HALF, timeout=120):
        assert_same_logs(found, expected, but=but)


@pytest.mark.parametrize("loss_type", [["aot_unpaired"], ["sigmoid", "sft"]], ids=str)
def test_losses_that_are_those_of_a_batch_are_averaged(ranks, tmp_path, loss_type):
    """They sort a batch, or take the mean over its tokens: one process has to read the data ranks' batches in turn.

    Means over tokens that TRL logs beside the loss are those of all tokens which processes read at once.
    """
    more = {"loss_type": loss_type, **HALF}
    accumulation = Run().all_arguments()["gradient_accumulation_steps"]
    trainer = stock_trainer(
        "DPO", str(tmp_path / "stock"), "dense", **more, gradient_accumulation_steps=2 * accumulation
    )
    expected = logged(trainer)
    for found in ranks(2).run(omni, "DPO", "dp_shard=2", str(tmp_path / "omni"), "dense", **more, timeout=120):
        assert_same_logs(found, expected, but=("num_input_tokens_seen", *BY_TOKEN, *(f"eval_{x}" for x in BY_TOKEN)))


def _of_each_batch(kind: str, folder: str, model: str, **more: Any) -> list[dict[str, float]]:
    """What one process evaluates for each two rows alone, and `tokens` of them."""
    trainer = stock_trainer(kind, folder, model, **more)
    trainer.train()
    data = trainer.eval_dataset
    halves = [data.select(range(begin, begin + 2)) for begin in range(0, len(data), 2)]
    counts = [sum(map(_targets, half)) if kind == "SFT" else 1 for half in halves]
    return [trainer.evaluate(half) | {"tokens": n} for half, n in zip(halves, counts, strict=True)]


def _targets(row: dict[str, Any]) -> int:
    """Of a row for SFT: nothing comes before the first token, so that it is none."""
    return sum(label != -100 for label in row["labels"][1:])


@pytest.mark.parametrize(
    ("kind", "model", "more"), [c for c in CASES if c[0] == "SFT" or "mi" in c[1] or "moe" in c[1]]
)
def test_data_ranks_evaluate_the_losses_of_their_batches(ranks, tmp_path, kind, model, more):
    """The mean over label tokens for SFT, over batches for the others; the router's loss is that of a batch."""
    batches = _of_each_batch(kind, str(tmp_path / "stock"), model, **more)
    tokens = sum(batch["tokens"] for batch in batches)
    loss = sum(batch["eval_loss"] * batch["tokens"] for batch in batches) / tokens
    for found in ranks(2).run(omni, kind, "dp_shard=2", str(tmp_path / "omni"), model, **more, **HALF, timeout=120):
        assert found[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
        if "eval_aux_loss" in batches[0]:
            aux = sum(batch["eval_aux_loss"] for batch in batches) / len(batches)
            assert found[-1]["eval_aux_loss"] == pytest.approx(aux, rel=1e-5)


UNEVEN = [("SFT", "dense"), ("SFT", "mixtral"), ("DPO", "dense"), ("Reward", "reward"), ("KTO", "dense")]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("kind", "model"), UNEVEN)
def test_batches_that_keep_a_rank_in_step_are_not_logged(ranks, tmp_path, kind, model, accumulation):
    """The last batches of an epoch and of the evaluation are real on one rank alone."""
    more: dict[str, Any] = dict(max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=accumulation)
    more |= dict(num_rows=10 if accumulation == 1 else 13, eval_rows=6, train_sampling_strategy="sequential")
    more |= {"loss_type": "apo_zero_unpaired"} if kind == "KTO" else {}
    but = ["num_input_tokens_seen", *(["eval_loss"] if kind == "SFT" else [])]
    but += ["eval_aux_loss"] if model == "mixtral" else []
    if accumulation > 1:  # batches of 2, 2 and 1 rows have another mean than batches of 4 and 1
        more["learning_rate"] = 0.0
        but += [] if model == "dense" and kind == "SFT" else ["loss", "train_loss", "grad_norm"]
    expected = stock(kind, str(tmp_path / "stock"), model, **more)
    for found in ranks(2).run(omni, kind, "dp_shard=2", str(tmp_path / "omni"), model, **more, **HALF, timeout=120):
        assert_same_logs(found, expected, but=tuple(but))


@pytest.mark.parametrize(("kind", "model"), UNEVEN[:-1])
def test_batches_that_fill_the_last_window_of_a_stream_are_not_logged(tmp_path, kind, model):
    """Three rows in a window of four, in one process."""
    more: dict[str, Any] = dict(max_steps=1, num_rows=3, per_device_train_batch_size=1)
    expected = stock(kind, str(tmp_path / "stock"), model, gradient_accumulation_steps=3, **more)
    trainer = omni_trainer(kind, "", str(tmp_path / "omni"), model, gradient_accumulation_steps=4, **more)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    assert_same_logs(logged(trainer), expected, but=("epoch",))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_a_head_of_another_dtype_than_the_norm_logs_what_one_process_logs(ranks, tmp_path, kind, plan):
    """It is an FSDP unit of its own, and TRL reads its weight beside the module."""
    expected = stock(kind, str(tmp_path / "stock"), "two_dtypes")
    more, but = (HALF, ("num_input_tokens_seen", "eval_loss")) if plan == "dp_shard=2" else ({}, ())
    for found in ranks(2).run(omni, kind, plan, str(tmp_path / "omni"), "two_dtypes", **more, timeout=120):
        assert_same_logs(found, expected, but=but)


@pytest.mark.parametrize("style", ["free", "keep"])
def test_a_head_that_a_rule_names_logs_what_one_process_logs(ranks, tmp_path, style):
    expected = stock("SFT", str(tmp_path / "stock"), "dense")
    plan = {"sp": 2, "modules": {"lm_head": {"fsdp": style}}}
    for found in ranks(2).run(omni, "SFT", plan, str(tmp_path / "omni"), "dense", timeout=120):
        assert_same_logs(found, expected)


def test_kto_pairs_rows_of_a_process(ranks, tmp_path):
    """KTO's KL term mixes the rows of a process: the right value is that of as many processes of the stock class."""
    expected = ranks(2).run(stock, "KTO", str(tmp_path / "stock"), "dense", timeout=120)
    found = ranks(2).run(omni, "KTO", "dp_shard=2", str(tmp_path / "omni"), "dense", timeout=120)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_logs(mine, theirs)
