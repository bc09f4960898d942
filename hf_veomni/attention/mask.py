"""What a token may attend to, as a small object in place of an S x S mask.

A mask function is read (`mask_reader`) into limits, which an attention uses without a mask, and spans of tokens that
see nothing outside: documents without their padding, cut into chunks where the model has them. A function that cannot
be read is evaluated by transformers' own code, block by block and never outside of a document.

Shapes: B rows; S tokens of a full row; m queries and n keys of one block.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask_reader import MaskFunction, Pattern, holds_absolute_chunks, read_pattern, required
from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply, make, on_host, remember, with_values


class Span(NamedTuple):
    """Tokens of one row that attend to each other only. Limits in tokens of the row, end exclusive."""

    row: int
    begin: int
    end: int


class KernelLayout(NamedTuple):
    """Spans as a varlen kernel takes them.

    Attributes:
        cu_seqlens: int32 [number of spans + 1].
        max_length: tokens of the longest span.
        index: int64, the tokens of the flattened B*S that lie in a span; None if all do.
    """

    cu_seqlens: Tensor
    max_length: int
    index: Tensor | None


class _NoTensorError(UnsupportedError, AttributeError):
    """A model computes with its mask; `hasattr` still works."""


class MaskSpec:
    """Which tokens of the full rows attend to which; passes through a model as its `attention_mask`.

    Attributes:
        before, after: limits within a span in tokens, None for none.
        causal: whether nothing is seen that comes after, after=0.
        spans: what is left of the documents without padding, cut into chunks where the pattern has them. Tokens
            outside of every span attend to nothing.
        evaluate: `block` decides within a span; otherwise `before` and `after` say all.
    """

    def __init__(
        self,
        num_rows: int,
        row_length: int,
        function: MaskFunction,
        *,
        padding: Tensor | None = None,
        documents: Documents | None = None,
        device: torch.device | str = "cpu",
        use_vmap: bool = False,
    ) -> None:
        """See `omni_mask`. `padding`: bool [B, S], True for tokens; `documents`: of the same rows, or None.

        Raises:
            UnsupportedError: chunks over packed sequences inside of a function that is not known.
        """
        self.num_rows, self.row_length, self.function = num_rows, row_length, function
        self.padding, self.documents, self.device = padding, documents, torch.device(device)
        self.cache: dict[Any, Any] = {}  # what an attention derives, once a forward instead of once a layer
        self._use_vmap = use_vmap
        pattern = self._settle(read_pattern(function))
        spans, holes = self._unpad(self._documents(pattern))
        spans, aligned = self._cut_chunks(spans, pattern)
        self.before, self.after = pattern.before, pattern.after
        self.causal = self.after == 0
        self._call, self._holes = pattern.evaluate or not aligned, holes
        self.evaluate = self._call or holes
        self.spans: tuple[Span, ...] = tuple(spans)
        if self._call and documents is not None and documents.is_packed and holds_absolute_chunks(function):
            raise UnsupportedError(
                "This model combines chunked attention with a mask function of its own and does not hand positions to "
                "the mask creation, so chunks cannot restart per document: train it on unpacked rows."
            )

    def lengthened(self, extra: int) -> MaskSpec:
        """The mask of rows with `extra` tokens of padding behind, which attend to nothing."""
        padding = self.padding
        if padding is None:
            padding = remember(make(torch.ones, self.num_rows, self.row_length, dtype=torch.bool), self.device)
        padding = apply(Tensor.expand, apply(Tensor.bool, padding), self.num_rows, -1)
        padding = apply(torch.nn.functional.pad, padding, (0, extra))
        length = self.row_length + extra
        return MaskSpec(
            self.num_rows, length, self.function, padding=padding, device=self.device, use_vmap=self._use_vmap
        )

    def __getattr__(self, name: str) -> Any:
        raise _NoTensorError(
            f"The mask object of 'omni_varlen' has no `{name}`: this model uses its attention mask as a tensor. Keep "
            "the model's own attention, with `prepare_omni(..., attention='keep')` or attn_implementation='sdpa'."
        )

    @property
    def ndim(self) -> int:
        """That of the mask it stands for: transformers tells a mask that is made already by it."""
        return len(self.shape)

    @property
    def shape(self) -> torch.Size:
        """[B, 1, S, S]."""
        return torch.Size((self.num_rows, 1, self.row_length, self.row_length))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest span; 0 if there is none."""
        return max((span.end - span.begin for span in self.spans), default=0)

    @cached_property
    def is_full(self) -> bool:
        """Whether every row is one span without padding."""
        return len(self.spans) == self.num_rows and all(s.end - s.begin == self.row_length for s in self.spans)

    def is_plain(self, length: int) -> bool:
        """Whether the limits leave a span of `length` tokens fully causal or fully bidirectional."""
        reach = length - 1
        return (self.before is None or self.before >= reach) and (self.after in (None, 0) or self.after >= reach)

    @cached_property
    def kernel_layout(self) -> KernelLayout:
        """Spans for a varlen kernel, on the device of the mask; built once, without reading back from it."""
        lengths = [end - begin for _, begin, end in self.spans]
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        index = None
        if sum(lengths) != self.num_rows * self.row_length:
            starts = [span.row * self.row_length + span.begin for span in self.spans]
            shift = (torch.tensor(starts, dtype=torch.long) - edges[:-1]).to(self.device, non_blocking=True)
            counts = torch.tensor(lengths, dtype=torch.long).to(self.device, non_blocking=True)
            index = torch.arange(sum(lengths), device=self.device)
            index = index + shift.repeat_interleave(counts, output_size=sum(lengths))
        return KernelLayout(edges.to(self.device, non_blocking=True), self.max_length, index)

    def block(self, queries: Span, keys: Span) -> Tensor:
        """Bool [m, n]: which keys of a block each query attends to. Both lie in one span of `spans`."""
        (row, first, last), (_, low, high) = queries, keys
        if self._call:
            mask = self._evaluate(queries, keys)
        else:
            left = torch.arange(first, last, device=self.device)[:, None] - torch.arange(low, high, device=self.device)
            mask = torch.ones_like(left, dtype=torch.bool)
            mask = mask if self.before is None else mask & (left <= self.before)
            mask = mask if self.after is None else mask & (left >= -self.after)
        if self._holes:
            padding = self.padding
            assert padding is not None
            mask = mask & padding[row, low:high] & padding[row, first:last, None]
        return mask

    def _evaluate(self, queries: Span, keys: Span) -> Tensor:
        """transformers' own evaluation, of one block."""

        def one_row(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return self.function(batch_idx + queries.row, head_idx, q_idx, kv_idx)

        return required("sdpa_mask")(
            batch_size=1,
            q_length=queries.end - queries.begin,
            kv_length=keys.end - keys.begin,
            q_offset=queries.begin,
            kv_offset=keys.begin,
            mask_function=one_row,
            attention_mask=None,
            allow_is_causal_skip=False,
            use_vmap=self._use_vmap,
            device=self.device,
        )[0, 0]

    def _settle(self, pattern: Pattern) -> Pattern:
        """Hold on to packing only as transformers makes it: documents in one piece, positions that count by one.

        What `documents` were read of is so, and is on the host already; else the host waits for the device here.
        """
        if pattern.segments is None and pattern.positions is None:
            return pattern
        if pattern.segments is None:
            return Pattern(evaluate=True)
        known = self.documents
        if known is not None and pattern.segments is known.segments:
            if pattern.positions is None:
                return replace(pattern, segments=None)
            if known.positions is not None and known.told_by(pattern.positions.expand(self.num_rows, -1)):
                return replace(pattern, segments=None, positions=on_host(known.positions))
        positions = None if pattern.positions is None else on_host(pattern.positions)
        pattern = replace(pattern, segments=on_host(pattern.segments), positions=positions)
        assert pattern.segments is not None
        change = pattern.segments.diff(dim=1)
        sound = (change >= 0).all()
        if pattern.positions is not None:
            sound = sound & ((pattern.positions.diff(dim=1) == 1) | (change > 0)).all()
        return pattern if bool(sound) else Pattern(evaluate=True)

    def _documents(self, pattern: Pattern) -> list[Span]:
        """Documents by `documents` and by the function's own packing; where both tell, a boundary of either counts."""
        edges = [{0, self.row_length} for _ in range(self.num_rows)]
        for row, begin, _ in self.documents.spans() if self.documents is not None else ():
            edges[row].add(begin)
        if pattern.segments is not None:
            for row, left in pattern.segments.expand(self.num_rows, -1).diff(dim=1).nonzero().tolist():
                edges[row].add(left + 1)
        rows = [sorted(row) for row in edges]
        return [Span(r, *pair) for r, row in enumerate(rows) for pair in zip(row[:-1], row[1:], strict=True)]

    def _unpad(self, spans: list[Span]) -> tuple[list[Span], bool]:
        """Spans from their first to their last token, and whether there is padding between."""
        if self.padding is None:
            return spans, False
        tokens = [np.flatnonzero(row) for row in on_host(self.padding).expand(self.num_rows, -1).numpy()]
        kept, holes = [], False
        for row, begin, end in spans:
            low, high = np.searchsorted(tokens[row], (begin, end)).tolist()
            if low < high:
                kept.append(Span(row, int(tokens[row][low]), int(tokens[row][high - 1]) + 1))
                holes |= kept[-1].end - kept[-1].begin != high - low
        return kept, holes

    def _cut_chunks(self, spans: list[Span], pattern: Pattern) -> tuple[list[Span], bool]:
        """Spans cut where a chunk ends, and whether that is what the function says."""
        if pattern.evaluate or pattern.chunk is None:
            return spans, not pattern.evaluate
        origins = [span.begin for span in spans]
        if pattern.positions is not None:
            where = torch.tensor([span[:2] for span in spans], dtype=torch.long)
            firsts = pattern.positions.expand(self.num_rows, -1)[where[:, 0], where[:, 1]].tolist()
            origins = [origin - first for origin, first in zip(origins, firsts, strict=True)]
        elif self.documents is None or not self.documents.is_packed:
            starts = on_host(pattern.chunk_start).tolist() if pattern.chunk_start is not None else [0] * self.num_rows
            if any(starts[span.row] != span.begin for span in spans):
                return spans, False
        chunks = []
        for (row, begin, end), origin in zip(spans, origins, strict=True):
            first = begin + pattern.chunk - (begin - origin) % pattern.chunk
            edges = [begin, *range(first, end, pattern.chunk), end]
            chunks += [Span(row, *pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
        return chunks, True


def omni_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | MaskSpec | None = None,
    **kwargs: Any,
) -> MaskSpec | Tensor | None:
    """What transformers calls to create a mask for "omni_varlen"; documents are those of the running forward.

    Args:
        attention_mask: bool [B, S], True for tokens and False for padding, or None; or a mask made before, to return.
        kwargs: what `masking_utils.sdpa_mask` takes besides.

    Returns:
        A `MaskSpec` where queries and keys are the same tokens; otherwise (a cache that holds earlier tokens) the mask
        of stock sdpa. Padding that the host does not know (`host`) costs a synchronisation per mask, not per layer.

    Raises:
        UnsupportedError: packed documents are set for rows of another shape.
    """
    if isinstance(attention_mask, MaskSpec):  # made above the backbone: it counts as it is, as a tensor does
        return attention_mask
    function: MaskFunction = mask_function or required("causal_mask_function")
    documents = current().documents
    same_tokens = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if not same_tokens or (attention_mask is not None and attention_mask.shape[-1] != kv_length):
        return required("sdpa_mask")(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if documents is not None and (documents.num_rows, documents.row_length) != (batch_size, q_length):
        if documents.is_packed:
            raise UnsupportedError(
                f"A mask for {batch_size} rows of {q_length} tokens was asked for, but the packed documents are of "
                f"{documents.num_rows} rows of {documents.row_length}: unpack the rows for this model."
            )
        documents = None
    if attention_mask is not None:
        known = on_host(attention_mask)
        attention_mask = None if bool(known.all()) else with_values(attention_mask, known)
    return MaskSpec(
        batch_size,
        q_length,
        function,
        padding=attention_mask,
        documents=documents,
        device=kwargs.get("device", "cpu"),
        use_vmap=bool(kwargs.get("use_vmap", False)),
    )
