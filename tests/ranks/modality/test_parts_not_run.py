"""Rows that do not run a part of the model: towers that transformers does not name, an encoder fed from outside."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import T5Config, T5ForConditionalGeneration

from tests.sweep.training import compare_logs, omni_logs, stock_logs


@pytest.mark.parametrize("family", ["granite_speech_plus", "deepseek_vl_hybrid"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_text_trains_beside_towers_that_nobody_names(ranks, family, plan):
    wanted = stock_logs(family)
    for found in ranks(2).run(omni_logs, family, plan, timeout=60):
        assert compare_logs(found, wanted) == "works"


def _t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return T5ForConditionalGeneration(config)


def _step(plan: str | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and weights after one step, of a decoder that is given embeddings."""
    from hf_veomni import prepare_omni

    model = _t5()
    if plan is not None:
        prepare_omni(model, plan)
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(3, 64, (2, 2, 8), generator=generator)
    embedded = torch.randn(2, 8, 32, generator=generator)
    loss = model(input_ids=ids, decoder_inputs_embeds=embedded, labels=labels).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return loss.item(), {name: tensor.detach() for name, tensor in full.items()}


def test_a_decoder_takes_embeddings_beside_an_encoder_of_its_own_units(ranks):
    wanted, weights = _step(None)
    for loss, found in ranks(2).run(_step, "dp_shard=2", timeout=60):
        assert loss == pytest.approx(wanted, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
