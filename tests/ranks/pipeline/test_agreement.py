"""What one rank of a window sees alone, or two ranks see differently, is refused on every rank."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from tests.models import build_model, packed_batch


def _refusal(model: Any, batches: list[dict[str, Any]]) -> str:
    from hf_veomni import run_window

    try:
        run_window(model, batches)
    except ValueError as error:
        return str(error)
    return "none"


def _counts() -> str:
    from hf_veomni import prepare_omni

    rows = [packed_batch((5, 3), seed=seed) for seed in range(3)]
    return _refusal(prepare_omni(build_model("llama"), "dp_shard=2"), rows[torch.distributed.get_rank() :])


def test_windows_of_different_length_are_refused(ranks) -> None:
    assert all("the data ranks were given [3, 2] micro-batches" in found for found in ranks(2).run(_counts))


def _ties() -> list[str]:
    """Tied embeddings whose copies get other options by name, are frozen by one name, and by both."""
    from hf_veomni import OmniParallelismConfig, prepare_omni

    accelerator: Any = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig("pp=2"))
    model = prepare_omni(build_model("llama_tied"), "pp=2")
    named, found = dict(model.named_parameters()), []
    for word in ("embed", "norm"):
        groups = [
            {"params": [p for n, p in named.items() if (word in n) is chosen], "weight_decay": 0.0 if chosen else 0.1}
            for chosen in (True, False)
        ]
        try:
            accelerator.prepare(torch.optim.AdamW([group for group in groups if group["params"]]))
            found.append("none")
        except ValueError as error:
            found.append(str(error))
    for word in ("embed", "lm_head"):
        for name, parameter in named.items():
            parameter.requires_grad_(parameter.requires_grad and word not in name)
        found.append(_refusal(model, [packed_batch((5, 3))]))
    return found


def test_tied_embeddings_are_stepped_and_frozen_alike(ranks) -> None:
    for options, alike, frozen, both in ranks(2).run(_ties):
        assert "first stage ({'weight_decay': 0.0}) than for its copy on the last one ({'weight_decay': 0.1})" in (
            options
        )
        assert "'model.embed_tokens.weight' is frozen on the first stage, and is trained on the last" in frozen
        assert alike == both == "none"


def _faults() -> list[str]:
    """Labels that the last stage alone reads, ids that the first one reads, and calls without backward."""
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama"), "pp=2")
    row = packed_batch((5, 3))
    found = [_refusal(model, [row, row | {"labels": row["labels"][:, 1:]}])]
    found.append(_refusal(model, [row, row | {"input_ids": row["input_ids"] + 1000}]))
    with torch.no_grad():
        found.append(_refusal(model, [row]))
    return [*found, _refusal(model.eval(), [row])]


def test_what_one_stage_alone_would_stumble_over_is_refused(ranks) -> None:
    for labels, ids, gradients, mode in ranks(2).run(_faults):
        assert "`labels` [1, 7] of a batch must have the shape of `input_ids`, [1, 8]" in labels
        assert "`input_ids` of a batch go from 10" in ids
        assert "call it outside of torch.no_grad()" in gradients
        assert "call `model.train()` first" in mode


def _calls() -> list[str]:
    """Calls that one stage cannot answer, of the model, of its backbone, and once it is detached."""
    from hf_veomni import UnsupportedError, detach_omni, prepare_omni

    model: Any = prepare_omni(build_model("llama"), "pp=2").eval()
    ids, found = torch.tensor([[5, 6, 7]]), []

    def call(module: Any, **inputs: Any) -> None:
        try:
            module(**inputs)
        except UnsupportedError as error:
            found.append(str(error))

    with torch.no_grad():
        call(model, inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
        call(model, input_ids=ids, return_dict=False)
        call(model.model, input_ids=ids)
        assert model(input_ids=ids).logits.shape == (1, 3, model.config.vocab_size)  # refusals leave nothing behind
        call(detach_omni(model), input_ids=ids)
    return found


def test_calls_that_one_stage_cannot_answer_are_refused(ranks) -> None:
    for embeds, as_tuple, backbone, detached in ranks(2).run(_calls):
        assert "`inputs_embeds`" in embeds and "Give `input_ids`" in embeds
        assert "`return_dict` (False)" in as_tuple
        assert "The backbone of a pipeline stage was called by itself" in backbone
        assert "or after `detach_omni`" in detached
