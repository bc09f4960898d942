"""A world of ranks that are not there: this process is one of them, and no collective moves anything.

What in the package, and in torch, cannot be answered without values or without other ranks is answered here, and only
within `fake_world`. Nothing of the step path knows of it:

    agreement of the ranks      there is one voice
    device of the rank          the CPU, since autograd wants a driver for fake CUDA tensors, too; but kernels, chunks
                                and compiled functions are chosen as on the device that is asked for
    meshes                      made with real tensors, since torch reads them back
    routes of experts           balanced over the experts, or with the skew that is asked for
    grids of a rank's items     keep their values, as those of the batch do (`encoders`)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from hf_veomni.expert.bundles import count_hits
from hf_veomni.expert.compute import Groups
from hf_veomni.expert.dispatch import (
    Route,
    chunk_sizes,
    count_pairs,
    exchange_counts,
    make_bundles,
    rows_per_token,
    saves_bytes,
)
from hf_veomni.hf.require import require
from hf_veomni.host import as_values
from hf_veomni.loss import chunked
from hf_veomni.loss.head import default_chunk_tokens

_FAKE = "torch.testing._internal.distributed.fake_pg"
# transformers' own name: whether there are as many placeholders as features is a question to the values.
_UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: object, **kwargs: object) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def _move(module: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    """`Module.to`: all is on its device; for another dtype there are new parameters, since torch swaps no fakes."""
    given = (*args, *kwargs.values())
    dtype = next(
        (x.dtype if isinstance(x, Tensor) else x for x in given if isinstance(x, (Tensor, torch.dtype))), None
    )
    made: dict[Tensor, Tensor] = {}

    def cast(x: Tensor) -> Tensor:
        if x not in made:
            cast = x.detach().to(dtype)
            made[x] = nn.Parameter(cast, x.requires_grad) if isinstance(x, nn.Parameter) else cast
        return made[x]

    for owner in module.modules() if dtype is not None else ():
        both: tuple[Any, ...] = owner._parameters, owner._buffers
        for tensors in both:
            changed = {n: cast(x) for n, x in tensors.items() if x is not None and x.is_floating_point()}
            tensors.update(changed)
    return module


def even_split(number: int, parts: int) -> list[int]:
    """`number` in `parts` sizes that differ by at most one, the larger ones first."""
    small, larger = divmod(number, parts)
    return [small + (part < larger) for part in range(parts)]


def balanced_routes(
    skew: float,
    top_k_index: Tensor,
    num_experts: int,
    group: dist.ProcessGroup | None,
    chunks: int = 1,
) -> list[Route]:
    """What `make_routes` makes where routing is even, and this rank's experts get `skew` times their share.

    Collective: that of `make_routes`.
    """
    index = top_k_index.split(chunk_sizes(len(top_k_index), chunks))
    parts = [part.reshape(-1) for part in index]
    orders = [torch.argsort(experts, stable=True) for experts in parts]
    counts = [count_pairs(experts, num_experts) for experts in parts]
    pairs = [experts.numel() for experts in parts]
    if group is None:
        sizes = [even_split(number, num_experts) for number in pairs]
        return [Route(o, Groups(c, s)) for o, c, s in zip(orders, counts, sizes, strict=True)]
    ranks = dist.get_world_size(group)
    leaving = torch.stack([count.view(ranks, -1) for count in counts], dim=1)
    bundled = saves_bytes(top_k_index.shape[-1], num_experts, ranks)
    hits = [count_hits(part // leaving.shape[-1], ranks) for part in index] if bundled else []
    _, came = exchange_counts(leaving, hits, group)
    each = rows_per_token(top_k_index.shape[-1], num_experts, ranks) / ranks  # rows of a token for a rank
    routes = []
    for chunk, number in enumerate(pairs):
        send, receive = even_split(number, ranks), even_split(round(number * skew), ranks)
        sizes = even_split(sum(receive), num_experts // ranks)
        arriving, bundles = came[:, chunk, : leaving.shape[-1]], None
        if bundled:
            tokens = len(index[chunk])
            rows = [round(tokens * each)] * ranks, [round(tokens * min(1.0, each * skew))] * ranks
            bundles = make_bundles(hits[chunk], leaving[:, chunk], came[:, chunk], *rows)
        groups = Groups(arriving.sum(0), sizes)
        routes.append(Route(orders[chunk], groups, arriving.flatten(), send, receive, bundles))
    return routes


def _chunk_on_cuda(vocabulary: int, hidden_bytes: int, device_type: str = "cuda") -> int:
    return default_chunk_tokens(vocabulary, hidden_bytes, "cuda")


def _compiled_applies(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and logits.numel() >= chunked._LEAST_ELEMENTS


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The results of a compiled function, which makes nothing else."""
    if function.__name__ == "log_sum_exp":
        return lambda logits, targets: (logits.new_empty(len(logits), dtype=torch.float32),) * 2
    return lambda logits, *rest: torch.empty_like(logits)


