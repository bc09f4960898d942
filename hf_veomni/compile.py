"""torch.compile by layer. Exchanges, experts' dispatch and FSDP's hooks break its graphs; the rest is fused."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import get_parallel_state, is_prepared

logger = logging.get_logger(__name__)


def compile_layers(model: nn.Module, **options: object) -> None:
    """Compile each layer of the decoder and of the towers by itself: after `prepare_omni`, whose hooks stay in force.

    All layers of a kind share their graphs, so that it takes seconds where the full model takes minutes. The model
    itself stays what it is: state dict, saving, PEFT and `generate` do not notice.

    Args:
        model: a transformers model or a `PeftModel` on one.
        options: as in torch.compile, for example `backend="inductor"`, `mode="max-autotune-no-cudagraphs"`.

    Beside activation checkpointing nothing is compiled, which a warning says: torch's checkpoint keeps its compiler
    out of what it runs, and of what it runs again.

    Raises:
        UnsupportedError: the model has no layers of the kind that transformers can checkpoint one by one, or its plan
            has two sequences in flight.
    """
    if is_prepared(model) and (overlap := get_parallel_state(model).plan.overlap) != "none":
        raise UnsupportedError(
            f"`overlap` ({overlap!r}) cannot be combined with compiled layers, which cannot be called with two "
            "sequences inside: leave one of the two off."
        )
    layers = [m for m in hf.base_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no layers (`GradientCheckpointingLayer`) to compile one by one: leave "
            "compilation off, or call `compile` on modules of your choice."
        )
    if any(layer.gradient_checkpointing for layer in layers):
        warn_of_checkpointing()
    for layer in layers:
        layer.compile(**options)


def warn_of_checkpointing() -> None:
    """Say that compilation has no effect."""
    logger.warning(
        "Layers under activation checkpointing are not compiled: torch keeps its compiler out of what its checkpoint "
        "runs. Leave one of the two off."
    )
