"""What docs/towers.md shows runs, and the rules that it names are those of a plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_veomni.plan import MODULE_RULES

PAGE = (Path(__file__).parents[2] / "docs/towers.md").read_text()


def test_the_plan_is_read():
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/towers.md", "exec", dont_inherit=True), names)
    assert names["plan"].modules == {"*.visual": {"sp": "ulysses"}}


def test_rules_exist():
    assert set(re.findall(r'`"(\w+)"`', PAGE)) <= set(MODULE_RULES["sp"])
