"""torch.compile by layer. Exchanges, experts' dispatch and FSDP's hooks break its graphs; the rest is fused."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each layer of the stacks by itself, decoder and towers: after `prepare_omni`, whose hooks stay in force.

    All layers of a kind share their graphs, so that it takes seconds where the whole model takes minutes. The model
    itself stays what it is: state dict, saving, PEFT and `generate` do not notice.

    Args:
        model: a transformers model or a `PeftModel` on one.
        options: as in torch.compile, for example `backend="inductor"`, `mode="max-autotune-no-cudagraphs"`.

    Raises:
        UnsupportedError: the model has no layers of the kind that transformers can checkpoint one by one.
    """
    layers = [m for m in hf.base_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no layers (`GradientCheckpointingLayer`) to compile one by one: leave "
            "compilation off, or call `compile` on modules of your choice."
        )
    for layer in layers:
        layer.compile(**options)
