"""Sharded tensors on disk: what each rank owns in a safetensors file of its own, readable under any other layout.

    index.json                                      written last: number of files, global shapes, what is no tensor
    shard-00001-model-00001-of-00001.safetensors    rank 0's parts, with the place of each in its global tensor
    shard-00002-model-00001-of-00001.safetensors    rank 1's

The layout is that of torch.distributed.checkpoint's HuggingFaceStorageWriter, whose reader opens it too. No pickle is
written or read. A part that several ranks hold is written by the first of them. Tensors on the meta device belong to
another pipeline stage, which reads and writes them.

A box is the begin and the end in each dimension of a global tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from operator import index
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.modeling_utils import str_to_torch_dtype

from hf_veomni.checkpoint.lazy import Box, LazyTensor
from hf_veomni.checkpoint.low_bit import as_written, fill
from hf_veomni.checkpoint.manifest import Digest, flush
from hf_veomni.comm.agree import together
from hf_veomni.errors import UnsupportedError

INDEX = "index.json"
_VERSION = 1
_INFO = "DCP_SHARDING_INFO"  # torch's name for where the parts belong
_PLAIN = (type(None), bool, int, float, str)  # what json gives back as it was


def shard_name(rank: int) -> str:
    """Of the file that a rank writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _ranks() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where it begins in the global one."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def _writes(tensor: Tensor, leads: bool) -> bool:
    """Whether this rank is the first of those that hold its part."""
    if tensor.is_meta:
        return False
    if not isinstance(tensor, DTensor):
        return leads
    place = tensor.device_mesh.get_coordinate()
    return place is not None and not any(
        at for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate()
    )


