"""Stock models, one of each kind of attention and layer, and a packed sequence for each: what parity is measured on.

Shapes: S tokens of the row; the documents of the row are batches of one for the stock model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as T
from torch import Tensor

VOCABULARY = 512
Batch = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    window: int
    lengths: tuple[int, ...]


# A document of one token, and one that fills most of a block of the kernels.
LARGE = Sizes(512, 8, 2, 64, 4, 64, (300, 7, 201, 1, 129, 386))
SMALL = Sizes(64, 4, 2, 16, 2, 7, (23, 1, 17, 30))


def _common(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _experts(sizes: Sizes) -> dict[str, Any]:
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": sizes.hidden // 2}


def _alternating(sizes: Sizes, other: str) -> dict[str, Any]:
    return {"layer_types": [other if i % 2 == 0 else "full_attention" for i in range(sizes.layers)]}


def _dense(sizes: Sizes) -> Any:
    return T.Qwen3Config(**_common(sizes))


def _window(sizes: Sizes) -> Any:
    return T.Gemma3TextConfig(
        **_common(sizes), sliding_window=sizes.window, query_pre_attn_scalar=sizes.head_dim,
        **_alternating(sizes, "sliding_attention"),
    )  # fmt: skip


def _softcap(sizes: Sizes) -> Any:
    return T.Gemma2Config(
        **_common(sizes), sliding_window=sizes.window, query_pre_attn_scalar=sizes.head_dim,
        attn_logit_softcapping=20.0, final_logit_softcapping=20.0, **_alternating(sizes, "sliding_attention"),
    )  # fmt: skip


def _sinks(sizes: Sizes) -> Any:
    return T.GptOssConfig(
        **_common(sizes) | {"intermediate_size": sizes.hidden}, sliding_window=sizes.window, num_local_experts=8,
        num_experts_per_tok=2, **_alternating(sizes, "sliding_attention"),
    )  # fmt: skip


def _moe(sizes: Sizes) -> Any:
    return T.Qwen3MoeConfig(**_common(sizes), **_experts(sizes))


def _linear(sizes: Sizes) -> Any:
    width = sizes.head_dim // 2
    return T.Qwen3NextConfig(
        **_common(sizes), **_experts(sizes), **_alternating(sizes, "linear_attention"),
        shared_expert_intermediate_size=sizes.hidden // 2, linear_num_key_heads=sizes.kv_heads,
        linear_num_value_heads=sizes.heads, linear_key_head_dim=width, linear_value_head_dim=width, rms_norm_eps=1e-3,
    )  # fmt: skip


def _vlm(sizes: Sizes) -> Any:
    from tests import processors

    tokenizer = processors.qwen_vl().tokenizer
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    marks |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    quarter = sizes.head_dim // 8
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True}
    text = _common(sizes) | {"rope_parameters": rope | {"mrope_section": [2 * quarter, quarter, quarter]}}
    vision = {"depth": 2, "hidden_size": sizes.hidden // 2, "intermediate_size": sizes.hidden, "num_heads": 4}
    vision |= {"out_hidden_size": sizes.hidden, "patch_size": 4, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 64}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    return T.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


# name -> (its configuration, the stock model's attention, has experts)
FAMILIES: dict[str, tuple[Callable[[Sizes], Any], str, bool]] = {
    "dense": (_dense, "sdpa", False),
    "moe": (_moe, "sdpa", True),
    "linear": (_linear, "sdpa", True),
    "vlm": (_vlm, "sdpa", False),
    "window": (_window, "sdpa", False),
    "sinks": (_sinks, "eager", True),  # in fp32 on FlexAttention, as the next: each kind is compiled for 20 s
    "softcap": (_softcap, "eager", False),
}


def build(family: str, small: bool, dtype: torch.dtype, device: str) -> Any:
    """The stock model in training mode, of weights that depend on the family alone.

    They are larger than a model's own initialisation, so that attention is not uniform and no gradient is tiny.
    """
    make, attention, _ = FAMILIES[family]
    config = make(SMALL if small else LARGE)
    config._attn_implementation = attention
    auto = T.AutoModelForImageTextToText if family == "vlm" else T.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype)  # not cast afterwards: tables of positions stay fp32 then
    generator = torch.Generator().manual_seed(0)
    # At 0.6 the stock model with linear attention is off by 1 in bf16, which would let anything pass.
    scale = (0.15 if family == "linear" else 0.6) * (SMALL if small else LARGE).hidden ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0, scale, generator=generator)
            parameter.copy_(noise + 1 if parameter.dim() == 1 and "norm" in name else noise)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.to(device).train()


def text_documents(small: bool) -> list[Batch]:
    """Documents of random tokens, a third of which are not learnt."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (SMALL if small else LARGE).lengths:
        ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        learnt = torch.rand(ids.shape, generator=generator) < 0.7
        found.append({"input_ids": ids, "labels": ids.masked_fill(~learnt, -100)})
    return found


def text_row(documents: list[Batch]) -> Batch:
    """The documents one behind the other, as the collator packs them."""
    labels = [document["labels"].clone() for document in documents]
    for part in labels:
        part[:, 0] = -100  # nothing is predicted across a boundary
    lengths = [document["input_ids"].shape[1] for document in documents]
    return {
        "input_ids": torch.cat([document["input_ids"] for document in documents], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.cat(labels, dim=1),
    }


def picture_documents(model: Any) -> tuple[list[Batch], Batch]:
    """Samples with images by the stock processor, one by one, and the packed sequence of them."""
    from hf_veomni import OmniDataCollatorWithPacking
    from tests import processors

    processor, mark = processors.qwen_vl(), processors.PICTURE
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((32, 32), (50, 90), (70, 40))]
    samples: list[dict[str, Any]] = [
        {"text": f"Before {mark} and after it.", "images": images[:1]},
        {"text": "Nothing to see here, only words."},
        {"text": f"{mark} or {mark}?", "images": images[1:]},
    ]
    documents = []
    for sample in samples:
        inputs = dict(processor(text=[sample["text"]], images=sample.get("images"), return_tensors="pt"))
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        documents.append(inputs)
    return documents, dict(OmniDataCollatorWithPacking(processor=processor, model_config=model.config)(samples))


def inputs_of(family: str, small: bool, model: Any) -> tuple[list[Batch], Batch]:
    """The documents for the stock model, and the packed sequence of them."""
    if family == "vlm":
        return picture_documents(model)
    documents = text_documents(small)
    return documents, text_row(documents)


def to_device(batch: Batch, device: str) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
