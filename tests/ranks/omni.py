"""A composed model on several ranks against itself on one, whatever the rows of each data rank hold.

Data rank d has rows of its own; the reference gradient is the mean over data ranks of the gradients of their losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_veomni import OmniModel
from tests.ranks.parity import Errors, compare_gradients, relative_error
from tests.unit.omni.parts import AUDIO_TOKEN, IMAGE_TOKEN, MIMI, NUM_CODES, SOUND_TOKEN, VISION_TOKEN, build, settings

# Documents of a row, a letter for each part: text, seen image, heard sound, drawn image, spoken sound.
MIXED = ("tvtat", "tvvt", "tit", "tst", "ta")
_MOE = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setting:
    """`rows`: the documents of each data rank's row. `changes`: options of the parts, as `settings` takes them."""

    rows: tuple[tuple[str, ...], ...]
    changes: dict[str, Any] = field(default_factory=dict)
    moe: bool = False
    lora: bool = False
    saved: tuple[str, ...] = ("projector",)  # with lora: what is trained and saved in full
    micro_batches: int = 1


def make_model(setting: Setting) -> nn.Module:
    """The composed model with all parts, on CPU and alike everywhere."""
    config = settings(**setting.changes)
    config["decoders"]["audio"] = {"config": MIMI, "token_id": SOUND_TOKEN, "loss_weight": 0.5}
    if setting.moe:
        config["foundation"]["config"] = {**config["foundation"]["config"], **_MOE}
    model = freeze_noise(build(config))
    if not setting.lora:
        return model
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=r"foundation\..*\.(q|v)_proj",
            modules_to_save=list(setting.saved),
            init_lora_weights=False,
        ),
    )
    return freeze_noise(wrapped).train()  # PEFT trains all of the copies that it saves


def freeze_noise(model: nn.Module) -> nn.Module:
    """Biases of keys add the same to all scores of a query: their gradient is nothing but rounding."""
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)
    return model


def make_row(documents: Sequence[str], seed: int) -> dict[str, Tensor]:
    """One packed sequence with its features; placeholders of what is seen and heard are no targets."""
    generator = torch.Generator().manual_seed(seed)
    marks = {"v": (VISION_TOKEN, 4), "a": (AUDIO_TOKEN, 5), "i": (IMAGE_TOKEN, 16), "s": (SOUND_TOKEN, 6)}
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    first: list[int] = []
    for document in documents:
        parts = []
        for kind in document:
            if kind == "t":
                length = int(torch.randint(2, 6, (1,), generator=generator))
                parts.append(torch.randint(3, 90, (length,), generator=generator))
            else:
                token, count = marks[kind]
                parts.append(torch.full((count,), token))
        first.append(sum(map(len, ids)))
        ids.append(torch.cat(parts))
        positions.append(torch.arange(len(ids[-1])))
    row = torch.cat(ids)[None]
    labels = row.masked_fill((row == VISION_TOKEN) | (row == AUDIO_TOKEN), -100)
    labels[:, first] = -100
    batch = {"input_ids": row, "labels": labels, "position_ids": torch.cat(positions)[None]}
    count = {kind: "".join(documents).count(kind) for kind in marks}
    if count["v"]:
        batch["pixel_values"] = torch.randn(count["v"], 3, 8, 8, generator=generator)
    if count["a"]:
        batch["input_features"] = torch.randn(count["a"], 8, 10, generator=generator)
    if count["i"]:
        batch["image_codes"] = torch.randint(0, NUM_CODES, (count["i"], 16), generator=generator)
    if count["s"]:
        codes = torch.randint(0, 16, (count["s"], 6), generator=generator)
        batch["audio_codes"] = codes + torch.tensor([0, 16]).repeat(3)
    return batch


def make_batches(setting: Setting) -> list[list[dict[str, Tensor]]]:
    """Rows by data rank and micro-batch; the second micro-batch of a rank has the next rank's kinds of documents."""
    count = len(setting.rows)
    return [
        [
            make_row(setting.rows[(rank + micro) % count], seed=10 * rank + micro)
            for micro in range(setting.micro_batches)
        ]
        for rank in range(count)
    ]


