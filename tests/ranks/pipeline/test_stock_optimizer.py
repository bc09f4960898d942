"""The optimizer of one process, which knows parameters by their place alone, read in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_torch_version

from tests.ranks.parity import whole
from tests.sweep import tiny

_SEVERAL = pytest.mark.skipif(not is_torch_version(">=", "2.13"), reason="torch 2.11 crashes, and is refused")


def _voxtral() -> Any:
    """Its projector, of the first stage, is registered after its language model."""
    config: Any = tiny.tiny_config("voxtral")
    config.text_config.num_hidden_layers = 4
    return tiny.build(config, tiny.choose_class("voxtral")[1], torch.float32)


def _moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(optimizer.state[p]["exp_avg"]).mean().item() for name, p in trained.items()}


def _load(plan: str, path: str, turned: bool = False) -> dict[str, float]:
    """The moment that each parameter of this rank has got."""
    from hf_veomni import prepare_omni
    from hf_veomni.checkpoint.state import load_stock_optimizer

    model = prepare_omni(_voxtral(), plan)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters[::-1] if turned else parameters)
    load_stock_optimizer(model, optimizer, path)
    return _moments(model, optimizer)


def _write(path: Path) -> dict[str, float]:
    """A moment of its own for each parameter of the stock model; those of Adam are a tenth of the gradients."""
    model = _voxtral()
    optimizer = torch.optim.AdamW(model.parameters())
    for place, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:  # positions of the encoder are frozen
            parameter.grad = torch.full_like(parameter, place)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    return _moments(model, optimizer)


@pytest.mark.parametrize("plan", ["pp=2", pytest.param("pp=2,pp_stages=2", marks=_SEVERAL)])
def test_each_parameter_gets_its_own_moments(ranks, tmp_path: Path, plan: str) -> None:
    wanted = _write(tmp_path / "optimizer.pt")
    assert len(set(wanted.values())) == len(wanted)
    found = {
        k: v for one in ranks(2).run(_load, plan, str(tmp_path / "optimizer.pt"), timeout=60) for k, v in one.items()
    }
    assert found == pytest.approx(wanted, rel=1e-5)


def test_another_order_than_the_model_has_is_refused(ranks, tmp_path: Path) -> None:
    _write(tmp_path / "optimizer.pt")
    ranks(2).raises(_load, "pp=2", str(tmp_path / "optimizer.pt"), True, match="the other way round")
