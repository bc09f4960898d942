"""Two sequences in flight: in which order they run, what each has for itself, and how an error of one ends both."""

from __future__ import annotations

import gc
import weakref
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_veomni.pairs
from hf_veomni import UnsupportedError, run_pair
from hf_veomni.comm import give_way
from hf_veomni.context import CheckpointCarrier, current, enter, leave, within
from hf_veomni.pairs import Visit, run_both


def _both(function: Any, *inputs: Any) -> tuple[Any, Any]:
    """Both at once, which give way from their beginning on."""
    calls = [partial(function, x) for x in inputs]
    return run_both((calls[0], calls[1]), (Visit(), Visit()))


def test_each_runs_until_it_gives_way() -> None:
    events: list[str] = []

    def run(name: str) -> str:
        for step in range(3):
            events.append(f"{name}{step}")
            give_way()
        return name

    assert _both(run, "a", "b") == ("a", "b")
    assert events == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_nothing_gives_way_outside_of_a_backbone() -> None:
    events: list[str] = []

    def run(name: str) -> None:
        for step in range(2):
            events.append(f"{name}{step}")
            give_way()
        enter(run, lane=current().flight)
        give_way()
        leave(run)
        events.append(f"{name} ends")

    run_pair(run, "a", "b")
    assert events == ["a0", "a1", "b0", "b1", "a ends", "b ends"]
    assert current().flight is None and current().lane is None


def test_each_has_its_own_context_grad_mode_and_autocast() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="")
    variable.set("outer")

    def run(name: str) -> list[Any]:
        found: list[Any] = [variable.get()]
        variable.set(name)
        with within(ids=torch.zeros(1) if name == "a" else None), torch.set_grad_enabled(name == "a"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "b"):
                give_way()
                dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
                found += [variable.get(), current().ids is None, torch.is_grad_enabled(), dtype]
            give_way()
            found.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return found

    first, second = _both(run, "a", "b")
    assert first == ["outer", "a", False, True, torch.float32, torch.float32]
    assert second == ["outer", "b", True, False, torch.bfloat16, torch.float32]
    assert variable.get() == "outer" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_each_draws_from_its_own_stream() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        give_way()
        first = torch.rand(2)
        give_way()
        return torch.cat([first, torch.rand(2)])

    alone = [run(seed) for seed in (3, 4)]
    for found, expected in zip(_both(run, 3, 4), alone, strict=True):
        assert torch.equal(found, expected)


def test_streams_of_a_pair_differ_and_are_left_alone_where_nothing_draws() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run_pair(lambda _: None, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = run_pair(lambda _: torch.rand(4), 1, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(torch.get_rng_state(), before)


def test_an_error_of_one_ends_the_hooks_and_blocks_of_the_other() -> None:
    ended: list[str] = []

    class Layer(nn.Module):
        def forward(self, name: str) -> None:
            give_way()
            if name == "b":
                raise KeyError(name)
            give_way()

    layer = Layer()
    layer.register_forward_hook(lambda module, args, output: ended.append(args[0]), always_call=True)

    def run(name: str) -> None:
        try:
            layer(name)
        finally:
            ended.append(f"{name} ends")

    with pytest.raises(KeyError, match="b"):
        _both(run, "a", "b")
    assert ended == ["b", "b ends", "a", "a ends"]
    assert _both(lambda x: x, 1, 2) == (1, 2)


def test_an_error_before_the_other_has_begun_is_raised() -> None:
    def run(name: str) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="a"):
        _both(run, "a", "b")


def test_an_error_of_who_is_ended_becomes_a_note_of_the_first() -> None:
    def run(name: str) -> None:
        torch.manual_seed(ord(name))
        with torch.no_grad():
            give_way()
            if name == "b":
                raise KeyError(name)
            try:
                give_way()
            except Exception as error:
                raise OSError("while it ended") from error
            finally:
                torch.set_grad_enabled(False)

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="b") as raised:
        _both(run, "a", "b")
    assert "OSError('while it ended')" in raised.value.__notes__[0]
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    assert current().flight is None and _both(lambda x: x, 1, 2) == (1, 2)


def test_an_interrupt_of_who_is_ended_is_raised() -> None:
    def run(name: str) -> None:
        torch.manual_seed(ord(name))
        give_way()
        if name == "b":
            raise KeyError(name)
        try:
            give_way()
        finally:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        _both(run, "a", "b")
    assert torch.equal(torch.get_rng_state(), state)


def _meeting(key: object, log: list[Any], value: int) -> int:
    def together(*visits: Visit) -> tuple[int, int]:
        log.append(tuple(visit.args[0] for visit in visits))
        return visits[0].args[0] * 10, visits[1].args[0] * 10

    def alone(value: int) -> int:
        log.append(value)
        return value * 100

    lane = current().lane
    assert lane is not None
    return lane.meet(key, Visit((value,)), together, alone)


