"""What a Trainer logs of a family: the stock one in one process, OmniTrainer on the ranks of a plan."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

PLANS = ("sp=2", "dp_shard=2")
ROWS, ACCUMULATED, STEPS = 2, 2, 2  # rows of a batch in one process and batches of a step
LIMIT = 1e-4  # relative, of two steps in fp32

Logs = list[tuple[float, float]]


def stock_logs(model_type: str) -> Logs:
    """Loss and gradient norm of each step, by the stock Trainer in this process.

    It divides by the accumulated batches, and a loss that ignores the count of items needs that, where the model's
    forward takes no keyword arguments. Else it adds the batches' means up: so it is told what the model does.
    """
    from transformers import Trainer, TrainingArguments

    class Told(Trainer):
        def __init__(self, model: Any, **options: Any) -> None:
            batch = options["data_collator"](options["train_dataset"][:ROWS])
            counts = _divides_by_items(model, batch)
            super().__init__(model, **options)
            self.model_accepts_loss_kwargs = counts

    return _run(model_type, Told, TrainingArguments, ROWS)


def _divides_by_items(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether a stock model's loss halves when it is told of twice the items."""
    try:
        with torch.no_grad():
            one, two = (float(model.eval()(**batch, num_items_in_batch=torch.tensor(n)).loss) for n in (8, 16))
    except TypeError:  # takes no such argument
        return False
    finally:
        model.train()
    return abs(one - 2 * two) <= 0.1 * abs(one)


def omni_logs(model_type: str, plan: str, rule: str = "") -> Logs | str:
    """The same by OmniTrainer on every rank, or why it refuses.

    Args:
        rule: names of modules that run under the plan's rule "sp: gather", as a record has them.
    """
    from hf_veomni import OmniTrainer, OmniTrainingArguments, ParallelPlan, UnsupportedError

    parsed = ParallelPlan.parse(plan)
    if rule and parsed.sp_size > 1:
        parsed = replace(parsed, modules={pattern: {"sp": "gather"} for pattern in rule.split(", ")})
    rows = ROWS // (2 if plan == "dp_shard=2" else 1)
    try:
        return _run(model_type, OmniTrainer, OmniTrainingArguments, rows, plan=parsed)
    except UnsupportedError as error:
        return " ".join(str(error).split())[:400]


def compare_logs(found: Logs | str, wanted: Logs) -> str:
    """ "works", or what is off."""
    if isinstance(found, str):
        return found
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        for name, one, other in zip(("loss", "gradient norm"), mine, theirs, strict=True):
            if not abs(one - other) <= LIMIT * max(abs(other), 1e-3):
                return f"wrong: {name} {one:.6g} for {other:.6g} in step {step}"
    return "works"


def _run(model_type: str, trainer_class: Any, args_class: Any, rows: int, **options: Any) -> Logs:
    from transformers import PrinterCallback

    from tests.sweep import tiny

    warnings.filterwarnings("ignore")
    kind, model_class = tiny.choose_class(model_type)
    model = tiny.build(tiny.tiny_config(model_type), model_class, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _freeze(module)
    with tempfile.TemporaryDirectory() as directory:
        args = args_class(
            output_dir=directory,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=ACCUMULATED,
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="sgd",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = trainer_class(model=model, args=args, train_dataset=_samples(model, kind), data_collator=_stack)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


def _freeze(norm: nn.Module) -> None:
    """Let a batch norm keep what it has seen: each data rank normalises by the rows of its own, as under any DDP."""
    norm.eval()
    norm.train = lambda mode=True: norm


def _samples(model: Any, kind: str) -> list[dict[str, Tensor]]:
    """Rows of one length. Only a causal model has rows of different numbers of labels: others average batches."""
    from tests.sweep import rows

    takes = inspect.signature(type(model).forward).parameters
    batch = rows.plain(model, kind, takes).inputs
    if kind != "causal":
        ids = batch["decoder_input_ids"] if "decoder_input_ids" in batch else batch["input_ids"]
        batch["labels"] = torch.where(batch["labels"] == -100, ids, batch["labels"])
    samples = [{name: value[row] for name, value in batch.items()} for row in range(2)]
    return [samples[index] for index in (0, 1, 1, 1) * STEPS]


def _stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