def _substitutes(world_size: int, kernels: str, skew: float) -> Iterator[tuple[str, str, Any]]:
    device = torch.device("cpu")
    yield "hf_veomni.mesh", "_start", lambda: (device, world_size)
    yield "hf_veomni.mesh", "_find_device", lambda: device
    yield "hf_veomni.fsdp.sync", "_alone", lambda: True
    yield "hf_veomni.comm.agree", "_world_size", lambda: 1
    yield "hf_veomni.sequence.attach", "check_same_rows", lambda given, state: None
    yield "hf_veomni.expert.forward", "make_routes", partial(balanced_routes, skew)
    yield "hf_veomni.pairs:_ThreadState", "draws_as", lambda self, other: True  # nothing draws
    yield "hf_veomni.modality.items", "remember", lambda grid, device: as_values(grid)
    if kernels == "cuda":
        yield "hf_veomni.attention.varlen", "has_kernel", lambda device: True
        yield "hf_veomni.expert.compute", "has_grouped_kernel", lambda device: True
        yield "hf_veomni.loss.head", "default_chunk_tokens", _chunk_on_cuda
        yield "hf_veomni.loss.chunked", "can_compile", _compiled_applies
        yield "hf_veomni.loss.chunked", "compiled", _compiled
    stock = import_module("hf_veomni.mesh").init_parallel_state
    yield "hf_veomni.prepare", "init_parallel_state", _really(stock)
    yield "torch.nn:Module", "to", _move
    yield "torch.distributed.device_mesh:DeviceMesh", "__init__", None
    yield "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam", "_init_sharding_spec_tp", None


@contextmanager
def _unchecked() -> Iterator[None]:
    before = os.environ.get(_UNCHECKED)
    os.environ[_UNCHECKED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_UNCHECKED]
        else:
            os.environ[_UNCHECKED] = before


@contextmanager
def _replaced(where: str, name: str, value: object) -> Iterator[None]:
    module, _, member = where.partition(":")
    owner: Any = import_module(module)
    owner = getattr(owner, member) if member else owner
    if value is None and not hasattr(owner, name):
        yield  # of another version of torch
        return
    stock = getattr(owner, name)
    setattr(owner, name, _really(stock) if value is None else value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextmanager
def fake_world(world_size: int, rank: int, *, kernels: str = "cpu", skew: float = 1.0) -> Iterator[FakeTensorMode]:
    """Make this process rank `rank` of `world_size` ranks, and its tensors fake. One at a time.

    Raises:
        RuntimeError: the process is a rank already.
    """
    if dist.is_initialized():
        raise RuntimeError("This process is a rank already: `torch.distributed` is initialised. Dry-run in another.")
    require(_FAKE, ("FakeStore",))
    store = import_module(_FAKE).FakeStore()  # the module registers the backend "fake"
    _clear_sharding_prop_cache()  # which knows meshes by their sizes, and would give those of another world
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=store)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_unchecked())
            for where, name, value in _substitutes(world_size, kernels, skew):
                stack.enter_context(_replaced(where, name, value))
            stack.enter_context(mode)
            yield mode
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
