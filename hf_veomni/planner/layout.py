"""One way to lay a model out over the ranks, and every way there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

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
        mixed: gathers in bf16, and reductions of gradients in fp32, as the Trainer has them with `bf16=True`.
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

    @property
    def adapter(self) -> int:
        """Bytes of an adapter's parameter as gathered."""
        return 2 if self.mixed else 4


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, whether layers are checkpointed, and how exchanges are overlapped.

    Attributes:
        overlap: "none" or "chunks".
    """

    replicate: int
    shard: int
    sp: int
    ep: int
    checkpointing: bool
    overlap: str = "none"

    @classmethod
    def of(cls, plan: ParallelPlan | str, world_size: int, checkpointing: bool) -> Layout:
        """That of a plan: its sizes, and its overlap if that is one of the formulas'."""
        given = ParallelPlan() if plan == "single" else ParallelPlan.parse(plan)
        plan = given.resolve(world_size)
        overlap = plan.overlap if plan.overlap == "chunks" else "none"
        return cls(
            plan.dp_replicate_size, plan.dp_size // plan.dp_replicate_size, plan.sp_size, plan.ep_size, checkpointing,
            overlap,
        )  # fmt: skip

    def changes(self, other: Layout) -> int:
        """How many settings differ."""
        names = ("replicate", "sp", "ep", "checkpointing", "overlap")
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
    def world(self) -> int:
        return self.data * self.sp

    @property
    def plan(self) -> ParallelPlan:
        return ParallelPlan(self.replicate, self.shard, self.sp, self.ep, overlap=self.overlap)

    def tokens(self, job: Job) -> int:
        """Tokens of a sequence on one rank."""
        return ceil(job.context / self.sp)

    def accumulation(self, job: Job) -> int:
        """Micro-batches of a step on each rank."""
        return job.accumulation if job.batch is None else ceil(job.batch / self.data)

    def __str__(self) -> str:
        return f"{self.plan}{', checkpointing' if self.checkpointing else ''}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def layouts(shape: Shape, world_size: int) -> Iterator[Layout]:
    """Every layout of a world that the package runs for this model: sp up to the query heads, ep that divides both the
    experts and the ranks that share a replica."""
    for sp in _divisors(world_size):
        if sp > shape.heads:
            continue
        for shard in _divisors(world_size // sp):
            replicate = world_size // sp // shard
            for ep in _divisors(shard * sp):
                if ep > 1 and (not shape.experts or shape.experts % ep):
                    continue
                for overlap in ("none", "chunks") if sp > 1 or ep > 1 else ("none",):
                    for checkpointing in (False, True):
                        yield Layout(replicate, shard, sp, ep, checkpointing, overlap)
