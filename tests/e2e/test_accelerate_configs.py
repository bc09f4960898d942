"""Every accelerate configuration starts the ranks that its plan is for; a mistake in one is an error."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_veomni.plan import ACCELERATE_ENV_VARIABLE, ACCELERATE_PREFIX, ParallelPlan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
names = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def launcher_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What accelerate's own launcher puts into the environment of the ranks for this file."""
    from accelerate.commands.launch import _validate_launch_command

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--config_file", str(path), "--machine_rank", "0", "--main_process_port", "0", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return prepare_multi_gpu_env(arguments)


@names
def test_plan_fits_processes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = launcher_environment(path, monkeypatch)
    monkeypatch.setenv(ACCELERATE_ENV_VARIABLE, environment[ACCELERATE_ENV_VARIABLE])
    monkeypatch.delenv("HF_VEOMNI_PLAN", raising=False)
    processes = yaml.safe_load(path.read_text())["num_processes"]
    plan = ParallelPlan.from_env()
    assert plan != ParallelPlan()
    assert plan.resolve(processes).world_size == processes


@names
def test_ranks_get_weights_and_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = launcher_environment(path, monkeypatch)
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    if path.name.startswith("cpu"):
        assert environment["CUDA_VISIBLE_DEVICES"] == "-1"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    else:
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@names
def test_header_names_the_file_and_the_page_lists_it(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"accelerate_configs/{path.name}" in header and "# For: " in header
    config = yaml.safe_load(path.read_text())
    plan = config["parallelism_config"]["parallelism_config_sp_backend"].removeprefix(ACCELERATE_PREFIX)
    assert f"| `{path.name}` | {config['num_processes']} | `{plan}` |" in (ROOT / "docs/configs.md").read_text()


def test_the_page_lists_no_other_file() -> None:
    listed = set(re.findall(r"\| `(\w+\.yaml)` \|", (ROOT / "docs/configs.md").read_text()))
    assert listed == {path.name for path in CONFIGS}


def edited(folder: Path, old: str, new: str) -> Path:
    text = (ROOT / "accelerate_configs/cpu_sp2.yaml").read_text()
    assert text.count(old) >= 1
    path = folder / "edited.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("veomni:sp=2", "veomni:ps=2", "Unknown plan key 'ps'.*did you mean 'sp'"),
        ("veomni:sp=2", "veomni:sp=two", "must be name=integer"),
        ("veomni:sp=2", "veomni:sp=2,sp=2", "appears twice"),
        ("veomni:sp=2", "veomin:sp=2", "veomni:"),
        ("parallelism_config_sp_backend", "parallelism_config_sp_backned", "veomni:"),
    ],
)
def test_typo_in_the_plan_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    """Also one that accelerate drops: then the launcher says that there is a plan, and there is none."""
    from hf_veomni import OmniParallelismConfig

    environment = launcher_environment(edited(tmp_path, old, new), monkeypatch)
    for name, value in environment.items():
        if name.startswith(("PARALLELISM_CONFIG_", "ACCELERATE_USE", "FSDP_")):
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        OmniParallelismConfig(None)


def test_typo_in_a_section_is_refused_by_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown keys"):
        launcher_environment(edited(tmp_path, "\nparallelism_config:", "\nparalelism_config:"), monkeypatch)


def test_every_file_is_what_accelerate_reads() -> None:
    assert CONFIGS
    for path in CONFIGS:
        assert load_config_from_file(str(path)).parallelism_config


def test_files_of_jobs_are_the_planners_choice() -> None:
    """`python accelerate_configs/make.py` would write them again as they are. By formulas each fits its device, and is
    within 5 % of its dry run if `dry_runs.json` has one."""
    make: dict[str, Any] = runpy.run_path(str(ROOT / "accelerate_configs/make.py"))
    texts = dict(make["texts"]())
    assert len(texts) == len(make["JOBS"])
    for name, text in texts.items():
        assert (ROOT / "accelerate_configs" / name).read_text() == text, name
        assert re.search(r"Estimated by (a dry run of the step|`hf-veomni plan`).*, not measured", text, flags=re.S)
    known = make["known_dry_runs"]()
    for job in make["JOBS"]:
        best, found = make["entry_of"](job), known.get(job.name)
        assert best.fits and best.layout.checkpointing >= job.checkpointing
        if found is not None:
            assert best.memory.total == pytest.approx(found["peak_bytes"], rel=0.05), job.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu8_80gb_8b", "gpu1_24gb_8b_lora"])
def test_dry_runs_are_what_they_were(name: str) -> None:
    make: dict[str, Any] = runpy.run_path(str(ROOT / "accelerate_configs/make.py"))
    job = next(job for job in make["JOBS"] if job.name == name)
    assert make["dry_run_of"](job) == make["known_dry_runs"]()[name]
