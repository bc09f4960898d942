"""Ranks that do not agree fail together, at once and with one message; parameters of any layout are made equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.models import build_model, packed_batch


def _prepare_different(change: str) -> None:
    from hf_veomni import prepare_omni
    from tests.ranks.traces import left_by_us, wrapped_functions

    model = DIFFERENT[change](dist.get_rank())
    try:
        prepare_omni(model, "dp_shard=2")
    finally:
        assert not left_by_us(model) and not wrapped_functions()


def _frozen(model):
    model.model.norm.weight.requires_grad_(False)
    return model


DIFFERENT: dict[str, Any] = {
    "architecture": lambda rank: build_model(("llama", "qwen3")[rank]),
    "shapes": lambda rank: build_model("llama", intermediate_size=(80, 96)[rank]),
    "dtypes": lambda rank: build_model("llama", dtype=(torch.float32, torch.bfloat16)[rank]),
    "frozen": lambda rank: _frozen(build_model("llama")) if rank else build_model("llama"),
    "layers": lambda rank: build_model("llama", num_hidden_layers=2 - rank),
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            "architecture",
            r"'model.layers.0.self_attn.q_norm.weight' is missing on rank 0; \(16,\) float32, trained on",
        ),
        ("shapes", r"'model.layers.0.mlp.gate_proj.weight' is \(80, 64\) .* on rank 0; \(96, 64\) .* on rank 1"),
        ("dtypes", r"'model.embed_tokens.weight' is .* float32, trained on rank 0; .* bfloat16, trained on rank 1"),
        ("frozen", r"'model.norm.weight' is \(64,\) float32, trained on rank 0; \(64,\) float32 on rank 1"),
        ("layers", r"'model.layers.1.self_attn.q_proj.weight' is .* on rank 0; missing on rank 1"),
    ],
)
def test_ranks_with_different_models(ranks, change, match):
    first, second = ranks(2).raises(_prepare_different, change, match=match, timeout=30)
    assert first == second


def _fail_on_one_rank(name: str) -> None:
    from hf_veomni import prepare_omni
    from tests.ranks.traces import left_by_us, wrapped_functions

    rank = dist.get_rank()
    model = build_model("llama").to("meta") if name == "meta" and rank else build_model("llama")
    if name == "shard points" and rank:
        model = build_model("openai-gpt")
    try:
        prepare_omni(model, "sp=two" if name == "plan" and rank else "sp=2")
    finally:
        assert not left_by_us(model) and not wrapped_functions()


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("meta", "ValueError", "Parameter 'model.embed_tokens.weight' is on the meta device"),
        ("shard points", "UnsupportedError", "OpenAIGPTLMHeadModel has no shard points"),
        ("plan", "ValueError", r"Plan entry 'sp=two'"),
    ],
)
def test_a_refusal_on_one_rank_reaches_all(ranks, name, kind, match):
    messages = ranks(2).raises(_fail_on_one_rank, name, match=match, kind=kind, timeout=30)
    assert messages[0].startswith(f"Preparing the model failed on rank 1: {kind}: ")


def _refuse_a_file_on_one_rank() -> None:
    from hf_veomni import UnsupportedError
    from hf_veomni.checkpoint import together

    with together("Reading"):
        if dist.get_rank() == 1:
            raise UnsupportedError("No such layout.")


def test_a_refused_file_on_one_rank_is_unsupported_on_all(ranks):
    messages = ranks(2).raises(_refuse_a_file_on_one_rank, match="No such layout", kind="UnsupportedError", timeout=30)
    assert messages[0] == "Reading failed on rank 1: UnsupportedError: No such layout."


def _different_plans() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model("llama"), ("sp=2", "dp_shard=2")[dist.get_rank()])


def test_ranks_with_different_plans(ranks):
    ranks(2).raises(_different_plans, match="`plan` differs between the ranks: .*on rank 0; .*on rank 1", timeout=30)


class _Layouts(nn.Module):
    """What a checkpoint reader or a flat buffer leaves: views that are transposed, or begin off a word."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        flat = torch.randn(64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        self.odd = nn.Parameter(flat[1:9])
        self.transposed = nn.Parameter(flat[16:28].view(3, 4).T)
        self.strided = nn.Parameter(flat[30:60:2])
        self.register_buffer("flags", torch.arange(5) % 2 == seed)
        self.register_buffer("scalar", torch.tensor(float(seed)))
        self.register_buffer("empty", torch.empty(0))


def _synchronize_layouts() -> list[Any]:
    from hf_veomni.fsdp import synchronize_parameters

    model, wanted = _Layouts(dist.get_rank()), _Layouts(0)
    names = synchronize_parameters(model)
    state, first = model.state_dict(), wanted.state_dict()
    again = synchronize_parameters(model)
    return [sorted(names), all(torch.equal(state[key], first[key]) for key in first), again]


def test_parameters_of_any_layout_become_those_of_rank_0(ranks):
    names = ["flags", "odd", "scalar", "strided", "transposed"]
    assert ranks(2).run(_synchronize_layouts, timeout=30) == [[names, True, []]] * 2


def _evaluate_detached() -> list[Any]:
    from hf_veomni import detach_omni, prepare_omni

    model = detach_omni(prepare_omni(build_model("llama"), "dp_shard=2"))
    with torch.no_grad():
        model(**packed_batch((9,)), use_cache=False)
    prompt = packed_batch((5,))["input_ids"]
    stop = {"stopping_criteria": [_StopEarly()]} if dist.get_rank() else {}
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **stop)
    return [[p.shape for p in model.parameters() if type(p).__name__ != "DTensor"], tokens.shape[1]]


class _StopEarly:
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_a_detached_model_frees_its_weights_and_generates_in_step(ranks):
    """FSDP2 stays after `detach_omni`, hence also what it needs: one rank may finish before the others."""
    (whole, longest), (_, shortest) = ranks(2).run(_evaluate_detached, timeout=30)
    assert whole == [] and longest == 11 and shortest < longest
