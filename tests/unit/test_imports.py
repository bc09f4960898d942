"""What an import brings: `hf-veomni --help` no torch, the first public name all of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_veomni

# Each takes seconds to import.
HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft", "numpy")

_HELP = """
import sys
from typer.testing import CliRunner
from hf_veomni.cli import app

commands = [command.name or command.callback.__name__ for command in app.registered_commands]
assert {"support", "dry-run"} <= set(commands), commands
for arguments in ([], ["--help"], ["--version"], *([command, "--help"] for command in commands)):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == (0 if arguments else 2) and found.output, (arguments, found)
    brought = sorted(set(sys.argv[1:]) & set(sys.modules))
    assert not brought, f"{arguments} imports {brought}"
"""

_FIRST_NAME = """
import sys
import hf_veomni

assert "torch" not in sys.modules
import hf_veomni.planner  # what reads configs on its own knows composed models
from transformers import CONFIG_MAPPING

assert sys.argv[1] in CONFIG_MAPPING and "hf_veomni.trainer" not in sys.modules
hf_veomni.UnsupportedError
assert set(hf_veomni.__all__) <= set(vars(hf_veomni)) and "hf_veomni.trainer" in sys.modules
"""


def _python(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=60)


def test_help_and_version_wait_for_no_library():
    _python(_HELP, *HEAVY)


def test_the_first_public_name_imports_all():
    _python(_FIRST_NAME, hf_veomni.OmniConfig.model_type)


def test_public_names_are_listed_and_others_are_an_attribute_error():
    assert set(hf_veomni.__all__) <= set(dir(hf_veomni))
    with pytest.raises(AttributeError, match="module 'hf_veomni' has no attribute 'OmniTrainr'"):
        hf_veomni.OmniTrainr  # noqa: B018
