"""`plan="auto"`: the planner's choice is in force on all ranks and trains; an unknown device is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from hf_veomni import UnsupportedError
from hf_veomni.planner import find_device
from tests.multimodal import qwen3_vl
from tests.ranks.training import PackedRows, tiny_model


def _train(folder: Path, plan: str, **options: Any) -> tuple[str, bool, int, float]:
    """(plan in force, checkpointing, steps, loss)"""
    from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments

    options = {"model": tiny_model().to(torch.bfloat16), "train_dataset": PackedRows(8), "max_steps": 2} | options
    data, model, given = options.pop("train_dataset"), options.pop("model"), options.pop("optimizers", (None, None))
    arguments = OmniTrainingArguments(
        str(folder), plan=plan, per_device_train_batch_size=1, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, **options,
    )  # fmt: skip
    assert arguments.to_dict()["plan"] == plan
    collator = OmniDataCollatorWithPacking()
    trainer = OmniTrainer(model, arguments, train_dataset=data, data_collator=collator, optimizers=given)
    result = trainer.train()
    return str(arguments.plan), arguments.activation_checkpointing, result.global_step, result.training_loss


def small_device(folder: Path) -> str:
    """One of the table but for its links, which make exchanges cost nothing."""
    names = ("measured", "source", "name", "torch_name")
    values = {k: v for k, v in vars(find_device("h100-80gb")).items() if k not in names}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "intra_gbs": 1e6, "intra_us": 0.001}))
    return str(path)


def choose(model: Any, dataset: Any, world_size: int = 2, **options: Any) -> Any:
    """What ranks of a Trainer with these arguments would choose."""
    from hf_veomni.trainer.auto import choose_plan

    values = {"plan": "auto:h100-80gb", "world_size": world_size, "bf16": True, "optim": "adamw_torch_fused"}
    values |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "activation_checkpointing": False}
    values |= {"token_budget": None, "length_column_name": "length", "device": torch.device("cpu")}
    return choose_plan(SimpleNamespace(**values | options), model, dataset)


@pytest.mark.parametrize(("init", "stored"), [(None, 4), ({"dtype": "auto"}, 2), ({"dtype": "bfloat16"}, 2)])
def test_dtype_of_what_is_given_by_name(tmp_path: Path, init: dict[str, str] | None, stored: int) -> None:
    """TRL loads a checkpoint in bf16 as fp32, unless `model_init_kwargs` say otherwise."""
    from trl.trainer.utils import create_model_from_path

    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = create_model_from_path(str(tmp_path), device_map=None, **(init or {}))
    assert next(loaded.parameters()).dtype.itemsize == stored
    best = choose(str(tmp_path), PackedRows(8), 1, model_init_kwargs=init)
    assert best.memory.categories["parameters"] == stored * loaded.num_parameters()


def test_full_weights_fit_while_they_are_sharded() -> None:
    """70B in bf16 are 131 GiB, which `prepare_omni` moves to each device of 79."""
    sizes: dict[str, Any] = {"hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8}
    sizes |= {"num_attention_heads": 64, "dtype": "bfloat16"}
    given = {"model_init_kwargs": {"dtype": "auto"}}
    assert choose(LlamaConfig(**sizes, num_hidden_layers=30), PackedRows(8), 16, **given).fits
    with pytest.raises(UnsupportedError, match=r"`plan` .*takes 1\d\d.\d GiB then.*meta device.*`prepare_omni"):
        choose(LlamaConfig(**sizes, num_hidden_layers=80), PackedRows(8), 16, **given)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"per_device_train_batch_size": 3}, "{0} samples"), ({"token_budget": 40}, "up to {0} tokens")],
)
def test_says_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    from hf_veomni.trainer import auto

    lines: list[str] = []
    monkeypatch.setattr(auto, "announce", lines.append)
    given = {"plan": f"auto:{small_device(tmp_path)}", "gradient_accumulation_steps": 2, **options}
    ranks = choose(tiny_model().config, PackedRows(8), 4, **given).layout.data
    size = next(iter(options.values())) * 2 * ranks
    assert lines[0].endswith(f"It has {ranks} data ranks: a step takes {said.format(size)}.")


def test_ranks_agree_on_the_planners_first(ranks, tmp_path: Path) -> None:
    from hf_veomni.planner import plan_layouts

    device = small_device(tmp_path)
    found = ranks(2).run(_train, tmp_path, f"auto:{device}", timeout=120)
    rows = PackedRows(8).rows
    context, document = max(sum(map(len, row)) for row in rows), max(len(part) for row in rows for part in row)
    best = plan_layouts(tiny_model().config, 2, device, context=context, document=document).best
    assert [result[:3] for result in found] == [(str(best.layout.plan), best.layout.checkpointing, 2)] * 2


def test_checkpointing_that_is_asked_for_stays(ranks, tmp_path: Path) -> None:
    (found,) = ranks(1).run(_train, tmp_path, "auto:h100-80gb", activation_checkpointing=True, timeout=120)
    assert found[:3] == ("single", True, 2)


def half_frozen() -> Any:
    model = tiny_model().to(torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    return model


def with_adapters(**options: Any) -> Any:
    return get_peft_model(tiny_model().to(torch.bfloat16), LoraConfig(target_modules="all-linear", **options))


def seeing() -> Any:
    kind, config, _ = qwen3_vl()
    return kind(config).to(torch.bfloat16)


def two_adapters() -> Any:
    model = with_adapters()
    model.add_adapter("other", LoraConfig(target_modules="all-linear"))
    return model


def test_the_largest_rank_of_adapters_counts() -> None:
    given: list[dict[str, Any]] = [{"r": 8}, {"r": 8, "rank_pattern": {"q_proj": 64}}, {"r": 64}]
    one, pattern, all_of_them = (choose(with_adapters(**ranks), PackedRows(8)).memory for ranks in given)
    assert pattern == all_of_them and pattern.total > one.total


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("auto", {}, "knows no device 'cpu'.*auto:h100-80gb"),
        ("auto:h100", {}, "'h100'. is not in the table: did you mean 'h100-80gb'"),
        ("auto:h100-80gb", {"model": tiny_model()}, "in bf16, not in torch.float32"),
        ("auto:h100-80gb", {"train_dataset": iter(())}, "lengths of the samples"),
        ("auto:h100-80gb", {"train_dataset": [{"text": "a"}]}, "`input_ids`.*only text.*tokenise.*length_column_name"),
        (
            "auto:h100-80gb",
            {"train_dataset": datasets.Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})},
            "`plan` .*`input_ids`.*only prompt, answer.*Or name a plan",
        ),
        ("auto:h100-80gb", {"optim": "sgd"}, "`optim` .'sgd'.*'adamw_torch_fused'.*name a plan"),
        ("auto:h100-80gb", {"optim": "adamw_torch"}, "`optim` .'adamw_torch'.*'adamw_torch_fused'.*name a plan"),
        ("auto:h100-80gb", {"model": half_frozen()}, r"[\d,]+ frozen parameters.*name a plan"),
        (
            "auto:h100-80gb",
            {"model": with_adapters(modules_to_save=["lm_head"])},
            "`modules_to_save` .*plain LoRA",
        ),
        ("auto:h100-80gb", {"model": with_adapters(use_dora=True)}, "LoRA with `use_dora` .True.*name a plan"),
        ("auto:h100-80gb", {"model": with_adapters(bias="all")}, "LoRA with `bias` .'all'"),
        ("auto:h100-80gb", {"model": two_adapters()}, "2 adapters .default, other.*name a plan"),
        ("auto:h100-80gb", {"optimizers": (torch.optim.SGD([torch.ones(1)]), None)}, "own .`optimizers`"),
        ("auto:h100-80gb", {"model": seeing()}, r"activations of encoders.*has [\d,]+ parameters.*name a plan"),
    ],
)
def test_refuses(tmp_path: Path, plan: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _train(tmp_path, plan, **options)


def test_elsewhere_it_is_no_plan() -> None:
    from hf_veomni import prepare_omni

    with pytest.raises(ValueError, match="`plan` .'auto'. is chosen by OmniTrainer"):
        prepare_omni(tiny_model(), "auto")
