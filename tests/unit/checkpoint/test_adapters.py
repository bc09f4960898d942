"""A run goes on with adapters that mean the same as those of its checkpoint, or an error names the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from hf_veomni.checkpoint import check_adapters
from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments
from tests.ranks.training import Run, tiny_model

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": False}


def _model(**more: Any) -> Any:
    return get_peft_model(tiny_model(), LoraConfig(**{**CONFIG, **more}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stock PEFT writes it."""
    folder = tmp_path_factory.mktemp("saved")
    _model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"lora_alpha": 16}, "`lora_alpha` 16, in the checkpoint '.*' it has 8"),
        ({"r": 8}, "`r` 8, .* it has 4"),
        ({"use_rslora": True}, "`use_rslora` True, .* it has False"),
        ({"target_modules": ["q_proj"]}, r"`target_modules` \['q_proj'\], .* it has \['q_proj', 'v_proj'\]"),
        ({"target_modules": ".*_proj"}, r"`target_modules` '\.\*_proj', .* it has"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` \['lm_head'\], .* it has None"),
        ({"alpha_pattern": {"q_proj": 4}}, "`alpha_pattern` {'q_proj': 4}, .* it has {}"),
        ({"layers_to_transform": [0]}, r"`layers_to_transform` \[0\], .* it has None"),
    ],
)
def test_another_adapter_is_refused_by_its_field(saved: Path, more: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"The adapter 'default' has {named}"):
        check_adapters(_model(**more), saved)


@pytest.mark.parametrize(
    "more",
    [{}, {"target_modules": ["v_proj", "q_proj"]}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}],
)
def test_what_means_the_same_or_may_change_is_taken(saved: Path, more: dict[str, Any]) -> None:
    check_adapters(_model(**more), saved)


def test_every_adapter_is_compared(saved: Path, tmp_path: Path) -> None:
    def both(alpha: int) -> Any:
        model = _model()
        model.add_adapter("other", LoraConfig(**{**CONFIG, "lora_alpha": alpha}))
        return model

    both(4).save_pretrained(tmp_path)
    check_adapters(both(4), tmp_path)
    with pytest.raises(ValueError, match="The adapter 'other' has `lora_alpha` 5, .* it has 4"):
        check_adapters(both(5), tmp_path)


def test_names_that_peft_adds_again_are_the_same(tmp_path: Path) -> None:
    """It extends `modules_to_save` in the user's own object, once for each model that is made with it."""
    kind = AutoModelForSequenceClassification
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])
    once = get_peft_model(kind.from_config(tiny_model().config), config)
    once.save_pretrained(tmp_path)
    again = get_peft_model(kind.from_config(tiny_model().config), config)
    names = list(again.peft_config["default"].modules_to_save or ())
    assert len(names) > len(set(names))
    check_adapters(again, tmp_path)


def test_a_model_without_adapters_has_nothing_to_compare(saved: Path) -> None:
    check_adapters(tiny_model(), saved)


def test_a_configuration_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json' cannot be read"):
        check_adapters(_model(), tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_does_not_go_on_with_another_scale(tmp_path: Path, sharded: bool) -> None:
    """Names and shapes are the same, so nothing else would tell."""

    def train(resume: bool, alpha: int) -> None:
        run = Run(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1 + resume})
        arguments = OmniTrainingArguments(**run.all_arguments(output_dir=str(tmp_path), sharded_weights=sharded))
        OmniTrainer(model=_model(lora_alpha=alpha), args=arguments, **run.data()).train(resume_from_checkpoint=resume)

    train(False, 8)
    with pytest.raises(ValueError, match="`lora_alpha` 16, in the checkpoint '.*checkpoint-1' it has 8"):
        train(True, 16)
    train(True, 8)
