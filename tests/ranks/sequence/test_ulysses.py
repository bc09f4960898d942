"""The exchange of sequence for heads, alone: outputs and gradients in fp64 equal attention on one rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_veomni import gather_sequence, prepare_omni
from hf_veomni.comm import gather_shards
from hf_veomni.sequence.ulysses import AttentionCall, ulysses_attention


class _Module(torch.nn.Module):
    """An attention module with a per-head parameter, as GPT-OSS has it."""

    def __init__(self, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.sinks = torch.nn.Parameter(torch.arange(num_heads, dtype=torch.float64))


def _attention(module, query, key, value, attention_mask, *, s_aux=None, position_bias=None):
    """A plain attention function that uses everything that Ulysses has to slice by head."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) + attention_mask + position_bias
    scores = scores * (1 + s_aux.view(1, -1, 1, 1)) + module.sinks.view(1, -1, 1, 1) * scores.sin()
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def _inputs(num_query: int, num_key_value: int, value_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_query, 24, 4), (2, num_key_value, 24, 4), (2, num_key_value, 24, value_width)]
    shapes += [(2, num_query, 24, 24), (1, num_query, 24, 24), (num_query,), (2, 24, num_query, value_width)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _errors(num_query: int, num_key_value: int, value_width: int, exchanged: Any = ulysses_attention) -> list[float]:
    """Largest differences of output and gradients between Ulysses and one rank."""
    query, key, value, mask, bias, sinks, cotangent = _inputs(num_query, num_key_value, value_width)
    module, group = _Module(num_query, num_query // num_key_value), dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    part = 24 // size
    errors, grads = [], []
    for local in (False, True):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        whole = [*leaves, sinks.clone().requires_grad_()]
        module.zero_grad()
        if local:
            pieces = [x.narrow(2, rank * part, part) for x in leaves]
            extra = {"s_aux": whole[3], "position_bias": bias}
            out = exchanged(AttentionCall(_attention, module, mask, num_query, extra), *pieces, group)
            assert out.shape == (2, part, num_query, value_width) and out.is_contiguous()
            out = gather_shards(out, group, dim=1) / size  # every rank has the same loss; the backward sums them
        else:
            out, _ = _attention(module, *leaves, mask, s_aux=whole[3], position_bias=bias)
        (out * cotangent).sum().backward()
        found = [x.grad for x in whole] + [module.sinks.grad]
        if local:
            for grad in found:
                dist.all_reduce(grad)
            out = out * size
        grads.append([out.detach(), *found])
    errors = [float((a - b).abs().max()) for a, b in zip(*grads, strict=True)]
    return errors


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2), (9, 3), (8, 4), (5, 1)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ulysses_equals_single_rank(ranks, size, heads):
    for errors in ranks(size).run(_errors, *heads, 4):
        assert max(errors) < 1e-12, errors


def test_ulysses_with_another_value_width_equals_single_rank(ranks):
    for errors in ranks(2).run(_errors, 4, 2, 3):
        assert max(errors) < 1e-12, errors


def _gather_gradient() -> tuple[float, float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.arange(6, dtype=torch.float64).view(2, 3).add(10 * rank).requires_grad_()
    out = gather_shards(x, dist.group.WORLD, dim=-1)
    expected = torch.cat([torch.arange(6.0).view(2, 3).add(10 * r) for r in range(size)], -1)
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out) * (rank + 1)
    (out * weights).sum().backward()
    mine = torch.arange(out.numel(), dtype=torch.float64).view_as(out)[:, 3 * rank : 3 * rank + 3]
    total = mine * sum(range(1, size + 1))
    return float((out - expected).abs().max()), float((x.grad - total).abs().max())


def test_gather_concatenates_and_its_backward_sums(ranks):
    for errors in ranks(3).run(_gather_gradient):
        assert errors == (0.0, 0.0)


def _training_logits(config: dict) -> list[float]:
    """Differences of gathered training logits and gradients to one rank, while the loss could still be chunked."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**config)).double()
    model = prepare_omni(copy.deepcopy(stock), "sp=2").train()
    ids = torch.arange(21)[None]
    found = gather_sequence(model(input_ids=ids).logits, model)
    expected = stock(input_ids=ids, use_cache=False).logits
    for logits in (found, expected):
        logits.log_softmax(-1)[..., 0].sum().backward()
    pairs = zip(model.parameters(), stock.parameters(), strict=True)
    errors = [(ours.grad.full_tensor() - theirs.grad).abs().max() for ours, theirs in pairs]
    return [float((found - expected).abs().max()), float(max(errors))]


def test_gathered_training_logits_and_their_gradients_equal_single_rank(ranks):
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    config |= dict(num_attention_heads=4, num_key_value_heads=2)
    for errors in ranks(2).run(_training_logits, config):
        assert max(errors) < 1e-6, errors  # Llama's norms compute in fp32
