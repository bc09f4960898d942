"""The sets of versions: floors are what pyproject.toml says, in the constraints files and in the README."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.versions import ROOT, SETS, canonical, read_pins, read_results

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors(requirements: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        assert match is not None, f"{requirement} has a bound that nothing here knows"
        found[canonical(match[1])] = match[2]
    return found


def as_numbers(version: str) -> list[int]:
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (4 - len(numbers))


def test_floor_set_holds_the_floors() -> None:
    pins = read_pins(ROOT / "constraints-floor.txt")
    for name, floor in floors(PROJECT["dependencies"]).items():
        assert as_numbers(pins[name]) == as_numbers(floor), name


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_other_sets_are_above_the_floors(name: str) -> None:
    pins = read_pins(ROOT / name)
    for package, floor in floors(PROJECT["dependencies"]).items():
        assert as_numbers(pins[package]) >= as_numbers(floor), package


def test_results_are_of_the_pinned_versions_and_green() -> None:
    results = read_results()
    assert set(results) == set(SETS)
    for name, result in results.items():
        assert result["versions"] == read_pins(ROOT / f"constraints-{name}.txt"), f"run `make test-{name}` and commit"
        assert result["counts"]["failed"] == 0
        assert result["counts"]["passed"] > 2500
        assert len(result.get("again", ())) <= 5  # a time limit on a loaded machine, not a habit


def test_readme_names_the_floors() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    for name, floor in floors(PROJECT["dependencies"]).items():
        if name not in ("typer", "rich"):
            assert f"{name} {floor}" in text, name
