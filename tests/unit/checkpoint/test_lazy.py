"""Parts of a lazy tensor equal the same parts of the whole one, through everything that conversions do."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import core_model_loading as stock

from hf_veomni.checkpoint.lazy import LazyTensor, open_lazy


class _Counted:
    """A tensor as a lazy one, with the number of elements read from it."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.read = values, 0
        self.lazy = LazyTensor(values.shape, values.dtype, self._take)

    def _take(self, box):
        self.read += self.values[box].numel()
        return self.values[box].clone()


def _boxes(shape):
    """Halves and single rows in every dimension, and what is empty."""
    choices = [sorted({(0, n), (0, n // 2), (n // 2, n), (n - 1, n), (n, n)}) for n in shape]
    for box in itertools.product(*choices):
        yield tuple(slice(*part) for part in box)


def _check(function, *shapes, dtype=torch.float32):
    sources = [_Counted(torch.randn(shape).to(dtype)) for shape in shapes]
    wanted = function(*[source.values for source in sources])
    got = function(*[source.lazy for source in sources])
    assert not any(source.read for source in sources), "read before a part was wanted"
    wanted, got = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (wanted, got))
    assert len(wanted) == len(got)
    for whole, lazy in zip(wanted, got, strict=True):
        assert isinstance(lazy, LazyTensor) and lazy.shape == whole.shape and lazy.dtype == whole.dtype
        assert torch.equal(lazy.read(), whole)
        for box in _boxes(whole.shape):
            assert torch.equal(lazy.read(box), whole[box]), box
    return sources


OPERATIONS = {
    "detach": lambda a: a.detach(),
    "index": lambda a: a[...],
    "cast": lambda a: a.to(torch.bfloat16),
    "transpose": lambda a: a.transpose(1, 2).contiguous(),
    "transpose negative": lambda a: a.transpose(-1, 0),
    "permute": lambda a: a.permute(2, 0, -2),
    "slice": lambda a: a[1:3, :, -3:-1],
    "step": lambda a: a[:, ::2],
    "select": lambda a: a[:, -1],
    "unbind": lambda a: torch.unbind(a, -2),
    "chunk": lambda a: torch.chunk(a, 3, dim=2),
    "split": lambda a: torch.split(a, [1, 2, 3], dim=-1),
    "squeeze": lambda a: a[:, 1:2].squeeze(1),
    "squeeze nothing": lambda a: a.squeeze(1),
    "unsqueeze": lambda a: a.unsqueeze(-1),
    "cat": lambda a: torch.cat([a, a[:1]], 0),
    "stack": lambda a: torch.stack([a, a * 2], 1),
    "stack of real": lambda a: torch.stack([a, torch.ones(4, 2, 6)], -1),
    "view": lambda a: a.reshape(4, 3, 4).transpose(1, 2),
    "arithmetic": lambda a: (a * 3 + 1).sum(1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_parts_equal_those_of_the_whole(name):
    _check(OPERATIONS[name], (4, 2, 6))


CONVERSIONS = {
    "experts": ([stock.MergeModulelist(0), stock.Concatenate(1)], ["gate.*", "up.*"], ["gate_up"]),
    "fused": ([stock.Chunk(0)], ["qkv"], ["q", "k", "v"]),
    "fused permuted": ([stock.Chunk(0), stock.PermuteForRope()], ["qkv"], ["q", "k", "v"]),
    "interleaved": ([stock.Interleave(0)], ["a"], ["b"]),
    "transposed": ([stock.Transpose(0, 1)], ["a"], ["b"]),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_transformers_by_parts_equal_the_whole(name):
    operations, sources, targets = CONVERSIONS[name]
    per_source = 3 if name == "experts" else 1

    def convert(*tensors):
        found = {key: list(tensors[i * per_source : (i + 1) * per_source]) for i, key in enumerate(sources)}
        for operation in operations:
            found = operation.convert(
                found,
                source_patterns=sources,
                target_patterns=targets,
                config=SimpleNamespace(num_attention_heads=2),
            )
        return [found[key] for key in targets]

    _check(convert, *[(12, 8)] * (per_source * len(sources)))


def test_reads_no_more_than_the_part_of_stacked_experts():
    sources = [_Counted(torch.randn(6, 4)) for _ in range(8)]
    stacks = [torch.stack([s.lazy for s in sources[i : i + 4]]) for i in (0, 4)]
    joined = torch.cat(stacks, 1)  # gate_up [4, 12, 4]
    part = joined.read((slice(1, 2), slice(0, 6), slice(0, 4)))  # gate of expert 1, no up
    assert torch.equal(part[0], sources[1].values)
    assert [source.read for source in sources] == [0, 24, 0, 0, 0, 0, 0, 0]


def test_comparisons_read_at_once():
    a, b = (_Counted(torch.arange(6.0)) for _ in range(2))
    assert torch.equal(a.lazy, b.lazy)


def test_refuses_to_write():
    with pytest.raises(TypeError, match="writes into a tensor of the checkpoint"):
        _Counted(torch.zeros(3)).lazy.mul_(2)


def test_refuses_to_join_what_differs():
    with pytest.raises(ValueError, match="different shapes"):
        torch.stack([_Counted(torch.zeros(3)).lazy, _Counted(torch.zeros(4)).lazy])


def test_reads_files(tmp_path):
    tensors = {"a": torch.randn(5, 7).bfloat16(), "scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    with ExitStack() as files:
        lazy = open_lazy(str(tmp_path / "x.safetensors"), files)
        for name, tensor in tensors.items():
            assert torch.equal(lazy[name].read(), tensor) and lazy[name].dtype == tensor.dtype
        assert torch.equal(lazy["a"].read((slice(1, 3), slice(2, 5))), tensors["a"][1:3, 2:5])
