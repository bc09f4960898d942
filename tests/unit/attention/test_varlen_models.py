"""Stock models with packed and padded rows under "omni_varlen", against their own attention on each document alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.qwen3 import Qwen3Config

from hf_veomni.attention.documents import Documents
from hf_veomni.attention.varlen import VARLEN_NAME, register_varlen_attention
from hf_veomni.context import within

BASE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "use_cache": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
FAMILIES: dict[str, Callable] = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen3": lambda: Qwen3Config(**BASE, **SLIDING, use_sliding_window=True),
    "gemma2": lambda: Gemma2Config(**BASE, **SLIDING, attn_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**BASE, **SLIDING, query_pre_attn_scalar=8),
    "gpt_oss": lambda: GptOssConfig(**BASE, **SLIDING, **EXPERTS),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**BASE, **MLA, "num_key_value_heads": 4, "head_dim": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "llama4": lambda: Llama4TextConfig(
        **BASE,
        **EXPERTS,
        attention_chunk_size=6,
        intermediate_size_mlp=40,
        layer_types=["chunked_attention", "full_attention"],
    ),
}
EAGER_ONLY = ("gemma2", "gpt_oss")  # the rest has sdpa, which is exact in fp64
LENGTHS = (11, 1, 20, 7)


def limit(family: str) -> float:
    """Norms and routers round to fp32: where the order of sums differs, that much is left to compare."""
    return 1e-10 if family == "llama" else 2e-6


@pytest.fixture(autouse=True)
def softmax_in_model_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's eager softmax is fp32 for any model; the masks of an fp64 model overflow in it, to NaN for padding."""
    stock = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: stock(x, dim=dim))


def build(family: str, attention: str) -> PreTrainedModel:
    register_varlen_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](), dtype=torch.float64, attn_implementation=attention, experts_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model.train()


def packed(documents: Documents | None) -> AbstractContextManager[None]:
    return within(documents=documents)


def run(model: PreTrainedModel, ids: Tensor, weights: Tensor, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of their weighted sum (added to those that are there)."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def hide_positions_from_masks(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the families that keep the positions to themselves."""
    names = [name for name in vars(sys.modules[type(model).__module__]) if re.fullmatch(r"create_\w*mask", name)]
    assert names
    for name in names:
        stock = getattr(sys.modules[type(model).__module__], name)
        blind = partial(lambda stock, **kwargs: stock(**{**kwargs, "position_ids": None}), stock)
        monkeypatch.setattr(sys.modules[type(model).__module__], name, blind)


def own_attention(family: str) -> str:
    return "eager" if family in EAGER_ONLY else "sdpa"


@pytest.mark.parametrize(
    ("family", "told_by"),
    [
        *((family, "both") for family in FAMILIES),
        *((family, told_by) for family in ("qwen3", "llama4") for told_by in ("documents", "positions")),
    ],
)
def test_packed_row_equals_each_document_alone(family: str, told_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (1, sum(LENGTHS)), generator=generator)
    weights = torch.randn(1, sum(LENGTHS), 60, dtype=torch.float64, generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    alone = build(family, own_attention(family))
    pieces = []
    for part, weight in zip(ids.split(LENGTHS, 1), weights.split(LENGTHS, 1), strict=True):
        piece, expected = run(alone, part, weight)
        pieces.append(piece)

    model = build(family, VARLEN_NAME)
    if told_by == "documents":
        hide_positions_from_masks(model, monkeypatch)
    with packed(None if told_by == "positions" else Documents.from_lengths([LENGTHS])):
        logits, grads = run(model, ids, weights, position_ids=positions)
    assert float((logits - torch.cat(pieces, 1)).abs().max()) < limit(family)
    assert largest_difference(grads, expected) < 10 * limit(family)


@pytest.mark.parametrize(
    ("family", "side"), [*((family, "left") for family in FAMILIES), ("qwen3", "right"), ("gpt_oss", "right")]
)
def test_padded_batch_equals_own_attention_on_tokens(family: str, side: str) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes, width = (17, 9, 23), 23
    ids = torch.randint(1, 60, (3, width), generator=generator)
    begins = torch.tensor([width - n if side == "left" else 0 for n in sizes])[:, None]
    column = torch.arange(width)[None]
    mask = (column >= begins) & (column < begins + torch.tensor(sizes)[:, None])
    weights = torch.randn(3, width, 60, dtype=torch.float64, generator=generator) * mask[..., None]
    results = [
        run(build(family, name), ids, weights, attention_mask=mask.long())
        for name in (VARLEN_NAME, own_attention(family))
    ]
    (logits, grads), (expected_logits, expected) = results
    assert torch.isfinite(logits).all()
    assert float((logits - expected_logits)[mask].abs().max()) < limit(family)
    assert largest_difference(grads, expected) < 10 * limit(family)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "llama4"])
def test_packed_row_equals_itself_under_activation_checkpointing(family: str) -> None:
    ids = torch.randint(1, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    weights = torch.ones(1, sum(LENGTHS), 60, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        model = build(family, VARLEN_NAME)
        if checkpointing:
            model.activation_checkpointing_enable()
        logits = None
        with packed(Documents.from_lengths([LENGTHS])):
            logits = model(input_ids=ids, use_cache=False).logits
        (logits * weights).sum().backward()  # documents are no longer set when the layers run again
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert largest_difference(*results) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_own_attention(family: str) -> None:
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    texts = []
    for name in (VARLEN_NAME, own_attention(family)):
        model = build(family, name).eval()
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True))
    assert texts[0].tolist() == texts[1].tolist()


def test_built_model_takes_the_name() -> None:
    model = build("llama", "sdpa")
    model.set_attn_implementation(VARLEN_NAME)
    assert model.config._attn_implementation == VARLEN_NAME
    with packed(Documents.from_lengths([(3, 4)])):
        logits = model(input_ids=torch.arange(1, 8)[None], use_cache=False).logits
        changed = model(input_ids=torch.tensor([[9, 9, 9, 4, 5, 6, 7]]), use_cache=False).logits
    assert logits[:, 3:].equal(changed[:, 3:]) and not logits[:, :3].equal(changed[:, :3])
