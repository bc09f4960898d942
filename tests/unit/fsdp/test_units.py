"""Every layer is an FSDP unit of its own, also where the family's plan goes by other names than its modules have."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    T5Config,
)

from hf_veomni.fsdp.wrap import plan_units


def _build(family: str) -> nn.Module:
    with torch.device("meta"):
        match family:
            case "bart":
                return AutoModelForSeq2SeqLM.from_config(BartConfig(encoder_layers=3, decoder_layers=2, d_model=32))
            case "t5":
                return AutoModelForSeq2SeqLM.from_config(T5Config(num_layers=3, num_decoder_layers=2, d_model=32))
            case "bert":
                return BertModel(BertConfig(num_hidden_layers=5))
            case "llama":
                return AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=5, hidden_size=32))
            case "bloom":
                return AutoModelForCausalLM.from_config(BloomConfig(n_layer=5))
            case "falcon":
                return AutoModelForCausalLM.from_config(FalconConfig(num_hidden_layers=5))
            case "gptj":
                return AutoModelForCausalLM.from_config(GPTJConfig(n_layer=5))
    return AutoModelForCausalLM.from_config(GPT2Config(n_layer=5))


_LAYERS = {
    "bart": r"model.(encoder|decoder).layers.\d",
    "t5": r"(encoder|decoder).block.\d",
    "bert": r"encoder.layer.\d",
    "llama": r"model.layers.\d",
    "bloom": r"transformer.h.\d",
    "falcon": r"transformer.h.\d",
    "gptj": r"transformer.h.\d",
    "gpt2": r"transformer.h.\d",
}


@pytest.mark.parametrize("family", _LAYERS)
def test_each_layer_is_a_unit(family):
    model = _build(family)
    names = {module: name for name, module in model.named_modules()}
    units = [[names[module] for module in modules] for modules, _ in plan_units(model, {})]
    layers = [unit for unit in units if re.fullmatch(_LAYERS[family], unit[0])]
    assert len(layers) == 5 and all(len(unit) == 1 for unit in layers), units
    owned = [{p for module in modules for p in module.parameters()} for modules, _ in plan_units(model, {})]
    assert sum(map(len, owned)) == len(set().union(*owned)), "a parameter in two units"


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_what_an_encoder_decoder_ties_stays_in_the_root(family: str) -> None:
    model = _build(family)
    assert all(len(modules) == 1 for modules, _ in plan_units(model, {}))
    with pytest.raises(ValueError, match=r"The rule `fsdp` for 'lm_head' has no effect"):
        plan_units(model, {"lm_head": {"fsdp": "keep"}})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "paligemma"])
def test_rules_for_other_names_are_no_news(family, caplog):
    """transformers warns of the rules in its plan that a model with towers has no names for."""
    import logging

    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    try:
        plan_units(model, {})
    finally:
        logger.propagate = propagate
    assert "match nothing" not in caplog.text
