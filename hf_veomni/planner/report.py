"""Plans as a table, as json, as a plot, and as a configuration of accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from hf_veomni.plan import ACCELERATE_PREFIX
from hf_veomni.planner.devices import Device
from hf_veomni.planner.memory import CATEGORIES
from hf_veomni.planner.search import GIB, Entry, Plans

# Of the categories, and of what the device needs beside tensors.
_COLORS: dict[str, str] = dict(
    zip(
        (*CATEGORIES, "reserved"),
        ("#4c78a8", "#f58518", "#54a24b", "#9ecae9", "#b279a2", "#eeca3b", "#ff9da6", "#bab0ac"),
        strict=True,
    )
)

# Said wherever figures of a model with encoders are: what these take depends on the images of a batch.
WITHOUT_ENCODERS = "Activations of encoders are not in it."
# The way out where the full weights do not fit a device.
_BY_PARTS = (
    "build the model on the meta device and shard it with `prepare_omni(model, plan, checkpoint=...)`, by which each "
    "rank reads its own part (docs/accelerate.md)"
)

if TYPE_CHECKING:
    from rich.console import RenderableType


def to_dict(plans: Plans, count: int | None = None) -> dict[str, Any]:
    """Plain values, for json: the first `count` entries, None for all."""
    job = plans.job
    return {
        "model": plans.shape.name,
        "parameters": plans.shape.total,
        "active_parameters": plans.shape.active,
        "device": plans.device.name,
        "device_gib": plans.device.memory_gib,
        "world_size": plans.world_size,
        "context": job.context,
        "document": job.document,
        "batch": job.batch,
        "accumulation": job.accumulation,
        "lora": job.lora,
        "mixed_precision": job.mixed,
        "fp32": job.fp32,
        "notes": [WITHOUT_ENCODERS] if plans.shape.encoders else [],
        "layouts": len(plans.entries),
        "fitting": len(plans.fitting),
        "entries": [_entry(plans, entry) for entry in plans.entries[:count]],
    }


def _entry(plans: Plans, entry: Entry) -> dict[str, Any]:
    return {
        "plan": str(entry.layout.plan),
        "checkpointing": entry.layout.checkpointing,
        "accumulation": entry.layout.accumulation(plans.job),
        "fits": entry.fits,
        "over_bytes": max(0, entry.over),
        "peak_bytes": entry.memory.total,
        "peak_moment": entry.memory.moment,
        "peak": entry.memory.categories,
        "reserved_bytes": entry.reserved,
        "device_bytes": entry.memory.total + entry.reserved,
        "loading_bytes": entry.loading + entry.reserved,
        "loads": plans.loads(entry),
        "seconds": entry.time.seconds,
        "seconds_by_part": entry.time.parts,
        "hidden_seconds": entry.time.hidden,
        "tokens_per_second": entry.tokens_per_second,
        "tokens_per_second_and_device": entry.tokens_per_second / plans.world_size,
        "mfu": plans.mfu(entry),
        "exchanges": [{**vars(x), "sent": x.sent} for x in entry.exchanges],
    }


def _column(name: str) -> dict[str, Any]:
    """How a column of a table is set: plans are kept whole, on several lines where the terminal is narrow."""
    return {"min_width": 24, "overflow": "fold"} if name == "plan" else {"justify": "right"}


def render(plans: Plans, count: int = 10) -> Iterable[RenderableType]:
    """Tables for a terminal: the fastest that fit, and the nearest that do not."""
    from rich.table import Table

    job, world = plans.job, plans.world_size
    title = f"{plans.shape.name}, {plans.shape.total / 1e9:.1f}B, {world} x {plans.device.name}, {job.context} tokens"
    fitting = plans.fitting
    table = Table(title=f"{title}\n{len(fitting)} of {len(plans.entries)} layouts fit")
    shown = fitting[:count]
    loading = not all(plans.loads(entry) for entry in shown)
    captions = [f"{WITHOUT_ENCODERS} `dry_run` with an `image_batch` has them."] if plans.shape.encoders else []
    if loading:
        captions.append(f"A plan whose loading takes more than {plans.device.memory_gib} GiB: {_BY_PARTS}.")
    table.caption = "\n".join(captions) or None
    axes = ("sp", "ep", "fsdp", *(["pp", "bubble"] if any(e.layout.pp > 1 for e in shown) else []))
    sizes = ("GiB", *(["loading"] if loading else []))
    for column in ("plan", "ckpt", *sizes, "tokens/s/device", "MFU %", "step s", f"exposed s: {axes[0]}", *axes[1:]):
        table.add_column(column, **_column(column))
    for entry in shown:
        parts = entry.time.parts
        table.add_row(
            str(entry.layout.plan),
            "yes" if entry.layout.checkpointing else "",
            f"{(entry.memory.total + entry.reserved) / GIB:.1f}",
            *([f"{(entry.loading + entry.reserved) / GIB:.1f}"] if loading else []),
            f"{entry.tokens_per_second / world:.0f}",
            f"{100 * plans.mfu(entry):.1f}",
            f"{entry.time.seconds:.2f}",
            *(f"{parts.get(axis, 0.0):.2f}" for axis in axes),
        )
    yield table
    others = plans.entries[len(fitting) :]
    if others:
        left = Table(title="What does not fit, the nearest first")
        for column in ("plan", "ckpt", "over by GiB", *CATEGORIES):
            left.add_column(column, **_column(column))
        for entry in others[:count]:
            sizes = [f"{entry.memory.categories[c] / GIB:.1f}" for c in CATEGORIES]
            ckpt = "yes" if entry.layout.checkpointing else ""
            left.add_row(str(entry.layout.plan), ckpt, f"{entry.over / GIB:.1f}", *sizes)
        yield left


def draw(plans: Plans, path: str | os.PathLike[str], count: int = 12) -> None:
    """A plot: memory of the fastest plans by category, and memory and speed of all with their Pareto front.

    Raises:
        ImportError: matplotlib is not installed (`pip install hf-veomni[plot]`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.35 * count + 2.2), layout="constrained")
    bars, scatter = figure.subplots(1, 2)
    job = plans.job
    figure.suptitle(
        f"{plans.shape.name} on {plans.world_size} x {plans.device.name}, {job.context:,} tokens", fontsize=11
    )
    shown = list(reversed(plans.entries[:count]))
    names = [str(entry.layout) for entry in shown]
    left = [0.0] * len(shown)
    for category, color in _COLORS.items():
        sizes = [e.reserved if category == "reserved" else e.memory.categories[category] for e in shown]
        bars.barh(names, [size / GIB for size in sizes], left=left, label=category, color=color)
        left = [x + size / GIB for x, size in zip(left, sizes, strict=True)]
    bars.axvline(plans.device.memory_gib, color="black", linestyle="--", linewidth=1)
    bars.tick_params(axis="y", labelsize=8)
    bars.set(xlabel="GiB of a device (dashed: what it has)", title="Memory of the first layouts, the best on top")
    bars.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.35, -0.1), ncols=4)
    _draw_all(plans, scatter)
    figure.savefig(path, dpi=110)


