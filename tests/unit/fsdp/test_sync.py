"""Parameters and buffers of all ranks made equal where some of them are not on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_veomni.fsdp import sync


def test_buffers_of_the_cpu_travel_by_way_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL does, these collectives take nothing from the CPU; two ranks, of which all tensors differ."""
    travelled: list[torch.device] = []

    def collective(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        assert tensor.device.type == "cuda", "No backend type associated with device type cpu"
        travelled.append(tensor.device)

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: 1,
        all_gather_object=lambda values, value: values.__setitem__(slice(None), [value] * 2),
        all_reduce=collective,
        broadcast=collective,
        ReduceOp=dist.ReduceOp,
    )
    monkeypatch.setattr(sync, "dist", fake)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [False] * len(self))  # they have no values
    model = nn.BatchNorm1d(3)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = nn.BatchNorm1d(3)
        model.weight = nn.Parameter(torch.ones(3, device="cuda"), requires_grad=False)
        names = sync.synchronize_parameters(model, torch.device("cuda", 0))
    assert names == [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert len(travelled) == 2 + len(names)
    assert model.running_mean is not None and model.running_mean.device.type == "cpu"
