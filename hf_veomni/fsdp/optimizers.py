"""Optimizers on shards: which of them give what they give on full parameters.

An update of an element that reads no other element is the same on a shard. Others read a parameter as a whole
(factored moments, norms, orthogonal matrices): then it is up to DTensor whether the numbers are those of the whole.
That is found out by trying, on a tensor of a few elements.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import _muon

from hf_veomni.comm.agree import agree
from hf_veomni.errors import UnsupportedError
from hf_veomni.logs import logger

_BY_ELEMENT = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
)
# Of torchao: updates of an element read the block of its own shard, so that full parameters would tell nothing.
_BY_BLOCK = frozenset({"AdamW8bit", "AdamW4bit"})
_FUSED = (torch.optim.Adam, torch.optim.AdamW)  # whose `fused` update DTensor knows
_STEPS, _TOLERANCE = 3, 1e-5


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose steps on shards are not those on full parameters.

    Torch's optimizers that work by element are known, and torchao's that keep few bits of the moments. Any other makes
    three steps on a small tensor, whole and sharded as the parameters are; where it cannot be tried by itself, a
    warning says so. The optimizer given is not touched.

    Collectives: those of the optimizer on the small tensors, and an all-gather of small objects over all ranks; none
    for optimizers that are known, or that hold no shards.

    Raises:
        UnsupportedError: its steps raise or differ; on every rank.
    """
    kind = type(optimizer)
    groups = [[p for p in group["params"] if isinstance(p, DTensor)] for group in optimizer.param_groups]
    if not any(groups):
        return
    if kind in _BY_ELEMENT:
        if kind not in _FUSED and any(group.get("fused") for group in optimizer.param_groups):
            agree(
                _refusal(optimizer, "`fused` (True) has no form for shards (leave it out)"), "Checking the optimizer"
            )
        return
    if kind.__name__ in _BY_BLOCK and kind.__module__.partition(".")[0] == "torchao":
        _compile_for_each_rank(optimizer)
        return
    if isinstance(optimizer, torch.optim.Muon):
        _orthogonalize_whole()
    samples = [list({(p.dim(), p.device_mesh, p.placements): p for p in group}.values()) for group in groups]
    try:
        expected = _steps(optimizer, samples, lambda whole, like: whole)
    except Exception as error:  # of any kind: the code is the user's
        if not dist.get_rank():
            logger.warning(
                "Whether %s gives on shards what it gives on full parameters could not be tried (%s: %s): compare a "
                "few steps with those of one process.",
                *(kind.__name__, type(error).__name__, error),
            )
        return
    agree(_difference(optimizer, samples, expected), "Checking the optimizer")


def _difference(optimizer: Any, samples: list[list[DTensor]], expected: list[Tensor]) -> UnsupportedError | None:
    try:
        found = _steps(optimizer, samples, lambda whole, like: distribute_tensor(whole, *like, src_data_rank=None))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return _refusal(optimizer, f"its update fails on shards ({type(error).__name__}: {first})")
    worst = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    if worst > _TOLERANCE:
        return _refusal(optimizer, f"its update reads more than one element, and differs on shards (by {worst:.1e})")
    return None


def _refusal(optimizer: Any, reason: str) -> UnsupportedError:
    known = ", ".join(sorted(one.__name__ for one in _BY_ELEMENT))
    return UnsupportedError(
        f"`{type(optimizer).__name__}` does not work with parameters of which each rank holds a shard: {reason}. Use "
        f"an optimizer that works by element ({known}), `torch.optim.Muon`, or one rank."
    )


def _steps(
    optimizer: Any, samples: list[list[DTensor]], place: Callable[[Tensor, tuple[Any, Any]], Tensor]
) -> list[Tensor]:
    """Whole tensors, of the kinds of `samples`, after a few steps of a copy of `optimizer` on them.

    The copy is made with these tensors in place of the parameters, and nothing in place of the state.
    """
    generator = torch.Generator().manual_seed(0)
    trial = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): trial, id(optimizer.state): defaultdict(dict)}
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    for group, shards in zip(optimizer.param_groups, samples, strict=True):
        made = []
        for shard in shards:
            whole = torch.randn(_shape(shard), generator=generator, dtype=torch.float64)
            like = (shard.device_mesh, shard.placements)
            made.append(nn.Parameter(place(whole.to(shard.device), like)))
            # Rows of unlike sizes, so that a norm of a part is not that of the whole.
            sizes = torch.logspace(-1, 1, whole.shape[0] if whole.dim() else 1, dtype=torch.float64)
            gradient = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
            gradient = gradient * sizes.view(-1, *[1] * (whole.dim() - 1)) if whole.dim() else gradient
            parameters.append((made[-1], place(gradient.to(shard.device), like)))
        memo[id(group["params"])] = made
    hooks = {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    vars(trial).update(copy.deepcopy({k: v for k, v in vars(optimizer).items() if k not in hooks}, memo), **hooks)
    if callable(train := getattr(type(trial), "train", None)):  # of schedule-free ones
        train(trial)

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for parameter, gradient in parameters:
            parameter.grad = parameter.detach() + gradient
            value = (parameter.detach() / 2 + gradient).mul(parameter.detach()).sum()
            total = total + (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        return total

    for _ in range(_STEPS):
        closure()
        type(trial).step(trial, closure)  # not `trial.step`, which a scheduler may have bound to the optimizer itself
    return [p.full_tensor() if isinstance(p, DTensor) else p.data for p, _ in parameters]


def _shape(parameter: DTensor) -> list[int]:
    """A small tensor of as many dimensions, sharded unevenly."""
    shape = [min(size, 3) for size in parameter.shape]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            shape[placement.dim] = 2 * parameter.device_mesh.size(axis) + 1
    return shape


def _compile_for_each_rank(optimizer: torch.optim.Optimizer) -> None:
    """Keep torchao's compiled step out of torch's cache on disk, which takes shards of unlike sizes for the same.

    Its key has the size of the full parameter. Where a dimension does not divide, another rank's code would be found,
    and raise. What the compiler makes of a graph is still cached, by the sizes in it.
    """
    before: list[bool] = []

    def turn_off(*_: object) -> None:
        before.append(functorch_config.enable_autograd_cache)
        functorch_config.enable_autograd_cache = False

    def turn_back(*_: object) -> None:
        functorch_config.enable_autograd_cache = before.pop()

    optimizer.register_step_pre_hook(turn_off)
    optimizer.register_step_post_hook(turn_back)


def _orthogonalize_whole() -> None:
    """Let Muon make full matrices orthogonal on each rank, in which it rounds to bf16 in the order of one process.

    Of shards torch would gather some in each of its iterations, and add up partial products in bf16.
    """
    stock = _muon._zeropower_via_newtonschulz
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def orthogonalize(gradient: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(gradient, DTensor):
            return stock(gradient, *args, **kwargs)
        whole = stock(gradient.full_tensor(), *args, **kwargs)
        return distribute_tensor(whole, gradient.device_mesh, gradient.placements, src_data_rank=None)

    _muon._zeropower_via_newtonschulz = orthogonalize
