"""Forward and backward of a rank on a device that has no values: the meta device stands for a GPU.

Every read of a value raises here, every operation on tensors of the device and of the CPU together does, and so does
every collective on a tensor of the CPU, as with NCCL: the group knows the meta device alone. Kernels are taken as on a
GPU (`has_kernel`, `has_grouped_kernel`). What FSDP2 does is torch's and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_veomni import OmniDataCollatorWithPacking, ParallelPlan, prepare
from hf_veomni.attention import varlen
from hf_veomni.expert import compute
from hf_veomni.expert.dispatch import Route, combine, count_pairs, dispatch
from hf_veomni.host import forget
from hf_veomni.mesh import ParallelState
from tests.models import build_model

DEVICE = torch.device("meta")
LENGTHS = (9, 21, 7)  # an odd row


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """Rank 0 of two, of which collectives move nothing; kernels as on a GPU."""
    monkeypatch.setattr(varlen, "has_kernel", lambda device: device == DEVICE)
    monkeypatch.setattr(compute, "has_grouped_kernel", lambda device: device == DEVICE)
    dist.init_process_group("meta:fake", rank=0, world_size=2, store=FakeStore())
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture
def attached(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`attached(name)`: a model of the zoo on the device, with all hooks of a rank of sp=2 but that of dropout."""
    monkeypatch.setattr(prepare, "attach_dropout", lambda model, state: lambda: None)  # "meta" has no generator
    undo: list[Callable[[], Any]] = []

    def attach(name: str, **overrides: Any) -> Any:
        with torch.device("cpu"):
            model: Any = build_model(name, dtype=torch.bfloat16, **overrides).to(DEVICE)
        state = ParallelState(ParallelPlan(sp_size=2).resolve(2), DEVICE, sp_group=group)
        prepare._attach(model, state, "auto", True, undo, apart=True)
        model._omni_attachment._compared = True  # the rows of the ranks are compared in the first call, on the host
        return model

    try:
        yield attach
    finally:
        for step in reversed(undo):
            step()


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]
    row = OmniDataCollatorWithPacking()([{"input_ids": x} for x in ids])
    return {name: values.to(DEVICE) for name, values in row.items()}


@pytest.mark.parametrize(
    "name", ["llama", "llama_uneven", "qwen3_sliding", "qwen3_moe", "gpt_oss", "gemma2", "gemma3"]
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_stays_on_the_device(attached: Callable[..., Any], name: str, checkpointing: bool) -> None:
    model = attached(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(**_batch(), use_cache=False).loss
    loss.backward()
    assert loss.device == DEVICE
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.device == DEVICE for parameter in model.parameters())


def test_the_device_has_no_values(attached: Callable[..., Any]) -> None:
    """Without the collator's knowledge the model has to ask, which is seen here."""
    model = attached("llama")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        model(**{name: forget(values) for name, values in _batch().items()}, use_cache=False)


@pytest.mark.parametrize("where", ["operation", "collective"])
def test_a_tensor_of_the_cpu_is_noticed(group: dist.ProcessGroup, where: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        if where == "operation":
            torch.ones(2, device=DEVICE) + torch.ones(2)
        else:
            dist.all_reduce(torch.ones(2), group=group)


def test_experts_of_two_ranks_stay_on_the_device(group: dist.ProcessGroup) -> None:
    """Dispatch, grouped kernel and combine with the sizes of a route that the host knows."""
    tokens, top_k, width = 12, 2, 16
    experts = torch.arange(tokens * top_k, device=DEVICE) % 4
    counts = count_pairs(experts, 4)
    arriving, half = torch.empty_like(counts), tokens * top_k // 2
    groups = compute.Groups(arriving.view(2, -1).sum(0), [half] * 2)
    route = Route(torch.argsort(experts), groups, arriving, [half] * 2, [half] * 2)
    x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, width, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, top_k, device=DEVICE, requires_grad=True)
    rows, arrived = dispatch(x, weights, route, group)
    out = combine(compute.grouped_matmul(rows, weight, groups), arrived, weights, route, group)
    assert out.shape == (tokens, width)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.device == DEVICE for t in (x, weight, weights))
