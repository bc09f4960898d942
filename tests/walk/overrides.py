"""What families need besides sizes by name. Keys: model types of transformers' CONFIG_MAPPING."""

from __future__ import annotations

from typing import Any

# "__init__" holds what the default config needs to be made at all.
OVERRIDES: dict[str, dict[str, Any]] = {}

# model type -> (kind, class): where the Auto mappings lead to a class that nobody trains.
CLASSES: dict[str, tuple[str, str]] = {}
