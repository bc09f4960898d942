"""The loss of a step is normalised alike whoever computes it: under every plan, with accumulation and dummy batches.

The right value is that of the stock Trainer in one process over the same batches. Where a loss takes no count of items
the stock Trainer is told so (`model_accepts_loss_kwargs`), since it would add such losses up instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from tests.ranks.training import VOCABULARY, Outcome, Run, outcome, tiny_model

PLANS = [(1, ""), (2, "dp_shard=2"), (2, "sp=2"), (4, "sp=2,dp_shard=2")]
plans = pytest.mark.parametrize(("world", "plan"), PLANS, ids=[plan or "one process" for _, plan in PLANS])


class _Rows(Dataset):
    """Rows of uneven lengths; `labels` as the head wants them."""

    def __init__(self, num_rows: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(low: int, high: int, size: int = 1) -> list[int]:
            return torch.randint(low, high, (size,), generator=generator).tolist()

        self.rows = []
        for _ in range(num_rows):
            tokens = draw(3, VOCABULARY, draw(5, 12)[0])
            masked = [token if place % 3 == 0 else -100 for place, token in enumerate(tokens)]
            target = draw(3, VOCABULARY, draw(2, 9)[0])
            labels = {"tokens": masked, "target": target, "row": draw(0, 3)[0], "tags": [t % 3 for t in tokens]}[kind]
            self.rows.append({"input_ids": tokens, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def _bert(**more: Any) -> BertConfig:
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return BertConfig(
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **(sizes | more)
    )


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _bart() -> nn.Module:
    sizes: dict[str, Any] = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
    heads: dict[str, Any] = dict(encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0)
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, **sizes, **heads)
    )


def _classifier() -> nn.Module:
    config = tiny_model().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config)


# name -> model, labels
HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "t5": (_t5, "target"),
    "bart": (_bart, "target"),
    "masked": (lambda: BertForMaskedLM(_bert()), "tokens"),
    "tags": (lambda: BertForTokenClassification(_bert(num_labels=3)), "tags"),
    "classifier": (_classifier, "row"),
}


def _arguments(**more: Any) -> dict[str, Any]:
    return Run().all_arguments(**({"num_train_epochs": 1, "include_num_input_tokens_seen": False} | more))


def _stock(model: nn.Module, rows: Dataset, ranks: int, counts: bool, kind: type = Trainer, **options: Any) -> Outcome:
    arguments = _arguments(**options.pop("arguments", {}))
    arguments["gradient_accumulation_steps"] *= ranks
    trainer = kind(
        model=model, args=TrainingArguments(**arguments), train_dataset=rows, data_collator=_each, **options
    )
    if not counts:
        trainer.model_accepts_loss_kwargs = False
    return outcome(trainer, trainer.train().training_loss)


def _each(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Batches of one row."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def _head(plan: str, name: str) -> Outcome:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    build, labels = HEADS[name]
    arguments = OmniTrainingArguments(**_arguments(plan=plan))
    trainer = OmniTrainer(_spread(build()), arguments, train_dataset=_Rows(7, labels), data_collator=_each)
    return outcome(trainer, trainer.train().training_loss)


def _assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=2e-5)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).abs().max() < 1e-5, name


def _on(ranks: Any, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    if world == 1:
        return [function(*args, **kwargs)]
    return ranks(world).run(function, *args, timeout=90, **kwargs)


@plans
@pytest.mark.parametrize("name", list(HEADS))
def test_heads_that_take_no_count_average_over_batches(ranks, world, plan, name):
    """7 rows by 2 x 2: the last step is filled up, and its targets are fewer."""
    build, labels = HEADS[name]
    data_ranks = 2 if "dp_shard" in plan else 1
    expected = _stock(_spread(build()), _Rows(7, labels), data_ranks, counts=False)
    for found in _on(ranks, world, _head, plan, name):
        _assert_same(found, expected)


def _mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _share(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def _no_labels(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs["logits"].float().logsumexp(-1).square().mean()


FUNCTIONS = {"mean": (_mean, False), "share": (_share, None), "no_labels": (_no_labels, False)}


def _function(plan: str, name: str) -> Outcome:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(plain=True, num_rows=7)
    arguments = OmniTrainingArguments(**_arguments(plan=plan))
    trainer = OmniTrainer(run.model(), arguments, compute_loss_func=FUNCTIONS[name][0], **run.data())
    return outcome(trainer, trainer.train().training_loss)


@plans
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_that_compute_the_loss_equal_one_process(ranks, world, plan, name):
    """`loss_is_scaled_for_ga` tells the stock Trainer that a function takes no count."""
    function, scaled = FUNCTIONS[name]
    run = Run(plain=True, num_rows=7)
    kind = type("Stock", (Trainer,), {"loss_is_scaled_for_ga": scaled})
    arguments = _arguments()
    arguments["gradient_accumulation_steps"] *= 2 if "dp_shard" in plan else 1
    stock = kind(run.model(), TrainingArguments(**arguments), compute_loss_func=function, **run.data())
    expected = outcome(stock, stock.train().training_loss)
    for found in _on(ranks, world, _function, plan, name):
        _assert_same(found, expected)


def _count_in_bf16(plan: str) -> list[float]:
    """What the loss of the model divides by."""
    from hf_veomni.loss import CausalLMLoss
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    seen: list[float] = []
    stock = CausalLMLoss.__call__

    def noting(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(float(kwargs["num_items_in_batch"]))
        return stock(self, *args, **kwargs)

    CausalLMLoss.__call__ = noting
    try:
        run = Run(plain=True, num_rows=6)
        trainer = OmniTrainer(
            run.model(),
            OmniTrainingArguments(**_arguments(plan=plan, bf16=True, gradient_accumulation_steps=3)),
            **run.data(),
        )
        trainer.train()
    finally:
        CausalLMLoss.__call__ = stock
    return seen


def test_the_count_is_not_rounded_to_bf16(ranks):
    """FSDP2 casts floating inputs of the model, and this one would be off by up to 0.4 %."""
    rows = Run(plain=True, num_rows=6).dataset(6, 0)
    total = sum(len(rows[i]["labels"]) - 1 for i in range(6))
    assert float(torch.tensor(total / 6).bfloat16()) != total / 6
    for seen in ranks(2).run(_count_in_bf16, "dp_shard=2", timeout=60):
        assert seen == pytest.approx([total / 6] * 3, rel=1e-6)
