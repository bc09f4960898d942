"""Which errors are shown once, and what the launcher's file says of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_veomni import ParallelPlan, UnsupportedError
from hf_veomni.launcher import ENV_VARIABLE, report_errors


def _wrong_plan() -> None:
    ParallelPlan.from_string("tp=2")


def _wrong_script() -> None:
    raise UnsupportedError("raised by a script")


@pytest.fixture
def raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets the processes of one attempt end in an error; returns what is printed, each a message."""

    def run(fail: Callable[[], None], num_processes: int = 2) -> list[str]:
        shown: list[str] = []
        for rank in range(num_processes):
            folder = tmp_path / "attempt_0" / str(rank)
            folder.mkdir(parents=True)
            monkeypatch.setenv(ENV_VARIABLE, str(folder / "error.json"))
            monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(str(error)))
            report_errors()
            try:
                fail()
            except Exception as error:
                sys.excepthook(type(error), error, error.__traceback__)
        return shown

    return run


def test_an_error_of_ours_is_shown_once_and_reported_by_each(raised, tmp_path: Path) -> None:
    shown = raised(_wrong_plan)
    assert len(shown) == 1 and "there is no tensor parallelism" in shown[0]
    for rank in range(2):
        report = json.loads((tmp_path / f"attempt_0/{rank}/error.json").read_text())["message"]
        assert report["message"].endswith(shown[0]) and int(report["extraInfo"]["timestamp"]) > 0


def test_errors_of_others_are_left_alone(raised, tmp_path: Path) -> None:
    assert raised(_wrong_script) == ["raised by a script"] * 2
    assert not (tmp_path / "attempt_0/0/error.json").exists()


def test_nothing_is_installed_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_VARIABLE, raising=False)
    before = sys.excepthook
    report_errors()
    assert sys.excepthook is before
