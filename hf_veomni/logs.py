"""What a run tells the person in front of it: one line on rank 0, also where nobody has set up logging."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist

logger = logging.getLogger("hf_veomni")

ENV_VARIABLE = "HF_VEOMNI_VERBOSITY"


def announce(message: str) -> None:
    """Tell `message` on rank 0: to logging if it takes INFO of "hf_veomni", otherwise to stderr.

    `HF_VEOMNI_VERBOSITY=warning` (or "error") is silence. Not collective.
    """
    if os.environ.get(ENV_VARIABLE, "info").lower() != "info":
        return
    if dist.is_initialized() and dist.get_rank():
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(message)
    else:
        print(f"hf_veomni: {message}", file=sys.stderr, flush=True)


def warn_of_no_plan(world_size: int) -> None:
    """Say on rank 0 what the default plan makes of several ranks, for whom nobody has named one. Not collective."""
    if world_size > 1 and not dist.get_rank():
        logger.warning(
            "No plan was given, neither by the script nor by its launcher: each of the %d ranks reads rows of its "
            "own, and all shard the parameters (dp_shard=%d). Give `plan='sp=2'`, or launch with a yaml that names a "
            "plan.",
            world_size,
            world_size,
        )
