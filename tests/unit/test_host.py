"""Tensors whose values the host keeps while they travel. The meta device stands for a real one: it has no values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader

from hf_veomni.host import apply, forget, forget_in_graphs, knows, make, on_host, remember, with_values

DEVICE = torch.device("meta")


def test_values_travel_along() -> None:
    values = torch.tensor([[0, 1, 2, 0, 1]])
    moved = send_to_device({"position_ids": remember(values)}, DEVICE)["position_ids"]
    assert moved.device == DEVICE and knows(moved)
    assert torch.equal(on_host(moved), values)
    assert torch.equal(on_host(moved.to(torch.int32)), values.int())
    assert torch.equal(on_host(apply(lambda x: x[:, 2:], moved)), values[:, 2:])


def test_everything_else_is_a_plain_tensor() -> None:
    moved = remember(torch.arange(4)).to(DEVICE)
    assert type(moved + 1) is type(moved[1:]) is type(torch.cat([moved, moved])) is type(forget(moved)) is torch.Tensor
    assert not knows(moved + 1)
    assert not knows(torch.arange(4))


def test_a_change_on_the_device_makes_the_copy_stale() -> None:
    moved = remember(torch.arange(4)).to(DEVICE)
    moved.add_(1)
    assert not knows(moved)
    with pytest.raises(NotImplementedError, match="meta"):  # asks the device, which has no values here
        on_host(moved)


def test_a_change_on_the_cpu_counts() -> None:
    labels = remember(torch.arange(4))
    labels[0] = -100
    assert on_host(labels.to(DEVICE)).tolist() == [-100, 1, 2, 3]


def test_values_given_later() -> None:
    made = with_values(torch.arange(3, device=DEVICE), torch.arange(3))
    assert made.device == DEVICE and on_host(made).tolist() == [0, 1, 2]


def _collate(samples: list[int]) -> dict[str, torch.Tensor]:
    return {"labels": remember(torch.tensor(samples))}


@pytest.mark.parametrize("workers", [0, 1])
def test_values_come_out_of_a_loader(workers: int) -> None:
    batches = list(DataLoader([1, 2], collate_fn=_collate, num_workers=workers))  # type: ignore[arg-type]
    assert [on_host(batch["labels"].to(DEVICE)).tolist() for batch in batches] == [[1], [2]]


def test_copies_are_as_good() -> None:
    values = remember(torch.arange(3)).to(DEVICE)
    for copied in (copy.deepcopy(values), pickle.loads(pickle.dumps(values))):
        assert copied.device == DEVICE and on_host(copied).tolist() == [0, 1, 2]


def test_layers_take_them() -> None:
    ids = remember(torch.tensor([[1, 2]]))
    layer = torch.nn.Embedding(4, 3)
    assert torch.equal(layer(ids), layer(forget(ids)))
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    assert compiled(ids).tolist() == [[2, 4]]


class _Masked(torch.nn.Linear):
    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.to(torch.float32) * 2)


def _know(module: torch.nn.Module, args: tuple) -> tuple:
    """What the hooks of a prepared model do."""
    return (with_values(args[0], on_host(args[0])),)


@pytest.mark.parametrize("given", [forget, remember])
def test_a_graph_gets_plain_tensors(given):
    """torch's graphs take no subclass as an input: a bare TypeError of its dispatcher."""
    model, mask = _Masked(3, 2), given(torch.tensor([[1, 1, 0]]))
    model.register_forward_pre_hook(_know)
    wanted = model(mask)
    undo = forget_in_graphs(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(mask), wanted)
    assert knows(with_values(mask, on_host(mask)))  # outside of graphs nothing is forgotten
    undo()
    assert list(model._forward_pre_hooks.values()) == [_know]


def test_inference_tensors_are_asked() -> None:
    with torch.inference_mode():
        values = remember(torch.arange(3), DEVICE)
        values.add_(1)
        assert not knows(values)


def test_fakes_stay_fakes() -> None:
    """Of a dry run: they have no values, and nothing says that they have."""
    with FakeTensorMode():
        ids = torch.zeros(3, dtype=torch.long)
        made = with_values(ids, torch.zeros(3, dtype=torch.long))
        assert made is ids and not knows(made)


def test_fakes_remember_real_values() -> None:
    """What is computed from them on the host is real, also where the function makes tensors of its own."""
    real = torch.tensor([[0, 1, 2, 0, 1]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = remember(real, DEVICE)
        assert isinstance(ids, FakeTensor) and knows(ids) and not knows(ids + 1)
        assert ids.device.type == DEVICE.type
        assert (on_host(ids).diff(dim=1) != 1).nonzero()[:, 1].tolist() == [2]
        longer = apply(lambda x: torch.cat([x, x.new_ones(1, 2).cumsum(1) - 1], 1), ids)
        assert longer.shape == (1, 7) and on_host(longer).tolist() == [[0, 1, 2, 0, 1, 0, 1]]
        made = remember(make(lambda: torch.arange(3)[None]), DEVICE)
        assert on_host(made).numpy().tolist() == [[0, 1, 2]]
        assert isinstance(on_host(ids) + torch.zeros(1), FakeTensor)  # with something that has no values
        ids.add_(1)
        assert not knows(ids)
