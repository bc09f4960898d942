"""A packed sequence of samples with images or audio trains like the samples alone, on stock models of real
families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.multimodal import build, samples_of
from tests.ranks.parity import relative_error, whole

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen2_audio", "idefics3"]


def summed_loss(model: Any, processor: Any, sample: dict[str, Any], logits: bool = False) -> Any:
    """Loss of one sample, summed over its targets, and their number, as the stock model and processor give it.

    `logits`: these instead, [tokens, vocabulary].
    """
    items = {name.replace("audios", "audio"): [values] for name, values in sample.items() if name != "text"}
    items = {name: values[0] if name == "audio" else values for name, values in items.items()}
    inputs = processor(text=[sample["text"]], return_tensors="pt", **items)
    names = [f"{kind}_token_{ending}" for kind in ("image", "audio") for ending in ("id", "index")]
    special = torch.tensor([getattr(model.config, name, -1) for name in names])
    labels = inputs["input_ids"].masked_fill(torch.isin(inputs["input_ids"], special), -100)
    scores = model(**inputs).logits
    if logits:
        return scores[0]
    return F.cross_entropy(scores[0, :-1], labels[0, 1:], reduction="sum"), int((labels[0, 1:] != -100).sum())


def _compare(family: str, plan: str) -> dict[str, float]:
    """Relative errors of the packed sequence: losses by sample, loss of the row, gradients."""
    from hf_veomni import OmniDataCollatorWithPacking, gather_sequence, prepare_omni

    model, processor = build(family)
    samples = samples_of(family)
    alone = [summed_loss(model, processor, sample) for sample in samples]
    expected = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    row = OmniDataCollatorWithPacking(processor=processor, model_config=model.config)(samples)
    prepare_omni(model, plan)
    out = model(**row)
    logits = gather_sequence(out.logits, model).detach()  # before backward frees the head
    out.loss.backward()
    counted = row["position_ids"].reshape(-1, row["input_ids"].shape[1])[0]
    losses = F.cross_entropy(logits[0, :-1], row["labels"][0, 1:], reduction="none")
    starts = [*(counted == 0).nonzero().flatten().tolist(), len(counted)]
    parts = [losses[begin : end - 1].sum() for begin, end in zip(starts, starts[1:], strict=False)]
    assert len(parts) == len(samples)
    wanted = {name: p for name, p in wanted.items() if not name.endswith("k_proj.bias")}  # 0: softmax cancels it
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() <= gradients.keys() and len(wanted) > 30
    return {
        "samples": max(relative_error(part, loss) for part, (loss, _) in zip(parts, alone, strict=True)),
        "loss": relative_error(out.loss, expected),
        "gradients": max(relative_error(gradients[name], gradient) for name, gradient in wanted.items()),
    }


@pytest.mark.parametrize("plan", ["", "sp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_samples_alone(ranks, family, plan):
    for errors in ranks(2 if plan else 1).run(_compare, family, plan, timeout=120):
        print(family, plan, errors)
        assert max(errors.values()) < 1e-5, errors


def _train(folder: str, budget: int | None, streaming: bool) -> tuple[float, int]:
    from datasets import Dataset

    from hf_veomni import (
        OmniDataCollatorWithPacking,
        OmniTrainer,
        OmniTrainingArguments,
        pack_dataset,
    )
    from hf_veomni.modality import CostModel

    model, processor = build("qwen2_5_vl")
    samples = [
        {"text": f"{sample['text']} {i}", "images": [picture.tolist() for picture in sample.get("images", ())]}
        for i, sample in enumerate(samples_of("qwen2_5_vl") * 3)
    ]
    for sample in samples:
        sample["images"] = [_file(folder, picture) for picture in sample["images"]]
    source = Dataset.from_list(samples)
    source = source.to_iterable_dataset() if streaming else source
    packed = pack_dataset(source, 240, processor=processor, cost=CostModel.from_config(model.config).costs)
    arguments = OmniTrainingArguments(
        folder, plan="", max_steps=2, per_device_train_batch_size=1, token_budget=budget, report_to=[], use_cpu=True,
        gradient_accumulation_steps=2, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    collator = OmniDataCollatorWithPacking(budget or 240, processor, model_config=model.config)
    trainer = OmniTrainer(model, arguments, train_dataset=packed, data_collator=collator)
    result = trainer.train()
    return result.training_loss, trainer.state.global_step


def _file(folder: str, picture: Any) -> str:
    import numpy as np
    from PIL import Image

    array = np.asarray(picture, dtype=np.uint8)
    path = f"{folder}/{array.shape[0]}x{array.shape[1]}-{int(array.sum())}.png"
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(
    "budget, streaming", [(None, False), (480, False), (None, True)], ids=["", "budget", "stream"]
)
def test_the_trainer_takes_rows_of_samples(ranks, tmp_path, budget, streaming):
    ((loss, steps),) = ranks(1).run(_train, str(tmp_path), budget, streaming, timeout=120)
    assert steps == 2 and 0 < loss < 20
