"""What a run's step report says is wrong, and what to do: `hf-veomni doctor RUN`.

out of memory        what the peak was made of by the planner, and the smallest change of the plan that fits
features             a modality's features are as many as its placeholders, or the model refuses
slow data            ranks wait for batches
slow rank            one rank's layers take longer than the others' for the same work
exchanges            all-to-alls of sp and ep that nothing hides
experts              uneven load, or too few tokens an expert for large matmuls
low MFU              with experts on several ranks, and which of these it comes from
recompiles           torch.compile makes graphs after the first steps
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hf_veomni.errors import UnsupportedError

RECORD, PAGE = "step_report.json", "step_report.html"
FAILED = "step_report.error.{}.json"  # of a rank, where its training failed: all that it knows, like RECORD
PARTS = ("data", "forward", "exchange", "backward", "optimizer", "other")
# Shares of a step, and ratios, from which on something is said.
SLOW_DATA, EXPOSED, SLOW_RANK, UNEVEN, FEW_ROWS, LOW_MFU = 0.15, 0.2, 1.2, 1.5, 256, 0.2
# Of a record beside its rows; what `hf_veomni/trainer/step_report.py` writes.
_KEYS = {"model", "config", "plan", "world_size", "sp_size", "ep_size", "device", "checkpointing", "accumulation"}
_KEYS |= {"lora", "mixed", "fp32", "context", "document", "error"}
OUT_OF_MEMORY = "out of memory"
_FEATURES = re.compile(r"features?\b.*\btokens?\b.*(do not|does not|mismatch)|tokens: \d+, features:?", re.I | re.S)


@dataclass(frozen=True)
class Row:
    """Steps between two logs.

    Attributes:
        step: the last of them.
        parts: seconds of a step, on average over the ranks, by part; exchanges are taken out of forward and backward.
        tokens_per_second: of all ranks.
        mfu: None where it is not known.
        memory_gib: most on any rank; 0 where the device does not tell.
        balance: most model FLOPs (or tokens) of a data rank over the mean.
        slowest: the rank whose layers took longest for their work, and how many times the median.
        compiled: graphs made, on the rank with most.
        experts: what was logged of the experts' load.
    """

    step: int
    parts: dict[str, float]
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    balance: float
    slowest: tuple[int, float]
    compiled: int
    experts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: int,
        steps: int,
        ranks: Sequence[Mapping[str, float]],
        sp_size: int,
        peak: float | None,
        experts: dict[str, float],
    ) -> Row:
        """From the sums of every rank over `steps` steps. `peak`: FLOP/s of a device."""
        mean = {name: sum(rank[name] for rank in ranks) / len(ranks) / steps for name in (*PARTS, "work")}
        inside = mean["forward"] + mean["backward"]
        for name in ("forward", "backward"):  # waits are told by what they interrupt, in proportion
            mean[name] -= mean["exchange"] * (mean[name] / inside if inside else 0.0)
        seconds = sum(mean[name] for name in PARTS)
        loads = [rank["flops"] or rank["tokens"] for rank in ranks[::sp_size]]
        tokens = sum(rank["tokens"] for rank in ranks[::sp_size]) / steps
        flops = sum(rank["flops"] for rank in ranks) / sp_size / steps
        paces = [rank["work"] / (rank["flops"] or rank["tokens"] or 1.0) for rank in ranks]
        usual = median(paces)
        slowest = max(range(len(paces)), key=paces.__getitem__)
        return cls(
            step=step,
            parts={name: mean[name] for name in PARTS},
            tokens_per_second=tokens / seconds if seconds else 0.0,
            mfu=flops / seconds / peak / len(ranks) if peak and seconds and flops else None,
            memory_gib=max(rank["memory"] for rank in ranks) / 2**30,
            balance=max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0,
            slowest=(slowest, paces[slowest] / usual if usual else 1.0),
            compiled=int(max(rank["compiled"] for rank in ranks)),
            experts=experts,
        )

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        return self.parts[part] / self.seconds if self.seconds else 0.0

    def log(self) -> dict[str, float]:
        """For the Trainer's log."""
        found = {f"step_{name}_seconds": seconds for name, seconds in self.parts.items()}
        found |= {"step_balance": self.balance, "step_slowest_rank": self.slowest[1]}
        return found | ({"memory_gib": self.memory_gib} if self.memory_gib else {})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    """One diagnosis: its name, what was measured, and the way out."""

    name: str
    measured: str
    advice: str


