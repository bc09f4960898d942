"""Qwen3-30B-A3B's layers as one of 8 ranks of an EP group computes them: 16 of the 128 experts, 8 for each token.

With 8 ranks of t tokens and even routing a rank's 16 experts get 8 t / 8 tokens, 8 times: as many as here, where t
tokens go to 8 of 16. So matmuls, weights and activations are those of such a rank; what is missing is the exchange,
the other 112 columns of the router, and what FSDP does besides.

    ours       prepare_omni: on one rank the experts are transformers' own
    ours ep    the package's own computation of the experts, as under ep_size > 1, without the exchange
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from benchmarks import step
from benchmarks.on_gpu.part import Part
from benchmarks.on_gpu.speed import layers_that_fit, make_options, measure
from hf_veomni.expert.forward import ExpertsForward

LARGE = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "intermediate": 768, "vocab": 151_936}
LARGE |= {"experts": 16, "top_k": 8}
SMALL = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 16, "vocab": 128}
SMALL |= {"experts": 4, "top_k": 2}
CASES = ((8192, 1024, True, 45), (32_768, 1024, False, 50))
FEW = ((96, 16, True, 30),)


class ExpertsBench(step.Bench):
    """`step.Bench` with a mixture of experts."""

    def build(self) -> PreTrainedModel:
        options = self.options
        config = Qwen3MoeConfig(
            hidden_size=options.hidden,
            moe_intermediate_size=options.intermediate,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.head_dim,
            num_experts=options.experts,
            num_experts_per_tok=options.top_k,
            norm_topk_prob=True,
            vocab_size=options.vocab,
            max_position_embeddings=max(options.tokens),
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).train()

    def last_of(self, layer: Any) -> Tensor:
        return layer.mlp.gate.weight

    def contenders(self) -> list[str]:
        return ["ours", "ours ep", "stock sdpa"]

    @contextmanager
    def installed(self, name: str) -> Iterator[None]:
        experts = [module for module in self.model.modules() if hasattr(module, "gate_up_proj")]
        with step.installed(self.model, "ours" if name == "ours ep" else name):
            for module in experts if name == "ours ep" else ():
                module.forward = ExpertsForward(module)
            try:
                yield
            finally:
                for module in experts:
                    vars(module).pop("forward", None)


def run(part: Part) -> None:
    for tokens, median, stock, seconds in FEW if part.small else CASES:
        part.case(f"{tokens} packed, 16 of 128", experts, part, tokens, median, stock, seconds=seconds)


def experts(part: Part, tokens: int, median: int, stock: bool) -> None:
    options = make_options(part, SMALL if part.small else LARGE)
    attention = 2 * options.hidden * options.head_dim * (options.heads + options.kv_heads)
    parameters = attention + options.experts * 3 * options.hidden * options.intermediate
    options.layers = layers_that_fit(options, tokens, parameters, 48, stock)
    measure(part, ExpertsBench, options, tokens, median)
