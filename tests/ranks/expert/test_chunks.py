"""Experts in chunks of tokens: the exchange alone in fp64, and full models in fp32, against the blocking form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni import prepare_omni
from tests.models import packed_batch
from tests.ranks.parity import Setting, make_model
from tests.ranks.sequence.test_pipelined import differences

EXPERTS, TOP_K, WIDTH = 6, 2, 5


def _exchange(tokens: int) -> float:
    """The largest difference of outputs and gradients in fp64: one exchange, and three chunks; in bundles too."""
    from hf_veomni.expert.dispatch import (
        chunk_sizes,
        combine,
        dispatch,
        land_combine,
        land_dispatch,
        launch_combine,
        launch_dispatch,
        make_routes,
    )

    group = dist.group.WORLD
    count = tokens * (dist.get_rank() + 1) // 2
    generator = torch.Generator().manual_seed(dist.get_rank())
    index = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    given = [torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (WIDTH, TOP_K, WIDTH)]
    matrices = torch.arange(float(EXPERTS // 2)).double()[:, None] + torch.arange(WIDTH).double()
    found: list[list[Tensor]] = []
    for chunks, bundled in ((1, False), (3, False), (1, True), (3, True)):
        x, weights = (t.clone().requires_grad_() for t in given[:2])
        scale = matrices.clone().requires_grad_()
        routes = make_routes(index, EXPERTS, group, chunks, bundled)

        def work(rows: Tensor, route: Any, scale: Tensor) -> Tensor:
            return (rows * scale.repeat_interleave(route.groups.counts, 0)).sin()

        if chunks == 1:
            rows, arrived = dispatch(x, weights, routes[0], group)
            out = combine(work(rows, routes[0], scale), arrived, weights, routes[0], group)
        else:
            sizes = chunk_sizes(count, chunks)
            cut = zip(x.split(sizes), weights.split(sizes), routes, strict=True)
            departed = [launch_dispatch(*part, group) for part in cut]
            landed = [land_dispatch(d, r) for d, r in zip(departed, routes, strict=True)]
            back = [
                launch_combine(work(rows, r, scale), arrived, r, group)
                for (rows, arrived), r in zip(landed, routes, strict=True)
            ]
            parts = zip(back, weights.split(sizes), routes, strict=True)
            out = torch.cat([land_combine(*part) for part in parts])
        (out * given[2]).sum().backward()
        found.append([out.detach(), x.grad, weights.grad, scale.grad])
    pairs = [(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True)]
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize("tokens", [16, 3, 1])
def test_chunks_of_an_exchange_equal_one(ranks, tokens):
    for error in ranks(2).run(_exchange, tokens):
        assert error < 1e-12


@pytest.mark.parametrize(
    ("tokens", "chunks", "sizes"),
    [
        (512, 4, [80, 176, 176, 80]),
        (8192, 4, [1360, 2736, 2736, 1360]),
        (5, 4, [1, 1, 2, 1]),
        (0, 3, [0, 0, 0]),
        (7, 1, [7]),
    ],
)
def test_the_ends_are_half_as_large(tokens: int, chunks: int, sizes: list[int]) -> None:
    from hf_veomni.expert.dispatch import chunk_sizes

    assert chunk_sizes(tokens, chunks) == sizes


def _models(setting: Setting, plan: str, checkpointing: bool) -> float:
    batch = packed_batch([11, 1, 17, 8], seed=0 if "sp=2" in plan else dist.get_rank())
    models = [prepare_omni(make_model(setting), f"{plan}{overlap}") for overlap in ("", ",overlap=chunks")]
    for model in models:
        if checkpointing:
            enable: Any = getattr(model, "gradient_checkpointing_enable", None)
            enable({"use_reentrant": False})
            if setting.lora:
                model.enable_input_require_grads()
    return max(differences(*models, batch))


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", ["sp=2,ep=2", "dp_shard=2,ep=2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_equal_the_blocking_form(ranks, name, plan, checkpointing):
    # The gradients of GPT-OSS' biases are small differences of large sums: fp32 has 3e-6 of them in any two orders.
    setting = Setting(model=name, dtype=torch.float64 if name == "gpt_oss" else torch.float32)
    for worst in ranks(2).run(_models, setting, plan, checkpointing, timeout=120):
        assert worst < 1e-6


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_on_experts_equal_the_blocking_form(ranks, checkpointing):
    # Of large adapters: fp32 has 1.1e-6 in any two orders.
    setting = Setting(model="qwen3_moe", lora=True, dtype=torch.float64)
    for worst in ranks(2).run(_models, setting, "sp=2,ep=2", checkpointing, timeout=120):
        assert worst < 1e-6


@pytest.mark.parametrize("bundled", [False, True])
def test_routes_of_chunks_read_the_host_once(ranks, bundled):
    assert all(ranks(2).run(_counts, bundled))


def _counts(bundled: bool) -> bool:
    from hf_veomni.expert.dispatch import make_routes

    calls, original = [], dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        index = torch.arange(14).view(7, 2) % EXPERTS
        routes = make_routes(index, EXPERTS, dist.group.WORLD, 4, bundled)
    finally:
        dist.all_to_all_single = original
    assert [len(route.order) for route in routes] == [2, 6, 4, 2]
    return len(calls) == 1
