"""Linear attention, state spaces and short convolutions on cut and packed sequences equal the stock model on one rank.

The reference runs each document alone, so a state that crosses a document's begin, or fails to cross a rank, shows.
`test_linear_gather.py` has the generic scheme, tests/unit/sequence the index arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.hybrids import HYBRIDS
from tests.ranks.parity import Run, Setting

MODELS = ["qwen3_next", *(name for name in HYBRIDS if name != "zamba")]
# Longer than the chunks of the scans (8, and 64 of the delta rule), cut through a document by sp=2 and sp=4; then
# documents of one token and shorter than the convolutions' reach, also on either side of a cut.
LENGTHS = ((60, 1, 2, 70, 9), (1, 3, 90, 1, 14))


@pytest.mark.parametrize("model", MODELS)
def test_sp2_equals_one_rank(check, model):
    check(Setting(model, lengths=LENGTHS), Run("sp=2", checkpointing=True))


@pytest.mark.parametrize("model", ["qwen3_next", "bamba", "minimax"])
def test_packed_rows_equal_documents_on_one_rank_each(check, model):
    check(Setting(model, lengths=LENGTHS), Run("dp_shard=2"))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("plan", ["sp=2", "sp=4", "sp=2,dp_shard=2", "dp_shard=2"])
@pytest.mark.parametrize("model", MODELS)
def test_product_equals_one_rank(check, model, plan, packed, checkpointing):
    setting = Setting(model, packed=packed, lengths=LENGTHS * 4 if packed else None, micro_batches=2)
    if model == "bailing_hybrid":  # a bias of its gate sums over all tokens, in fp32 to 1.6e-5 without SP as well
        setting = replace(setting, dtype=torch.float64, overrides={"experts_implementation": "eager"})
    # The family's own code casts to fp32 inside of fp64, so that it is no more exact than elsewhere.
    check(setting, Run(plan, checkpointing=checkpointing), tolerance=1e-5)
