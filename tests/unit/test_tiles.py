"""A dense MLP in tiles of tokens: the same numbers, less memory, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks._memory import MemoryLog
from hf_veomni import ParallelPlan, UnsupportedError, detach_omni, prepare_omni, tiles
from tests.models import build_model, packed_batch

RULES = {"*.mlp": {"tokens": "tiled"}}


def step(model: Any, batch: dict[str, Tensor], checkpointing: bool) -> list[Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_loss_and_gradients_are_those_of_the_stock_mlp(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    batch = packed_batch([11, 1, 17, 8])
    expected = step(prepare_omni(build_model(name, dtype=torch.float64), ""), batch, checkpointing)
    calls: list[int] = []
    model = prepare_omni(build_model(name, dtype=torch.float64), ParallelPlan(modules=RULES))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features != model.config.vocab_size:
            module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[-2]))
    found = step(model, batch, checkpointing)
    assert {16, 5, 37} == set(calls), "37 tokens outside of the MLPs, tiles of 16, 16 and 5 inside"
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).abs().max()) <= 1e-6 * float(two.abs().max().clamp(min=1e-6))
    assert all("forward" not in vars(m) for n, m in detach_omni(model).named_modules() if n.endswith(".mlp"))


def test_one_tile_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 256, bias=False), nn.Linear(256, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).sigmoid())

    peaks = []
    for tile in (1 << 20, 64):
        monkeypatch.setattr(tiles, "TILE", tile)
        module = Wide()
        tiles._tile(module)
        with MemoryLog() as log:
            module(torch.randn(1, 1024, 8, requires_grad=True)).sum().backward()
        peaks.append(log.peak()[0])
    assert peaks[1] < peaks[0] / 5


class Mixing(nn.Module):
    """No token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(1, keepdim=True))


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be combined with experts"):
        prepare_omni(build_model("qwen3_moe"), ParallelPlan(modules=RULES))
    with pytest.raises(UnsupportedError, match="LlamaAttention does not compute each token"):
        prepare_omni(build_model("llama"), ParallelPlan(modules={"*.self_attn": {"tokens": "tiled"}}))
    model: Any = build_model("llama")
    model.model.layers[1].mlp = Mixing()
    with pytest.raises(UnsupportedError, match="'model.layers.1.mlp': Mixing does not compute each token"):
        prepare_omni(model, ParallelPlan(modules=RULES))
    dropping: Any = build_model("llama")
    dropping.model.layers[0].mlp.down_proj = nn.Sequential(dropping.model.layers[0].mlp.down_proj, nn.Dropout(0.1))
    with pytest.raises(UnsupportedError, match="would draw other masks in 'down_proj.1'"):
        prepare_omni(dropping, ParallelPlan(modules=RULES))
