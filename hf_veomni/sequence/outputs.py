"""Which row an output comes from: of the length of a full row, its slice of s tokens tells only ceil(S / sp) = s.

What a model returns is noted, and so is its place in the autograd graph, through which what is computed from it is
found. A tensor of neither (computed without gradients) is of the only length that fits it, or nobody knows.

Shapes: B rows; S tokens of a full row; s tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MARK = "hf_veomni_row"


def tensors_in(output: object) -> Iterator[Tensor]:
    """The tensors that a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))


class Outputs:
    """What one model has returned, and for rows of which lengths."""

    def __init__(self, sp_size: int) -> None:
        self._sp_size = sp_size
        self._lengths: dict[int, set[int]] = {}  # s -> S of the rows that ran
        self._outputs = WeakTensorKeyDictionary()  # output -> (S, whether it is full)

    def __deepcopy__(self, memo: dict[int, Any]) -> Outputs:
        memo[id(self)] = copied = Outputs(self._sp_size)
        copied._lengths = {part: set(lengths) for part, lengths in self._lengths.items()}
        return copied

    @property
    def is_empty(self) -> bool:
        """Whether no forward has been noted."""
        return not self._lengths

    def add(self, length: int) -> None:
        """A row of S tokens begins to run."""
        self._lengths.setdefault(self._part(length), set()).add(length)

    def note(self, output: object, length: int, made_full: bool = False) -> None:
        """What a cut model or backbone returned for a row of `length` tokens.

        Args:
            made_full: its head worked on full rows, so that what is as long as neither is no slice (some leave out
                the first token, or pick one).
        """
        for tensor in tensors_in(output):
            shape = tensor.shape
            node: Any = tensor.grad_fn
            if len(shape) < 2 or self.is_full(tensor):
                continue
            if shape[1] not in (self._part(length), length):
                if made_full:
                    self.note_full(tensor)
            else:
                self._outputs[tensor] = (length, False)
                if node is not None:
                    node.metadata.setdefault(_MARK, (id(self), length))

    def note_full(self, tensor: Tensor) -> None:
        """A tensor [B, S, ...] that has been put together."""
        self._outputs[tensor] = (tensor.shape[1], True)

    def is_full(self, tensor: Tensor) -> bool:
        """Whether a noted output already has the full sequence."""
        return tensor in self._outputs and self._outputs[tensor][1]

    def is_noted(self, tensor: Tensor) -> bool:
        """Whether the model has returned this tensor, as a slice."""
        return tensor in self._outputs and not self.is_full(tensor)

    def length_of(self, local: Tensor, full_fits: bool, length: int | None = None) -> int:
        """S of the row that `local` [B, s, ...] is a slice of.

        Args:
            full_fits: whether outputs may be unsharded, [B, S, ...].
            length: S as the caller names it.

        Raises:
            ValueError: no row fits, or several, and `local` is not known to come from one of them.
        """
        if self.is_empty:
            raise ValueError("No row has run through the model yet: call the model before `gather_sequence`.")
        part = local.shape[1] if local.dim() >= 2 else 0
        if length is not None:
            if part not in (self._part(length), length if full_fits else 0):
                raise ValueError(
                    f"`local` {tuple(local.shape)} is no slice of a row of `length` ({length}) tokens, of which each "
                    f"of {self._sp_size} ranks has {self._part(length)}: pass the length of its row."
                )
            return length
        if local in self._outputs:
            return self._outputs[local][0]
        if full_fits and part in self._lengths.get(self._part(part), ()):
            return part
        fitting = self._lengths.get(part, set())
        if not fitting:
            raise ValueError(
                f"`local` has shape {tuple(local.shape)}, but this rank's slices of the rows that ran have "
                f"{', '.join(map(str, sorted(self._lengths)))} tokens on dimension 1: pass what the model "
                "returned, or what was computed from it token by token."
            )
        found = fitting if len(fitting) == 1 else self._in_graph(local)
        if len(found) != 1:
            raise ValueError(
                f"`local` {tuple(local.shape)} may be of a row of {' or of '.join(map(str, sorted(fitting)))} tokens, "
                "which have run through the model: gather the model's output before computing from it, or name the "
                "length, `gather_sequence(local, model, length=...)`."
            )
        return next(iter(found))

    def _part(self, length: int) -> int:
        return -(-length // self._sp_size)

    def _in_graph(self, local: Tensor) -> set[int]:
        """Lengths of the outputs that a tensor was computed from."""
        base = local._base
        if base is not None and base in self._outputs:
            return {self._outputs[base][0]}
        todo: list[Any] = [local.grad_fn]
        seen, found = set(), set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            mark = node.metadata.get(_MARK)
            if mark is not None and mark[0] == id(self):
                found.add(mark[1])
            else:
                todo += [following for following, _ in node.next_functions]
        return found
