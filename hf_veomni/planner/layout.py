"""One way to lay a model out over the ranks, and every way there is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil, isqrt

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ParallelPlan
from hf_veomni.planner.shape import Shape


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        context: tokens of a packed sequence.
        document: tokens of the longest documents in it, on which the attention's work depends.
        batch: packed sequences of an optimizer step, over all ranks; None: one for each micro-batch.
        accumulation: micro-batches of each data rank, where `batch` does not say.
        lora: rank of adapters on all linear layers; None trains everything.
        mixed: autocast to bf16, gathers in bf16, and reductions of gradients in fp32, as the Trainer has them with
            `bf16=True`.
        fp32: parameters, gradients and states of the optimizer are kept in fp32 (with `mixed`), else in bf16.
    """

    context: int
    document: int
    batch: int | None = None
    accumulation: int = 1
    lora: int | None = None
    mixed: bool = False
    fp32: bool = False

    @property
    def stored(self) -> int:
        """Bytes of a parameter of the model."""
        return 4 if self.fp32 else 2

    @property
    def trained(self) -> int:
        """Bytes of a trained parameter, of its gradient, and of each of its states; PEFT has adapters in fp32."""
        return 4 if self.lora else self.stored

    @property
    def reduced(self) -> int:
        """Bytes of a gradient on its way through a reduction."""
        return 4 if self.mixed else self.trained


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, whether layers are checkpointed, and how exchanges are overlapped.

    Attributes:
        overlap: as a plan's.
        pp: pipeline stages.
    """

    replicate: int
    shard: int
    sp: int
    ep: int
    checkpointing: bool
    overlap: str = "none"
    pp: int = 1

    @classmethod
    def of(cls, plan: ParallelPlan | str, world_size: int, checkpointing: bool) -> Layout:
        """That of a plan: its sizes and its overlap, without rules for modules.

        Raises:
            UnsupportedError: stages that the plan cuts by itself, or several of a rank.
        """
        given = ParallelPlan() if plan == "single" else ParallelPlan.parse(plan)
        plan = given.resolve(world_size)
        if plan.pp_layers is not None or plan.pp_stages > 1:
            raise UnsupportedError(
                f"The plan '{plan}' has `pp_layers` or `pp_stages`, and the planner's formulas are for one stage of "
                "each rank, with the layers shared out by cost: leave both out to have it estimated."
            )
        shard = plan.dp_size // plan.dp_replicate_size
        sizes = plan.dp_replicate_size, shard, plan.sp_size, plan.ep_size
        return cls(*sizes, checkpointing, plan.overlap, plan.pp_size)

    def changes(self, other: Layout) -> int:
        """How many settings differ."""
        names = ("replicate", "sp", "ep", "checkpointing", "overlap", "pp")
        return sum(getattr(self, name) != getattr(other, name) for name in names)

    @property
    def fsdp(self) -> int:
        return self.shard * self.sp

    @property
    def efsdp(self) -> int:
        return self.fsdp // self.ep

    @property
    def data(self) -> int:
        """Data ranks."""
        return self.replicate * self.shard

    @property
    def stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.data * self.sp

    @property
    def world(self) -> int:
        return self.pp * self.stage

    @property
    def plan(self) -> ParallelPlan:
        return ParallelPlan(self.replicate, self.shard, self.sp, self.ep, self.pp, overlap=self.overlap)

    def tokens(self, job: Job) -> int:
        """Tokens of a packed sequence on one rank."""
        return ceil(job.context / self.sp)

    @property
    def wrapped(self) -> bool:
        """Whether FSDP2 gathers the parameters: a rank alone computes with its own."""
        return self.stage > 1

    def adapter(self, job: Job) -> int:
        """Bytes of an adapter's parameter as a layer finds it, and of its gradient there."""
        return 2 if job.mixed and self.wrapped else 4

    def hidden(self, job: Job) -> int:
        """Bytes of a number of the hidden states, and of a weight as a layer finds it: FSDP2 casts both to bf16, and
        autocast, which a rank alone has, only what a matmul is given."""
        return job.stored if job.mixed and not self.wrapped else 2

    def sequence(self, job: Job) -> int:
        """Tokens on one rank of what runs at a time: under pairs without a second micro-batch the larger half of a
        sequence, which is cut between documents: the longer ones are taken to be of equal length."""
        if self.overlap != "pairs" or self.accumulation(job) > 1:
            return self.tokens(job)
        documents = job.context // job.document
        cuts = (count * job.document for count in {documents // 2, ceil(documents / 2)})
        return ceil(min(max(cut, job.context - cut) for cut in cuts) / self.sp)

    def runs(self, job: Job) -> bool:
        """Whether it would run: pairs want a second micro-batch, or a sequence of several documents."""
        return self.overlap != "pairs" or self.accumulation(job) > 1 or 2 * job.document <= job.context

    def accumulation(self, job: Job) -> int:
        """Micro-batches of a step on each rank."""
        return job.accumulation if job.batch is None else ceil(job.batch / self.data)

    def has(self, names: Collection[str]) -> bool:
        """Whether it has any of "pp", "pairs", "chunks"."""
        return self.overlap in names or (self.pp > 1 and "pp" in names)

    def __str__(self) -> str:
        return f"{self.plan}{', checkpointing' if self.checkpointing else ''}"


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def layouts(shape: Shape, world_size: int) -> Iterator[Layout]:
    """Every layout of a world that the package runs for this model: pp up to the layers, sp up to the query heads, ep
    that divides both the experts and the ranks that share a replica."""
    for pp in _divisors(world_size):
        if pp == 1 or (shape.cuts and pp <= len(shape.order)):
            yield from _of_stage(shape, world_size // pp, pp)


def _of_stage(shape: Shape, ranks: int, pp: int) -> Iterator[Layout]:
    for sp in _divisors(ranks):
        if sp > shape.attention.heads:
            continue
        for shard in _divisors(ranks // sp):
            replicate = ranks // sp // shard
            for ep in _divisors(shard * sp):
                if ep > 1 and (not shape.experts or any(number % ep for number in shape.experts)):
                    continue
                for overlap in _overlaps(ranks, sp, ep) if pp == 1 else ("none",):
                    for checkpointing in (False, True):
                        yield Layout(replicate, shard, sp, ep, checkpointing, overlap, pp)


def _overlaps(ranks: int, sp: int, ep: int) -> tuple[str, ...]:
    return ("none", *(["chunks"] if sp > 1 or ep > 1 else []), *(["pairs"] if ranks > 1 else []))
