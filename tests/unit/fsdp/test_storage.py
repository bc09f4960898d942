"""Parameters that share memory are refused, fakes of a dry run too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
from torch import nn
from torch._subclasses import FakeTensorMode

from hf_veomni import UnsupportedError
from hf_veomni.fsdp.storage import check_own_storage


@pytest.mark.parametrize("mode", [nullcontext(), FakeTensorMode()], ids=["real", "fake"])
def test_two_views_of_one_memory_are_refused(mode: AbstractContextManager) -> None:
    with mode:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        check_own_storage(model)
        model[1].weight = nn.Parameter(model[0].weight.detach().T)
        with pytest.raises(UnsupportedError, match="'0.weight' and '1.weight' are two views of the same memory"):
            check_own_storage(model)
        model[1].weight = model[0].weight  # tied by being the same parameter
        check_own_storage(model)