def _alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row with a mask that keeps its documents apart, for a model that is not prepared."""
    begins = (batch["position_ids"][0] == 0).cumsum(0)
    mask = (begins[:, None] == begins[None]).tril()
    return {**batch, "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]}


def _num_items(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    if len(batches) == 1:
        return {}
    return {"num_items_in_batch": sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)}


def compute_reference(setting: Setting, path: Path) -> None:
    """Loss, logits and gradients of the composed model in one process, written to `path`."""
    model = make_model(setting)
    losses, logits = [], []
    for batches in make_batches(setting):
        for batch in batches:
            out = model(**_alone(batch), **_num_items(batches))
            (out.loss / len(setting.rows)).backward()
            losses.append(out.loss.item())
            logits.append({name: out[name].detach() for name in _HEADS if out.get(name) is not None})
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.save({"losses": losses, "logits": logits, "gradients": gradients, "norm": norm}, path)


_HEADS = ("logits", "image_logits", "audio_logits")


def compare(setting: Setting, plan: str, path: str, checkpoint: str | None = None) -> dict[str, Any]:
    """On every rank: the prepared model against the reference at `path`; `checkpoint`: built on meta."""
    from hf_veomni import gather_sequence, get_parallel_state, prepare_omni

    if checkpoint is None:
        model = make_model(setting)
    else:
        from transformers import AutoConfig

        with torch.device("meta"):
            model = freeze_noise(OmniModel(AutoConfig.from_pretrained(checkpoint)).train())
    prepare_omni(model, plan, checkpoint=checkpoint)
    reference, state = torch.load(path), get_parallel_state(model)
    batches = make_batches(setting)[state.dp_rank]
    errors = Errors()
    for micro, batch in enumerate(batches):
        wanted = reference["logits"][state.dp_rank * len(batches) + micro]
        model.eval()
        with torch.no_grad():
            out = model(**batch)
        found = {name: gather_sequence(out[name], model) for name in wanted}
        errors.logits = max(errors.logits, *(relative_error(found[name], wanted[name]) for name in wanted))
        model.train()
        out = model(**batch, **_num_items(batches))
        out.loss.backward()
        expected = reference["losses"][state.dp_rank * len(batches) + micro]
        errors.loss = max(errors.loss, abs(out.loss.item() - expected) / abs(expected))
        errors.losses.append(out.loss.item())
    compare_gradients(model, reference, errors)
    return asdict(errors)


def generate(setting: Setting, plan: str) -> dict[str, Tensor]:
    """On every rank: what a prepared model says, draws and sounds; with `plan` "" on one, prepared by nobody."""
    model: Any = make_model(setting)
    if plan:
        from hf_veomni import prepare_omni

        prepare_omni(model, plan)
    model.eval()
    base = model.get_base_model() if setting.lora else model
    prompts = torch.tensor([[3, 4, *[VISION_TOKEN] * 4, 5, 6], [7, 8, *[VISION_TOKEN] * 4, 9, 10]])
    seen = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    given = {"pixel_values": seen}
    said = model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False, **given)
    codes, pictures = base.generate_image(prompts, **given)
    sampled, _ = base.generate_image(prompts[:, :2], do_sample=True, generator=torch.Generator().manual_seed(7))
    sounding, sounds = base.generate_audio(prompts, frames=3, **given)
    again = base.decoders["image"].lm_encode(pictures)
    found = {"said": said, "codes": codes, "pictures": pictures, "sampled": sampled, "sounds": sounds}
    return found | {"sounding": sounding, "again": again}


def evaluate_whole(setting: Setting, plan: str) -> dict[str, Tensor]:
    """On every rank: the logits of all heads of the first row, as a user's metrics see them."""
    model: Any = make_model(setting).eval()
    batch = make_batches(setting)[0][0]
    with torch.no_grad():
        if not plan:
            out = model(**_alone(batch))
            return {name: out[name] for name in _HEADS}
        from hf_veomni import prepare_omni
        from hf_veomni.trainer.losses import full_outputs

        prepare_omni(model, plan)
        with full_outputs(model):
            out = model(**batch)
    return {name: out[name] for name in _HEADS}
