"""Packed sequences of models whose learned positions do not begin at 0, against the stock model on each document
alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

from hf_veomni import ParallelPlan, prepare_omni
from tests.sweep import tiny
from tests.sweep.family import _output

LENGTHS = (9, 4, 1, 10)
FAMILIES = ("roberta", "esm", "xmod", "nystromformer", "xlm-roberta-xl", "kosmos_2_5_text_model", "bert")
RULES = {"nystromformer": {"nystromformer.encoder.layer.*.attention.self": {"sp": "gather"}}}


def build(family: str, **fields):
    _, model_class = tiny.choose_class(family)
    config = tiny.tiny_config(family)
    for name, value in fields.items():
        setattr(config, name, value)
    model = tiny.build(config, model_class, torch.float64).eval()
    return model, prepare_omni(copy.deepcopy(model), ParallelPlan(modules=RULES.get(family, {})))


def rows(seed: int = 0):
    ids = torch.randint(3, 79, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, positions


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([_output(model(input_ids=part)) for part in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_documents_alone(family):
    model, prepared = build(family)
    ids, positions = rows()
    with torch.no_grad():
        found = _output(prepared(input_ids=ids, position_ids=positions))
        assert (found - alone(model, ids)).abs().max() < 1e-10
        if family != "bert":  # which counts from 0 itself
            assert (
                _output(model(input_ids=ids[:, :9], position_ids=positions[:, :9])) - found[:, :9]
            ).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["roberta", "esm", "xmod"])
def test_padding_tokens_inside_of_documents_are_not_counted(family):
    model, prepared = build(family)
    ids, positions = rows(1)
    ids[0, [3, 4, 12, 20]] = model.config.pad_token_id
    with torch.no_grad():
        found = _output(prepared(input_ids=ids, position_ids=positions))
    assert (found - alone(model, ids)).abs().max() < 1e-10


@pytest.mark.parametrize("family", ["roberta", "esm", "nystromformer"])
def test_positions_as_the_model_counts_them_are_taken_as_they_are(family):
    model, prepared = build(family)
    ids, positions = rows(2)
    begin = 2 if family == "nystromformer" else model.config.pad_token_id + 1
    with torch.no_grad():
        found = _output(prepared(input_ids=ids, position_ids=positions + begin))
    assert (found - alone(model, ids)).abs().max() < 1e-10
    if family == "nystromformer":  # whose landmarks are of the padding too
        return
    short = ids[:, :6].repeat(2, 1)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    own = torch.where(mask == 1, mask.cumsum(1) - 1 + begin, begin - 1)
    with torch.no_grad():
        found = _output(prepared(input_ids=short, attention_mask=mask, position_ids=own))
        wanted = _output(model(input_ids=short, attention_mask=mask, position_ids=own))
    assert (found - wanted)[mask == 1].abs().max() < 1e-10


def test_embeddings_count_from_the_origin_too():
    model, prepared = build("roberta")
    ids, positions = rows(3)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        found = _output(prepared(inputs_embeds=embeddings, position_ids=positions))
        wanted = [_output(model(inputs_embeds=part)) for part in embeddings.split(LENGTHS, dim=1)]
    assert (found - torch.cat(wanted, dim=1)).abs().max() < 1e-10


def test_documents_longer_than_the_table_are_refused():
    model, prepared = build("roberta")
    rows_of_table = model.config.max_position_embeddings
    longest = rows_of_table - model.config.pad_token_id - 1
    ids = torch.full((1, longest + 3), 5)
    positions = torch.cat([torch.arange(longest), torch.arange(3)])[None]
    with torch.no_grad():
        prepared(input_ids=ids, position_ids=positions)
        with pytest.raises(ValueError, match=rf"document of {longest + 1} tokens is longer than .* {longest}\)"):
            prepared(input_ids=ids[:, : longest + 1], position_ids=torch.arange(longest + 1)[None])


def test_rotary_positions_are_left_alone_and_shares_of_masked_tokens_are_refused():
    fields = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    fields |= dict(pad_token_id=1, mask_token_id=90, position_embedding_type="rotary", max_position_embeddings=64)
    torch.manual_seed(0)
    model = EsmForMaskedLM(EsmConfig(**fields, token_dropout=False)).double().eval()
    prepared = prepare_omni(copy.deepcopy(model), "sp=1")
    ids, positions = rows(4)
    ids[0, [3, 12]] = 1
    with torch.no_grad():
        assert (prepared(input_ids=ids, position_ids=positions).logits - alone(model, ids)).abs().max() < 1e-10
    drops = prepare_omni(EsmForMaskedLM(EsmConfig(**fields, token_dropout=True)).eval(), "sp=1")
    with pytest.raises(ValueError, match="share of masked tokens .*, or set `token_dropout` to False"):
        drops(input_ids=ids, position_ids=positions)
    drops(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
