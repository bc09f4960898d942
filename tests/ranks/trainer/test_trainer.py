"""OmniTrainer on ranks trains as the stock Trainer does in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.ranks.training import (
    NoteEvents,
    PlainRows,
    Run,
    assert_same_training,
    collate,
    outcome,
    relative,
    tiny_model,
    train_omni,
    train_stock,
)

PLANS = [(2, "sp=2", 1), (2, "dp_shard=2", 2), (4, "sp=2,dp_shard=2", 2), (4, "dp_replicate=2,sp=2", 2)]
plans = pytest.mark.parametrize(("world", "plan", "data_ranks"), PLANS, ids=[plan for _, plan, _ in PLANS])


def _train(plan: str, run: Run, **options: Any):
    return train_omni(plan, run, **options)


@plans
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_equals_one_process(ranks, world, plan, data_ranks, lora):
    """9 rows over 2 x 2: uneven token counts, a short last window, a data rank without a last row, clipping."""
    run = Run(lora=lora)
    expected = train_stock(run, data_ranks)
    assert min(expected.norms) > 0.5, "clipping must be active"
    assert len(set(expected.losses)) == len(expected.losses)
    for found in ranks(world).run(_train, plan, run, timeout=120):
        assert_same_training(found, expected)


@plans
def test_padded_batches_equal_one_process(ranks, world, plan, data_ranks):
    """Batches of two padded rows, the last batch short."""
    run = Run(plain=True, num_rows=9, arguments={"per_device_train_batch_size": 2})
    expected = train_stock(run, data_ranks)
    for found in ranks(world).run(_train, plan, run, timeout=120):
        assert_same_training(found, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True},
        {"max_steps": 3, "lr_scheduler_type": "cosine", "warmup_steps": 1},
        {"train_sampling_strategy": "sequential", "weight_decay": 0.1},
        {"dataloader_drop_last": True},
        {"optim": "sgd", "learning_rate": 0.1},
        {"optim": "adagrad"},
        {"gradient_accumulation_steps": 3},
    ],
    ids=lambda arguments: next(iter(arguments)) + "=" + str(next(iter(arguments.values()))),
)
def test_feature_equals_one_process(ranks, arguments):
    run = Run(num_rows=8, arguments=arguments)
    expected = train_stock(run, 2)
    for found in ranks(4).run(_train, "sp=2,dp_shard=2", run, timeout=120):
        assert_same_training(found, expected)


def test_rmsprop_equals_one_process(ranks):
    """Its epsilon of 1e-8 makes steps of the rounding noise in gradients of zero, so weights are not compared."""
    run = Run(num_rows=8, arguments={"optim": "rmsprop", "learning_rate": 1e-4})
    expected = train_stock(run, 2)
    for found in ranks(4).run(_train, "sp=2,dp_shard=2", run, timeout=120):
        assert relative(found.losses, expected.losses) < 1e-5
        assert relative(found.norms, expected.norms) < 1e-4


def test_tied_embeddings_equal_one_process(ranks):
    run = Run(config={"tie_word_embeddings": True})
    expected = train_stock(run)
    for found in ranks(2).run(_train, "sp=2", run, timeout=120):
        assert_same_training(found, expected)


def _square_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss that mixes tokens of the row, so that no rank could compute it from its slice."""
    logits = outputs["logits"].float()
    assert logits.shape[:2] == labels.shape
    scored = logits[..., :-1, :].log_softmax(-1)
    valid = labels[..., 1:] != -100
    picked = scored.gather(-1, labels[..., 1:].clamp(min=0)[..., None])[..., 0] * valid
    return (picked - picked.mean()).square().sum() / num_items_in_batch - picked.sum() / num_items_in_batch


@plans
def test_compute_loss_func_sees_whole_rows(ranks, world, plan, data_ranks):
    run = Run(options={"compute_loss_func": _square_loss})
    expected = train_stock(run, data_ranks)
    for found in ranks(world).run(_train, plan, run, timeout=120):
        assert_same_training(found, expected)


def _grouped(plan: str, run: Run) -> tuple[list[int], list[list[int]], float]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([int(batch["input_ids"].sum()) for batch in loader])
    return epochs[0], epochs, trainer.train().training_loss


def test_group_by_length_reads_every_row_once_in_an_order_of_its_own_each_epoch(ranks):
    run = Run(num_rows=16, arguments={"train_sampling_strategy": "group_by_length"})
    rows = sorted(sum(run.dataset(16, 0)[i]["input_ids"]) for i in range(16))
    results = ranks(4).run(_grouped, "sp=2,dp_shard=2", run, timeout=120)
    for first in (0, 2):
        assert results[first] == results[first + 1], "ranks of an SP group read the same rows"
    assert sorted(results[0][0] + results[2][0]) == rows, "data ranks share the rows out"
    assert results[0][1][0] != results[0][1][1]


def _events(plan: str, run: Run) -> dict[str, int]:
    notes = NoteEvents()
    train_omni(plan, run, callbacks=[notes])
    return notes.events


def test_callbacks_come_as_in_one_process(ranks):
    run = Run(num_rows=8, eval_rows=3, arguments={"eval_strategy": "epoch"})
    notes = NoteEvents()
    train_stock(run, 2, callbacks=[notes])
    assert notes.events["evaluate"] == 2
    for events in ranks(4).run(_events, "sp=2,dp_shard=2", run, timeout=120):
        assert events == notes.events