def _draw_all(plans: Plans, axis: Any) -> None:
    """Memory and speed of all entries, with their Pareto front."""
    points = [((e.memory.total + e.reserved) / GIB, e.tokens_per_second / plans.world_size, e) for e in plans.entries]
    for fits, color in ((False, "#c8c8c8"), (True, "#54a24b")):
        some = [(x, y) for x, y, entry in points if entry.fits is fits]
        label = f"{len(some)} fit" if fits else f"{len(some)} do not fit"
        axis.scatter([x for x, _ in some], [y for _, y in some], s=14, color=color, label=label)
    front, best = [], -1.0
    for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            front.append((x, y))
            best = y
    axis.step([x for x, _ in front], [y for _, y in front], where="post", color="#4c4c4c", label="most for the memory")
    if plans.fitting:
        x, y, _ = points[0]
        axis.scatter(
            [x], [y], s=90, facecolors="none", edgecolors="#e45756", linewidths=2, label="the fastest that fits"
        )
    axis.axvline(plans.device.memory_gib, color="black", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel="GiB of a device (dashed: what it has)", ylabel="predicted tokens/s of a device")
    axis.set_title("All layouts")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(fontsize=8)


def count_nodes(world_size: int, device: Device) -> int:
    """Machines of a file for `accelerate launch`, which starts as many ranks on each.

    Raises:
        ValueError: the world is no multiple of a node's devices.
    """
    if world_size > device.node and world_size % device.node:
        near = world_size - world_size % device.node
        raise ValueError(
            f"`world_size` ({world_size}) must be a multiple of the {device.node} devices in a node of {device.name} "
            f"for a file that accelerate starts, with as many ranks on every node: take {near} or "
            f"{near + device.node}, or a device file with another `node`."
        )
    return max(1, world_size // device.node)


def accelerate_config(
    plans: Plans, entry: Entry, path: str, purpose: str = "", dry_run: Mapping[str, int] | None = None
) -> str:
    """The text of a file for `accelerate launch --config_file` with this entry's plan; the estimate is its header.

    Args:
        path: that the file will have.
        purpose: for the header; by default what was planned for.
        dry_run: bytes at the peak by category that a dry run of the entry found, for the header in place of those by
            formulas.

    Raises:
        ValueError: nodes would have different numbers of ranks.
    """
    job, device, world = plans.job, plans.device, plans.world_size
    machines = count_nodes(world, device)
    peak = entry.memory.categories if dry_run is None else dry_run
    sizes = ", ".join(f"{c} {size / GIB:.1f}" for c, size in peak.items() if size >= GIB / 20)
    by = "by `hf-veomni plan`" if dry_run is None else "by a dry run of the step on one of the ranks"
    estimate = (
        f"Estimated {by}, not measured: {sum(peak.values()) / GIB:.1f} GiB of tensors a device at the peak ({sizes}). "
        f"By formulas {entry.memory.total / GIB:.1f} GiB, {entry.reserved / GIB:.1f} GiB beside them, and "
        f"{entry.tokens_per_second / world:.0f} tokens/s and device."
    )
    lines = wrap(f"{world} x {device.name}: {entry.layout.plan}.", 115)
    lines += wrap(f"For: {_about(plans, entry, purpose)}.", 115) + wrap(estimate, 115)
    loads = plans.loads(entry)
    if not loads:
        size = f"{entry.loading / GIB:.1f} GiB"
        loaded = f"Loaded in full, the model does not fit a device while it is sharded ({size})"
        lines += wrap(f"{loaded}: {_BY_PARTS}.", 115)
    if plans.shape.encoders:
        lines += [WITHOUT_ENCODERS]
    if machines > 1:
        lines += ["", "On every node, with its own rank and the address of node 0:"]
        lines += [f"  accelerate launch --config_file {path} \\"]
        lines += ["      --machine_rank RANK --main_process_ip ADDRESS --main_process_port 29500 script.py"]
    else:
        lines += ["", f"  accelerate launch --config_file {path} script.py"]
    weights = "every rank loads the weights" if loads else "each rank reads its own part"
    head = "\n".join(f"# {line}".rstrip() for line in lines)
    return f"""{head}
distributed_type: FSDP
mixed_precision: {"bf16" if job.mixed else "'no'"}
num_machines: {machines}
num_processes: {world}
fsdp_config:
  fsdp_version: 2
  fsdp_cpu_ram_efficient_loading: false  # {weights}; true leaves all but the first without
parallelism_config:
  parallelism_config_sp_backend: "{ACCELERATE_PREFIX}{_stated(entry)}"  # the plan
"""


def _about(plans: Plans, entry: Entry, purpose: str) -> str:
    """What an entry is for, and what a script has to do for it."""
    job = plans.job
    trained = "full fine-tuning" if job.lora is None else f"LoRA of rank {job.lora}"
    about = purpose or f"{trained} of {plans.shape.name} with {plans.shape.total / 1e9:.0f}B parameters"
    about += f", on packed sequences of {job.context:,} tokens"
    if job.document < job.context:
        about += f" with documents of up to {job.document:,}"
    if entry.layout.checkpointing:
        about += ", with `activation_checkpointing=True`"
    if entry.layout.overlap == "pairs":
        about += ", in OmniTrainer or with `run_pair` (overlap=pairs)"
    if entry.layout.pp > 1:
        about += f", {entry.layout.accumulation(job)} micro-batches a step, by `run_window` (pp)"
    return about


def _stated(entry: Entry) -> str:
    """The plan as a string that says something of a plan of data ranks alone, too."""
    text = str(entry.layout.plan)
    return "dp_shard=1" if text == "single" else text


def write_accelerate_config(plans: Plans, entry: Entry, path: str | os.PathLike[str]) -> None:
    """Write `accelerate_config` to a file."""
    Path(path).write_text(accelerate_config(plans, entry, str(path)))
