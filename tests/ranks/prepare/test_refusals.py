"""What cannot be right is refused on every rank, within seconds, by a message that names the value and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import build_model, packed_batch, padded_batch


def _prepare(name: str, plan: Any, overrides: dict[str, Any] | None = None, **options: Any) -> None:
    """Prepare; where that is refused the model must be as it was."""
    from hf_veomni import prepare_omni
    from tests.ranks.traces import changes, traces, wrapped_functions

    model = build_model(name, **(overrides or {}))
    before, wrapped = traces(model), set(wrapped_functions())
    try:
        prepare_omni(model, plan, **options)
    except ValueError:
        assert not changes(before, traces(model))
        assert wrapped.issuperset(wrapped_functions())
        raise


def _call(name: str, plan: str, change: str, overrides: dict[str, Any] | None = None) -> None:
    """A call that is refused; the prepared model must still answer a right one as before."""
    from hf_veomni import gather_sequence, prepare_omni

    model = prepare_omni(build_model(name, **(overrides or {})), plan)
    right = packed_batch((9, 6))
    before = gather_sequence(model(**right).logits, model)
    try:
        CALLS[change](model)
    except ValueError:
        assert torch.equal(gather_sequence(model(**right).logits, model), before), "the refusal left something behind"
        raise


def _long_document(model):
    model(**packed_batch((5, 33)))


def _short_labels(model):
    batch = packed_batch((9, 6))
    model(**{**batch, "labels": batch["labels"][:, 1:]})


def _local_labels(model):
    batch = packed_batch((9, 7))
    model(**{**batch, "labels": batch["labels"][:, :8]})


def _logits_to_keep(model):
    model(**packed_batch((9, 6)), logits_to_keep=1)


def _cache_with_labels(model):
    model(**packed_batch((15,)), use_cache=True)


def _cache_with_gradients(model):
    batch = packed_batch((15,))
    batch.pop("labels")
    model(**batch, use_cache=True)


def _output_attentions(model):
    model(**packed_batch((9, 6)), output_attentions=True)


def _expanded_mask(model):
    batch = padded_batch((15,))
    mask = torch.ones(15, 15, dtype=torch.bool).tril()[None, None]
    model(input_ids=batch["input_ids"], attention_mask=mask)


CALLS = {f.__name__: f for f in (_long_document, _short_labels, _local_labels, _logits_to_keep)} | {
    f.__name__: f for f in (_cache_with_labels, _cache_with_gradients, _output_attentions, _expanded_mask)
}


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ("sp=3", r"pp_size \* dp_replicate_size \* sp_size.* = 3\) must divide the number of ranks \(2\)"),
        ("sp=2,dp_shard=2", r"= 4\) must equal the number of ranks \(2\): start 4 ranks"),
        ("dp_shard=1", r"= 1\) must equal the number of ranks \(2\)"),
        ("spp=2", r"Unknown plan key 'spp': did you mean 'sp'"),
        ("sp=two", r"Plan entry 'sp=two' in 'sp=two' must be name=integer"),
        ({"sp_size": 0}, r"`sp_size` \(0\) must be a positive integer"),
        ("pp=2,overlap=chunks", r"`overlap` \('chunks'\) cannot be combined with `pp_size` \(2\)"),
        ("sp=2,ep=2", r"`ep_size` \(2\) needs experts, and .* has none to shard: it is a dense model"),
        ("sp=2,dp_shard=1,ep=3", r"`ep_size` \(3\) must divide `dp_shard_size \* sp_size` \(2\): use 1, 2"),
        ({"sp": 2, "modules": {"lm_haed": {"fsdp": "keep"}}}, r"'lm_haed' matches no module.*lm_head"),
        ({"sp": 2, "modules": {"lm_head": {"fspd": "keep"}}}, r"Unknown rule 'fspd'.*did you mean 'fsdp'"),
    ],
)
def test_plans_that_do_not_fit(ranks, plan, match):
    ranks(2).raises(_prepare, "llama", plan, match=match, timeout=30)


def _prepare_experts(model: str, options: dict[str, Any]) -> None:
    from hf_veomni import prepare_omni
    from tests.ranks.parity import add_adapter

    stock: Any = build_model(model, **({"num_experts": options["experts"]} if "experts" in options else {}))
    stock.config._experts_implementation = options.get("kernels", "grouped_mm")
    if "shared" in options:
        first, second = (layer.mlp.experts for layer in stock.model.layers)
        second.down_proj = first.down_proj
    prepare_omni(add_adapter(stock) if options.get("adapters") else stock, "dp_shard=2,ep=2")


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        ("llama", {}, r"`ep_size` \(2\) needs experts, and LlamaForCausalLM has none to shard: it is a dense model"),
        ("qwen3_moe", {"experts": 3}, r"`ep_size` \(2\) must divide the number of experts \(3\).*: use 1, 3"),
        ("qwen3_moe", {"shared": True}, r"layers.1.mlp.experts.down_proj' is the same parameter as 'model.layers.0"),
        ("qwen3_moe", {"kernels": "deepgemm_megamoe"}, "exchanges tokens inside its kernel"),
        ("qwen3_moe", {"adapters": True, "kernels": "batched_mm"}, "knows no adapters on 'model"),
    ],
)
def test_experts_that_cannot_be_sharded(ranks, model, options, match):
    ranks(2).raises(_prepare_experts, model, options, match=match, timeout=30)


def _merged_adapter() -> None:
    from hf_veomni import prepare_omni
    from tests.ranks.parity import add_adapter

    model: Any = add_adapter(build_model("qwen3_moe"))
    model.merge_adapter()
    prepare_omni(model, "dp_shard=2,ep=2")


def test_merged_adapters(ranks):
    ranks(2).raises(_merged_adapter, match="is merged into the base weight: call `unmerge_adapter", timeout=30)


def _adapter_after_sharding(model: str, plan: str) -> None:
    from hf_veomni import prepare_omni
    from tests.ranks.parity import add_adapter

    wrapped = add_adapter(prepare_omni(build_model(model), plan))
    wrapped(**packed_batch((9, 6)))


@pytest.mark.parametrize(("model", "plan"), [("llama", "sp=2"), ("mixtral", "sp=2,ep=2")])
def test_adapters_that_come_after_sharding(ranks, model, plan):
    ranks(2).raises(
        _adapter_after_sharding, model, plan, match="came after `prepare_omni`: apply PEFT first", timeout=30
    )


def _layers_left_out(plan: str, training: bool) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from hf_veomni import prepare_omni

    config = OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4)
    config.layerdrop, config.word_embed_proj_dim = 0.5, 32
    model = prepare_omni(OPTForCausalLM(config), plan).train(training)
    model(packed_batch((9,))["input_ids"])


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_layers_that_each_rank_leaves_out_at_random(ranks, plan):
    ranks(2).raises(_layers_left_out, plan, True, match=r"`layerdrop` \(0.5\) of `model.decoder` lets", timeout=30)
    ranks(2).run(_layers_left_out, plan, False)


def test_more_sp_ranks_than_query_heads(ranks):
    match = r"`sp_size` \(4\) must not exceed the number of query heads \(2\): use at most 2"
    ranks(4).raises(_prepare, "llama", "sp=4", {"num_attention_heads": 2}, match=match, timeout=30)


def test_model_without_shard_points(ranks):
    match = r"OpenAIGPTLMHeadModel has no shard points for sequence parallelism.*Use sp_size=1"
    ranks(2).raises(_prepare, "openai-gpt", "sp=2", match=match, timeout=30)


def test_unknown_attention_option(ranks):
    match = r"`attention` \('varlen'\) must be 'auto' or 'keep'"
    ranks(2).raises(_prepare, "llama", "sp=2", match=match, attention="varlen", timeout=30)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ("_long_document", r"A document of 33 tokens is longer than the model's context .*32\)"),
        ("_short_labels", r"`labels` \(1, 14\) must have one entry for each token of the row \(1, 15\)"),
        ("_local_labels", r"`labels` \(1, 8\) must have one entry for each token of the row \(1, 16\)"),
        ("_logits_to_keep", r"`logits_to_keep` \(1\) counts from the end of the full row"),
        ("_cache_with_labels", r"`labels` with `use_cache=True`"),
        ("_cache_with_gradients", r"`use_cache=True` or `past_key_values` cannot be combined with gradients"),
        ("_output_attentions", r"`output_attentions` is not available under sequence parallelism"),
        ("_expanded_mask", r"`attention_mask` \(Tensor\) is expanded already"),
    ],
)
def test_calls_that_cannot_be_right(ranks, call, match):
    overrides = {"max_position_embeddings": 32}
    ranks(2).raises(_call, "llama", "sp=2", call, overrides, match=match, timeout=30)


def _packed_with_cache() -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama"), "dp_shard=2")
    with torch.no_grad():
        model(**packed_batch((9, 6)), use_cache=True)


def test_packed_rows_with_a_cache(ranks):
    ranks(2).raises(
        _packed_with_cache, match="Packed documents would see each other with `use_cache=True`", timeout=30
    )


def _router_loss() -> None:
    from unittest.mock import patch

    from hf_veomni import prepare_omni

    with patch("hf_veomni.prepare.attach_router_loss", return_value=None):  # as for a family with a loss of its own
        prepare_omni(build_model("qwen3_moe"), "sp=2")(**packed_batch((9, 6)), output_router_logits=True)


def test_router_loss_of_a_slice(ranks):
    ranks(2).raises(_router_loss, match="`output_router_logits` adds a load-balancing loss of this rank", timeout=30)


def _prepare_family(name: str) -> None:
    import transformers

    from hf_veomni import prepare_omni

    model_class, config_class, extra = FAMILIES[name]
    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, config_class)(**{**small, **heads, **extra})
    model = prepare_omni(getattr(transformers, model_class)(config), "sp=2")
    batch = packed_batch((15,))
    other = {"cross_attention_states": torch.zeros(1, 8, 32)} if name == "mllama" else {}
    model(input_ids=batch["input_ids"], **other)


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "doge": ("DogeForCausalLM", "DogeConfig", {}),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {"d_model": 32, "n_head": 4, "n_layer": 1}),
}


@pytest.mark.parametrize(
    ("family", "match"),
    [
        (
            "xlnet",
            r"XLNetLMHeadModel has no shard points .*modules=\{'transformer.layer.\*.rel_attn': \{'sp': 'gather'\}\}",
        ),
        ("doge", r"DogeForCausalLM has no shard points .*makes an attention mask of its own from that of the row"),
    ],
)
def test_families_that_cannot_be_cut(ranks, family, match):
    ranks(2).raises(_prepare_family, family, match=match, timeout=30)


def _scaled_queries(plan: str, lengths: tuple[int, ...]) -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama4", floor_scale=20), plan)
    model(**packed_batch((19, 19) if plan == "sp=2" else (9, 10)))
    model(**packed_batch(lengths))


@pytest.mark.parametrize(
    ("plan", "lengths", "longest"), [("sp=2", (20, 5), 20), ("sp=2", (13, 13, 13), 20), ("dp_shard=2", (13, 13), 26)]
)
def test_llama_4_where_its_layers_would_scale_by_positions_of_the_slice(ranks, plan, lengths, longest):
    match = rf"slice of {longest} tokens is too long for Llama4ForCausalLM: from token 20 on"
    ranks(2).raises(_scaled_queries, plan, lengths, match=match, timeout=30)


def _restarting_planes() -> None:
    from hf_veomni import prepare_omni

    batch = packed_batch((9, 6))
    batch["position_ids"] = batch["position_ids"].expand(3, 1, -1)
    prepare_omni(build_model("llama"), "dp_shard=2").model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"]
    )


def test_three_planes_of_positions_that_restart(ranks):
    ranks(2).raises(_restarting_planes, match=r"pass \[4, rows, tokens\], text positions first", timeout=30)


def _packed_rows_of_gpt() -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("openai-gpt"), "dp_shard=2")
    batch = packed_batch((9, 6))
    positions = batch.pop("position_ids")
    model(**batch).loss.backward()  # one document a row is fine
    model(**batch, position_ids=positions)


def test_packed_rows_of_a_model_that_cannot_tell_documents_apart(ranks):
    ranks(2).raises(_packed_rows_of_gpt, match="position_ids|Packed sequences would not be kept apart", timeout=30)


def _twice() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(prepare_omni(build_model("llama"), "sp=2"), "sp=2")


def _unprepared() -> None:
    from hf_veomni import gather_sequence

    gather_sequence(torch.zeros(1, 4), build_model("llama"))


def _on_meta() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model("llama").to("meta"), "sp=2")


def _foreign_slice() -> None:
    from hf_veomni import gather_sequence, prepare_omni

    model = prepare_omni(build_model("llama"), "sp=2")
    model(**packed_batch((9, 6)))
    gather_sequence(torch.zeros(1, 15, 3), model)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (_twice, r"LlamaForCausalLM is already prepared: call `detach_omni\(model\)` first"),
        (_unprepared, r"LlamaForCausalLM has no cut sequence: call `prepare_omni"),
        (_on_meta, r"Parameter 'model.embed_tokens.weight' is on the meta device"),
        (_foreign_slice, r"`local` has shape \(1, 15, 3\), but this rank's slices .* have 8 tokens"),
    ],
)
def test_misuse(ranks, case, match):
    ranks(2).raises(case, match=match, timeout=30)
