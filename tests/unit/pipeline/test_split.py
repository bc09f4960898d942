"""Which layers a stage gets, and in which order it runs micro-batches."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_veomni import ParallelPlan
from hf_veomni.errors import UnsupportedError
from hf_veomni.pipeline.chain import _read_loop, find_chain
from hf_veomni.pipeline.schedule import one_forward_one_backward
from hf_veomni.pipeline.split import split_layers, split_model
from hf_veomni.pipeline.stage import Absent
from tests.models import build_model
from tests.sweep import tiny


@pytest.mark.parametrize(
    ("costs", "last", "stages", "sizes"),
    [
        ([1, 1, 1, 1], 0, 2, [2, 2]),
        ([1] * 5, 0, 2, [3, 2]),
        ([1] * 6, 2, 2, [4, 2]),  # the head counts as two layers
        ([1] * 4, 100, 4, [1, 1, 1, 1]),
        ([5, 1, 1, 1, 1, 1], 0, 2, [1, 5]),
        ([1] * 10, 1, 4, [3, 3, 3, 1]),
    ],
)
def test_most_expensive_stage_is_as_cheap_as_can_be(costs, last, stages, sizes) -> None:
    ranges = split_layers(costs, last, stages)
    assert [len(each) for each in ranges] == sizes
    assert [i for each in ranges for i in each] == list(range(len(costs)))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"`pp_size` \(3\) must not exceed the number of layers \(2\)"):
        split_layers([1, 1], 0, 3)
    several = r"`pp_size \* pp_stages` \(2 \* 2 = 4\)"
    with pytest.raises(UnsupportedError, match=rf"{several} must not exceed the number of layers \(2\)"):
        split_layers([1, 1], 0, 4, per_rank=2)
    with pytest.raises(UnsupportedError, match=rf"{several} is too large for 4 layers, .*\. Use 3 or fewer"):
        split_layers([1] * 4, 0, 4, least=2, per_rank=2)


def test_experts_count_as_those_that_a_token_is_sent_to() -> None:
    model = build_model("glm4_moe", num_hidden_layers=4)  # the first layer is dense
    chain = find_chain(model)
    with torch.no_grad():
        assert [len(r) for r in split_model(model, chain, 2)] == [2, 2]


def test_the_plan_may_give_the_layers_of_each_stage() -> None:
    model = build_model("llama", num_hidden_layers=4)
    chain = find_chain(model)
    given = ParallelPlan.from_string("pp=2,pp_layers=3+1").pp_layers
    assert split_model(model, chain, 2, given) == [range(3), range(3, 4)]
    with pytest.raises(ValueError, match=r"`pp_layers` \(3\+2\) adds up to 5 layers, and the model has 4"):
        split_model(model, chain, 2, (3, 2))
    with pytest.raises(UnsupportedError, match=r"`pp_layers` \(1\+3\) .* the first 2 takes features"):
        split_model(model, replace(chain, deep=2), 2, (1, 3))


def test_encoders_and_layers_with_features_count_with_the_first_stage() -> None:
    assert [len(each) for each in split_layers([1] * 6, 0, 2, first=2)] == [2, 4]
    assert [len(each) for each in split_layers([1] * 6, 0, 2, first=100, least=3)] == [3, 3]
    with pytest.raises(UnsupportedError, match=r"`pp_size` \(4\) is too large for 4 layers, of which the first .* 2"):
        split_layers([1] * 4, 0, 4, least=2)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_schedule_runs_each_micro_batch_once_and_holds_few(stages: int, count: int) -> None:
    for stage in range(stages):
        actions = one_forward_one_backward(stage, stages, count)
        assert [a.index for a in actions if not a.backward] == list(range(count))
        assert [a.index for a in actions if a.backward] == list(range(count))
        held = most = 0
        for action in actions:
            held += -1 if action.backward else 1
            most = max(most, held)
        assert most <= stages - stage


def _run(ranks: int, count: int, chunks: int) -> float:
    """Run the schedules of all ranks, a message at a time. Returns the share of the time in which they stand still."""
    todo = [one_forward_one_backward(rank, ranks, count, chunks) for rank in range(ranks)]
    assert all(len(set(actions)) == len(actions) == 2 * count * chunks for actions in todo)
    last, now = ranks * chunks - 1, [0.0] * ranks
    done: dict[tuple[int, bool, int], float] = {}
    while any(todo):
        before = len(done)
        for rank, actions in enumerate(todo):
            while actions:
                backward, index, chunk = actions[0]
                stage = chunk * ranks + rank
                wanted = [(stage, False, index)] if backward else []
                if (stage < last) if backward else (stage > 0):
                    wanted.append((stage + (1 if backward else -1), backward, index))
                if any(each not in done for each in wanted):
                    break
                begin = max([now[rank], *(done[each] for each in wanted)])
                now[rank] = done[stage, backward, index] = begin + (2 if backward else 1) / chunks
                actions.pop(0)
        assert len(done) > before, "no rank goes on"
    return 1 - 3 * count / max(now)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_schedules_of_all_ranks_fit_each_other_and_the_formula(ranks: int, chunks: int) -> None:
    for count in range(1, 20):
        share = _run(ranks, count, chunks)
        if count >= ranks:
            assert share == pytest.approx((ranks - 1) / (chunks * count + ranks - 1), abs=1e-9), count


@pytest.mark.parametrize("chunks", [2, 3])
def test_several_stages_a_rank_hold_so_many_forwards(chunks: int) -> None:
    for rank in range(4):
        held = most = 0
        for action in one_forward_one_backward(rank, 4, 16, chunks):
            held += -1 if action.backward else 1
            most = max(most, held)
        assert most == 2 * (3 - rank) + (chunks - 1) * 4 + 1


_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}


def _refused(model_type: str, auto=AutoModelForCausalLM, **options):
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **options))


def _tiny(name: str):
    with torch.device("meta"):
        return tiny.choose_class(name)[1]._from_config(tiny.tiny_config(name))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: _refused("t5", AutoModelForSeq2SeqLM, num_layers=2), "encoder-decoder"),
        (lambda: _refused("biogpt", num_hidden_layers=2), "beside the call of a layer"),
        (lambda: _refused("gemma4_text", num_hidden_layers=2, **_KINDS), "self.first_kv_shared_layer_idx"),
        (lambda: _refused("bamba", num_hidden_layers=2, attn_layer_indices=[1]), "cannot cut Bamba"),
        (lambda: _tiny("zamba2"), "handed `original_hidden_states` .* which depends on the embeddings"),
    ],
)
def test_models_that_are_no_chain_are_refused_by_name(model, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        find_chain(model())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "paligemma",
            "`attention_mask`, which PaliGemmaModel hands to every layer, depends on",
        ),
        ("llava_next", "`image_newline` of LlavaNextModel belongs to none of its modules"),
    ],
)
def test_models_that_see_are_refused_where_stages_need_the_encoders(name: str, match: str) -> None:
    model = tiny.build(tiny.tiny_config(name), tiny.choose_class(name)[1], torch.float32)
    with pytest.raises(UnsupportedError, match=match):
        find_chain(model)


def test_encoders_are_found_around_the_backbone() -> None:
    model: Any = tiny.build(tiny.tiny_config("qwen3_vl"), tiny.choose_class("qwen3_vl")[1], torch.float32)
    chain = find_chain(model)
    assert chain.owner is model.model.language_model and chain.encoders == ((model.model, "visual"),)
    assert chain.inputs == ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
    assert chain.deep == len(model.config.vision_config.deepstack_visual_indexes)


def test_an_encoder_of_another_stage_says_whose_it_is() -> None:
    encoder = Absent(torch.nn.Linear(2, 2))
    assert encoder.in_features == 2
    with pytest.raises(UnsupportedError, match="Linear belongs to the first stage of a pipeline"):
        encoder(torch.zeros(2))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_chains_are_found(name: str) -> None:
    model = build_model(name)
    chain = find_chain(model)
    assert chain.before == ("embed_tokens",) and [name for _, name in chain.after] == ["norm", "lm_head"]
    assert not chain.gives_tuple and chain.layers is model.model.layers


def _with_loop(body: str) -> tuple[ast.For, ast.AST]:
    tree = ast.parse(f"def forward(self, x):\n    {body}").body[0]
    return [node for node in ast.walk(tree) if isinstance(node, ast.For)][-1], tree


@pytest.mark.parametrize("value", ["{}", "[]", "dict()", "defaultdict(list)", "self.make_list()"])
def test_containers_that_layers_hand_to_each_other_are_refused(value: str) -> None:
    """Keys and values that later layers read would be on another stage."""
    loop, tree = _with_loop(f"kept = {value}\n    for layer in self.layers:\n        x = layer(x, kept=kept)")
    with pytest.raises(UnsupportedError, match="its layers hand `kept` to each other beside their hidden states"):
        _read_loop(build_model("llama"), loop, tree)


@pytest.mark.parametrize(
    "made",
    [
        "kept = self.rotary_emb(x, ids)",  # a module without parameters that reads dtype and device alone
        "kept = make_causal_mask(inputs_embeds=x)",
        "kept = torch.arange(x.shape[1], device=x.device)",
        "kept = None\n    if x is not None: kept = torch.zeros_like(x)",
    ],
)
def test_tables_that_layers_only_read_are_not(made: str) -> None:
    loop, tree = _with_loop(f"{made}\n    for layer in self.layers:\n        x = layer(x, kept=kept)")
    assert _read_loop(build_model("llama"), loop, tree) == (False, False)


@pytest.mark.parametrize(
    "made",
    [
        "kept = torch.clone(inputs_embeds)",
        "kept = self.norm(x)",
        "kept = self.dropout(x)",  # no module of the model: what it does is not known
        "kept = 1\n    if x.sum() > 0: kept = 2",
        "kept = {'mask': make_mask(x), 'first': x[:, 0]}",
        "for kept in x.unbind(): pass",
    ],
)
def test_values_of_the_embeddings_beside_the_hidden_states_are_refused(made: str) -> None:
    """Stages after the first have zeros in their place."""
    loop = f"{made}\n    for layer in self.layers:\n        x = layer(x, kept=kept)"
    with pytest.raises(UnsupportedError, match="its layers are handed `kept` beside their hidden states"):
        _read_loop(build_model("llama"), *_with_loop(loop))