def _bf16(plan: str, run: Run):
    return train_omni(plan, run)


def test_bf16_autocast_follows_one_process(ranks):
    """Rounding to bf16 differs with the order of sums; the runs stay together to its precision."""
    run = Run(arguments={"bf16": True})
    expected = train_stock(run)
    for found in ranks(2).run(_bf16, "sp=2", run, timeout=120):
        assert relative(found.losses, expected.losses) < 5e-3
        assert relative(found.norms, expected.norms) < 5e-2
        assert all(weight.dtype == torch.float32 for weight in found.weights.values())


def _dropout_masks(plan: str) -> tuple[list[float], list[float], float]:
    """Sums of the adapters' dropout masks of two steps, and the next number of the process-wide stream."""
    from peft import LoraConfig

    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    seen: list[float] = []
    run = Run(num_rows=4, arguments={"max_steps": 2, "gradient_accumulation_steps": 1, "seed": 3})
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    trainer = OmniTrainer(
        model=tiny_model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), peft_config=lora, **run.data()
    )
    dropout = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    dropout.register_forward_hook(lambda module, args, out: seen.append((out[0] == 0).float().mean(-1).tolist()))
    trainer.train()
    first, second = [entry[0] for entry in seen], [entry[-1] for entry in seen]
    return first, second, torch.rand(()).item()


def test_dropout_differs_between_ranks_while_data_order_does_not(ranks):
    results = ranks(2).run(_dropout_masks, "sp=2", timeout=120)
    assert results[0][:2] != results[1][:2]
    assert results[0][2] == results[1][2], "the process-wide stream, which samplers use, stays the same"
    again = ranks(2).run(_dropout_masks, "sp=2", timeout=120)
    assert again == results, "the masks follow from the seed"


def _neftune(plan: str) -> tuple[list[float], list[float], int]:
    run = Run(arguments={"neftune_noise_alpha": 5.0, "learning_rate": 0.0, "num_train_epochs": 1})
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    before = len(trainer.model.get_input_embeddings()._forward_hooks)
    trainer.train()
    after = len(trainer.model.get_input_embeddings()._forward_hooks)
    noisy = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    quiet = train_omni(plan, Run(arguments={"learning_rate": 0.0, "num_train_epochs": 1})).losses
    return noisy, quiet, after - before


def test_neftune_adds_noise_in_training_and_leaves(ranks):
    for noisy, quiet, left in ranks(2).run(_neftune, "sp=2", timeout=120):
        assert all(a != b for a, b in zip(noisy, quiet, strict=True))
        assert relative(noisy, quiet) < 0.2
        assert left == 0


def _noise(plan: str) -> list[tuple[int, float]]:
    """Length of the row, and the largest part of its noise in units of alpha / sqrt(S H), at each batch."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(plain=True, arguments={"max_steps": 2, "neftune_noise_alpha": 5.0, "learning_rate": 0.0})
    weight: Any = run.model().get_input_embeddings().weight.detach()  # type: ignore[operator]
    trainer = OmniTrainer(run.model(), OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    found: list[tuple[int, float]] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        clean = weight[args[0]]
        scale = 5.0 / (args[0].shape[1] * output.shape[2]) ** 0.5
        found.append((output.shape[1], float((output.detach() - clean).abs().max()) / scale))

    class Begin(TrainerCallback):
        """After Trainer has put its noise on the embeddings."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.model.get_input_embeddings().register_forward_hook(note)

    trainer.add_callback(Begin())
    trainer.train()
    return found


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_the_noise_of_neftune_is_that_of_the_whole_row(ranks, plan):
    """alpha / sqrt(S H), S being the tokens of the row and not of a rank's part, and drawn by each rank for itself."""
    first, second = ranks(2).run(_noise, plan, timeout=60)
    rows = PlainRows(9, 0)
    lengths = {len(rows[i]["input_ids"]) for i in range(9)}
    for length, largest in [*first, *second]:
        assert length in lengths
        assert 0.95 < largest <= 1.0001, largest
    assert [x for _, x in first] != [x for _, x in second]


def _model_init(plan: str, run: Run):
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    trainer = OmniTrainer(model_init=run.model, args=arguments, **run.data())
    return outcome(trainer, trainer.train().training_loss)


def test_model_init_equals_one_process(ranks):
    """The stock Trainer turns the cache off on the first model only; with it, packed documents leak there."""
    run = Run(config={"use_cache": False})
    arguments = TrainingArguments(**run.all_arguments())
    trainer = Trainer(model_init=run.model, args=arguments, **run.data())
    expected = outcome(trainer, trainer.train().training_loss)
    for found in ranks(2).run(_model_init, "sp=2", run, timeout=120):
        assert_same_training(found, expected)


def test_reference_is_the_stock_trainer():
    """What these tests compare with has seen nothing of ours."""
    run = Run(num_rows=2)
    trainer = Trainer(
        model=run.model(), args=TrainingArguments(**run.all_arguments()), data_collator=collate, train_dataset=[]
    )
    assert not any("omni" in name for module in trainer.model.modules() for name in vars(module))
