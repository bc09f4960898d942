"""The checkpoints of a run's directory: which are complete, and which are removed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from hf_veomni.checkpoint import together
from hf_veomni.checkpoint.foreign import foreign_training
from hf_veomni.checkpoint.manifest import MANIFEST, REMOVED, find_damage
from hf_veomni.errors import UnsupportedError

logger = logging.get_logger(__name__)

OPTIMIZER_DIRECTORY = "optimizer"  # sharded, one file a rank, by parameter name
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def saves(args: Any) -> bool:
    """Whether a run writes checkpoints."""
    return args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint


def no_place(output_dir: str | os.PathLike[str], error: OSError) -> str:
    """That checkpoints cannot be written there, in words."""
    why = error.strerror or str(error)
    return (
        f"`output_dir` ('{output_dir}') cannot be written on {socket.gethostname()} ({why}): name a folder that can, "
        "which all ranks see."
    )


def make_output_dir(args: Any) -> None:
    """Trainer makes it on the ranks that save; an error there is raised on every rank. Collective.

    Raises:
        OSError: it cannot be made.
    """
    with together("Making `output_dir`"):
        if args.should_save:
            try:
                os.makedirs(args.output_dir, exist_ok=True)
            except OSError as error:
                raise OSError(no_place(args.output_dir, error)) from error


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < math.inf  # type: ignore[operator]


# What Trainer's state must hold, where it holds it at all: it reads these, and would fail in the middle.
_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "global_step": ("a number of steps", lambda value: _is_number(value, int)),
    "max_steps": ("a number of steps", lambda value: _is_number(value, int)),
    "epoch": ("a number of epochs", lambda value: value is None or _is_number(value, int, float)),
    "num_input_tokens_seen": ("a number of tokens", lambda value: _is_number(value, int, float)),
    "log_history": (
        "a list of logs",
        lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
    ),
    "stateful_callbacks": ("states by their callbacks", lambda value: value is None or isinstance(value, dict)),
    "best_model_checkpoint": ("a path", lambda value: value is None or isinstance(value, str)),
}


def _unreadable_state(checkpoint: Path) -> str | None:
    """What is wrong with the state that Trainer writes last, in words."""
    try:
        stored = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        TrainerState(**stored)
        for name in ("global_step", *stored):
            meaning, holds = _STATE.get(name, ("", bool))
            if meaning and not holds(stored[name]):
                raise ValueError(f"`{name}` ({stored[name]!r:.60}) is not {meaning}")
    except FileNotFoundError:
        return f"no {TRAINER_STATE_NAME} in it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({type(error).__name__}: {error})"
    return None


def _is_stock(checkpoint: Path) -> bool:
    """Whether the stock Trainer may have written it, which knows no manifest."""
    return not (checkpoint / MANIFEST).exists() and not (checkpoint / OPTIMIZER_DIRECTORY).exists()


def _damage(checkpoint: Path, *, contents: bool = False) -> str | None:
    if _is_stock(checkpoint):
        return _unreadable_state(checkpoint) or foreign_training(checkpoint)
    return find_damage(checkpoint, contents=contents) or _unreadable_state(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(root: Path) -> list[Path]:
    """The earliest step first."""
    found = [entry for entry in (root.iterdir() if root.is_dir() else ()) if _CHECKPOINT.fullmatch(entry.name)]
    return sorted(found, key=_step)


def last_complete_checkpoint(output_dir: str | os.PathLike[str], *, contents: bool = False) -> Path:
    """The newest checkpoint under `output_dir` that is complete, by its manifest. Damaged ones are named in a warning.

    One of the stock Trainer is complete if it has its state.

    Args:
        contents: compare checksums too, of as many as it takes to find a complete one.

    Raises:
        ValueError: there is none.
    """
    damages: list[str] = []
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        damage = _damage(checkpoint, contents=contents)
        if damage is None:
            if damages:
                logger.warning(f"'{checkpoint.name}' is the newest complete checkpoint: {'; '.join(damages)}.")
            return checkpoint
        damages.append(f"{checkpoint.name}: {damage}")
    listed = f" ({'; '.join(damages)})" if damages else ""
    raise ValueError(
        f"No complete checkpoint in `output_dir` ('{output_dir}'){listed}: start without `resume_from_checkpoint`, or "
        "name the directory of one."
    )


_ANOTHER = "name a checkpoint directory, or True for the newest complete one"


def check_checkpoint(checkpoint: Path, wanted_by: str = "`resume_from_checkpoint`", way_out: str = _ANOTHER) -> None:
    """Refuse a checkpoint that is damaged. Without a manifest it must have Trainer's state.

    Args:
        wanted_by: the argument that asks for it, for the message.
        way_out: what else to do, for the message.

    Raises:
        ValueError: it is missing, incomplete, or its contents have changed.
        UnsupportedError: its optimizer's state is DeepSpeed's or FSDP's.
    """
    damage = find_damage(checkpoint, contents=True) if (checkpoint / MANIFEST).exists() else None
    damage = damage or _unreadable_state(checkpoint)
    if damage is None and (foreign := foreign_training(checkpoint)) is not None:
        raise UnsupportedError(
            f"{wanted_by} ('{checkpoint}') cannot be resumed from: {foreign}. `hf-veomni convert {checkpoint} OUT` "
            "writes them as safetensors: begin a new run from OUT."
        )
    if damage is not None:
        raise ValueError(f"{wanted_by} ('{checkpoint}') is missing or incomplete ({damage}): {way_out}.")


def later_checkpoints(checkpoint: Path) -> list[Path]:
    """Those beside it that are whole and of a later step; none beside a folder that is named in another way."""
    if not _CHECKPOINT.fullmatch(checkpoint.name):
        return []
    later = [found for found in _checkpoints(checkpoint.parent) if _step(found) > _step(checkpoint)]
    return [found for found in later if _damage(found) is None]


def tell_of_later_ones(checkpoint: Path, output_dir: str | os.PathLike[str]) -> None:
    """Warn where a run goes on from `checkpoint` of its own folder, and later ones lie beside it."""
    if Path(os.path.abspath(checkpoint)).parent != Path(os.path.abspath(output_dir)):
        return
    if later := [found.name for found in later_checkpoints(checkpoint)]:
        logger.warning(
            f"This run resumes from '{checkpoint}', and there are checkpoints of later steps beside it "
            f"({', '.join(later)}), which it does not use. `resume_from_checkpoint=True` takes them while they are "
            "there; with `save_total_limit` they are removed before what this run writes."
        )


def put_surplus_aside(root: Path, limit: int | None, written: Path, best: str | os.PathLike[str] | None) -> list[Path]:
    """Take checkpoints away until `limit` are left: damaged ones first, then those of later steps, the last one first,
    which a run that went back to an earlier one has left behind, then the earliest steps. `remove_aside` frees their
    disk; a kill in between leaves no half of one.

    Args:
        limit: `save_total_limit`; None or 0 keeps all.
        written: the one just written, which stays whatever its step is.
        best: the best one, which stays too.

    Returns:
        The surplus. What cannot be moved, as one that its owner has write-protected, stays, with a warning.
    """
    found = _checkpoints(root)
    kept = {written.name, *([Path(best).name] if best is not None else [])}

    def order(checkpoint: Path) -> tuple[bool, bool, int]:
        step = _step(checkpoint)
        left_behind = step > _step(written)
        return _damage(checkpoint) is None, not left_behind, -step if left_behind else step

    removable = sorted((c for c in found if c.name not in kept), key=order)
    surplus = removable[: max(0, len(found) - limit)] if limit and limit > 0 else []
    for checkpoint in surplus:
        _put_aside(checkpoint)
    return surplus


def _put_aside(checkpoint: Path) -> None:
    try:
        aside = Path(tempfile.mkdtemp(prefix=REMOVED, dir=checkpoint.parent))
        checkpoint.rename(aside / checkpoint.name)
    except OSError as error:
        if not isinstance(error, PermissionError):  # a full disk, or a layer of a container that knows no such move
            shutil.rmtree(checkpoint, ignore_errors=True)
        if checkpoint.exists():
            _tell_that_it_stays(checkpoint, error.strerror or str(error))


@cache
def _tell_that_it_stays(checkpoint: Path, why: str) -> None:
    """Once, not at each save."""
    logger.warning(f"'{checkpoint}' is one more than `save_total_limit`, but cannot be removed ({why}): it stays.")
