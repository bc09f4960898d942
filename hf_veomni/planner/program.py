"""A list of operations, and what is live while they run: tensors have sizes and no values.

    forward     an operation makes its output, and saves tensors for its backward; what nobody saves or reads is freed
    backward    in reverse: gradients of its inputs and of its weight are made, then what it saved is freed

So saved bytes, temporaries, and the order in which gradients appear follow from the list of operations alone. Views
are no operations, and what is a view in the backward alone hands its gradient on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

INPUT = 0


class Live(NamedTuple):
    """Bytes at one moment: activations, what collectives wrote, and gradients of weights."""

    activations: int
    communication: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def beside(self, other: Live) -> Live:
        """With another sequence, which adds its gradients of weights to the same ones."""
        return Live(self.activations + other.activations, self.communication + other.communication, self.gradients)


class Moment(NamedTuple):
    """One operation of a backward.

    Attributes:
        segment: how many gradients of exchanges have been launched before.
        early: before the experts' last gradient, where experts are apart.
        now, after: what is live while it runs, and when it has.
    """

    segment: int
    early: bool
    now: Live
    after: Live


class Both(NamedTuple):
    """Moments of the backward of two sequences.

    Attributes:
        opening: the second one in its first turn, without what the first one has of the layer behind.
        first, second: all others, as `Program.backward` has them.
        rest: of one sequence before its last turn.
    """

    opening: tuple[Live, ...]
    first: tuple[Live, ...]
    second: tuple[Live, ...]
    rest: Live


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
        for i, op in enumerate(self.operations):
            last.update({x: max(i - 1, last.get(x, 0)) for x in op.holds})
        end = max(i for i, op in enumerate(self.operations) if op.saves) if until_saved else len(self.operations)
        live, saved, kept, best = {INPUT}, set[int](), 0, Live(0)
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

    def _back(self, apart: bool) -> Iterator[Moment]:
        """The backward, operation by operation; see `backward`."""
        counts: dict[int, int] = {}
        for op in self.operations:
            for x in op.saves:
                counts[x] = counts.get(x, 0) + 1
        held, kept = set(counts), sum(op.keeps for op in self.operations)
        grads = {self.operations[-1].output: _Buffer(self.sizes[self.operations[-1].output], False)}
        weights, segment = 0, 0
        left = sum(op.experts for op in self.operations) if apart else 0
        for op in reversed(self.operations):
            given = grads.pop(op.output)
            made = self._made(op)
            weights += op.weight
            now = self._with(held, kept + op.back, grads, [given, *made.values()], weights)
            early = left > 0
            if op.experts and left:
                left -= 1
                weights = weights if left else 0
            for x in op.saves:
                counts[x] -= 1
                held -= set() if counts[x] else {x}
            kept -= op.keeps
            for x in (*made, *op.passes):
                grads.setdefault(x, made.get(x, given))  # a second gradient is added in place
            after = self._with(held, kept, grads, [given] if op.sends else [], weights)
            yield Moment(segment, early, now, after)
            segment += op.sends or any(self.flying[x] for x in op.inputs)  # a gradient has been launched

    def _with(
        self, held: set[int], rest: int, grads: Mapping[int, _Buffer], more: Sequence[_Buffer], weights: int
    ) -> Live:
        """What is saved, with gradients."""
        buffers = {id(buffer): buffer for buffer in (*grads.values(), *more)}.values()
        tensors = self._live(held, rest + self._in_the_air(grads))
        sent = sum(b.size for b in buffers if b.sent)
        size = sum(b.size for b in buffers) - sent
        return Live(tensors.activations + size, tensors.communication + sent, weights)

    def backward(self, apart: bool) -> tuple[list[Live], list[Live]]:
        """Moments of the backward: until the experts' last gradient, and after it.

        Args:
            apart: experts are a unit of FSDP2 of their own, whose gradients leave with their last one; otherwise all
                moments are in the second list.
        """
        moments = list(self._back(apart))
        return [m.now for m in moments if m.early], [m.now for m in moments if not m.early]

    def backward_of_two(self, apart: bool) -> Both:
        """The same of two sequences, which take turns where a gradient's exchange is launched; the second begins.

        It begins this layer's backward in the turn in which it has ended that of the layer behind it, where the first
        one still has its last turn to go.
        """
        moments, saved = list(self._back(apart)), self.saved()
        whole = saved._replace(activations=saved.activations + self.sizes[self.operations[-1].output])
        turns = [[m for m in moments if m.segment == number] for number in range(moments[-1].segment + 1)]
        before, opening = whole, [m.now.beside(saved) for m in turns[0]]
        both: tuple[list[Live], list[Live]] = ([], [])
        for number, turn in enumerate(turns):
            after = turn[-1].after
            if number:
                both[0 if turns[number - 1][-1].early or turn[0].early else 1].extend(
                    m.now.beside(before) for m in turn
                )
            for m in turn:
                live = m.now.beside(after)
                made = after.gradients if after.gradients >= m.now.gradients else m.now.gradients
                both[0 if m.early else 1].append(live._replace(gradients=made))
            last, before = before, after
        return Both(tuple(opening), tuple(both[0]), tuple(both[1]), last if len(turns) > 1 else Live(0))


@dataclass(eq=False)
class _Buffer:
    size: int
    sent: bool
