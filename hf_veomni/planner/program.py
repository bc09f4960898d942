"""What one layer computes, operation by operation, and what is live meanwhile: tensors have sizes and no values.

    forward     an operation makes its output, and saves tensors for its backward; what nobody saves or reads is freed
    backward    in reverse: gradients of its inputs and of its weight are made, then what it saved is freed

So saved bytes, temporaries, and the order in which gradients appear follow from the list of operations alone. Views
are no operations, and what is a view in the backward alone hands its gradient on. tests/unit/planner compares the sums
with dry runs, where the real code makes the tensors.

Shapes: t tokens of this rank; P = t * top_k pairs of (token, expert), as many as arrive where routing is balanced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hf_veomni.expert.dispatch import chunk_sizes
from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.traffic import sent_rows
from hf_veomni.sequence.pipelined import chunk_layouts
from hf_veomni.sequence.ulysses import head_layout

B16, B32, INDEX = 2, 4, 8
_INPUT = 0


class Live(NamedTuple):
    """Bytes at one moment: activations, what collectives wrote, and gradients of weights."""

    activations: int
    communication: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class _Operation:
    output: int
    inputs: tuple[int, ...]  # whose gradients its backward makes
    passes: tuple[int, ...]  # inputs that get the gradient of the output as it is
    saves: tuple[int, ...]
    keeps: int  # saved bytes of its own: indices, statistics
    scratch: int  # temporaries of the forward
    back: int  # and of the backward
    weight: int  # bytes of the gradient of its weight
    sends: bool  # a collective: what it makes is a buffer of communication
    flies: bool  # only the launch of one: a later operation lands it, and the gradient takes off there
    holds: tuple[int, ...]  # tensors that are alive until here though nothing reads them: what was sent
    experts: bool  # its weight is an expert's


class Program:
    """Operations in the order of the forward; tensors are numbers, 0 is the layer's input."""

    def __init__(self, given: int) -> None:
        """`given`: bytes of the input."""
        self.sizes, self.sent, self.flying = [given], [False], [False]
        self.operations: list[_Operation] = []

    def add(
        self,
        inputs: Sequence[int],
        size: int,
        saves: Sequence[int] = (),
        passes: Sequence[int] = (),
        keeps: int = 0,
        scratch: int = 0,
        back: int = 0,
        weight: int = 0,
        sends: bool = False,
        flies: bool = False,
        holds: Sequence[int] = (),
        experts: bool = False,
        saves_output: bool = False,
    ) -> int:
        """One operation; returns its output."""
        output = len(self.sizes)
        self.sizes.append(size)
        self.sent.append(sends or flies)
        self.flying.append(flies)
        saved = (*saves, output) if saves_output else tuple(saves)
        ends = tuple(inputs), tuple(passes), saved
        sizes = keeps, scratch, back, weight
        self.operations.append(_Operation(output, *ends, *sizes, sends, flies, tuple(holds), experts))
        return output

    def forward(self, until_saved: bool = False) -> Live:
        """The highest moment, the layer's input included. `until_saved`: stop once all is saved that will be, as a
        recomputation does."""
        last = {x: i for i, op in enumerate(self.operations) for x in (*op.inputs, *op.passes)}
        last |= {x: i - 1 for i, op in enumerate(self.operations) for x in op.holds}
        end = max(i for i, op in enumerate(self.operations) if op.saves) if until_saved else len(self.operations)
        live, saved, kept, best = {_INPUT}, set[int](), 0, Live(0)
        for i, op in enumerate(self.operations[: end + 1]):
            if until_saved and i == end:
                break
            live.add(op.output)
            saved.update(op.saves)
            kept += op.keeps
            best = max(best, self._live(live | saved, kept + op.scratch), key=lambda x: x.total)
            live -= {x for x in live if last.get(x, -1) <= i and x != op.output}
        return best

    def waiting(self) -> int:
        """Gradients that are there when the backward first asks for something saved."""
        grads = {self.operations[-1].output: _Buffer(self.sizes[self.operations[-1].output], False)}
        for op in reversed(self.operations):
            if op.saves or op.keeps or op.flies:  # a landing unpacks what was saved, with its gradient in the air
                break
            given = grads.pop(op.output)
            made = self._made(op)
            for x in (*made, *op.passes):
                grads.setdefault(x, made.get(x, given))
        return sum(buffer.size for buffer in {id(b): b for b in grads.values()}.values()) + self._in_the_air(grads)

    def _made(self, op: _Operation) -> dict[int, _Buffer]:
        """The gradients of an operation's inputs."""
        return {x: _Buffer(self.sizes[x], op.sends or self.flying[x]) for x in op.inputs}

    def _in_the_air(self, grads: Iterable[int]) -> int:
        """Bytes of gradients that were sent, and are held until the other ranks' have landed."""
        return sum(self.sizes[x] for x in grads if self.flying[x])

    def _live(self, tensors: set[int], rest: int) -> Live:
        sent = sum(self.sizes[x] for x in tensors if self.sent[x])
        return Live(sum(self.sizes[x] for x in tensors) - sent + rest, sent)

    def saved(self) -> Live:
        """What is kept for the backward."""
        return self._live({x for op in self.operations for x in op.saves}, sum(op.keeps for op in self.operations))

    def backward(self, apart: bool) -> tuple[list[Live], list[Live]]:
        """Moments of the backward: until the experts' last gradient, and after it.

        Args:
            apart: experts are a unit of FSDP2 of their own, whose gradients leave with their last one; otherwise all
                moments are in the second list.
        """
        counts: dict[int, int] = {}
        for op in self.operations:
            for x in op.saves:
                counts[x] = counts.get(x, 0) + 1
        held, kept = set(counts), sum(op.keeps for op in self.operations)
        grads = {self.operations[-1].output: _Buffer(self.sizes[self.operations[-1].output], False)}
        weights = 0
        moments: tuple[list[Live], list[Live]] = ([], [])
        left = sum(op.experts for op in self.operations) if apart else 0
        for op in reversed(self.operations):
            given = grads.pop(op.output)
            made = self._made(op)
            weights += op.weight
            buffers = [*{id(b): b for b in (*grads.values(), given, *made.values())}.values()]
            tensors = self._live(held, kept + op.back + self._in_the_air(grads))
            sent = sum(b.size for b in buffers if b.sent)
            size = sum(b.size for b in buffers) - sent
            now = Live(tensors.activations + size, tensors.communication + sent, weights)
            moments[0 if left else 1].append(now)
            if op.experts and left:
                left -= 1
                weights = weights if left else 0
            for x in op.saves:
                counts[x] -= 1
                held -= set() if counts[x] else {x}
            kept -= op.keeps
            for x in (*made, *op.passes):
                grads.setdefault(x, made.get(x, given))  # a second gradient is added in place
        return moments


