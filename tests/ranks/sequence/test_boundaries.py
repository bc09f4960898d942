"""Documents told by edges, by an index or by numbers in the mask, over the ranks of an SP group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.models import build_model
from tests.ranks.parity import relative_error

LENGTHS = (9, 4, 1, 9)


def _told(name: str, form: str) -> list[float]:
    from hf_veomni import prepare_omni

    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    edges = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))[None]
    labels = ids.clone()
    labels[0, edges[:-1].long()] = -100
    model = build_model(name)
    total = torch.zeros(())
    for part in ids.split(LENGTHS, dim=1):  # the stock model on each document alone
        logits = model(input_ids=part, use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1], part[0, 1:], reduction="sum") if part.shape[1] > 1 else total
    wanted = total / int((labels != -100).sum())
    wanted.backward()
    expected = model.get_input_embeddings().weight.grad
    model.zero_grad()
    prepare_omni(model, "sp=2")
    given = {
        "edges": {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 9, "max_length_k": 9},
        "index": {"seq_idx": numbers.int() - 1},
        "mask": {"attention_mask": numbers},
    }[form]
    loss = model(input_ids=ids, labels=labels, **given).loss
    loss.backward()
    got = model.get_input_embeddings().weight.grad.full_tensor()
    return [relative_error(loss, wanted), relative_error(got, expected)]


@pytest.mark.parametrize("form", ["edges", "index", "mask"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_documents_told_otherwise_equal_documents_alone(ranks, name, form):
    for errors in ranks(2).run(_told, name, form):
        assert max(errors) < 1e-5, errors


def _masks_above() -> None:
    from hf_veomni import prepare_omni
    from tests.multimodal import build

    model, processor = build("gemma3")
    inputs = processor(text=["words without a picture"], return_tensors="pt")
    inputs["attention_mask"][:, 5:] = 2
    prepare_omni(model, "sp=2")(**inputs)


def test_numbers_in_a_mask_are_refused_where_masks_are_made_above_the_stack(ranks):
    ranks(2).raises(_masks_above, match="makes its masks above the text backbone")
