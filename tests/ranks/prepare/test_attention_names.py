"""Which attention a prepared model's modules call: chosen by their config, whose name nobody else sees changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.models import build_model, packed_batch
from tests.ranks.parity import relative_error, whole

_SEEN: list[tuple[str, str, int]] = []


def _asks_its_name(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As flash attention does: it looks its kernels up by the name in the module's config."""
    _SEEN.append((module.config._attn_implementation, type(module.config).__name__, query.shape[1]))
    return sdpa_attention_forward(module, query, *args, **kwargs)


def _gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(whole(p.grad).clone() for p in model.parameters())]


def _worst(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(got, wanted, strict=True))


def _of_others() -> dict[str, Any]:
    return {name: f for name, f in AttentionInterface._global_mapping.items() if not name.startswith("omni")}


def _switched() -> list[Any]:
    from hf_veomni import detach_omni, prepare_omni

    AttentionInterface.register("asks_its_name", _asks_its_name)
    registered = _of_others()
    model = build_model("llama")
    batch = packed_batch((15,))
    wanted = _gradients(copy.deepcopy(model), batch)
    model.set_attn_implementation("eager")
    prepare_omni(model, "sp=2", attention="keep")
    found: list[Any] = [_worst(_gradients(model, batch), wanted)]
    model.set_attn_implementation("asks_its_name")
    found.append(_worst(_gradients(model, batch), wanted))
    found += [set(_SEEN), model.config._attn_implementation, "omni" in model.config.to_json_string()]
    found.append(_of_others() == registered)
    views = [m.config for m in model.modules() if type(getattr(m, "config", None)).__name__ == "AttentionConfig"]
    detach_omni(model)
    return [*found, len(views), all(m.config is model.config for m in model.modules() if hasattr(m, "config"))]


def test_attention_is_followed_when_it_is_set_later(ranks):
    for kept, switched, seen, name, saved, same, views, restored in ranks(2).run(_switched):
        assert kept < 1e-5 and switched < 1e-5, (kept, switched)
        assert seen == {("asks_its_name", "LlamaConfig", 2)}  # half of four heads, under the name it was selected by
        assert (name, saved, same) == ("asks_its_name", False, True)
        assert (views, restored) == (2, True)  # of two layers


def _unknown() -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("llama"), "sp=2")
    model.config._attn_implementation_internal = "unheard_of"
    model(**packed_batch((8,)))


def test_an_attention_that_nobody_registered_is_named(ranks):
    ranks(2).raises(_unknown, match="Attention 'unheard_of' is unknown to transformers' AttentionInterface")


def _upcasts() -> None:
    from hf_veomni import prepare_omni

    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, reorder_and_upcast_attn=True)
    config._attn_implementation = "eager"
    model = prepare_omni(GPT2LMHeadModel(config), "sp=2", attention="keep")
    model(**packed_batch((8,)))


def test_gpt2_in_its_own_attention_is_refused(ranks):
    """It compares the name with "eager" and leaves the interface out then."""
    ranks(2).raises(_upcasts, match="`reorder_and_upcast_attn` with attention 'eager'")


def test_a_view_reads_and_sets_its_config() -> None:
    from hf_veomni import hf

    config = GPT2Config(n_head=4)
    config._attn_implementation = "sdpa"
    view: Any = hf.AttentionConfig(config, None)
    view.select("omni|sdpa")
    view.n_head = 8
    assert (config.n_head, view.num_attention_heads, config._attn_implementation) == (8, 8, "sdpa")
    copied = copy.deepcopy(view)
    assert (copied._attn_implementation, copied.followed) == ("omni|sdpa", "sdpa")
    assert copied.shared is not config and copied.n_head == 8
    with pytest.raises(AttributeError):
        view.no_such_thing  # noqa: B018
