"""Models that see: encoders run on the first stage, and the stages give what the stock model gives in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.multimodal import FAMILIES, samples_of
from tests.ranks.alone import run_alone
from tests.ranks.modality.test_packed_multimodal import summed_loss
from tests.ranks.parity import relative_error, whole

SLOW = pytest.mark.slow
# Samples of each micro-batch: packed ones, text alone, one with an item at its end; and so again.
ROWS = ((0, 1), (2,), (3,), (2, 0))
ALONE = ((0,), (2,), (3,), (1,))  # of a family whose rows hold one document
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def _build(family: str) -> tuple[Any, Any]:
    """Of four layers, in fp32 and training mode, and its processor."""
    kind, config, processor = FAMILIES[family][0]()
    text = config.text_config
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = 4
    if kinds:
        text.layer_types = ["sliding_attention", "full_attention"] * 2 if family == "gemma3" else kinds * 2
    config.use_cache = text.use_cache = False
    torch.manual_seed(0)
    return kind._from_config(config, dtype=torch.float32, attn_implementation="sdpa").train(), processor


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", **_TEXT, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = {"model_type": "llama", **_TEXT, "vocab_size": 99, "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    config.use_cache = config.text_config.use_cache = False
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).train()


def _llava_rows() -> list[dict[str, Any]]:
    made = torch.Generator().manual_seed(3)
    rows = []
    for length, images in ((9, 1), (7, 0), (4, 2), (11, 1)):
        words = torch.randint(3, 97, (length,), generator=made)
        ids = torch.cat([words[:3], torch.full((16 * images,), 98), words[3:]])[None]
        row: dict[str, Any] = {"input_ids": ids, "labels": ids.masked_fill(ids == 98, -100)}
        if images:
            row["pixel_values"] = torch.randn(images, 3, 32, 32, generator=made)
        rows.append(row)
    return rows


def _reference(family: str, path: Path) -> None:
    """Loss and gradients of the window by the stock model, each sample alone."""
    if family == "llava":
        model = _llava()
        rows = _llava_rows()
        count = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
        losses = [model(**row, num_items_in_batch=count).loss for row in rows]
        loss = torch.stack(losses).sum()
    else:
        model, processor = _build(family)
        samples = samples_of(family)
        chosen = [i for row in (ALONE if family == "gemma3" else ROWS) for i in row]
        found = [summed_loss(model, processor, samples[i]) for i in chosen]
        loss = torch.stack([part for part, _ in found]).sum() / sum(number for _, number in found)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # 0 but for rounding: softmax cancels it.
    gradients = {name: grad for name, grad in gradients.items() if not name.endswith("k_proj.bias")}
    assert any("vis" in name for name in gradients)
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    torch.save({"loss": loss.item(), "gradients": gradients, "norm": norm.item()}, path)


def _stages(family: str, plan: str, path: str) -> tuple[dict[str, float], list[str]]:
    """Relative errors of this rank, and which gradients it has."""
    from hf_veomni import OmniDataCollatorWithPacking, get_parallel_state, prepare_omni, run_window

    wanted = torch.load(path)
    if family == "llava":
        model, rows = _llava(), _llava_rows()
    else:
        model, processor = _build(family)
        collate = OmniDataCollatorWithPacking(processor=processor, model_config=model.config)
        samples = samples_of(family)
        rows = [collate([samples[i] for i in row]) for row in (ALONE if family == "gemma3" else ROWS)]
    prepare_omni(model, plan)
    state = get_parallel_state(model)
    loss = run_window(model, rows[state.dp_rank :: state.dp_size])
    errors = {"loss": abs(loss.item() / wanted["loss"] - 1)}
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        if name in wanted["gradients"]:
            errors[name] = relative_error(gradient, wanted["gradients"][name])
        else:  # second name of a tied head; or nothing uses it
            tied = "lm_head" in name and model.config.tie_word_embeddings
            assert tied or name.endswith("k_proj.bias") or not gradient.abs().max() > 0, name
    return errors, list(found)


@pytest.mark.parametrize(
    ("family", "plan", "world"),
    [
        ("qwen3_vl", "pp=2", 2),
        ("llava", "pp=2", 2),
        pytest.param("qwen2_5_vl", "pp=2", 2, marks=SLOW),
        pytest.param("qwen3_vl", "pp=2,sp=2", 4, marks=SLOW),
        pytest.param("qwen2_5_vl", "pp=4", 4, marks=SLOW),
        pytest.param("qwen2_5_vl", "pp=2,dp_shard=2", 4, marks=SLOW),
        pytest.param("qwen2_5_vl", "pp=2,sp=2", 4, marks=SLOW),
        pytest.param("gemma3", "pp=2", 2, marks=SLOW),
        pytest.param("idefics3", "pp=2", 2, marks=SLOW),
        pytest.param("idefics3", "pp=2,dp_shard=2", 4, marks=SLOW),
        pytest.param("llava", "pp=2,dp_shard=2", 4, marks=SLOW),
        pytest.param("llava", "pp=4", 4, marks=SLOW),
        pytest.param("llava", "pp=2,sp=2", 4, marks=SLOW),
    ],
)
def test_models_that_see_equal_one_process(ranks, tmp_path: Path, family: str, plan: str, world: int) -> None:
    _reference(family, tmp_path / "reference.pt")
    found = ranks(world).run(_stages, family, plan, str(tmp_path / "reference.pt"), timeout=180)
    print([max(errors.items(), key=lambda item: item[1]) for errors, _ in found])
    names = {name for _, held in found for name in held}
    assert torch.load(tmp_path / "reference.pt")["gradients"].keys() <= names
    for errors, _ in found:
        assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def _too_deep() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(_build("qwen3_vl")[0], "pp=4")  # two layers add features, and three stages have one each


def test_what_the_first_stage_must_have_is_refused_elsewhere(ranks) -> None:
    ranks(4).raises(_too_deep, match=r"`pp_size` \(4\) is too large for 4 layers, of which the first stage has 2")


def _image_without_placeholders(rank: int, folder: str) -> None:
    from hf_veomni import OmniTrainer, OmniTrainingArguments

    rows: Any = _llava_rows()
    rows[1]["pixel_values"] = rows[0]["pixel_values"]
    options: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 4, "remove_unused_columns": False}
    options |= {"per_device_train_batch_size": 1, "save_strategy": "no", "report_to": "none", "plan": "pp=2"}
    args = OmniTrainingArguments(folder, **options)
    OmniTrainer(_llava(), args, train_dataset=rows, data_collator=lambda found: found[0]).train()


@SLOW
def test_what_the_first_stage_alone_finds_in_its_forward_ends_the_others(tmp_path: Path) -> None:
    ended = run_alone(_image_without_placeholders, 2, tmp_path, str(tmp_path / "run"))
    error = "ValueError: Image features and image tokens do not match"
    assert [end.code in (1, 76) for end in ended] == [True, True], ended
    assert error in ended[0].output and f"Rank 0 failed: {error}" in ended[1].output
    assert abs(ended[1].seconds - ended[0].seconds) < 15
