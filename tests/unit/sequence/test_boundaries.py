"""Packed documents told by other inputs than positions, against the stock model on each document alone."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_veomni import detach_omni, prepare_omni
from tests.multimodal import build as build_multimodal
from tests.sweep import tiny
from tests.sweep.family import _output

LENGTHS = (9, 4, 1, 10)
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@lru_cache
def build(family: str):
    if family == "llama":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    elif family == "llama stack":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().model
    else:
        config = tiny.tiny_config(family)
        tiny.use_plain_experts(config)
        model = tiny.build(config, tiny.choose_class(family)[1], torch.float64)
    model = model.eval()
    return model, prepare_omni(copy.deepcopy(model), "sp=1")


def ids_of(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 79, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([_output(model(input_ids=part)) for part in ids.split(LENGTHS, dim=1)], dim=1)


EDGES = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))[None]
FORMS = {
    "edges": {"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES, "max_length_q": 10, "max_length_k": 10},
    "edges of queries": {"cu_seq_lens_q": EDGES},
    "fla": {"cu_seqlens": EDGES[None].long()},
    "index": {"seq_idx": NUMBERS.int() - 1},
    "mask": {"attention_mask": NUMBERS},
    "all": {"cu_seq_lens_q": EDGES, "seq_idx": NUMBERS.int(), "attention_mask": NUMBERS},
    "beside positions": {"cu_seq_lens_q": EDGES, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "llama stack", "bert", "qwen3_next", "roberta", "mamba2"])
def test_documents_are_kept_apart(family, form):
    model, prepared = build(family)
    ids = ids_of()
    with torch.no_grad():
        found = _output(prepared(input_ids=ids, **FORMS[form]))
    limit = 1e-5 if family == "qwen3_next" else 1e-10  # whose scan rounds to fp32
    assert (found - alone(model, ids)).abs().max() < limit


def test_several_rows_and_padding():
    model, prepared = build("llama")
    ids = ids_of(1, rows=2)
    numbers = NUMBERS.repeat(2, 1)
    numbers[1, -10:] = 0
    edges = torch.cat([EDGES[:-1], EDGES + EDGES[-1]])
    wanted = torch.cat([alone(model, ids[:1]), alone(model, ids[1:])])
    with torch.no_grad():
        masked = prepared(input_ids=ids, attention_mask=numbers).logits
        flat = prepared(ids, cu_seq_lens_q=edges, cu_seq_lens_k=edges).logits
    assert (flat - wanted).abs().max() < 1e-10
    assert (masked - wanted)[numbers > 0].abs().max() < 1e-10


def test_the_stock_collator_without_positions():
    model, prepared = build("llama")
    ids = ids_of()
    collator = DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt"
    )
    batch = collator([{"input_ids": part[0].tolist()} for part in ids.split(LENGTHS, dim=1)])
    loss = prepared(**batch).loss
    logits = alone(model, ids)[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100)
    assert abs(loss.item() - wanted.item()) < 1e-10


def test_kept_attention_keeps_documents_apart_or_refuses():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    prepared = prepare_omni(copy.deepcopy(model), "sp=1", attention="keep")
    ids = ids_of()
    with torch.no_grad():
        for form in ("edges", "index", "mask"):
            found = prepared(input_ids=ids, **FORMS[form]).logits
            assert (found - alone(model, ids)).abs().max() < 1e-10
        with pytest.raises(ValueError, match="not kept apart beside an `attention_mask`"):
            prepared(input_ids=ids, attention_mask=torch.where(NUMBERS == 4, 0, NUMBERS))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float64])
def test_plain_masks_pass_as_they_are(dtype):
    model, prepared = build("llama")
    ids = ids_of(2, rows=2)
    mask = torch.ones(2, ids.shape[1], dtype=dtype)
    mask[1, -5:] = 0
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, attention_mask=mask).logits for m in (prepared, model))
    assert (found - wanted)[mask.bool()].abs().max() < 1e-10


def test_a_block_diagonal_mask_is_obeyed():
    model, prepared = build("llama")
    ids = ids_of()
    block = (NUMBERS[:, None] == NUMBERS[..., None])[:, None] & torch.ones(24, 24, dtype=torch.bool).tril()
    with torch.no_grad():
        assert (prepared(input_ids=ids, attention_mask=block).logits - alone(model, ids)).abs().max() < 1e-8


def test_what_contradicts_itself_or_cannot_be_told_is_refused():
    _, prepared = build("llama")
    ids = ids_of()
    count = torch.arange(24)[None]
    for inputs, message in (
        (
            {"cu_seq_lens_q": EDGES, "position_ids": count},
            "`cu_seq_lens_q` and `position_ids` mark different documents",
        ),
        ({"attention_mask": NUMBERS, "position_ids": count}, "numbers above 1 and `position_ids` mark different"),
        ({"cu_seq_lens_q": EDGES[:-1]}, r"`cu_seq_lens_q` .* must rise from 0 to the number of tokens \(24\)"),
        ({"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES[[0, 4]]}, "alike for queries and keys"),
        ({"seq_idx": NUMBERS[:, 1:]}, "`seq_idx` .* one number for each token"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(input_ids=ids, **inputs)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration takes no `position_ids`"):
        prepare_omni(t5, "sp=1")(input_ids=ids, attention_mask=NUMBERS, labels=ids)
    bloom = prepare_omni(tiny.build(tiny.tiny_config("bloom"), tiny.choose_class("bloom")[1], torch.float32), "sp=1")
    with pytest.raises(ValueError, match="Packed documents are not kept apart"):
        bloom(input_ids=ids, attention_mask=NUMBERS)


def test_pictures_need_positions_of_their_own():
    model, processor = build_multimodal("qwen2_5_vl")
    prepared = prepare_omni(model, "sp=1")
    inputs = processor(text=["words alone"], return_tensors="pt")
    edges = torch.tensor([0, 3, inputs["input_ids"].shape[1]])
    with torch.no_grad():
        found = prepared(**inputs, cu_seq_lens_q=edges).logits
        wanted = prepared(input_ids=inputs["input_ids"][:, :3]).logits
    assert (found[:, :3] - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"beside `image_grid_thw` .* give `position_ids` \[4, rows, tokens\]"):
        prepared(**inputs, cu_seq_lens_q=edges, image_grid_thw=torch.tensor([[1, 4, 4]]))


def test_detaching_takes_it_off_and_copies_have_their_own():
    model, prepared = build.__wrapped__("llama")
    ids = ids_of()
    twin = copy.deepcopy(prepared)
    detach_omni(prepared)
    with torch.no_grad():
        assert (prepared(input_ids=ids, **FORMS["edges"]).logits - model(input_ids=ids).logits).abs().max() < 1e-10
        assert (twin(input_ids=ids, **FORMS["edges"]).logits - alone(model, ids)).abs().max() < 1e-10
