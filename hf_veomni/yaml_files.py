"""Mappings from yaml files: what yaml itself lets pass in silence is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _Twice(Exception):
    """A key that a mapping has twice."""


def read_mapping(path: str | os.PathLike[str], what: str, example: str) -> Mapping[str, Any]:
    """The mapping that a yaml file holds.

    Args:
        what: the kind of file, for messages.
        example: a line that such a file may have.

    Raises:
        ValueError: no such file, text that is not yaml, a key that appears twice, several documents, or no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if not isinstance(key.value, list)]
            for place, key in enumerate(keys):
                if key in keys[:place] and key != "<<":
                    line = node.value[place][0].start_mark.line + 1
                    raise _Twice(f"{what} '{path}' has the key '{key}' twice (line {line}): give it once.")
            return super().construct_mapping(node, deep)

    # As in YAML 1.2, and as everybody writes a learning rate: to PyYAML `2e-4`, without a dot, is a text.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    if not Path(path).is_file():
        raise ValueError(f"{what} '{path}' {'is no file' if Path(path).exists() else 'does not exist'}.")
    try:
        documents = list(yaml.load_all(Path(path).read_text(), Loader))  # noqa: S506 (a safe loader)
    except _Twice as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OSError) as error:
        # yaml's own are not all YAMLErrors: the 32nd of a month is a ValueError, `!!map 3` a TypeError.
        raise ValueError(f"{what} '{path}' is not yaml: {error}") from error
    if len(documents) > 1:
        raise ValueError(f"{what} '{path}' holds {len(documents)} documents (lines '---'): one file says one thing.")
    values = documents[0] if documents else None
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} '{path}' must hold a mapping such as '{example}', not {values!r}.")
    return values
