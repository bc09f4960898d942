"""A sample of the sweep over all model families: one for each way in which a family is cut."""

from __future__ import annotations

import pytest

from tests.sweep.family import sweep_family
from tests.sweep.training import PLANS, compare_logs, omni_logs, stock_logs

WORK = (
    "bert",  # layers in a module of their own, attention that looks ahead, a loss from full logits
    "roberta",  # learned positions that begin behind the padding token
    "esm",
    "gpt2",  # a backbone that reshapes its output
    "t5",  # cross-attention, position biases
    "whisper",  # an encoder that takes no tokens
    "albert",  # one layer run many times
    "bloom",  # ALiBi, a patched attention
    "gptj",  # rope looked up inside of the layers
    "gemma3",  # masks made above the backbone
    "paligemma",  # a prefix that sees all of itself
    "gemma3n_text",  # streams of rows
    "gemma4_text",  # inputs of each layer
    "qwen3_next",  # linear attention
    "longcat_flash",  # experts that no token of a rank reaches
    "csm_depth_decoder_model",  # a head of weights for each place, for all tokens but the first
    "beam",  # a scale for each token, the same for all rows
    # By the rule that their error suggests, `sp: gather`:
    "glm_moe_dsa",  # an indexer, whose choice a layer passes to the next
    "nystromformer",  # learned positions that begin at 2
    "convbert",  # attention that never asks the interface, which looks ahead
    "glm5_next",  # several streams of hidden states
    "zaya",  # masks of several kinds
)


@pytest.mark.parametrize("family", WORK)
def test_family_equals_one_rank(ranks, family):
    for record in ranks(2).run(sweep_family, family, timeout=60):
        assert (record["outcome"], record["reason"]) == ("works", "")


def test_labels_of_a_decoder_beside_an_encoder_of_another_length(ranks):
    for record in ranks(2).run(sweep_family, "pp_formulanet", timeout=60):
        assert (record["outcome"], record["loss"]) == ("works", "model")


def test_a_head_that_counts_the_tokens_of_a_row_takes_no_packed_ones(ranks):
    for record in ranks(2).run(sweep_family, "csm_depth_decoder_model", timeout=60):
        assert "CsmDepthDecoderForCausalLM counts the tokens of a row" in record["packed"]


# T5 and BERT average over their batch, whatever they are told to divide by.
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next", "t5", "bert"])
def test_what_omni_trainer_logs_of_a_family_equals_one_process(ranks, family):
    wanted = stock_logs(family)
    for plan in PLANS:
        for found in ranks(2).run(omni_logs, family, plan, timeout=60):
            assert compare_logs(found, wanted) == "works"


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize(
    "family",
    ["bert", "t5", "bloom", "gpt2", "glm_moe_dsa", "convbert", "fnet", "glm5_next", "zaya", "minimax_m3_vl", "moshi"],
)
@pytest.mark.slow
def test_family_equals_one_rank_on_more(ranks, family, size):
    for record in ranks(size).run(sweep_family, family, f"sp={size}", timeout=60):
        assert (record["outcome"], record["reason"]) == ("works", "")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("colpali", "no `token_type_ids`"),
        ("funnel", "outside of the backbone"),
        ("xlnet", "takes hidden states of shape"),
        ("aimv2_text_model", "pass a mask"),
        ("mobilebert", "mix neighbours"),
        ("hrm_text", "has no list of layers"),
    ],
)
def test_refused_family_says_why(ranks, family, reason):
    for record in ranks(2).run(sweep_family, family, timeout=60):
        assert record["outcome"] == "refused"
        assert reason in record["reason"]
