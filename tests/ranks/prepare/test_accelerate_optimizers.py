"""Optimizers on shards: the steps of torch's own, and of others, on full parameters with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.optimization import Adafactor

from tests.models import build_model
from tests.ranks.parity import whole
from tests.ranks.training import Run, train_omni

PLANS = ["dp_shard=2", "sp=2"]


class _Lamb(torch.optim.Optimizer):
    """Reads the norms of full parameters, which DTensor has."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad * (p.norm() / p.grad.norm()), alpha=-group["lr"])


class _Lion(torch.optim.Optimizer):
    """Works by element, with its state made in the constructor."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p]["mean"]
                p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 0.01)


class _LocalNorm(_Lamb):
    """Reads what this rank has."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                p.add_(p.grad / local.norm().clamp(min=1e-3), alpha=-group["lr"])


# What is made of the parameters. Muon takes matrices alone.
EXACT: dict[str, Any] = {
    "Adadelta": dict(),
    "Adagrad": dict(),
    "Adam": dict(amsgrad=True),
    "AdamW": dict(fused=True),
    "Adamax": dict(),
    "ASGD": dict(t0=1),
    "Muon": dict(),
    "NAdam": dict(),
    "RAdam": dict(),
    "RMSprop": dict(momentum=0.9, centered=True),
    "SGD": dict(momentum=0.9, nesterov=True),
    "_Lamb": dict(),
    "_Lion": dict(),
}
REFUSED: dict[str, Any] = {
    "Adafactor": dict(),
    "LBFGS": dict(),
    "Rprop": dict(),
    "_HuggingFaceAdafactor": dict(scale_parameter=False, relative_step=False),
    "_LocalNorm": dict(),
}
if Version(torch.__version__).release >= (2, 15):  # DTensor has what it takes
    EXACT["Rprop"] = REFUSED.pop("Rprop")
_OTHERS = {"_Lamb": _Lamb, "_Lion": _Lion, "_LocalNorm": _LocalNorm, "_HuggingFaceAdafactor": Adafactor}


def _make(model: nn.Module, name: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    kind = _OTHERS[name] if name in _OTHERS else getattr(torch.optim, name)
    return kind([p for p in model.parameters() if p.dim() == 2 or name != "Muon"], lr=1e-2, **options)


def _steps(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Three steps with gradients that have nothing to do with the model. Collective on ranks."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p in model.parameters():
            gradient: Any = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            shard = getattr(p, "placements", None)
            p.grad = gradient if shard is None else distribute_tensor(gradient, p.device_mesh, shard)  # type: ignore
        optimizer.step()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def _prepare(plan: str, name: str, options: dict[str, Any]) -> Any:
    from accelerate import Accelerator

    from hf_veomni import OmniParallelismConfig, prepare_omni

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    model = prepare_omni(build_model("llama_uneven").double(), plan)
    return model, accelerator.prepare(_make(model, name, options))


def _on_ranks(plan: str, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    return _steps(*_prepare(plan, name, options))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("plan", PLANS)
def test_steps_are_those_of_one_process(ranks, plan, name):
    model = build_model("llama_uneven").double()
    expected = _steps(model, _make(model, name, EXACT[name]))
    for found in ranks(2).run(_on_ranks, plan, name, EXACT[name], timeout=60):
        for key, value in expected.items():
            assert (found[key] - value).abs().max() < 1e-10, key


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_parameters_is_refused(ranks, name):
    kind = name.removeprefix("_HuggingFace")
    match = f"`{kind}` does not work with parameters of which each rank holds a shard.*AdamW.*one rank"
    ranks(2).raises(_prepare, "dp_shard=2", name, REFUSED[name], match=match)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_fused_update_that_dtensor_does_not_know_is_refused(ranks, name):
    match = f"`{name}` does not work with parameters .*fused"
    ranks(2).raises(_prepare, "dp_shard=2", name, {"fused": True}, match=match)


def _train(folder: str) -> None:
    run = Run(arguments={"output_dir": folder, "max_steps": 1})
    train_omni("sp=2", run, optimizer_cls_and_kwargs=(torch.optim.Adafactor, {"lr": 1e-2}))


def test_the_trainer_refuses_it_too(ranks, tmp_path):
    ranks(2).raises(_train, str(tmp_path), match="`Adafactor` does not work with parameters")


def test_every_optimizer_of_torch_is_known_to_be_one_or_the_other():
    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert kinds - EXACT.keys() - REFUSED.keys() == {"Optimizer", "SparseAdam"}  # of embeddings with sparse gradients
