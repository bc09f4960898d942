"""What is expected of other libraries is written down, there, and named with versions where it is missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import Trainer

from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.require import TESTED, VersionError, override, require, require_overrides, require_parameters
from hf_veomni.hf.seams import ARGUMENTS, SEAMS
from hf_veomni.trainer import OmniTrainerMixin
from hf_veomni.trainer.counting import _DataRanks
from tests.versions import ROOT, read_pins

LIBRARIES = ("transformers", "accelerate", "peft", "torch")
# Of single families, asked for before they are read; and names of a namedtuple, of a schema and of a storage.
ELSEWHERE = {"_apply_gate", "_reshape", "_split_heads", "_asdict", "_replace", "_schema", "_cdata", "_to_copy"}
# Required where they are used, on the device that has them.
ELSEWHERE |= {"_varlen_attn", "_varlen_attn_backward", "_C"}
# Documented functions of Python.
ELSEWHERE |= {"_exit", "_current_frames"}


def _trees() -> list[tuple[str, ast.Module]]:
    files = sorted((ROOT / "hf_veomni").rglob("*.py"))
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text())) for file in files]


def _own_names(trees: list[tuple[str, ast.Module]]) -> set[str]:
    found: set[str] = set()
    for _, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            for target in (leaf for one in targets for leaf in ast.walk(one)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    found.add(target.attr if target.value.id == "self" else "")
    return found


def _methods(owner: type) -> dict[str, object]:
    """The methods and properties that classes of the package give `owner`, dunders left out."""
    ours = [base for base in owner.__mro__ if base.__module__.startswith("hf_veomni.")]
    members = {name: member for base in ours for name, member in vars(base).items() if not name.startswith("__")}
    return {name: getattr(m, "fget", m) for name, m in members.items() if callable(m) or isinstance(m, property)}


def test_every_private_name_is_in_the_table():
    trees = _trees()
    known = {name for names in SEAMS.values() for name in names} | _own_names(trees) | ELSEWHERE
    for file, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
                assert node.attr in known, f"{file}:{node.lineno}: {ast.unparse(node)}"


def test_every_import_from_inside_a_library_is_in_the_table():
    for file, tree in _trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in LIBRARIES:
                continue
            for name in (alias.name for alias in node.names):
                private = "._" in f"{node.module}.{name}"
                if private and name != "_C":
                    assert name in SEAMS.get(node.module, ()), f"{file}:{node.lineno}: {node.module}.{name}"


@pytest.mark.parametrize(("owner", "stock"), [(OmniTrainerMixin, Trainer), (_DataRanks, Accelerator)])
def test_every_override_is_marked(owner, stock):
    for name, method in _methods(owner).items():
        assert hasattr(stock, name) == hasattr(method, "__override__"), name


def test_renamed_method_of_a_stock_class_is_named(monkeypatch):
    require_overrides(OmniTrainerMixin, Trainer)
    monkeypatch.delattr(Trainer, "_save_rng_state")
    with pytest.raises(VersionError, match=r"transformers 5\.\d+\.\d+ has no `_save_rng_state` in .*Trainer`.*5\.23"):
        require_overrides(OmniTrainerMixin, Trainer)


def test_renamed_argument_of_a_stock_method_is_named():
    class Stock:
        def step(self, loss):
            pass

    class Own(Stock):
        @override
        def step(self, losses):
            pass

    Own.__module__ = "hf_veomni.trainer.own"
    Stock.step.__module__ = "transformers.trainer"
    with pytest.raises(VersionError, match="has no argument `losses` in"):
        require_overrides(Own)


@pytest.mark.parametrize(
    ("owner", "names", "match"),
    [
        (
            "transformers.modeling_utils",
            ("_nothing", "PreTrainedModel"),
            "has no `_nothing` in `transformers.mod",
        ),
        ("transformers.no_such_module", ("x",), "has no `no_such_module` in `transformers`"),
        ("accelerate:Accelerator", ("_nothing",), r"accelerate 1\.\d.* has no `_nothing`.*install accelerate 1\.15,"),
        ("peft:NoSuchClass", ("x",), "has no `NoSuchClass` in `peft`"),
    ],
)
def test_what_is_missing_is_named_with_the_versions(owner, names, match):
    with pytest.raises(VersionError, match=match) as found:
        require(owner, names)
    assert isinstance(found.value, ImportError) and isinstance(found.value, UnsupportedError)


def test_what_a_method_sets_counts():
    require("transformers:PreTrainedModel", ("_loss_function",))
    require(Accelerator, ("_models",))
    require_parameters("accelerate:Accelerator.gather", ("tensor",))


def test_tables_name_only_what_stands_once():
    assert all(len(set(names)) == len(names) for names in [*SEAMS.values(), *ARGUMENTS.values()])


@pytest.mark.parametrize("path", ["constraints-floor.txt", "constraints.txt", "constraints-newest.txt"])
def test_tested_versions_are_those_of_the_constraints(path):
    pins = read_pins(Path(ROOT) / path)
    for library, text in TESTED.items():
        low, _, high = text.replace(" and ", " to ").partition(" to ")
        numbers = [tuple(map(int, v.split(".")[:2])) for v in (low, pins[library], high or low)]
        assert numbers == sorted(numbers), (library, text, pins[library])