@dataclass(eq=False)
class _Buffer:
    size: int
    sent: bool


class _Layer:
    """Makes the program of a decoder layer."""

    def __init__(self, shape: Shape, t: int, sp: int, ep: int, lora: int | None, adapter: int, chunks: bool) -> None:
        self.shape, self.t, self.sp, self.ep, self.lora, self.adapter = shape, t, sp, ep, lora, adapter
        self.chunks = chunks
        self.trained = lora is None
        self.program = Program(self.t * shape.width * B16)

    def make(self) -> Program:
        attended = self._attention(self._norm(_INPUT, self.t * self.shape.width))
        stream = self._residual(_INPUT, attended)
        normed = self._norm(stream, self.t * self.shape.width)
        out = self._experts(normed) if self.shape.experts else self._mlp(normed)
        self._residual(stream, out)
        return self.program

    def _residual(self, stream: int, update: int) -> int:
        return self.program.add((), self.t * self.shape.width * B16, passes=(stream, update))

    def _norm(self, x: int, elements: int) -> int:
        add = self.program.add
        wide = add([x], elements * B32)
        scaled = add([wide], elements * B32, saves=[wide], scratch=elements * B32, back=2 * elements * B32)
        narrow = add([scaled], elements * B16)
        weighed = [narrow] if self.trained else []
        return add([narrow], elements * B16, saves=weighed, back=elements * B16 if self.trained else 0)

    def _linear(self, x: int, rows: int, width: int) -> int:
        """[t, width] to [t, rows], with its adapter."""
        add, t, lora, size = self.program.add, self.t, self.lora, self.adapter
        out = add([x], t * rows * B16, saves=[x] if self.trained else [], weight=rows * width * B16 * self.trained)
        if lora is None:
            return out
        given = add([x], t * width * size) if size == B32 else x
        low = add([given], t * lora * size, saves=[given], weight=lora * width * size)
        high = add([low], t * rows * size, saves=[low], weight=lora * rows * size)
        scaled = add([high], t * rows * size)
        if size == B16:
            return add((), t * rows * size, passes=(out, scaled))
        added = add([out], t * rows * size, passes=[scaled])
        return add([added], t * rows * B16)

    def _attention(self, x: int) -> int:
        shape, t = self.shape, self.t
        query, key, value = (self._linear(x, rows, shape.width) for rows in (shape.queries, shape.keys, shape.keys))
        if shape.normed:
            query, key = self._norm(query, t * shape.queries), self._norm(key, t * shape.keys)
        query, key = self._rotate(query, t * shape.queries * B16), self._rotate(key, t * shape.keys * B16)
        return self._linear(self._attend(query, key, value), shape.width, shape.queries)

    def _rotate(self, x: int, size: int) -> int:
        return self.program.add([x], size, scratch=2 * size, back=3 * size)

    def _attend(self, query: int, key: int, value: int) -> int:
        """Attention, and the exchanges around it."""
        shape, t, sp, add = self.shape, self.t, self.sp, self.program.add
        wide = t * shape.queries * B16
        if sp == 1:
            return add(
                [query, key, value], wide, saves=[query, key, value], keeps=B32 * t * shape.heads, saves_output=True
            )
        spans = head_layout(shape.heads, shape.key_value_heads, sp)
        first, last = spans.query[0]
        low, high = spans.key_value[0]
        own, other = ((b - a) * shape.head_width * t * sp * B16 for a, b in ((first, last), (low, high)))
        packed = wide + 2 * B16 * t * shape.head_width * sum(b - a for a, b in spans.key_value)
        landed = own + 2 * other
        sent = add([query, key, value], packed)
        came = add([sent], landed, sends=True, back=2 * landed)  # the gradients joined, and in the order of ranks
        heads = add((), landed, passes=[came])
        if self.chunks:  # of which each to which key heads come has those that it reads
            parts = ((part.key_value[0], fresh[0]) for part, fresh in chunk_layouts(spans))
            read = sum(b - a for (a, b), (begin, end) in parts if end > begin)
            landed = own + 2 * read * shape.head_width * t * sp * B16
        flat = add((), landed, passes=[heads])
        out = add([flat], own, saves=[flat], keeps=B32 * (last - first) * t * sp, saves_output=True)
        blocks = add((), own, passes=[out])
        back = add([blocks], wide, sends=True, back=wide)
        return add((), wide, passes=[back])

    def _mlp(self, x: int) -> int:
        inner, width, add = self.shape.inner, self.shape.width, self.program.add
        gate = self._linear(x, inner, width)
        active = add([gate], self.t * inner * B16, saves=[gate])
        up = self._linear(x, inner, width)
        product = add([active, up], self.t * inner * B16, saves=[active, up])
        return self._linear(product, width, inner)

    def _experts(self, x: int) -> int:
        """The router, and the experts: the package's own exchange with ep, else transformers' grouped matmuls."""
        shape, t, add, ep = self.shape, self.t, self.program.add, self.ep
        pairs, width = t * shape.top_k, shape.width
        own = shape.experts // ep * width * shape.inner * B16 * self.trained
        router = shape.experts * width * B16 * self.trained
        logits = add([x], t * shape.experts * B16, saves=[x] if self.trained else [], weight=router)
        probabilities = add([logits], t * shape.experts * B32, saves_output=True)
        chosen = add([probabilities], pairs * B32, keeps=pairs * INDEX, back=t * shape.experts * B32)
        weights = add([chosen], pairs * B16)
        if ep > 1:
            return self._exchanged(x, weights, own)
        size, order = pairs * width * B16, pairs * INDEX
        out = self._work(add([x], size, keeps=order, scratch=order), pairs, own)
        if self.lora:  # the package's own experts, without an exchange
            return self._combine(add([out], size, keeps=order), weights, t, pairs)
        weighed = self._weigh(out, weights, pairs)
        return self._sum(add([weighed], self.program.sizes[weighed], keeps=order), t)

    def _work(self, rows: int, pairs: int, own: int, last: bool = True) -> int:
        """What experts compute of their rows. `last`: of the chunks, whose gradient of the weights is made first."""
        add, inner, width = self.program.add, self.shape.inner, self.shape.width
        both = self._grouped(rows, pairs, 2 * inner, width, 2 * own, last)
        active = add([both], pairs * inner * B16, saves=[both])
        product = add([active], pairs * inner * B16, saves=[active, both], back=pairs * inner * B16)
        return self._grouped(product, pairs, width, inner, own, last)

    def _combine(self, rows: int, weights: int, t: int, pairs: int) -> int:
        """Pairs in the order of their tokens, weighed and summed."""
        return self._sum(self._weigh(rows, weights, pairs), t)

    def _weigh(self, rows: int, weights: int, pairs: int) -> int:
        """[P, C] times the router's weights; in fp32, if these are, in which both gradients are made first."""
        size, factor = pairs * self.shape.width * B16, 2 if self.shape.wide else 1
        back = (2 * factor - 1) * size
        return self.program.add([rows, weights], factor * size, saves=[rows, weights], back=back)

    def _sum(self, weighed: int, t: int) -> int:
        """[P, C] to [t, C]; the gradient of each pair is a view of its token's."""
        size = t * self.shape.width
        if not self.shape.wide:
            return self.program.add((), size * B16, passes=[weighed])
        return self.program.add([self.program.add((), size * B32, passes=[weighed])], size * B16)

    def _exchanged(self, x: int, weights: int, own: int) -> int:
        """The package's experts, to other ranks and back, in chunks of tokens whose exchanges run under each other."""
        add, sizes = self.program.add, chunk_sizes(self.t, CHUNKS if self.chunks else 1)
        wide, width, factor = self.shape.wide, self.shape.width, 2 if self.shape.wide else 1
        bundled = (rows_sent := sent_rows(self.shape, self.ep)) < self.shape.top_k

        def launch(rows: int, t: int) -> tuple[int, int]:
            return rows, add((), round(t * rows_sent) * width * B16, passes=[rows], flies=True)

        def leave(t: int) -> tuple[int, int]:
            pairs = t * self.shape.top_k
            back, order = 0 if bundled else pairs * width * B16, pairs * INDEX
            return launch(add([x], round(t * rows_sent) * width * B16, keeps=order, scratch=order, back=back), t)

        def back(rows: int, t: int) -> tuple[int, int]:  # the router's weights are put to the gradient here
            pairs, size = t * self.shape.top_k, t * self.shape.top_k * width * B16
            weighs, scratch = 4 * size if wide else size * bundled, factor * size if bundled and wide else 0
            row, order = round(t * rows_sent) * width * B16, pairs * INDEX
            return launch(add([rows, weights], row, saves=[rows], keeps=order, scratch=scratch, back=weighs), t)

        def land(flight: tuple[int, int], t: int) -> int:
            (sent, came), size = flight, t * self.shape.top_k * width * B16
            if bundled:
                return add([came], t * width * B16, back=round(t * rows_sent) * width * B16, holds=[sent])
            scratch = (factor + 1) * size  # in the order of the tokens, and weighed
            out = add([came], t * width * factor * B16, scratch=scratch, back=size, holds=[sent])
            return add([out], t * width * B16) if wide else out

        came, left, out = [leave(sizes[0])], list[tuple[int, int]](), list[int]()
        for chunk, t in enumerate(sizes):
            if chunk + 1 < len(sizes):
                came.append(leave(sizes[chunk + 1]))
            (sent, rows), pairs = came[chunk], t * self.shape.top_k
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
        out = add([x], pairs * rows * B16)
        low = add([x], 2 * pairs * lora * B16, saves=[x])
        high = add([low], pairs * rows * B16, saves=[low], experts=True)
        scaled = add([high], pairs * rows * B16)
        return add((), pairs * rows * B16, passes=(out, scaled))


@dataclass(frozen=True)
class Walk:
    """What one layer of a rank keeps, and its moments.

    Attributes:
        saved: bytes for its backward.
        forward: the highest moment of the forward, its input included.
        again: that of a recomputation, with the gradients that wait, and without the input.
        first, second: moments of the backward, see `Program.backward`.
    """

    saved: int
    forward: Live
    again: Live
    first: tuple[Live, ...]
    second: tuple[Live, ...]


@lru_cache(maxsize=4096)
def _walk(shape: Shape, t: int, sp: int, ep: int, lora: int | None, adapter: int, chunks: bool) -> Walk:
    program = _Layer(shape, t, sp, ep, lora, adapter, chunks).make()
    first, second = program.backward(apart=ep > 1)
    again = program.forward(until_saved=True)
    again = again._replace(activations=again.activations - program.sizes[_INPUT] + program.waiting())
    return Walk(program.saved().total, program.forward(), again, tuple(first), tuple(second))


def walk_layer(shape: Shape, layout: Layout, job: Job) -> Walk:
    """One decoder layer on one rank."""
    chunks = layout.overlap == "chunks"
    return _walk(shape, layout.tokens(job), layout.sp, layout.ep, job.lora, job.adapter, chunks)