@dataclass(frozen=True)
class Shard:
    """One file as it will be: a header and the tensors' bytes, in this order, without holes.

    Attributes:
        path: of the file.
        header: what safetensors begins with, its own length included.
        tensors: this rank's parts; each begins at a multiple of its item's size behind the header.
    """

    path: Path
    header: bytes
    tensors: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_shard(state: Mapping[str, Tensor], path: Path, leads: bool | None = None) -> Shard:
    """What this rank writes of `state`, global or sharded tensors by name. Reads no values.

    Args:
        leads: whether tensors that are no shards are this rank's to write; None: on rank 0.
    """
    leads = _ranks()[0] == 0 if leads is None else leads
    parts = {name: local_part(tensor.detach()) for name, tensor in state.items() if _writes(tensor, leads)}
    parts = {name: (as_written(part), offset) for name, (part, offset) in parts.items() if part.numel()}
    info = {name: {"saved_offsets": list(offset)} for name, (_, offset) in parts.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", _INFO: json.dumps(info)}
    return _lay_out(path, {name: part for name, (part, _) in parts.items()}, metadata)


def _lay_out(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Shard:
    names = {dtype: name for name, dtype in str_to_torch_dtype.items()}
    # Widest first: so each tensor is aligned to its own items.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    entries: dict[str, Any] = {}
    begin = 0
    for name in order:
        end = begin + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), names[tensors[name].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return Shard(path, len(text).to_bytes(8, "little") + text, [tensors[name] for name in order])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A plain safetensors file, as stock loads it; lazy tensors are read one at a time."""
    write_shard(_lay_out(path, tensors, {"format": "pt"}))


def write_shard(shard: Shard) -> Digest:
    """Write a planned file, one tensor after the other, and flush it. Returns its bytes and checksum."""
    digest, size = hashlib.sha256(), 0
    with shard.path.open("wb") as file:
        for data in _contents(shard):
            file.write(data)
            digest.update(data)
            size += len(data)
    flush(shard.path)
    return size, digest.hexdigest()


def _contents(shard: Shard) -> Iterator[Any]:
    yield shard.header
    for tensor in shard.tensors:
        values = tensor.read() if isinstance(tensor, LazyTensor) else tensor.cpu()
        yield values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def describe(state: Mapping[str, Any], files: int) -> str:
    """The contents of `index.json` for a state of tensors and plain values.

    Raises:
        UnsupportedError: a value that json does not give back as it was.
    """
    shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in values.items():
        if not all(isinstance(part, _PLAIN) for part in (value if isinstance(value, list | tuple) else [value])):
            raise UnsupportedError(
                f"'{name}' ({type(value).__name__}) cannot be written to a checkpoint, which holds tensors, numbers, "
                "strings and lists of them: keep it out of the optimizer's state and groups."
            )
    return json.dumps({"version": _VERSION, "files": files, "shapes": shapes, "values": values}) + "\n"


def plan_state(state: Mapping[str, Any], directory: Path, leads: bool | None = None) -> tuple[Shard, str]:
    """This rank's file of a sharded state, and the contents of the index. `leads`: see `plan_shard`. No collective."""
    rank, world = _ranks()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return plan_shard(tensors, directory / shard_name(rank), leads), describe(state, world)


def write_state(state: Mapping[str, Any], directory: str | os.PathLike[str], leads: bool | None = None) -> None:
    """Write a state of tensors and plain values by name, each rank what it owns. Every rank must call it.

    What is there already does not count from the beginning on, and counts again when all of it is new. `leads`: see
    `plan_shard`.

    Collectives: three small all-gathers over all ranks.

    Raises:
        OSError: a rank cannot write; on every rank.
        UnsupportedError: a value that is no tensor, number or string; on every rank.
    """
    directory, (rank, world) = Path(directory), _ranks()
    with together(f"Writing '{directory}'"):
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (directory / INDEX).unlink(missing_ok=True)
            for stale in set(directory.glob("shard-*.safetensors")) - {
                directory / shard_name(r) for r in range(world)
            }:
                stale.unlink()
    with together(f"Writing '{directory}'"):
        shard, text = plan_state(state, directory, leads)
        write_shard(shard)
    with together(f"Writing '{directory}'"):
        if rank == 0:
            (directory / INDEX).write_text(text)
            flush(directory / INDEX)
            flush(directory)


@dataclass(frozen=True)
class _Part:
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    handle: Any


class ShardReader:
    """A sharded state that is open for reading; `close` it, or use it in a `with`.

    Attributes:
        shapes: name -> global shape.
        values: name -> what is no tensor.

    Raises:
        ValueError: nothing complete there, or a file that is none of this layout.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files = ExitStack()
        self._parts: dict[str, dict[tuple[int, ...], _Part]] = {}
        try:
            files = self._read_index()
            for rank in range(files):
                self._open(self.directory / shard_name(rank))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def _read_index(self) -> int:
        path = self.directory / INDEX
        if not path.is_file():
            raise ValueError(
                f"'{self.directory}' is missing or incomplete (no {INDEX} in it): the checkpoint cannot be resumed "
                "from. Use an earlier one, or load its weights alone with from_pretrained."
            )
        try:
            stored = json.loads(path.read_text())
            self.shapes = {str(name): tuple(map(index, shape)) for name, shape in stored["shapes"].items()}
            self.values = dict(stored["values"])
            version, files = index(stored["version"]), index(stored["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' cannot be read ({type(error).__name__}: {error}).") from error
        if version != _VERSION:
            raise UnsupportedError(f"'{path}' has version {version}, this release reads {_VERSION}: use a newer one.")
        return files

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"'{path}' is missing: the checkpoint is incomplete. Use an earlier one.")
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt"))
            places = json.loads((handle.metadata() or {})[_INFO])
            for name in handle.keys():
                part = handle.get_slice(name)
                offset, shape = tuple(map(index, places[name]["saved_offsets"])), tuple(part.get_shape())
                spans = list(zip(offset, shape, self.shapes[name], strict=True))
                if any(at < 0 or at + size > total for at, size, total in spans):
                    raise ValueError(f"'{name}' {shape} at {offset} is outside of {self.shapes[name]}")
                found = _Part(offset, shape, str_to_torch_dtype[part.get_dtype()], handle)
                self._parts.setdefault(name, {})[offset] = found
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{path}' is no file of a sharded checkpoint ({type(error).__name__}: {error}): use an earlier one."
            ) from error

    def read(self, name: str, box: Box) -> Tensor:
        """The values of a tensor in `box`, on the CPU.

        Raises:
            ValueError: no file has all of it.
        """
        parts = list(self._parts.get(name, {}).values())
        sizes = [part.stop - part.start for part in box]
        # Ranks that keep a moment in codes write fp32, whatever the dtype of the parameter.
        dtype = reduce(torch.promote_types, (part.dtype for part in parts)) if parts else torch.float32
        whole = torch.empty(sizes, dtype=dtype)
        missing = whole.numel()
        for part in parts if missing else ():
            begins = [max(want.start, at) for want, at in zip(box, part.offset, strict=True)]
            ends = [min(want.stop, at + size) for want, at, size in zip(box, part.offset, part.shape, strict=True)]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            spans = list(zip(begins, ends, strict=True))
            source = tuple(slice(b - at, e - at) for (b, e), at in zip(spans, part.offset, strict=True))
            target = tuple(slice(b - want.start, e - want.start) for (b, e), want in zip(spans, box, strict=True))
            whole[target] = part.handle.get_slice(name)[source] if source else part.handle.get_tensor(name)
            missing -= math.prod(end - begin for begin, end in spans)
        if missing:
            raise ValueError(f"'{self.directory}' holds '{name}' in part only: the checkpoint is incomplete.")
        return whole

    def lazy(self, name: str) -> LazyTensor:
        """The whole of a tensor, to be read when it is wanted."""
        parts = self._parts.get(name)
        if not parts:
            raise ValueError(f"'{self.directory}' holds '{name}' in part only: the checkpoint is incomplete.")
        return LazyTensor(self.shapes[name], next(iter(parts.values())).dtype, lambda box: self.read(name, box))

    def check_names(self, names: set[str], what: str) -> None:
        """Raise ValueError unless the tensors here are just `names`; `what` they are, in words, for the message."""
        problems = [
            f"{verb} {', '.join(repr(name) for name in sorted(found)[:4])}"
            + (f" and {len(found) - 4} more" if len(found) > 4 else "")
            for verb, found in (("lacks", names - set(self.shapes)), ("has", set(self.shapes) - names))
            if found
        ]
        if problems:
            raise ValueError(
                f"'{self.directory}' is of another model or of other trainable parameters: unlike {what} it "
                f"{' and '.join(problems)}."
            )


@torch.no_grad()
def read_state(state: dict[str, Any], directory: str | os.PathLike[str], what: str) -> None:
    """Fill a state, sharded in any way, from what `write_state` wrote. Tensors are filled in place. No collective.

    Args:
        what: the state in words ("the model"), for messages.

    Raises:
        ValueError: nothing complete there, or a state of other names or shapes.
    """
    with ShardReader(directory) as reader:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        reader.check_names(set(tensors), what)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != reader.shapes[name]:
                raise ValueError(
                    f"'{directory}': '{name}' has shape {reader.shapes[name]}, but {what} here has "
                    f"{tuple(tensor.shape)}: the checkpoint is of another model."
                )
            if tensor.is_meta:
                continue
            local, offset = local_part(tensor)
            box = tuple(slice(at, at + size) for at, size in zip(offset, local.shape, strict=True))
            if local.numel():
                fill(local, reader.read(name, box))
        for name in state.keys() - tensors.keys():
            if name not in reader.values:
                raise ValueError(f"'{directory}' lacks '{name}': it was written by a run with another optimizer.")
            stored = reader.values[name]
            state[name] = tuple(stored) if isinstance(state[name], tuple) else stored
