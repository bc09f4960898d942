"""Documents beyond `max_position_embeddings` under scaled ropes, against the stock model on each document alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_veomni import prepare_omni
from hf_veomni.sequence.checks import Context

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
THETA = {"rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, **THETA}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, **THETA}
LINEAR = {"rope_type": "linear", "factor": 2.0, **THETA}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0, **THETA}
LONG |= {"original_max_position_embeddings": 16}


def build(rope, **fields):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | fields, rope_parameters=dict(rope))).double().eval()
    return model, prepare_omni(copy.deepcopy(model), "sp=1")


def errors(model, prepared, lengths) -> float:
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        found = prepared(input_ids=ids, position_ids=positions).logits
        alone = torch.cat([copy.deepcopy(model)(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    return float((found - alone).abs().max())


@pytest.mark.parametrize(
    "rope, lengths",
    [
        (YARN, (40, 3, 21)),
        (YARN, (64,)),
        (LINEAR, (32, 9)),
        (DYNAMIC, (100,)),
        (DYNAMIC, (7, 16, 2)),
        (DYNAMIC, (24, 24)),
        (LONG, (60, 17)),
        (LONG, (5, 16)),
    ],
)
def test_long_documents_equal_the_stock_model(rope, lengths):
    model, prepared = build(rope)
    assert errors(model, prepared, lengths) < 1e-7  # rope's tables are fp32


@pytest.mark.parametrize(
    "rope, lengths, message",
    [
        (YARN, (65,), r"65 tokens is longer .* 64\): split it, or raise `factor` of the config's `rope_parameters`"),
        (
            {"rope_type": "default", **THETA},
            (17,),
            r"17 tokens .* 16\): split it, or raise the context in the model's",
        ),
        (DYNAMIC, (24, 7), "of 7 to 24 tokens: from more than 16 on the rope .* rows of their own"),
        (LONG, (24, 16), "Packed documents of 16 to 24 tokens"),
        (LONG, (65,), "65 tokens is longer"),
    ],
)
def test_what_one_set_of_frequencies_cannot_do_is_refused(rope, lengths, message):
    model, prepared = build(rope)
    with pytest.raises(ValueError, match=message):
        errors(model, prepared, lengths)


def test_padding_is_no_document():
    model, prepared = build(DYNAMIC)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        found = prepared(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (found - wanted)[mask == 1].abs().max() < 1e-7


def test_ropes_of_layer_types_and_original_lengths():
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=64)
    config.rope_parameters = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", **THETA}}
    assert Context.of(config, None).limit == 256
    config.rope_parameters = YARN | {"original_max_position_embeddings": 64}
    config.max_position_embeddings = 256  # the extended length, as some configs have it
    assert Context.of(config, None).limit == 256
    assert Context.of(AutoConfig.for_model("gpt2"), None).limit == 1024