def test_who_comes_second_calls_for_both() -> None:
    log: list[Any] = []

    def run(value: int) -> list[int]:
        give_way()
        first = _meeting("one", log, value)
        give_way()
        return [first, _meeting("two", log, value + 1)]

    assert _both(run, 1, 5) == ([10, 20], [50, 60])
    assert sorted(sum(log, ())) == [1, 2, 5, 6] and len(log) == 2


def test_nothing_of_a_pair_is_kept_until_garbage_is_collected() -> None:
    class Big:
        pass

    kept: list[weakref.ref[Big]] = []

    def run(given: Big) -> Big:
        give_way()
        made = Big()
        kept.extend(map(weakref.ref, (given, made)))
        return made

    gc.disable()
    try:
        found: Any = _both(run, Big(), Big())
        assert [ref() is None for ref in kept] == [True, False] * 2
        del found
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_who_parks_goes_on_when_the_other_one_lets_it_or_ends() -> None:
    events: list[str] = []

    def run(name: str) -> None:
        lane = current().lane
        assert lane is not None
        if name == "a":
            events.append(f"a released: {lane.park('key')}")
            events.append(f"a released: {lane.park('never')}")
            return
        lane.release("another key")
        give_way()
        events.append("b goes on")
        lane.release("key")
        give_way()
        events.append("b ends")

    _both(run, "a", "b")
    assert events == ["b goes on", "a released: True", "b ends", "a released: False"]


def test_what_only_one_comes_to_is_called_alone() -> None:
    log: list[Any] = []

    def run(more: int, value: int) -> list[int]:
        found = [_meeting("only", log, value)] if value == more else []
        return [*found, _meeting("both", log, value)]

    assert _both(partial(run, 5), 1, 5) == ([10], [500, 50])  # the second one comes elsewhere, and then to the first
    assert _both(partial(run, 1), 1, 5) == ([100, 100], [500])  # the first one waited where the second never comes
    log.clear()
    assert _both(lambda value: _meeting(value, log, value), 1, 5) == (100, 500)  # each waits elsewhere
    assert sorted(log) == [1, 5]


class _Block(nn.Module):
    """Gives way twice, and draws a dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        give_way()
        hidden = nn.functional.dropout(self.one(x).tanh(), 0.5)
        give_way()
        return x + self.two(hidden).sigmoid()


@pytest.mark.parametrize("carried", [False, True])
def test_gradients_equal_those_of_one_after_the_other(carried: bool) -> None:
    blocks = [_Block() for _ in range(3)]
    carriers = [CheckpointCarrier(partial(checkpoint, use_reentrant=False)) for _ in blocks]
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (5, 3)]

    def run(index: int) -> Tensor:
        torch.manual_seed(index)
        hidden = inputs[index]
        for block, carrier in zip(blocks, carriers, strict=True):
            hidden = carrier(block, hidden) if carried else block(hidden)
        return hidden.square().sum()

    parameters = [p for block in blocks for p in block.parameters()]
    expected = torch.autograd.grad(run(0) + run(1), parameters)
    first, second = _both(run, 0, 1)
    for _ in range(2):  # layers run again for each backward
        found = torch.autograd.grad(first + second, parameters, retain_graph=True)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_checkpointed_goes_on_alone_and_is_computed_again_side_by_side(at_once: bool) -> None:
    events: list[str] = []

    def block(x: Tensor, name: str) -> Tensor:
        events.append(f"{name} begins")
        y = x.sin()
        give_way()
        events.append(f"{name} ends")
        return y.cos()

    def run(name: str) -> Tensor:
        x = torch.ones(2, requires_grad=True)
        for carrier in carriers:
            x = carrier(block, x, name)
        return x.sum()

    carriers = [CheckpointCarrier(partial(checkpoint, use_reentrant=False)) for _ in range(2)]
    losses = _both(run, "a", "b")
    assert events == ["a begins", "b begins", "a ends", "a begins", "b ends", "b begins", "a ends", "b ends"]
    events.clear()
    if at_once:
        (losses[0] + losses[1]).backward()
        layer = ["b begins", "a begins", "b ends", "a ends"]
        assert events == layer * 2
    else:
        losses[0].backward()
        losses[1].backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"use_reentrant": True}, "use_reentrant"), ({"use_reentrant": False, "context_fn": tuple}, "context_fn")],
)
def test_checkpointing_that_would_mix_both_is_refused(kwargs: dict[str, Any], match: str) -> None:
    carrier = CheckpointCarrier(partial(checkpoint, **kwargs))
    with pytest.raises(UnsupportedError, match=match):
        _both(lambda x: carrier(torch.sin, x), torch.ones(1), torch.ones(1))


def test_a_missing_greenlet_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_veomni.pairs, "greenlet", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-veomni\[overlap\]'"):
        run_pair(lambda x: x, 1, 2)
