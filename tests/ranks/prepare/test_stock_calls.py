"""What one calls on any Hugging Face model: `save_pretrained` writes the plain model, the rest is refused by name."""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.ranks.parity import relative_error, whole
from tests.ranks.training import adapt_experts, lora_model, tiny_mixtral, tiny_model


def _tied_head() -> nn.Module:
    model = get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    return _random(model)


def _tokens() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    return _random(get_peft_model(tiny_model(tie_word_embeddings=True), config))


def _random(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.1)
    return model


_MODELS: dict[str, Any] = {
    "full": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "experts": tiny_mixtral,
    "LoRA": lora_model,
    "LoRA on experts": lambda: adapt_experts(tiny_mixtral()),
    "LoRA on a tied head": _tied_head,
    "trained tokens": _tokens,
}
_BASES = {"LoRA on experts": tiny_mixtral, "LoRA": tiny_model}


def _saved(kind: str, plan: str, folder: Path, options: dict[str, Any]) -> None:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(_MODELS[kind](), plan)
    model.save_pretrained(folder, **options)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # it goes on training
    assert all(whole(p.grad).isfinite().all() for p in model.parameters() if p.grad is not None)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 15)[None]).logits


def _opened(kind: str, folder: Path) -> nn.Module:
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    base = _BASES.get(kind, _MODELS["tied"])()
    return PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("kind", _MODELS)
def test_save_pretrained_writes_the_plain_model(ranks, tmp_path, kind):
    plan = "sp=2,ep=2" if "experts" in kind else "sp=2"
    ranks(2).run(_saved, kind, plan, tmp_path / "saved", {}, timeout=90)
    assert torch.equal(_logits(_opened(kind, tmp_path / "saved")), _logits(_MODELS[kind]()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {"max_shard_size": "10KB"}),
        ("LoRA", {"save_embedding_layers": True}),
        ("LoRA", {"selected_adapters": ["default"]}),
    ],
)
def test_options_of_save_pretrained_count(ranks, tmp_path, kind, options):
    ranks(2).run(_saved, kind, "dp_shard=2", tmp_path / "saved", options, timeout=90)
    assert torch.equal(_logits(_opened(kind, tmp_path / "saved")), _logits(_MODELS[kind]()))
    _MODELS[kind]().save_pretrained(tmp_path / "stock", **options)
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("saved", "stock")]
    assert names[0] == names[1]


def _call(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    from hf_veomni import prepare_omni

    getattr(prepare_omni(_MODELS[kind](), "sp=2"), name)(*arguments, **options)


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "options", "match"),
    [
        ("full", "resize_token_embeddings", (80,), {}, "resize the embeddings before `prepare_omni`"),
        ("LoRA", "resize_token_embeddings", (80,), {}, "resize the embeddings before `prepare_omni`"),
        ("full", "push_to_hub", ("someone/something",), {}, "huggingface_hub.upload_folder"),
        ("full", "save_pretrained", ("nowhere",), {"push_to_hub": True}, "huggingface_hub.upload_folder"),
        ("full", "save_pretrained", ("nowhere",), {"distributed_checkpoint": True}, "is not available on a prepared"),
        ("full", "load_state_dict", ({},), {"assign": True}, "leave it out, so that the values are copied"),
        ("full", "no_sync", (), {}, "`accelerator.accumulate.model.`; `LocalSGD`"),
        ("LoRA", "no_sync", (), {}, "`LocalSGD`"),
        ("LoRA", "add_weighted_adapter", (["default"], [0.5], "half"), {}, "combine adapters before `prepare_omni`"),
        ("LoRA", "merge_and_unload", (), {}, "merge it into the plain model"),
        ("LoRA", "merge_adapter", (), {}, "merge it into the plain model"),
        ("LoRA", "unload", (), {}, "merge it into the plain model"),
    ],
)
def test_what_works_on_whole_parameters_is_refused(ranks, kind, name, arguments, options, match):
    ranks(2).raises(_call, kind, name, arguments, options, match=match)


def _loaded(kind: str, plan: str) -> Tensor:
    """Logits after other weights were loaded: while those of the head are gathered, and in place of those before."""
    from hf_veomni import gather_sequence, prepare_omni

    model: Any = prepare_omni(_MODELS[kind](), plan)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids)  # the head stays gathered for a backward that does not come
    missing, unexpected = model.load_state_dict(_other(kind))
    assert not missing and not unexpected
    model.load_state_dict({name: nn.Parameter(value) for name, value in _other(kind).items()})  # `keep_vars=True`
    if kind == "LoRA":
        set_peft_model_state_dict(model, get_peft_model_state_dict(_MODELS[kind](), _other(kind)))
    with torch.no_grad():
        return gather_sequence(model.eval()(input_ids=ids).logits, model)


def _other(kind: str) -> dict[str, Tensor]:
    """Of full tensors, as `torch.load` gives them."""
    return {name: 1.2 * value for name, value in _MODELS[kind]().state_dict().items()}


@pytest.mark.parametrize("kind", _MODELS)
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_load_state_dict_takes_whole_tensors(ranks, kind, plan):
    expected = _MODELS[kind]()
    expected.load_state_dict(_other(kind))
    plan = plan + ",ep=2" if "experts" in kind else plan
    for found in ranks(2).run(_loaded, kind, plan, timeout=60):
        assert relative_error(found, _logits(expected)) < 1e-5


def _load(state: dict[str, Tensor]) -> None:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(tiny_model(), "sp=2")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # stock's own
        raise ValueError(str(error)) from error


@pytest.mark.parametrize("name", ["missing", "shape"])
def test_a_state_of_another_model_raises_as_in_stock(ranks, name):
    state = tiny_model().state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    if name == "missing":
        del state[key]
        ranks(2).raises(_load, state, match="Missing key.*q_proj")
    else:
        state[key] = state[key][1:]
        ranks(2).raises(_load, state, match="size mismatch for model.layers.0.self_attn.q_proj.weight")


def _sgd() -> None:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    from hf_veomni import OmniParallelismConfig, prepare_omni

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig("dp_shard=2"))
    with LocalSGD(accelerator, prepare_omni(tiny_model(), "dp_shard=2"), 8):
        pass


def test_local_sgd_is_refused(ranks):
    ranks(2).raises(_sgd, match="`LocalSGD`, in which each rank trains a model of its own")


def _on_the_main_process_alone(folder: Path) -> str:
    import torch.distributed as dist

    from hf_veomni import prepare_omni
    from hf_veomni.checkpoint import stock_calls

    patience, stock_calls.MEETING = stock_calls.MEETING, timedelta(seconds=3)
    model: Any = prepare_omni(tiny_model(), "sp=2")
    try:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
    except ValueError as error:
        return str(error)
    finally:
        stock_calls.MEETING, stock_calls._turns = patience, count()  # the processes go on with other cases
    return ""


def test_a_save_on_the_main_process_alone_is_told_so(ranks, tmp_path):
    found = ranks(2).run(_on_the_main_process_alone, tmp_path / "saved", timeout=60)
    assert "was not called on ranks [1] within 3 s" in found[0] and not found[1]
    assert not (tmp_path / "saved").exists()


def _detached() -> bool:
    from hf_veomni import detach_omni, prepare_omni

    model: Any = detach_omni(prepare_omni(lora_model(), "sp=2"))
    base = model.get_base_model()
    return not any("save_pretrained" in vars(m) or "merge_adapter" in vars(m) for m in (model, base, model.base_model))


def test_detach_takes_them_off(ranks):
    assert all(ranks(2).run(_detached))
