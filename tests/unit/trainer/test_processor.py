"""The processor of the collator is saved beside the model, as a Trainer's own is."""

from __future__ import annotations

import pytest
from transformers import Trainer, TrainingArguments

from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments
from tests import processors
from tests.ranks.training import tiny_model

MAKERS = {"tokenizer": processors.byte_tokenizer, "qwen_vl": processors.qwen_vl, "audio": processors.qwen_audio}


def _saved(trainer_class, args_class, path, **options):
    args = args_class(output_dir=str(path), use_cpu=True, report_to=[])
    trainer_class(model=tiny_model(), args=args, **options).save_model(str(path))
    return {
        file.name: file.read_bytes() for file in path.iterdir() if file.name.startswith(("tok", "pro", "pre", "chat"))
    }


@pytest.mark.parametrize("classes", [(OmniTrainer, OmniTrainingArguments), (Trainer, TrainingArguments)])
@pytest.mark.parametrize("name", MAKERS)
def test_the_collators_processor_is_saved(tmp_path, name, classes):
    processor = MAKERS[name]()
    processor.save_pretrained(tmp_path / "wanted")
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "wanted").iterdir()}
    found = _saved(*classes, tmp_path / "found", data_collator=OmniDataCollatorWithPacking(processor=processor))
    assert found == wanted and "tokenizer.json" in found
    assert not _saved(*classes, tmp_path / "none", data_collator=OmniDataCollatorWithPacking())
    other = processors.byte_tokenizer("<other>")
    chosen = _saved(
        *classes,
        tmp_path / "chosen",
        data_collator=OmniDataCollatorWithPacking(processor=processor),
        processing_class=other,
    )
    assert b"<other>" in chosen["tokenizer.json"]
