"""One training run as data, run by the stock Trainer in one process or by OmniTrainer on ranks, and what came out."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 61


def tiny_model(seed: int = 1, **config: Any) -> nn.Module:
    """A two-layer Llama, spread out enough that gradients are clipped."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    made = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **(sizes | ids | config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def lora_model(**config: Any) -> nn.Module:
    """The tiny model with adapters on attention and a trained copy of the head. B is not zero: A gets gradients."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(**config), lora)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model


def tiny_mixtral(**config: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_local_experts=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **(sizes | config))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def adapt_experts(model: nn.Module) -> nn.Module:
    """rsLoRA on attention and experts, neither factor zero."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return wrapped


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, "t0" to "t60"; words may touch each other."""
    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"t\d+"), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")


class PackedRows(Dataset):
    """Rows of one to three documents of uneven lengths; the numbers of label tokens differ from row to row."""

    def __init__(self, num_rows: int, seed: int = 0, longest: int = 14) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        def document() -> list[int]:
            return torch.randint(3, VOCABULARY, (draw(3, longest),), generator=generator).tolist()

        self.rows = [[document() for _ in range(draw(1, 4))] for _ in range(num_rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        documents = self.rows[index]
        return {
            "input_ids": [token for document in documents for token in document],
            "labels": [label for document in documents for label in (-100, *document[1:])],
            "position_ids": [place for document in documents for place in range(len(document))],
        }


class PlainRows(PackedRows):
    """One document a row, padded by the collator."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.rows[index][0]
        return {"input_ids": tokens, "labels": list(tokens)}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded batch; a batch of one row has no padding and no mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    batch = {
        key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows]) for key in rows[0]
    }
    if len(rows) > 1:
        batch["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        )
    return batch


class NoteEvents(TrainerCallback):
    """Notes how often each event came."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}

    def _note(self, name: str) -> None:
        self.events[name] = self.events.get(name, 0) + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("step")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("epoch")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("log")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("save")


@dataclass(frozen=True)
class Run:
    """What to train. `arguments` go to the training arguments, `options` to the trainer."""

    lora: bool = False
    num_rows: int = 9
    plain: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    eval_rows: int = 0

    def model(self) -> nn.Module:
        return lora_model(**self.config) if self.lora else tiny_model(**self.config)

    def dataset(self, num_rows: int, seed: int) -> Dataset:
        return (PlainRows if self.plain else PackedRows)(num_rows, seed)

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = {"train_dataset": self.dataset(self.num_rows, 0), "data_collator": collate}
        if self.eval_rows:
            found["eval_dataset"] = self.dataset(self.eval_rows, 5)
        return found

    def all_arguments(self, **more: Any) -> dict[str, Any]:
        base = dict(
            output_dir=tempfile.mkdtemp(prefix="training-"),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # else Adam makes a full step of the rounding noise of a gradient of zero
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            include_num_input_tokens_seen=True,
        )
        return base | self.arguments | more


@dataclass
class Outcome:
    """What a run left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    state: dict[str, Any]
    train_loss: float
    evaluations: list[dict[str, float]]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def outcome(trainer: Trainer, train_loss: float) -> Outcome:
    """Collective on ranks."""
    history = trainer.state.log_history
    steps = [entry for entry in history if "grad_norm" in entry]
    kept = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen", "total_flos")
    return Outcome(
        losses=[entry["loss"] for entry in steps],
        norms=[entry["grad_norm"] for entry in steps],
        weights={name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()},
        state={name: getattr(trainer.state, name) for name in kept},
        train_loss=train_loss,
        evaluations=[entry for entry in history if "eval_loss" in entry],
    )


def train_stock(run: Run, data_ranks: int = 1, **options: Any) -> Outcome:
    """One process of the stock Trainer over the same windows: what the data ranks read at once, it reads in turn."""
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= data_ranks
    options = run.options | options
    trainer = Trainer(model=run.model(), args=TrainingArguments(**arguments), **run.data(), **options)
    return outcome(trainer, trainer.train().training_loss)


def train_omni(plan: str, run: Run, **options: Any) -> Outcome:
    """The same on this rank, under a plan."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    options = run.options | options
    trainer = OmniTrainer(model=run.model(), args=arguments, **run.data(), **options)
    return outcome(trainer, trainer.train().training_loss)


def loss_of_all_targets(trainer: Trainer, rows: Any) -> float:
    """The mean over the label tokens of all rows, by the stock trainer's own losses of one row at a time."""
    counts = [sum(label != -100 for label in rows[i]["labels"][1:]) for i in range(len(rows))]
    losses = [trainer.evaluate([rows[i]])["eval_loss"] for i in range(len(rows))]  # type: ignore[arg-type]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def relative(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    assert len(found) == len(expected), (found, expected)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def assert_same_training(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    assert relative(found.losses, expected.losses) < tolerance
    assert relative(found.norms, expected.norms) < tolerance
    assert relative([found.train_loss], [expected.train_loss]) < tolerance
    assert found.state == expected.state
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).abs().max() < tolerance, name
