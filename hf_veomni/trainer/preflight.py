"""Before the first step: what would end in a hang, a wrong model or a lost run is found in seconds, and named.

all ranks    tell over the store, which needs no working collective: versions, arguments, data, model
all ranks    compare; each raises the same error
all ranks    add up their numbers in every process group, within a time limit
"""

from __future__ import annotations

import hashlib
import platform
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer_utils import has_length

from hf_veomni.checkpoint.manifest import left_over_bytes
from hf_veomni.mesh import ParallelState
from hf_veomni.trainer.folders import no_place, saves
from hf_veomni.trainer.store import Board
from hf_veomni.trainer.watchdog import name_ranks

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "hf_veomni")
# Arguments that say where a rank is or what it shows, not what it trains.
_OWN_ARGUMENTS = frozenset(
    {"local_rank", "logging_dir", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "run_name",
     "report_to", "plan", "hub_token", "trackio_space_id"}
)  # fmt: skip
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object without a repr of its own
_VISIBLE = 10.0  # seconds in which a file of one machine appears on another
_EXCHANGE = 50.0  # seconds for one number in one group, whose connections are made with it
_SKEW = 10.0  # seconds that one rank may begin with it later than another
# Moments of the size of a parameter, of the optimizers that are known to keep them so; of others none are counted.
_MOMENTS = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "adamw_torch_8bit": 2, "adamw_torch_4bit": 2, "adagrad": 1, "rmsprop": 1,
}  # fmt: skip


def check_before_training(trainer: Any, resume_from_checkpoint: Any) -> None:
    """Raise on every rank where a run would not go well. Every rank calls it, at the start of `train`.

    Raises:
        ValueError: ranks with other versions, arguments, data or models; ranks that do not come, or that a process
            group does not connect; no space for a checkpoint, or a folder that cannot be written.
    """
    state: ParallelState = trainer.parallel_state
    lack = _lack_of_place(trainer)
    if state.world_size == 1:
        if lack is not None:
            raise ValueError(lack)
        return
    board = Board("preflight")
    facts = {"lack": lack, "where": socket.gethostname(), **_describe(trainer, resume_from_checkpoint)}
    try:
        everyone = board.gather("facts", facts, trainer.args.ddp_timeout)
    except TimeoutError as missing:
        raise ValueError(
            f"`train` was not called by {missing} within `ddp_timeout` ({trainer.args.ddp_timeout} s): every rank has "
            "to. A rank that still prepares its data needs a longer limit, or `with args.main_process_first():`."
        ) from missing
    for found in everyone:
        if found["lack"] is not None:
            raise ValueError(found["lack"])
    _compare(everyone)
    if saves(trainer.args):
        _check_shared(trainer.args, board)
    if state.mesh is not None:
        _try_groups(state, board)


def _compare(everyone: list[dict[str, Any]]) -> None:
    for topic in (name for name in everyone[0] if isinstance(everyone[0][name], dict)):
        for name in dict.fromkeys(name for facts in everyone for name in facts.get(topic, ())):
            kinds: dict[str, list[int]] = {}
            for rank, facts in enumerate(everyone):
                kinds.setdefault(str(facts.get(topic, {}).get(name, "missing")), []).append(rank)
            if len(kinds) > 1:
                said = "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in kinds.items())
                hosts = sorted({facts["where"] for facts in everyone})
                raise ValueError(
                    f"{topic}: `{name}` differs between the ranks: {said}. Start every rank with the same script, "
                    f"arguments, data and installation (machines: {', '.join(hosts[:8])})."
                )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(trainer: Any, resume: Any) -> dict[str, dict[str, Any]]:
    """What must be the same on all ranks, by topic."""
    args = trainer.args
    given = {
        name: _ADDRESS.sub("", repr(value)) for name, value in args.to_dict().items() if name not in _OWN_ARGUMENTS
    }
    if not saves(args):
        del given["output_dir"]  # where nothing of the run is looked for
    versions = {name: _version(name) for name in _PACKAGES}
    # A patch release of Python or a build of torch for another device is the same program.
    versions["torch"] = versions["torch"].partition("+")[0]
    versions["python"] = ".".join(platform.python_version_tuple()[:2])
    place = {"plan": str(args.plan), "device": str(args.device.type), "backend": dist.get_backend()}
    model = {"class": type(trainer.model).__name__}
    if args.plan.pp_size == 1:  # stages have parameters of their own, of a model that `prepare_omni` has compared
        model["parameters"] = _digest(_shapes(trainer.model))
    return {
        "Versions": versions,
        "Placement": place,
        "Arguments": {**given, "resume_from_checkpoint": repr(resume)},
        "Data": _describe_data(trainer.train_dataset),
        **_describe_evaluation(trainer.eval_dataset),
        "Model": model,
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...], str, bool]]:
    """By name; the shape of all shards together."""
    return [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]


