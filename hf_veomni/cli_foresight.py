"""`hf-veomni plan`, `dry-run` and `doctor`: what a job takes, and what slows a run down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

console = Console()


def _check_file(path: Path | None, endings: tuple[str, ...] = ()) -> None:
    """Refuse a file that cannot be written before anything is computed for it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise typer.BadParameter(f"The folder of '{path}' does not exist: make '{path.parent}' first.")
    if path.is_dir():
        raise typer.BadParameter(f"'{path}' is a folder: name a file in it.")
    if endings and path.suffix not in endings:
        raise typer.BadParameter(f"'{path}' must end in one of {', '.join(endings)}.")


@contextmanager
def _layer_bar() -> Iterator[None]:
    """On a terminal, a bar on stderr: the layers that dry runs within have gone through, forward and back."""
    from hf_veomni.dryrun.progress import telling

    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.fields[layers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("prepare", total=None, layers="")
        done: dict[str, int] = {}

        def tell(phase: str, layers: int, of: int) -> None:
            done[phase] = layers
            state = {"completed": sum(done.values()), "total": 2 * of, "layers": f"layer {layers} of {of}"}
            progress.update(task, description=phase, **state)

        with telling(tell):
            yield


def dry_run(
    model: Annotated[str, typer.Argument(help="Hub id, folder or path of a config.json.")],
    world_size: Annotated[int, typer.Option(help="Ranks.")],
    plan: Annotated[str, typer.Option(help="As in `prepare_omni`: 'sp=8,ep=8' or a yaml file.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of a packed sequence.")] = 4096,
    documents: Annotated[int, typer.Option(help="Documents of equal length in it.")] = 1,
    rank: Annotated[int, typer.Option(help="The rank to play.")] = 0,
    kernels: Annotated[str, typer.Option(help="Choose kernels as on 'cuda' or on 'cpu'.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of the parameters.")] = "bfloat16",
    mixed_precision: Annotated[bool, typer.Option(help="bf16 autocast and gathers around them.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Activation checkpointing of the layers.")] = False,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA adapters on all linear layers.")] = None,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of the step.")] = 1,
    skew: Annotated[float, typer.Option(help="What this rank's experts get, over their share.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file, too.")] = None,
) -> None:
    """Report memory and traffic of one rank's training step, without GPUs: the real code on fake tensors."""
    import torch

    from hf_veomni import dryrun

    _check_file(json_path)

    if not 1 <= documents <= tokens // 2:
        raise typer.BadParameter(f"--documents ({documents}) of --tokens ({tokens}) must be of 2 tokens or more each.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise typer.BadParameter(f"--dtype ('{dtype}') is no dtype of torch: use bfloat16 or float32.")
    lengths = [tokens // documents + (i < tokens % documents) for i in range(documents)]
    try:
        with _layer_bar():
            found = dryrun.dry_run(
                model,
                plan,
                world_size,
                tokens=lengths,
                rank=rank,
                kernels=kernels,
                dtype=getattr(torch, dtype),
                mixed_precision=mixed_precision,
                checkpointing=checkpointing,
                lora=lora,
                accumulation=accumulation,
                skew=skew,
            )
    except ValueError as error:  # of ours, which says what to do
        raise typer.BadParameter(str(error)) from error
    for part in found.render():
        console.print(part)
    if json_path is not None:
        json_path.write_text(json.dumps(found.to_dict(), indent=1) + "\n")


def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder or path of a config.json.")],
    world_size: Annotated[int, typer.Option(help="Ranks.")],
    device: Annotated[str, typer.Option(help="Short name in the table of devices, or a yaml file of your own.")],
    context: Annotated[int, typer.Option(help="Tokens of a packed sequence.")] = 4096,
    document: Annotated[int | None, typer.Option(help="Tokens of the longest documents in it; default: all.")] = None,
    batch: Annotated[int | None, typer.Option(help="Packed sequences of an optimizer step, over all ranks.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA adapters on all linear layers.")] = None,
    mixed_precision: Annotated[bool, typer.Option(help="bf16 autocast, gradients reduced in fp32.")] = False,
    fp32: Annotated[bool, typer.Option(help="Weights and optimizer in fp32, with --mixed-precision.")] = False,
    without: Annotated[str, typer.Option(help="What to leave out, of pp, pairs, chunks: 'pp,pairs'.")] = "",
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step, where --batch does not say.")] = 1,
    count: Annotated[int, typer.Option(help="Rows of the tables.")] = 10,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all layouts to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory and speed into this file.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write accelerate's configuration of the fastest.")] = None,
) -> None:
    """Predict memory and speed of every layout of some devices, by formulas, and name the fastest that fits."""
    from hf_veomni.planner import find_device, plan_layouts, report

    for path in (json_path, write):
        _check_file(path)
    _check_file(picture, (".png", ".svg", ".pdf"))
    if picture is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--picture needs matplotlib: `pip install hf-veomni[plot]`, or leave it out.")
    try:
        if write is not None:
            report.count_nodes(world_size, find_device(device))
        found = plan_layouts(
            model,
            world_size,
            device,
            context=context,
            document=document,
            batch=batch,
            accumulation=accumulation,
            lora=lora,
            mixed_precision=mixed_precision,
            fp32=fp32,
            without=[name.strip() for name in without.split(",") if name.strip()],
        )
    except ValueError as error:  # of ours, which says what to do
        raise typer.BadParameter(str(error)) from error
    for part in report.render(found, count):
        console.print(part)
    if json_path is not None:
        json_path.write_text(json.dumps(report.to_dict(found), indent=1) + "\n")
    if picture is not None:
        report.draw(found, picture)
    try:
        best = found.best
    except ValueError as error:
        console.print(str(error), style="bold", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error
    console.print(f"The fastest that fits: {best.layout}")
    if write is not None:
        report.write_accelerate_config(found, best, write)


def doctor(
    run: Annotated[Path, typer.Argument(help="The output directory of a run with `step_report=True`.")],
) -> None:
    """Say what slowed a run down or ended it, by its step report, and what to do."""
    from hf_veomni.doctor import diagnose

    try:
        findings = diagnose(run)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for found in findings:
        console.print(f"[bold]{found.name}[/]: {found.measured}", soft_wrap=True, highlight=False)
        console.print(f"  {found.advice}", soft_wrap=True, markup=False, highlight=False)
    if not findings:
        console.print("Nothing stands out.")
