"""What one layer computes, operation by operation, as a `Program`.

tests/unit/planner compares the sums with dry runs, where the real code makes the tensors.

Shapes: t tokens of this rank; P = t * top_k pairs of (token, expert), as many as arrive where routing is balanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hf_veomni.expert.dispatch import chunk_sizes
from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.program import INPUT, Live, Program
from hf_veomni.planner.shape import Attention, Layer
from hf_veomni.planner.traffic import sent_rows
from hf_veomni.sequence.pipelined import chunk_layouts
from hf_veomni.sequence.ulysses import head_layout

B16, B32, INDEX = 2, 4, 8


class _Maker:
    """Makes the program of a decoder layer."""

    def __init__(
        self,
        layer: Layer,
        attention: Attention,
        t: int,
        sp: int,
        ep: int,
        lora: int | None,
        adapter: int,
        autocast: bool,
        hidden: int,
        chunks: bool,
    ) -> None:
        """
        Args:
            adapter: bytes of an adapter's parameter.
            autocast: matmuls are in bf16 whatever they are given.
            hidden: bytes of a number of the hidden states, and of a weight.
        """
        self.layer, self.heads, self.t, self.sp, self.ep = layer, attention, t, sp, ep
        self.lora, self.adapter, self.autocast, self.hidden, self.chunks = lora, adapter, autocast, hidden, chunks
        self.trained, self.wide = lora is None, hidden == B32
        self.program = Program(self.t * layer.width * hidden)

    def make(self) -> Program:
        layer, size = self.layer, self.t * self.layer.width
        normed = self._norm(INPUT, size)
        stream = self._residual(INPUT, *self._attention(normed), normed)
        normed = self._norm(stream, size)
        out = self._experts(normed) if layer.experts else self._mlp(normed, layer.inner)
        if layer.shared:
            out = self._residual(out, self._mlp(normed, layer.shared))
        self._residual(stream, out, normed)
        return self.program

    def _residual(self, stream: int, update: int, *given: int) -> int:
        """`given`: what a module has made the update of, which its caller holds until it returns."""
        size = self.t * self.layer.width
        if self.wide and not self._is_wide(update, size):  # fp32 and bf16, and so are the gradients
            return self.program.add([update], size * B32, passes=[stream], holds=given)
        return self.program.add((), size * self.hidden, passes=(stream, update), holds=given)

    def _is_wide(self, x: int, elements: int) -> bool:
        """Whether it is in fp32."""
        return self.wide and self.program.sizes[x] == elements * B32

    def _narrow(self, x: int, elements: int) -> int:
        """What autocast gives a matmul: a copy in bf16 for each, where `x` is in fp32."""
        return self.program.add([x], elements * B16) if self._is_wide(x, elements) else x

    def _norm(self, x: int, elements: int) -> int:
        """In fp32, times the weight in the dtype of what it was given."""
        add, out, casts = self.program.add, elements * self.hidden, not self._is_wide(x, elements)
        wide = add([x], elements * B32) if casts else x
        scaled = add([wide], elements * B32, saves=[wide], scratch=elements * B32, back=2 * elements * B32)
        narrow = add([scaled], elements * B16) if casts else scaled
        back = out * self.trained + (out if casts and self.wide else 0)
        return add([narrow], out, saves=[narrow] if self.trained else [], back=back)

    def _linear(self, x: int, rows: int, width: int) -> int:
        """[t, width] to [t, rows], with its adapter."""
        add, t, lora, size = self.program.add, self.t, self.lora, self.adapter
        cast = rows * width * B16 * self.wide  # autocast's of the weight, which stays for the backward
        given, weight = self._narrow(x, t * width), rows * width * self.hidden * self.trained
        saved = [given] if self.trained else []
        out = add([given], t * rows * B16, saves=saved, keeps=cast, weight=weight, back=cast * self.trained)
        if lora is None:
            return out
        casts_up = size == B32 and not self._is_wide(x, t * width)
        given = add([x], t * width * size) if casts_up else x  # PEFT casts to the adapter's dtype
        weights, casts, held = (lora * width * size, lora * rows * size), (0, 0), [x, given]
        if size == B32 and self.autocast:  # which casts back, and the adapter, whose cast stays for the backward
            given, size = add([given], t * width * B16), B16
            casts = lora * width * B16, lora * rows * B16
        low = add([given], t * lora * size, saves=[given], keeps=casts[0], weight=weights[0])
        high = add([low], t * rows * size, saves=[low], keeps=casts[1], weight=weights[1])
        scaled = add([high], t * rows * size)
        if size == B16:
            return add((), t * rows * size, passes=(out, scaled), holds=held)
        added = add([out], t * rows * size, passes=[scaled], holds=held)
        return add([added], t * rows * B16)

    def _attention(self, x: int) -> tuple[int, ...]:
        """What it makes, and what is alive until it returns though nothing reads it."""
        heads, t, width = self.heads, self.t, self.layer.width
        if heads.latent:
            query, key, value = self._latent(x)
        else:
            if heads.fused:
                query = key = value = self._linear(x, heads.queries + 2 * heads.keys, width)
            else:
                query, key, value = (self._linear(x, rows, width) for rows in (heads.queries, heads.keys, heads.keys))
            if heads.normed:
                query, key = self._norm(query, t * heads.queries), self._norm(key, t * heads.keys)
            query, key = self._rotate(query, t * heads.queries * B16), self._rotate(key, t * heads.keys * B16)
        held = (query, key) if self.wide else ()  # in bf16 they are the kernel's
        query, key = self._narrow(query, t * heads.queries), self._narrow(key, t * heads.keys)
        return self._linear(self._attend(query, key, value), width, heads.out), *held

    def _rotate(self, x: int, size: int) -> int:
        """The rotary embedding of a part of the columns, joined with the others if there are any."""
        size = size // B16 * self.hidden
        part = size * self.heads.rotated // self.heads.width
        if not self.heads.joins:
            return self.program.add([x], size, scratch=2 * size, back=3 * size)
        return self.program.add([x], size, scratch=2 * part, back=3 * part)

    def _latent(self, x: int) -> tuple[int, int, int]:
        """Queries, keys and values of all heads, made of what is kept for a token (MLA)."""
        heads, t, add, width = self.heads, self.t, self.program.add, self.layer.width
        low = self._norm(self._linear(x, heads.low, width), t * heads.low) if heads.low else x
        query = self._linear(low, heads.queries, heads.low or width)
        joint = self._linear(x, heads.latent + heads.rotated, width)
        both = heads.width - heads.rotated + heads.values
        pair = self._linear(self._norm(joint, t * heads.latent), heads.heads * both, heads.latent)
        factor = 4 if heads.complex else 1  # complex numbers of fp32
        part = factor * t * heads.heads * heads.rotated * B16
        size = t * heads.queries * self.hidden
        query = add([query], size, scratch=2 * part, back=3 * part)
        key = add([pair, joint], size, back=size)
        return query, key, pair

    def _attend(self, query: int, key: int, value: int) -> int:
        """Attention, and the exchanges around it. Values are as wide as keys within the kernel, with zeros."""
        heads, t, sp, add = self.heads, self.t, self.sp, self.program.add
        if sp == 1:
            return self._attend_heads([query, key, value], heads.heads, heads.key_value_heads, t)
        spans = head_layout(heads.heads, heads.key_value_heads, sp)
        (first, last), (low, high) = spans.query[0], spans.key_value[0]
        both = heads.width + heads.values
        own, read = last - first, high - low
        packed = heads.queries + both * sum(b - a for a, b in spans.key_value)
        size = t * sp * B16
        landed = (own * heads.width + read * both) * size
        sent = add([query, key, value], packed * t * B16)
        came = add([sent], landed, sends=True, back=2 * landed)  # the gradients joined, and in the order of ranks
        flat = add((), landed, passes=[came])
        if self.chunks:  # of which each to which key heads come has those that it reads
            parts = ((part.key_value[0], fresh[0]) for part, fresh in chunk_layouts(spans))
            read = sum(b - a for (a, b), (begin, end) in parts if end > begin)
            landed = (own * heads.width + read * both) * size
        flat = add((), landed, passes=[flat])
        out = self._attend_heads([flat], own, read, t * sp)
        wide = t * heads.out * B16
        blocks = add((), own * heads.values * size, passes=[out])
        back = add([blocks], wide, sends=True, back=wide)
        return add((), wide, passes=[back])

    def _attend_heads(self, given: list[int], heads: int, key_value_heads: int, t: int) -> int:
        """The kernel on this rank's heads of t tokens."""
        add, sizes = self.program.add, self.heads
        statistics = B32 * t * heads
        if sizes.values == sizes.width:
            return add(given, t * heads * sizes.width * B16, saves=given, keeps=statistics, saves_output=True)
        padded = add(given[-1:], t * key_value_heads * sizes.width * B16)
        given = [*given[:-1], padded] if len(given) > 1 else [*given, padded]
        out = add(given, t * heads * sizes.width * B16, saves=given, keeps=statistics, saves_output=True)
        return add([out], t * heads * sizes.values * B16)

    def _mlp(self, x: int, inner: int) -> int:
        width, add, size = self.layer.width, self.program.add, self.t * inner * B16
        if self.layer.fused:
            both = self._linear(x, 2 * inner, width)
            active = add([both], size, saves=[both])
            product = add([active], size, saves=[active, both], back=size)
            return self._linear(product, width, inner)
        gate = self._linear(x, inner, width)
        active = add([gate], size, saves=[gate])
        up = self._linear(x, inner, width)
        product = add([active, up], size, saves=[active, up])
        return self._linear(product, width, inner)

    def _route(self, x: int) -> int:
        """The router's weights [t, top_k] of the experts that each token goes to."""
        layer, t, add = self.layer, self.t, self.program.add
        pairs, every, size = t * layer.top_k, t * layer.experts * B32, layer.experts * layer.width
        router, cast = size * self.hidden * self.trained, size * B16 * self.wide
        x = self._narrow(x, t * layer.width)
        if layer.casts and not self.wide:
            x = add([x], t * layer.width * B32)
            kept = [x] if self.trained else []
            logits = add([x], every, saves=kept, weight=router, back=size * B32 * self.trained)
        else:
            logits = add([x], every // 2, saves=[x] if self.trained else [], keeps=cast, weight=router)
        probabilities = add([logits], every, saves_output=True)
        chosen = add([probabilities], pairs * B32, keeps=pairs * INDEX, back=every)
        return add([chosen], pairs * (B32 if layer.wide else B16))

    def _experts(self, x: int) -> int:
        """The router, and the experts: the package's own exchange with ep, else transformers' grouped matmuls."""
        layer, add = self.layer, self.program.add
        pairs = self.t * layer.top_k
        own = layer.experts // self.ep * layer.width * layer.inner * B16 * self.trained
        weights = self._route(x)
        if self.ep > 1:
            return self._exchanged(x, weights, own)
        size, order = pairs * layer.width * B16, pairs * INDEX
        rows = add([x], size // B16 * self.hidden, keeps=order, scratch=order)
        out = self._work(rows, pairs, own)
        if self.lora:  # the package's own experts, without an exchange
            held = (rows, out) if self.wide else ()  # until they return
            out = self._sum(self._weigh(add([out], size, keeps=order), weights, pairs))
            return add([out], self.t * layer.width * B32, holds=held) if self.wide else out
        weighed = self._weigh(out, weights, pairs)
        return self._sum(add([weighed], self.program.sizes[weighed], keeps=order))

    def _work(self, rows: int, pairs: int, own: int, last: bool = True) -> int:
        """What experts compute of their rows. `last`: of the chunks, whose gradient of the weights is made first."""
        add, inner, width = self.program.add, self.layer.inner, self.layer.width
        both = self._grouped(rows, pairs, 2 * inner, width, 2 * own, last)
        active = add([both], pairs * inner * B16, saves=[both])
        product = add([active], pairs * inner * B16, saves=[active, both], back=pairs * inner * B16)
        return self._grouped(product, pairs, width, inner, own, last)

    def _weigh(self, rows: int, weights: int, pairs: int) -> int:
        """[P, C] times the router's weights; in fp32, if these are, in which both gradients are made first."""
        size, factor = pairs * self.layer.width * B16, 2 if self.layer.wide else 1
        back = (2 * factor - 1) * size
        return self.program.add([rows, weights], factor * size, saves=[rows, weights], back=back)

    def _sum(self, weighed: int) -> int:
        """[P, C] to [t, C]; the gradient of each pair is a view of its token's."""
        size = self.t * self.layer.width
        if not self.layer.wide:
            return self.program.add((), size * B16, passes=[weighed])
        return self.program.add([self.program.add((), size * B32, passes=[weighed])], size * B16)

    def _exchanged(self, x: int, weights: int, own: int) -> int:
        """The package's experts, to other ranks and back, in chunks of tokens whose exchanges run under each other."""
        add, sizes = self.program.add, chunk_sizes(self.t, CHUNKS if self.chunks else 1)
        wide, width, factor = self.layer.wide, self.layer.width, 2 if self.layer.wide else 1
        bundled = (rows_sent := sent_rows(self.layer, self.ep)) < self.layer.top_k

        def launch(rows: int, t: int) -> tuple[int, int]:
            return rows, add((), round(t * rows_sent) * width * B16, passes=[rows], flies=True)

        def leave(t: int) -> tuple[int, int]:
            pairs = t * self.layer.top_k
            back, order = 0 if bundled else pairs * width * B16, pairs * INDEX
            return launch(add([x], round(t * rows_sent) * width * B16, keeps=order, scratch=order, back=back), t)

        def back(rows: int, t: int) -> tuple[int, int]:  # the router's weights are put to the gradient here
            pairs, size = t * self.layer.top_k, t * self.layer.top_k * width * B16
            weighs, scratch = 4 * size if wide else size * bundled, factor * size if bundled and wide else 0
            row, order = round(t * rows_sent) * width * B16, pairs * INDEX
            return launch(add([rows, weights], row, saves=[rows], keeps=order, scratch=scratch, back=weighs), t)

        def land(flight: tuple[int, int], t: int) -> int:
            (sent, came), size = flight, t * self.layer.top_k * width * B16
            if bundled:
                return add([came], t * width * B16, back=round(t * rows_sent) * width * B16, holds=[sent])
            scratch = (factor + 1) * size  # in the order of the tokens, and weighed
            out = add([came], t * width * factor * B16, scratch=scratch, back=size, holds=[sent])
            return add([out], t * width * B16) if wide else out

        came, left, out = [leave(sizes[0])], list[tuple[int, int]](), list[int]()
        for chunk, t in enumerate(sizes):
            if chunk + 1 < len(sizes):
                came.append(leave(sizes[chunk + 1]))
            (sent, rows), pairs = came[chunk], t * self.layer.top_k
            taken = add([rows], pairs * width * B16, keeps=3 * pairs * INDEX, holds=[sent])
            left.append(back(self._work(taken, pairs, own, chunk + 1 == len(sizes)), t))
            if chunk:
                out.append(land(left[chunk - 1], sizes[chunk - 1]))
        out.append(land(left[-1], sizes[-1]))
        return out[0] if len(sizes) == 1 else add((), self.t * width * B16, passes=out)

    def _grouped(self, x: int, pairs: int, rows: int, width: int, weight: int, last: bool) -> int:
        """The experts' matmul of [P, width] to [P, rows], with its adapters."""
        add, lora = self.program.add, self.lora
        if lora is None:
            made, added = (weight, 0) if last else (0, weight)
            return add([x], pairs * rows * B16, saves=[x], weight=made, back=added, experts=True)
        each = self.layer.experts // self.ep * B16 * self.wide  # in bf16 for the backward, too
        out = add([self._narrow(x, pairs * width)], pairs * rows * B16, keeps=each * rows * width)
        x = self._narrow(x, pairs * width)
        low = add([x], 2 * pairs * lora * B16, saves=[x], keeps=2 * each * lora * width)
        high = add([low], pairs * rows * B16, saves=[low], keeps=2 * each * lora * rows, experts=True)
        scaled = add([high], pairs * rows * B16)
        return add((), pairs * rows * B16, passes=(out, scaled))


@dataclass(frozen=True)
class Walk:
    """What one layer of a rank keeps, and its moments.

    Attributes:
        saved: bytes for its backward.
        forward: the highest moment of the forward, its input included.
        again: that of a recomputation, with the gradients that wait, and without the input unless that is saved.
        first, second: moments of the backward, see `Program.backward`; under pairs of two sequences.
        opening, rest: see `Both`.
    """

    saved: int
    forward: Live
    again: Live
    first: tuple[Live, ...]
    second: tuple[Live, ...]
    opening: tuple[Live, ...] = ()
    rest: Live = Live(0)


@lru_cache(maxsize=8192)
def _walk(
    layer: Layer,
    attention: Attention,
    t: int,
    sp: int,
    ep: int,
    lora: int | None,
    adapter: int,
    autocast: bool,
    hidden: int,
    overlap: str,
) -> Walk:
    program = _Maker(layer, attention, t, sp, ep, lora, adapter, autocast, hidden, overlap == "chunks").make()
    apart = ep > 1 and layer.experts > 0
    again = program.forward(until_saved=True)
    given = program.sizes[INPUT] if hidden == B16 else 0  # the first norm saves what is in fp32 already
    again = again._replace(activations=again.activations - given + program.waiting())
    saved, forward = program.saved().total, program.forward()
    if overlap == "pairs":
        both = program.backward_of_two(apart)
        return Walk(saved, forward, again, both.first, both.second, both.opening, both.rest)
    first, second = program.backward(apart)
    return Walk(saved, forward, again, tuple(first), tuple(second))


def walk_layer(layer: Layer, attention: Attention, layout: Layout, job: Job, tokens: int) -> Walk:
    """One decoder layer on one rank, with so many tokens there."""
    ep = layout.ep if layer.experts else 1
    sizes = layout.adapter(job), job.mixed, layout.hidden(job)
    return _walk(layer, attention, tokens, layout.sp, ep, job.lora, *sizes, layout.overlap)