def _describe_data(dataset: Any) -> dict[str, Any]:
    """Kind and length, and the contents of three rows where a row is the same whenever it is read."""
    if dataset is None:
        return {"dataset": "none"}
    found: dict[str, Any] = {"dataset": type(dataset).__name__}
    if has_length(dataset):
        found["rows"] = len(dataset)
    if isinstance(dataset, datasets.Dataset) and len(dataset):
        table: Any = dataset.with_format("arrow")  # undecoded: no image is opened, no transform called
        found["columns"] = sorted(dataset.column_names)
        for row in sorted({0, len(dataset) // 2, len(dataset) - 1}):
            found[f"row {row}"] = _digest(table[row].to_pylist())
    return found


def _describe_evaluation(dataset: Any) -> dict[str, dict[str, Any]]:
    """Each set by its topic: ranks that evaluate more or fewer rows than others would wait for them."""
    if not isinstance(dataset, dict):
        return {"Evaluation data": {**_describe_data(dataset), "sets": "one"}}
    every = {f"Evaluation data '{name}'": _describe_data(found) for name, found in dataset.items()}
    return {"Evaluation data": {"sets": sorted(map(str, dataset))}, **every}


def _lack_of_place(trainer: Any) -> str | None:
    """That this rank cannot write there, or that the disk has no room for a checkpoint, in words; None if all is
    well, or nothing is written."""
    args = trainer.args
    if not saves(args):
        return None
    folder = Path(args.output_dir).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return no_place(args.output_dir, error)
    own = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    needed = checkpoint_bytes(trainer.model, args, "the user's" if own else None)
    free = shutil.disk_usage(folder).free
    if free >= needed or not args.should_save:
        return None
    with suppress(OSError):  # another run has the folder, and cleans up itself: that is told when it is locked
        free += left_over_bytes(Path(args.output_dir))  # of a run that was killed
    if free >= needed:
        return None
    return (
        f"`output_dir` ('{args.output_dir}') has {free / 1e9:.2f} GB free on {socket.gethostname()}, and a checkpoint "
        f"of this run takes about {needed / 1e9:.2f} GB: free some, name another disk, or set `save_only_model` or "
        "`save_strategy='no'`."
    )


def _check_shared(args: Any, board: Board) -> None:
    """Each rank writes its part into the same folder: rank 0 puts a file there, for which all look.

    Raises:
        ValueError: some do not find it.
    """
    path = Path(args.output_dir)
    try:
        path /= f".seen-by-all-{board.gather('token', secrets.token_hex(8), _EXCHANGE)[0]}"
        if board.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        board.gather("touched", True, _EXCHANGE)
        end = time.monotonic() + _VISIBLE
        while not (seen := path.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        everyone = board.gather("seen", seen, _EXCHANGE)
    except TimeoutError as missing:
        raise ValueError(f"{missing} said nothing while all looked for a file in `output_dir`.") from missing
    finally:
        if board.rank == 0 and path.is_file():
            path.unlink()
    if blind := [rank for rank, seen in enumerate(everyone) if not seen]:
        raise ValueError(
            f"`output_dir` ('{args.output_dir}') is not the same folder on all ranks: {name_ranks(blind)} cannot see "
            "what rank 0 writes there, and every rank writes its part of a checkpoint. Name a folder on a disk that "
            "all machines share, by its absolute path."
        )


def checkpoint_bytes(model: nn.Module, args: Any, optim: object = None) -> int:
    """Bytes of one checkpoint at least: the weights that are saved, and the optimizer's moments of those trained.

    Args:
        optim: the name of the optimizer, if it is not that of the arguments.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    weights = trained if hasattr(model, "peft_config") else sum(size for size, _ in sizes)
    optim = args.optim if optim is None else optim
    kind = str(getattr(optim, "value", optim))
    return weights + (0 if args.save_only_model else _MOMENTS.get(kind, 0) * trained)


def _groups(state: ParallelState) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """The process groups of a plan that have several ranks, by axis."""
    for mesh in (state.mesh, state.fsdp_mesh, state.expert_mesh):
        if mesh is not None:
            for axis in mesh.mesh_dim_names or ():
                if (group := mesh.get_group(axis)).size() > 1:
                    yield axis, group


def _try_groups(state: ParallelState, board: Board) -> None:
    """One number over each process group. What fails is told over the store, since groups may be what is broken."""
    trouble = None
    for axis, group in _groups(state):
        ranks = dist.get_process_group_ranks(group)
        number = torch.full((), float(board.rank), device=state.device)
        try:
            work: Any = dist.all_reduce(number, group=group, async_op=True)
            end = time.monotonic() + _EXCHANGE
            while not work.is_completed() and time.monotonic() < end:
                time.sleep(0.001)
            if not work.is_completed():
                trouble = f"axis `{axis}` over {name_ranks(ranks)} exchanged nothing within {_EXCHANGE:.0f} s"
            elif number.item() != sum(ranks):
                trouble = f"axis `{axis}` over {name_ranks(ranks)} adds up to {number.item()}, not {sum(ranks)}"
        except RuntimeError as error:  # the backend's own
            trouble = f"axis `{axis}` over {name_ranks(ranks)} failed: {str(error).splitlines()[0]}"
        if trouble is not None:
            break
    try:
        everyone = board.gather("groups", trouble, _EXCHANGE + _SKEW)
    except TimeoutError as missing:
        raise ValueError(f"The process groups do not work: {missing} said nothing after the exchange.") from missing
    told = [f"rank {rank}: {one}" for rank, one in enumerate(everyone) if one is not None]
    if told:
        raise ValueError(
            f"The process groups do not work ({'; '.join(told)}): look at the network between these ranks, at "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and at NCCL_DEBUG=INFO."
        )
