"""Cards and uploads are Trainer's own, with tags and a section on the plan; no network is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.ranks.training import Run


class _Hub:
    """What Trainer asks of the Hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.uploads: list[dict[str, Any]] = []
        self.error = error

    def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.uploads.append(options)
        return "https://the.hub/commit"


def _push(plan: str | None, directory: Path, error: Exception | None = None) -> tuple[Any, ...]:
    """What a run uploads, what `push_to_hub` returns, and the tags and the text of the card. Stock without a plan."""
    from transformers import Trainer, TrainingArguments

    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(arguments={"max_steps": 1, "output_dir": str(directory), "logging_steps": 1})
    hub, adapters = _Hub(error), LoraConfig(target_modules=["q_proj"])
    trainer: Any
    if plan is None:
        from peft import get_peft_model

        model = get_peft_model(run.model(), adapters)
        trainer = Trainer(model=model, args=TrainingArguments(**run.all_arguments()), **run.data())
    else:
        arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
        trainer = OmniTrainer(model=run.model(), args=arguments, peft_config=adapters, **run.data())
    trainer.train()
    with mock.patch("transformers.trainer.hf_api", lambda: hub):
        pushed = trainer.push_to_hub(tags="mine", dataset_tags="someone/chats", dataset="chats")
    card = ModelCard.load(directory / "README.md")
    return hub.uploads, pushed, card.data.to_dict(), card.text


def test_a_push_is_that_of_the_stock_trainer(ranks, tmp_path: Path) -> None:
    (wanted, result, data, text) = _push(None, tmp_path / "one/run")
    (found, pushed, mine, own), (nothing, no_result, _, _) = ranks(2).run(_push, "sp=2", tmp_path / "two/run")
    assert nothing == [] and no_result is None
    assert pushed == result and len(found) == 1
    assert {**found[0], "folder_path": None} == {**wanted[0], "folder_path": None}
    given = ["mine", "generated_from_trainer"]  # which PEFT drops from the stock card
    names = [{p.name for p in (tmp_path / where / "run").iterdir()} for where in ("one", "two")]
    assert names[1] == names[0] and "adapter_model.safetensors" in names[1]
    assert set(mine.pop("tags")) == {*data.pop("tags"), *given, "hf-veomni", "plan:sp=2"}
    assert mine == data
    before, section = own.split("## Trained with hf_veomni")
    assert "Training hyperparameters" in before and "Training hyperparameters" in text
    assert "- Plan: `sp=2`, 2 ranks" in section and "- Data: 9 samples" in section
    assert "- Figures: loss " in section or "- Figures: train_loss " in section
    assert "- Versions: hf-veomni " in section and "torch 2." in section


def _failed(directory: Path) -> str:
    with pytest.raises(OSError) as caught:
        _push("sp=2", directory, OSError("the Hub is away"))
    return str(caught.value)


def test_an_upload_that_fails_is_raised_on_every_rank(ranks, tmp_path: Path) -> None:
    first, second = ranks(2).run(_failed, tmp_path / "run")
    assert first == "the Hub is away"
    assert second == "Uploading to the Hub failed on rank 0: OSError: the Hub is away"


def _save(directory: Path) -> list[bool]:
    """Whether the card is ours after saving into a fresh directory, and into one with a card of a person."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run, card, found = Run(arguments={"max_steps": 1, "output_dir": str(directory)}), directory / "README.md", []
    arguments = OmniTrainingArguments(**run.all_arguments(plan=""))
    trainer = OmniTrainer(model=run.model(), args=arguments, **run.data())
    for text in (None, "# My model\n", None):
        card.unlink(missing_ok=True)
        if text is not None:
            card.write_text(text)
        trainer.save_model()
        found.append("Trained with hf_veomni" in card.read_text())
    trainer.save_model()  # over a card of its own
    trainer.save_model(str(directory / "elsewhere"))
    assert not (directory / "elsewhere/README.md").exists()
    return found + [card.read_text().count("Trained with hf_veomni") == 1]


def test_a_saved_model_has_a_card_that_replaces_none_of_a_persons(tmp_path: Path) -> None:
    assert _save(tmp_path / "run") == [True, False, True, True]
