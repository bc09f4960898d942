"""The context of the running forward: fields come and go by owner, and a recomputation has that of its forward."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_veomni
from hf_veomni import hf
from hf_veomni.attention.documents import Documents
from hf_veomni.context import Call, CheckpointCarrier, Row, current, enter, leave, within

DOCUMENTS = Documents.from_lengths([(3, 5)])


def test_the_package_has_one_context_variable() -> None:
    package = Path(hf_veomni.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "ContextVar(" in path.read_text()] == ["context.py"]


def test_owners_leave_in_any_order() -> None:
    call, row = Call(None, False, False, None), Row(None, 8, 8, False)
    enter(call, call=call)
    enter(row, row=row, documents=DOCUMENTS)
    assert current().call is call and current().row is row and current().documents is DOCUMENTS
    leave(call)
    assert current().call is None and current().row is row and current().documents is DOCUMENTS
    leave(call)  # once more changes nothing
    leave(row)
    assert current().row is None and current().documents is None and not current().entries


def test_a_block_ends_with_an_error() -> None:
    with pytest.raises(KeyError), within(documents=DOCUMENTS):
        raise KeyError
    assert current().documents is None


def _backward(loss: torch.Tensor) -> None:
    """In a thread of its own, as autograd does it on a GPU."""
    thread = Thread(target=loss.backward, kwargs={"retain_graph": True})
    thread.start()
    thread.join()


def test_a_recomputation_has_the_context_and_the_records_of_its_forward() -> None:
    carried, seen, made = CheckpointCarrier(lambda *args: checkpoint(*args, use_reentrant=False)), [], []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    def layer(x: torch.Tensor) -> torch.Tensor:
        recorded = current().recorded
        assert recorded is not None
        seen.append((current().documents, recorded.recall(make), recorded.recall(make)))
        return x.exp() * x.sin()

    x = torch.ones(3, requires_grad=True)
    with within(documents=DOCUMENTS):
        loss = carried(layer, carried(layer, x)).sum()
    first, second = (DOCUMENTS, 0, 1), (DOCUMENTS, 2, 3)
    assert seen == [first, second]
    for _ in range(2):
        _backward(loss)
    assert seen == [first, second] + [second, first] * 2
    assert current().recorded is None and current().documents is None


def test_the_carrier_is_put_on_once_and_taken_off() -> None:
    def function(function: Any, *args: Any) -> Any:
        return function(*args)

    layer: Any = nn.Module()
    hf.wrap_checkpointing([layer], CheckpointCarrier)  # not checkpointed
    layer._gradient_checkpointing_func = function
    for _ in range(3):  # each forward does it
        hf.wrap_checkpointing([layer], CheckpointCarrier)
    outer = layer._gradient_checkpointing_func
    assert type(outer) is CheckpointCarrier and outer.inner is function and outer(lambda x: x + 1, 1) == 2
    for _ in range(2):
        hf.restore_checkpointing([layer], CheckpointCarrier)
        assert layer._gradient_checkpointing_func is function
