"""Train stock models of transformers under a plan, plan jobs before there is a cluster, convert checkpoints."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_veomni import cli_foresight as foresight
from hf_veomni.support import OUTCOMES, Family

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"hf-veomni {_version('hf-veomni')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    wants_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def support(
    model: Annotated[str | None, typer.Option(help="Model type, folder with a config.json, or Hub id.")] = None,
) -> None:
    """Say what works under sequence parallelism: of all model types, or of one model."""
    from hf_veomni.support import load_matrix

    matrix = load_matrix()
    if model is not None and not Path(model).exists() and (known := _normalised(model)) in matrix.families:
        model = known
    if model is None:
        table = Table(title=f"transformers {matrix.versions['transformers']}, {matrix.date}, plan {matrix.plan}")
        for column in ("outcome", "model types"):
            table.add_column(column)
        for outcome, count in matrix.counts().most_common():
            table.add_row(outcome, str(count))
        console.print(table)
        for outcome in ("works", "refused"):
            names = sorted(f.model_type for f in matrix.families.values() if f.outcome == outcome)
            console.print(f"[bold]{outcome}[/]: {', '.join(names)}\n")
        return
    if model not in matrix.families:
        _check_spelling(model, list(matrix.families))
        _live(model)
        return
    family = matrix.families[model]
    for name, value in _findings(family):
        console.print(f"{name:12} {value}", soft_wrap=True, markup=False, highlight=False)
    if family.rule and family.outcome == "works":
        rules = ", ".join(f"'{pattern}': {{'sp': 'gather'}}" for pattern in family.rule.split(", "))
        console.print(f"{'rule':12} modules={{{rules}}} of the plan", soft_wrap=True)


def _normalised(model: str) -> str:
    """A name as people write it ("Qwen2.5-VL"), as transformers writes model types ("qwen2_5_vl")."""
    return re.sub(r"[-. ]+", "_", model.strip().lower())


def _findings(family: Family) -> Iterator[tuple[str, str]]:
    """What a person wants to know about a family, by name."""
    yield "model type", f"{family.model_type} ({family.model_class})" if family.model_class else family.model_type
    yield "outcome", f"{family.outcome}: {OUTCOMES[family.outcome]}"
    if family.reason:
        yield "reason", family.reason
    if family.outcome != "works":
        return
    yield "padded", family.padded
    yield "packed", family.packed
    if family.trainer:
        yield "OmniTrainer", family.trainer
    compared = "its own loss" if family.loss == "model" else "one of its outputs"
    yield "exact to", f"{family.error:.1e} of one process, in {family.dtype}: {compared} and all gradients"


def _check_spelling(model: str, known: list[str]) -> None:
    """Offer the nearest model type before the network is asked for what is none."""
    near = difflib.get_close_matches(_normalised(model), known, n=1, cutoff=0.8)
    if near and "/" not in model and not Path(model).exists():
        raise typer.BadParameter(
            f"'{model}' is no model type of transformers: did you mean '{near[0]}'? A folder needs its path, as in "
            "'./name', and a Hub id its owner, as in 'owner/name'."
        )


def _live(model: str) -> None:
    """The row of the model's family, and the test of its shard points on a model of this config, on meta."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from hf_veomni.errors import UnsupportedError
    from hf_veomni.sequence.inspect import find_shard_points
    from hf_veomni.support import load_matrix

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        known = list(load_matrix().families)
        near = difflib.get_close_matches(_normalised(model.rpartition("/")[2]), known, n=1, cutoff=0.5)
        hint = f"; the model type nearest to it is '{near[0]}'" if near else ""
        raise typer.BadParameter(
            f"'{model}' is no model type of transformers{hint}. As a folder or Hub id it has no config.json that can "
            f"be read: {str(error).splitlines()[0]}"
        ) from error
    family = load_matrix().families.get(config.model_type)
    console.print(f"family       {config.model_type}: {family.outcome if family else 'not in the matrix'}")
    if family is not None and family.reason:
        console.print(f"reason       {family.reason}", soft_wrap=True)
    with torch.device("meta"):
        try:
            built = AutoModelForCausalLM.from_config(config)
        except ValueError:
            built = AutoModel.from_config(config)
    try:
        points = find_shard_points(built)
    except UnsupportedError as error:
        console.print(f"this model   refused: {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"this model   can be cut: {len(points.layers)} layers, {len(points.attentions)} attention modules")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A yaml file: model, data, plan, lora, processes, arguments.")],
    print_script: Annotated[
        bool, typer.Option("--print-script", help="Print the script that the recipe stands for, and do not run it.")
    ] = False,
) -> None:
    """Train from one yaml file; `hf-veomni init` writes one. An example:

    \b
    model: HuggingFaceTB/SmolLM2-135M-Instruct
    data: {path: chats.jsonl, max_tokens: 4096}
    plan: sp=2
    lora: {r: 16, lora_alpha: 32}
    processes: 2
    arguments: {output_dir: outputs/run, learning_rate: 2.0e-4}
    """
    from hf_veomni.recipe import Recipe

    try:
        read = Recipe.from_yaml(recipe)
        path = Path(read.arguments["output_dir"]) / "train.py"
        text = read.script(str(path))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if print_script:
        typer.echo(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    command = [sys.executable, *read.command(str(path))]
    console.print(f"$ {shlex.join(command)}", highlight=False, soft_wrap=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    raise typer.Exit(subprocess.run(command, env=environment).returncode)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where the recipe is written.")] = Path("recipe.yaml"),
) -> None:
    """Ask a few questions and write a recipe for `hf-veomni train`."""
    import torch

    if path.exists() and not typer.confirm(f"{path} exists. Write over it?"):
        raise typer.Exit(1)
    model = typer.prompt("Model (folder or Hub id)", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    data = typer.prompt("Data (jsonl, parquet, saved folder or Hub id)", default="chats.jsonl")
    tokens = typer.prompt("Tokens of a packed sequence", default=4096, value_proc=_positive)
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    processes = typer.prompt("Processes on this machine", default=max(devices, 1), value_proc=_positive)
    longest = 16384  # tokens of a rank
    sp = next((n for n in range(1, processes + 1) if processes % n == 0 and tokens <= n * longest), processes)
    suggested = f"sp={sp}" if sp > 1 else (f"dp_shard={processes}" if processes > 1 else "")
    plan = typer.prompt("Plan", default=suggested, value_proc=lambda text: _fitting_plan(text, processes))
    lora = typer.confirm("Train an adapter (LoRA)? Otherwise all parameters are trained", default=True)
    output = typer.prompt("Output folder", default="outputs/run")
    lines = [
        f"model: {json.dumps(model)}",
        "data:",
        f"  path: {json.dumps(data)}",
        f"  max_tokens: {tokens}",
        f"plan: {json.dumps(plan)}",
        *(["lora: {r: 16, lora_alpha: 32}"] if lora else []),
        f"processes: {processes}",
        "arguments:",
        f"  output_dir: {json.dumps(output)}",
        "  per_device_train_batch_size: 1",
        "  num_train_epochs: 1",
        f"  learning_rate: {2e-4 if lora else 1e-5:.1e}",
        "  logging_steps: 1",
        *(["  bf16: true"] if devices and torch.cuda.is_available() else []),
        "  report_to: none",
    ]
    path.write_text("\n".join(lines) + "\n")
    console.print(f"Wrote {path}. Next: hf-veomni train {path}", highlight=False, soft_wrap=True)


def _positive(text: str) -> int:
    """The number, or an error after which it is asked for again."""
    if not str(text).isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"'{text}' must be a positive integer.")
    return int(text)


def _fitting_plan(text: str, processes: int) -> str:
    """The plan as it was given, or an error after which it is asked for again."""
    from hf_veomni.plan import ParallelPlan, asks_auto

    try:
        if not asks_auto(text):
            ParallelPlan.parse(text).resolve(processes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


@app.command("convert-config")
def convert_config(
    source: Annotated[Path, typer.Argument(help="A training file of VeOmni.")],
    target: Annotated[Path, typer.Argument(help="The recipe to write.")],
    processes: Annotated[int, typer.Option(help="Processes on all machines; VeOmni's files do not say it.")] = 1,
) -> None:
    """Convert a training file of VeOmni to a recipe for `hf-veomni train`; what has no equivalent is an error."""
    from hf_veomni.convert_config import convert_file

    try:
        convert_file(source, target, processes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"Wrote {target}. Next: hf-veomni train {target} --print-script", highlight=False, soft_wrap=True)


@app.command()
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint that `sharded_weights=True` wrote; or a folder with config.json and the torch file of "
            "DeepSpeed's zero_to_fp32.py or of FSDP's FULL_STATE_DICT."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
) -> None:
    """Convert sharded weights of a checkpoint to plain files that transformers or PEFT opens, with the tokenizer."""
    from hf_veomni.checkpoint.convert import convert as convert_checkpoint
    from hf_veomni.omni import OmniModel

    try:
        written = convert_checkpoint(checkpoint, out, classes=[OmniModel])
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error
    for path in written:
        console.print(f"{path}  {path.stat().st_size / 1e9:.2f} GB", soft_wrap=True, markup=False)


app.command("dry-run")(foresight.dry_run)
app.command()(foresight.plan)
app.command()(foresight.doctor)


@app.command()
def env() -> None:
    """Show versions, devices and kernels."""
    import torch

    from hf_veomni.attention.varlen import has_kernel

    for name in ("hf-veomni", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "trl"):
        console.print(f"{name:14} {_version(name)}")
    cuda = torch.cuda.is_available()
    console.print(
        f"{'device':14} {torch.cuda.get_device_name() if cuda else 'cpu'} x {torch.cuda.device_count() or 1}"
    )
    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    console.print(f"{'collectives':14} {', '.join(backends)}")
    kernel = cuda and has_kernel(torch.device("cuda"))
    console.print(f"{'varlen':14} {'torch.nn.attention.varlen' if kernel else 'one fused call per document'}")
    for name in ("flash-attn", "flash-linear-attention", "causal-conv1d", "kernels"):
        console.print(f"{name:14} {_version(name)}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Entry point of the `hf-veomni` script."""
    app()
