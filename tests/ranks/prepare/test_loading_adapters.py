"""Adapters on models that were built on the meta device, and what such models refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import packed_batch
from tests.ranks.parity import whole
from tests.ranks.stored import build_on_meta


def _adapters(directory: str, plan: str, stock: str, kind: Any, real: bool) -> dict[str, Tensor]:
    import torch.distributed as dist

    from hf_veomni import prepare_omni
    from hf_veomni.expert import find_layouts

    torch.manual_seed(dist.get_rank())
    model: Any = get_peft_model(build_on_meta(directory), _lora(kind), low_cpu_mem_usage=True)
    if real:
        for module in model.modules():
            for part in ("lora_A", "lora_B"):
                if hasattr(module, part):
                    getattr(module, part).to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
    prepare_omni(model, plan, checkpoint=directory)
    expected = torch.load(stock)["state"]
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(whole(parameter.detach()), expected[name.replace("base_layer.", "")]), name
    model(**packed_batch((9, 14, 6))).loss.backward()
    layouts = find_layouts(model)
    found = {name: whole(p.detach()) for name, p in model.named_parameters() if "lora_" in name}
    return {name: layouts[name].to_plain(t) if name in layouts else t for name, t in found.items()}


def _lora(kind: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=kind)


@pytest.mark.parametrize("plan", ["sp=2", "sp=2,ep=2"])
@pytest.mark.parametrize(("kind", "real"), [(True, False), ("gaussian", False), (False, False), (True, True)])
def test_adapters_are_initialised_as_peft_does_and_alike(ranks, checkpoint, plan, kind, real):
    folder, stock = checkpoint("qwen3_moe")
    found = ranks(2).run(_adapters, folder, plan, stock, kind, real, timeout=120)
    alone = ranks(1).run(_adapters, folder, "sp=1", stock, kind, real, timeout=120)[0]
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), _lora(kind))
    expected = {name: p.detach() for name, p in plain.named_parameters() if "lora_" in name}
    assert found[0].keys() == alone.keys() == expected.keys()
    for name, tensor in alone.items():
        # Ranks had seeds of their own: every part must come from the seed of rank 0.
        assert torch.equal(found[0][name], tensor) and torch.equal(found[1][name], tensor), name
        assert tensor.shape == expected[name].shape
        if real:
            assert 0.7 < tensor.std() < 1.3
        elif "lora_B" in name and kind is not False:
            assert not tensor.any()
        else:
            assert 0.5 < tensor.std() / expected[name].std() < 2, name


# ---------------------------------------------------------------------------- refusals


def _refused(directory: str, change: str, plan: str) -> None:
    import torch.distributed as dist

    from hf_veomni import prepare_omni

    model: Any = build_on_meta(directory)
    where: Any = directory
    if change == "no checkpoint":
        where = None
    elif change == "real":
        model.to_empty(device="cpu")
    elif change == "half":
        model.model.norm.to_empty(device="cpu")
    elif change == "folder" and dist.get_rank() == 1:
        where = os.path.join(directory, "nowhere")
    elif change == "larger":
        model.resize_token_embeddings(101, mean_resizing=False)
    elif change == "head":
        model.register_parameter("extra", nn.Parameter(torch.empty(3, device="meta")))
    elif change == "quantized":
        model.config.quantization_config = {"quant_method": "mxfp4"}
    elif change == "pissa":
        model = get_peft_model(model, _lora("gaussian"), low_cpu_mem_usage=True)
        model.peft_config["default"].init_lora_weights = "pissa"
    elif change == "saved":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    elif change == "dora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True), low_cpu_mem_usage=True)
    prepare_omni(model, plan, checkpoint=where)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("no checkpoint", r"'model\.embed_tokens\.weight' is on the meta device: name the weights with"),
        ("real", "has its weights already: leave it out"),
        ("half", r"'model\.norm\.weight' has values and others are on the meta device"),
        ("folder", "nowhere'?.* cannot be opened"),
        ("larger", r"has shape \(97, 64\) there and \(101, 64\) in the model"),
        ("head", "it lacks 'extra'"),
        ("quantized", "has a `quantization_config`"),
        ("pissa", r"`init_lora_weights` \('pissa'\)"),
        ("saved", r"lm_head\.original_module\.weight' is on the meta device.*`modules_to_save`"),
        ("dora", r"lora_magnitude_vector\.default\.weight' is on the meta device.*DoRA"),
    ],
)
def test_refuses_on_every_rank(ranks, checkpoint, change, match):
    ranks(2).raises(_refused, checkpoint("llama")[0], change, "sp=2", match=match)


def _changed(folder: str, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    AutoConfig.from_pretrained(folder).save_pretrained(target)
    state = {key: tensor for path in Path(folder).glob("*.safetensors") for key, tensor in load_file(path).items()}
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.layers.1.mlp.experts.2.up_proj.weight"), r"mlp\.experts\.gate_up_proj'"),
        (lambda s: s.pop("model.norm.weight"), r"lacks 'model\.norm\.weight'"),
        (lambda s: s.update(surprise=torch.zeros(2)), "the model has no 'surprise'"),
    ],
    ids=["an expert", "a norm", "a surprise"],
)
def test_refuses_files_that_do_not_fit(ranks, checkpoint, tmp_path, change, match):
    folder = _changed(checkpoint("qwen3_moe")[0], tmp_path, change)
    ranks(2).raises(_refused, folder, "", "sp=2,ep=2", match=match)


def _refused_and_used(directory: str) -> bool:
    """A model that was refused is as it was, so another call with the right folder goes through."""
    from hf_veomni import prepare_omni

    model = build_on_meta(directory)
    try:
        prepare_omni(model, "sp=2,ep=2", checkpoint=os.path.join(directory, "nowhere"))
    except ValueError:
        prepare_omni(model, "sp=2,ep=2", checkpoint=directory)
        return model(**packed_batch((9, 14))).loss.isfinite().item()
    return False


def test_a_refused_model_is_as_it_was(ranks, checkpoint):
    assert ranks(2).run(_refused_and_used, checkpoint("qwen3_moe")[0], timeout=60) == [True, True]
