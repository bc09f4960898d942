"""One run of a trainer of TRL: TRL's own class in one process, or behind the mixin on ranks, and what it logged."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.ranks.training import VOCABULARY, Run, lora_model, tiny_mixtral, tiny_model, word_tokenizer

_TIMES = ("runtime", "per_second", "total_flos")


def reward_model() -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_labels=1, pad_token_id=0, **sizes)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def tiny_qwen_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, head_dim=8)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(1)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, router_aux_loss_coef=0.02, **sizes, **ids))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def tiny_exaone_moe() -> nn.Module:
    """A mixture whose own forward has no router loss; TRL adds it."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, head_dim=8)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, n_group=1)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, num_shared_experts=1, topk_group=1)
    torch.manual_seed(1)
    model = ExaoneMoeForCausalLM(ExaoneMoeConfig(vocab_size=VOCABULARY, first_k_dense_replace=0, **sizes, **ids))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def two_dtypes() -> nn.Module:
    """The final norm in another dtype than the head."""
    model: Any = tiny_model().double()
    model.model.norm.float()
    return model


MODELS: dict[str, Any] = {
    "dense": tiny_model,
    "two_dtypes": two_dtypes,
    "lora": lora_model,
    "reward": reward_model,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen_moe,
    "exaone_moe": tiny_exaone_moe,
}


def _words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(f"t{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randrange(low, high)))


def rows(kind: str, count: int) -> Dataset:
    """Prompts and answers of uneven lengths, in the layout that the trainer reads."""
    draw = random.Random(0)
    pairs = [
        {"prompt": _words(draw, 2, 9), "chosen": " " + _words(draw, 1, 8), "rejected": " " + _words(draw, 1, 12)}
        for _ in range(count)
    ]
    if kind in ("DPO", "Reward"):
        return Dataset.from_list(pairs)
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    if kind == "SFT":
        return Dataset.from_list(answers)
    return Dataset.from_list([{**row, "label": bool(place % 3)} for place, row in enumerate(answers)])


def options(
    kind: str, folder: str, model: str, num_rows: int = 24, eval_rows: int = 4, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and the rest of a trainer."""
    arguments = Run().all_arguments(output_dir=folder, max_steps=3, per_device_train_batch_size=4)
    arguments |= {"per_device_eval_batch_size": 4, "bf16": False, "max_length": 40, **more}
    data = rows(kind, 24)
    found: dict[str, Any] = {"train_dataset": data.select(range(num_rows))}
    found["eval_dataset"] = data.select(range(eval_rows))
    found |= {"processing_class": word_tokenizer(), "model": MODELS[model]()}
    if kind in ("DPO", "KTO") and model != "lora":
        found["ref_model"] = MODELS[model]()
        with torch.no_grad():
            for parameter in found["ref_model"].parameters():
                parameter.mul_(1.1)
    return arguments, found


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    kept = {name: value for name, value in entry.items() if not any(word in name for word in _TIMES)}
    return {name: value for name, value in kept.items() if isinstance(value, int | float)}


def logged(trainer: Any) -> list[dict[str, float]]:
    """Everything that training and one evaluation log, but times."""
    trainer.train()
    trainer.evaluate()
    return [_numbers(entry) for entry in trainer.state.log_history]


def stock_trainer(
    kind: str, folder: str, model: str, trainer_options: dict[str, Any] | None = None, **more: Any
) -> Any:
    import trl

    arguments, found = options(kind, folder, model, **more)
    config = getattr(trl, f"{kind}Config")(**arguments)
    return getattr(trl, f"{kind}Trainer")(args=config, **(found | (trainer_options or {})))


def stock(kind: str, folder: str, model: str, **more: Any) -> list[dict[str, float]]:
    return logged(stock_trainer(kind, folder, model, **more))


def omni_trainer(
    kind: str, plan: str, folder: str, model: str, trainer_options: dict[str, Any] | None = None, **more: Any
) -> Any:
    import trl

    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments

    config = dataclass(type("Config", (OmniTrainingArguments, getattr(trl, f"{kind}Config")), {}))
    trainer = type(f"My{kind}", (OmniTrainerMixin, getattr(trl, f"{kind}Trainer")), {})
    arguments, found = options(kind, folder, model, **more)
    return trainer(args=config(**arguments, plan=plan), **(found | (trainer_options or {})))


def omni(kind: str, plan: str, folder: str, model: str, **more: Any) -> list[dict[str, float]]:
    return logged(omni_trainer(kind, plan, folder, model, **more))


def assert_same_logs(found: list[dict[str, float]], expected: list[dict[str, float]], but: tuple = ()) -> None:
    """Every number to 1e-5."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            close = abs(mine[name] - value) <= 1e-5 * max(1.0, abs(value))
            assert close or name in but, (name, mine[name], value)
