"""docs/architecture.md names the files that an optimizer step goes through, no other ones, and lines that exist."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest

from hf_veomni import ParallelPlan
from tests.ranks.step_path import Recorder, Trace, trace_step

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/architecture.md").read_text()

# What a reader has to follow; most of the switches are those of the two layers, on the way to an exchange and back.
# docs/architecture.md says what it would cost to have less. Four files and 20 switches are what a step does against
# faults: it notes where it is, looks at its batches, tells signals and times in an exchange that was there anyway, and
# leaves a forward that Ctrl-C ends (`context._call`).
MOST_FILES = 39
MOST_SWITCHES = 288


def _section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)
    return found


def _rows(section: str, columns: int) -> list[list[str]]:
    """Cells of the rows of all tables in a section, but for their heads."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {index for rule, row in enumerate(rows) if set("".join(row)) <= {"-"} for index in (rule - 1, rule)}
    found = [row for index, row in enumerate(rows) if index not in heads]
    assert all(len(row) == columns for row in found), [row for row in found if len(row) != columns]
    return found


WAY = _rows(_section("The way, file by file"), 3)
LANDMARKS = _rows(_section("Where is it?"), 3)


def _code(cell: str) -> list[str]:
    return [code.replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def traces(ranks, tmp_path_factory) -> list[Trace]:
    return ranks(2).run(trace_step, str(tmp_path_factory.mktemp("step")), timeout=180)


def test_the_page_names_each_file_on_the_way_and_no_other(traces: list[Trace]) -> None:
    named = {file for row in WAY for file in _code(row[0])}
    walked = {file for trace in traces for file in trace.files}
    assert len(walked) > 20, "the package was not traced"
    missing, foreign = walked - named, named - walked
    assert not missing and not foreign, f"'The way, file by file' misses {missing}, and names {foreign} off the way"


def test_the_functions_that_the_page_names_run(traces: list[Trace]) -> None:
    for files, functions, _ in WAY:
        (file,) = _code(files)
        ran = {name for trace in traces for name in trace.functions.get(file, ())}
        missing = [f for f in _code(functions) if not any(f".{name}".endswith(f".{f}") for name in ran)]
        assert not missing, (file, missing)


@pytest.mark.everyday  # comprehensions and FSDP's hooks call otherwise elsewhere
def test_the_way_does_not_grow(traces: list[Trace]) -> None:
    for trace in traces:
        assert len(trace.files) <= MOST_FILES
        assert trace.switches <= MOST_SWITCHES


def test_the_recorder_sees_new_threads_and_puts_the_profile_function_back() -> None:
    before, mine = sys.getprofile(), lambda *_: None
    sys.setprofile(mine)
    try:
        recorder = Recorder()
        recorder.start()
        thread = threading.Thread(target=ParallelPlan.from_string, args=("sp=2",))
        thread.start()
        thread.join()
        recorder.stop()
        recorder.stop()
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)
    assert "ParallelPlan.from_string" in recorder.result().functions["plan.py"]


@pytest.mark.parametrize(("question", "file", "line"), LANDMARKS)
def test_a_line_that_the_page_points_to_exists(question: str, file: str, line: str) -> None:
    (path,), lines = _code(file), _code(line)
    text = (ROOT / "hf_veomni" / path).read_text()
    assert lines, question
    for wanted in lines:
        assert wanted in text, f"{path} has no `{wanted}`"


def test_the_files_that_the_page_names_exist() -> None:
    folders = {path.name for path in (ROOT / "hf_veomni").iterdir() if path.is_dir()}
    for path in set(re.findall(r"`([\w/]+\.(?:py|md|svg|yaml))`", PAGE)):
        inside = ROOT / "hf_veomni" / path
        assert inside.exists() or (ROOT / path).exists(), path
        assert inside.exists() or path.split("/")[0] not in folders, path
