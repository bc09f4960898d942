"""What a run says of its plan: one line on rank 0, and a warning where nobody has named a plan for several ranks."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import Any

import pytest
import torch.distributed as dist

from tests.models import build_model


def _said(plan: str | None, how: str, verbosity: str = "") -> tuple[str, list[str]]:
    """What `prepare_omni`, or the Trainer, writes to stderr and to logging's warnings on this rank."""
    import os

    from hf_veomni import OmniTrainer, OmniTrainingArguments, prepare_omni

    if verbosity:
        os.environ["HF_VEOMNI_VERBOSITY"] = verbosity
    warnings: list[str] = []
    handler: Any = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("hf_veomni").addHandler(handler)
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            if how == "trainer":
                with tempfile.TemporaryDirectory() as folder:
                    args = OmniTrainingArguments(folder, plan=plan, use_cpu=True, report_to=[])
                    OmniTrainer(build_model("qwen3"), args)
            else:
                prepare_omni(build_model("qwen3"), plan)
    finally:
        logging.getLogger("hf_veomni").removeHandler(handler)
        os.environ.pop("HF_VEOMNI_VERBOSITY", None)
    assert dist.get_world_size() == 2
    return text.getvalue(), [message for message in warnings if "plan" in message]


@pytest.mark.parametrize("how", ["prepare", "trainer"])
def test_rank_0_names_the_plan(ranks, how):
    (text, warnings), (other, _) = ranks(2).run(_said, "sp=2", how, timeout=60)
    line = (
        "hf_veomni: Qwen3ForCausalLM under the plan sp=2, 2 ranks on cpu, 1 of them with data of their own, attention"
    )
    assert text.count(line) == 1 and "FSDP units" in text and "parameters trained." in text
    assert not warnings
    assert "under the plan" not in other


@pytest.mark.parametrize("how", ["prepare", "trainer"])
def test_no_plan_for_several_ranks_is_a_warning(ranks, how):
    (text, warnings), (_, others) = ranks(2).run(_said, None, how, timeout=60)
    assert "under the plan dp_shard=2, 2 ranks on cpu" in text
    assert len(warnings) == 1 and warnings[0].startswith("No plan was given") and "dp_shard=2" in warnings[0]
    assert not others


def test_parameters_are_those_of_all_stages(ranks):
    total = sum(p.numel() for p in build_model("qwen3").parameters())
    (text, _), _ = ranks(2).run(_said, "pp=2", "prepare", timeout=60)
    assert f"FSDP units in the first stage, {total:,} of {total:,} parameters trained." in text


def test_verbosity_silences_it(ranks):
    assert [text for text, _ in ranks(2).run(_said, "sp=2", "prepare", "warning", timeout=60)] == ["", ""]


def test_a_model_whose_get_decoder_is_its_head_is_described():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    from hf_veomni import detach_omni, prepare_omni

    ids: dict[str, int] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    detach_omni(prepare_omni(ModernBertForMaskedLM(ModernBertConfig(**sizes, **ids)), ""))
