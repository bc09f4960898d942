"""What a dry run found, as data, as a table and as json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_veomni.dryrun.memory import CATEGORIES, Peak
from hf_veomni.dryrun.traffic import Collective

if TYPE_CHECKING:
    from rich.console import RenderableType

_GIB = 2**30
_BEHIND = "(backward)"


@dataclass(frozen=True)
class DryRun:
    """Memory and traffic of one training step on one rank.

    Attributes:
        model: class of the model.
        plan: the resolved plan.
        rank: the rank that was played, of `world_size`.
        tokens: of each full sequence that the rank's SP group gets, the padding not counted.
        kernels: whose kernels were chosen, "cpu" or "cuda".
        peak: when most memory was in use.
        phases: most bytes in "forward", "backward" and "optimizer".
        before: live bytes by category before the step, what is there all the time.
        kept: live bytes by category when the loss of the last micro-batch is there.
        collectives: what this rank sends in the step.
        seconds: that the dry run took.
    """

    model: str
    plan: str
    world_size: int
    rank: int
    tokens: int
    kernels: str
    peak: Peak
    phases: dict[str, int]
    before: dict[str, int]
    kept: dict[str, int]
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that leave this rank in a step, by axis of the mesh."""
        found: Counter[str] = Counter()
        for entry in self.collectives:
            found[entry.axis] += entry.sent
        return dict(found.most_common())

    def modules(self, count: int | None = None) -> list[tuple[str, str, int]]:
        """(category, module, bytes) at the peak, most first; layers of a list are added up ("layers.*")."""
        found = [(category, module or _BEHIND, size) for (category, module), size in self.peak.modules.items()]
        return found[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {
            **{name: getattr(self, name) for name in ("model", "plan", "world_size", "rank", "tokens", "kernels")},
            "peak_bytes": self.peak.total,
            "peak": self.peak.categories,
            "peak_at": self.peak.place._asdict(),
            "phases": self.phases,
            "before": self.before,
            "kept": self.kept,
            "modules": [{"category": c, "module": m, "bytes": b} for c, m, b in self.modules()],
            "largest": [{"bytes": b, "category": c, **place._asdict()} for b, c, place in self.peak.largest],
            "collectives": [entry._asdict() for entry in self.collectives],
            "seconds": round(self.seconds, 1),
        }

    def render(self) -> Iterable[RenderableType]:
        """Tables for a terminal."""
        from rich.table import Table

        place = self.peak.place
        title = f"{self.model}, {self.plan}, rank {self.rank} of {self.world_size}, {self.tokens} tokens, GiB"
        memory = Table(title=title)
        for column in ("", *CATEGORIES, "total"):
            memory.add_column(column, justify="left" if not column else "right")
        for name, values in (("before the step", self.before), ("loss is there", self.kept)):
            memory.add_row(name, *(_gib(values[c]) for c in CATEGORIES), _gib(sum(values.values())))
        values = self.peak.categories
        memory.add_row("peak", *(_gib(values[c]) for c in CATEGORIES), _gib(self.peak.total), style="bold")
        yield memory
        where = place.module or _BEHIND
        phases = ", ".join(f"{phase} {_gib(size)}" for phase, size in self.phases.items())
        yield f"The peak is in the {place.phase}, at {place.operator} in {where}. Peaks: {phases} GiB.\n"
        modules = Table(title="What the peak is made of")
        for column in ("category", "module", "GiB"):
            modules.add_column(column, justify="right" if column == "GiB" else "left")
        for category, module, size in self.modules(12):
            modules.add_row(category, module, _gib(size))
        yield modules
        traffic = Table(title="What this rank sends in a step")
        for column in ("axis", "ranks", "collective", "calls", "payload GiB", "sent GiB"):
            traffic.add_column(column, justify="left" if column in ("axis", "collective") else "right")
        for c in self.collectives:
            traffic.add_row(c.axis, str(c.ranks), c.kind, str(c.calls), _gib(c.payload), _gib(c.sent))
        yield traffic


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}" if size >= _GIB / 100 or not size else f"{size / _GIB:.1e}"