def read_record(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The step report of a run, with the error that the ranks' others follow from: out of memory, or the first one.

    Raises:
        ValueError: there is none.
    """
    others = sorted(Path(run).glob(FAILED.format("*")))
    paths = [path for path in (Path(run) / RECORD, *others) if path.is_file()]
    path = paths[0] if paths else Path(run) / RECORD
    wanted = "it must be the `output_dir` of a run with `step_report=True` in its OmniTrainingArguments."
    if not Path(run).exists():
        raise ValueError(f"'{run}' does not exist: {wanted}")
    if not path.is_file():
        raise ValueError(f"'{run}' has no {RECORD}: {wanted}")
    records = [_read(path, wanted) for path in paths]
    errors = [record["error"] for record in records if record["error"]]
    first = min(errors, key=lambda e: (e["kind"] != OUT_OF_MEMORY, e.get("time", 0.0)), default=None)
    return {**records[0], "error": first}


def _read(path: Path, wanted: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        rows = [Row(**{**row, "slowest": tuple(row["slowest"])}) for row in record["rows"]]
        if missing := _KEYS - record.keys():
            raise KeyError(*sorted(missing))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is no step report that this version reads ({type(error).__name__}: {error}): {wanted}"
        ) from error
    return {**record, "rows": rows}


def diagnose(run: str | os.PathLike[str]) -> list[Finding]:
    """What a run's report says, worst first.

    Raises:
        ValueError: no report.
    """
    record = read_record(run)
    rows: list[Row] = record["rows"][1:] or record["rows"]  # the first one has what happens once
    found = list(_failures(record))
    if rows:
        found += [*_of_time(rows), *_of_experts(record, rows)]
        found += _of_speed(record, rows, [one.name for one in found])
    return found


def _failures(record: Mapping[str, Any]) -> Iterator[Finding]:
    error = record["error"]
    if not error:
        if not record["rows"]:
            yield Finding(
                "nothing measured",
                "the run has no row: it is in its first steps, or was killed there",
                "Look again after its first log, or set a smaller `logging_steps`; its output says what killed it.",
            )
        return
    message = str(error["message"]).strip()
    where = f"on rank {error['rank']}: " if error.get("rank") else ""
    said = where + (message.splitlines()[0] if message else f"{error['kind']} without a message")
    if error["kind"] == OUT_OF_MEMORY:
        yield Finding("out of memory", said, _fitting_plan(record))
    elif _FEATURES.search(message):
        yield Finding(
            "features not aligned",
            said,
            "A sample has more or fewer placeholder tokens than its images, videos or audio clips make features: let "
            "the model's own processor write the text, do not cut samples after it, and pack complete samples "
            "(`pack_dataset(..., processor=...)`).",
        )
    else:
        yield Finding("failed", f"{error['kind']}: {said}", "See the traceback of the run.")


def _fitting_plan(record: Mapping[str, Any]) -> str:
    """What the peak was made of, and the smallest change of plan that fits, by the planner."""
    from transformers import AutoConfig

    from hf_veomni.planner import GIB, identify_device, known_devices, plan_layouts
    from hf_veomni.planner.layout import Layout

    config = dict(record["config"])
    device = record["device"]
    try:
        like = identify_device(device["name"], device["memory_gib"])
    except UnsupportedError:
        if not device["memory_gib"]:
            return "The device does not tell its memory: `hf-veomni plan` says what fits on the one that you mean."
        nearest = min(known_devices().values(), key=lambda d: abs(d.memory_gib - device["memory_gib"]))
        like = type(nearest)(**{**vars(nearest), "memory_gib": device["memory_gib"], "name": device["name"]})
    if not record["context"]:
        return "It failed before its first batch, so there is no context to plan for: see `hf-veomni plan`."
    try:
        now = Layout.of(record["plan"], record["world_size"], record["checkpointing"])
        batch = now.data * record["accumulation"]
        plans = plan_layouts(
            AutoConfig.for_model(config.pop("model_type"), **config),
            record["world_size"],
            like,
            context=record["context"],
            document=min(max(record["document"], 1), record["context"]),
            batch=batch,  # is kept, by more micro-batches where there are fewer data ranks
            lora=record["lora"],
            mixed_precision=record["mixed"],
            fp32=record["fp32"],
            without=[name for name in ("pp", "pairs") if not now.has([name])],  # which not every training takes
        )
        entry = plans.find(now)
    except ValueError as error:
        return f"`hf-veomni plan` cannot say what fits: {error}"
    parts = sorted(entry.memory.categories.items(), key=lambda item: -item[1])
    made = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size > GIB / 20)
    peak = f"By formulas the peak of {now} is {entry.memory.total / GIB:.1f} GiB ({made}) at its {entry.memory.moment}"
    if not plans.fitting:
        near = plans.entries[0]
        return f"{peak}. No plan fits: '{near.layout}' is over by {near.over / GIB:.1f} GiB. Take more ranks or LoRA."
    least = min(plans.fitting, key=lambda e: (now.changes(e.layout), -e.tokens_per_second))
    if least.layout == now:
        return f"{peak}, which should fit: another process may hold memory, or experts got far more than their share."
    steps = least.layout.accumulation(plans.job)
    sequences = least.layout.data * steps
    change = f"{least.layout} ({least.memory.total / GIB:.1f} GiB)"
    if steps != record["accumulation"]:
        change += f" with `gradient_accumulation_steps={steps}`"
    if sequences != batch:
        change += f", and {sequences} packed sequences a step instead of {batch}"
    return f"{peak}. The smallest change that fits: {change}."


def _of_time(rows: Sequence[Row]) -> Iterator[Finding]:
    data, exchange = (median(row.share(part) for row in rows) for part in ("data", "exchange"))
    if data > SLOW_DATA:
        yield Finding(
            "slow data",
            f"{data:.0%} of a step is spent on waiting for batches",
            "Set `dataloader_num_workers`, decode and pack beforehand (`pack_dataset`), or put the data on a local "
            "disk.",
        )
    ranks = [row.slowest[0] for row in rows]
    slow = max(set(ranks), key=ranks.count)
    ratio = median(row.slowest[1] for row in rows)
    if ratio > SLOW_RANK and ranks.count(slow) > len(ranks) / 2:
        yield Finding(
            "slow rank",
            f"the layers of rank {slow} take {ratio:.2f} times as long as the median's for the same work",
            f"Look at the device of rank {slow}: clocks, temperature, other processes, its host's CPU. All ranks wait "
            "for it.",
        )
    balance = median(row.balance for row in rows)
    if balance > UNEVEN:
        yield Finding(
            "uneven batches",
            f"the fullest data rank has {balance:.2f} times the mean work",
            "Pack sequences of equal cost: `token_budget`, or `pack_dataset(..., cost=)`.",
        )
    if exchange > EXPOSED:
        yield Finding(
            "exposed exchange",
            f"{exchange:.0%} of a step waits for all-to-alls of sp and ep",
            "Keep sp and ep inside of a node, make them smaller, or hide them: `overlap=chunks` or `overlap=pairs` in "
            "the plan (docs/overlap.md).",
        )
    late = sum(row.compiled for row in rows[1:])
    if late:
        yield Finding(
            "recompiles",
            f"{late} graphs were made after the first logs",
            "Shapes or flags change from step to step: pack to one length, or `compile_layers(..., dynamic=True)`. "
            "TORCH_LOGS=recompiles names the guards.",
        )


_SLOWS = ("uneven experts", "exposed exchange", "small matmuls", "uneven batches", "slow data", "slow rank")


def _of_speed(record: Mapping[str, Any], rows: Sequence[Row], found: Sequence[str]) -> Iterator[Finding]:
    """Low MFU with experts on several ranks, and what of all that was measured it comes from."""
    known = [row.mfu for row in rows if row.mfu is not None]
    ep = record["ep_size"]
    if ep == 1 or not known or median(known) >= LOW_MFU:
        return
    causes = [name for name in _SLOWS if name in found]
    parts = sorted(((median(row.share(part) for row in rows), part) for part in PARTS), reverse=True)
    largest = ", ".join(f"{part} {share:.0%}" for share, part in parts[:3])
    yield Finding(
        "low MFU",
        f"{median(known):.0%} of what the device could do, with ep={ep}; most of a step is {largest}",
        f"It comes from {' and '.join(causes)}: see there."
        if causes
        else "Neither imbalance, nor exchanges, nor few rows for an expert explain it: compare a smaller ep, and "
        "`log_expert_load=True`, without which the load of experts is not measured.",
    )


def _of_experts(record: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Finding]:
    loads = [row.experts["expert_load_max"] for row in rows if "expert_load_max" in row.experts]
    if loads and median(loads) > UNEVEN:
        yield Finding(
            "uneven experts",
            f"the fullest expert gets {median(loads):.2f} times the mean",
            "Balance the router: `output_router_logits` for its loss, or `router_bias_update_speed` where it has a "
            "bias.",
        )
    text = record["config"].get("text_config") or record["config"]
    experts = next((text[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(n)), 0)
    ep = record["ep_size"]
    if experts and ep > 1 and record["context"]:
        rows_each = record["context"] / record["sp_size"] * text.get("num_experts_per_tok", 1) * ep / experts
        if rows_each < FEW_ROWS:
            yield Finding(
                "small matmuls",
                f"an expert gets {rows_each:.0f} rows of each layer's exchange",
                f"Below {FEW_ROWS} rows a matmul does not fill the device: longer sequences, a larger ep, or fewer "
                "sequence ranks.",
            )
