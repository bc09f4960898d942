"""What the experts of a model did, in the Trainer's log and as a plot; and the bias that balances their load."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_veomni import hf
from hf_veomni.comm.agree import together
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import ExpertCounter, ExpertLoad, find_biases, update_biases
from hf_veomni.mesh import get_parallel_state

PICTURE = "expert_load.png"


class ExpertLoadCallback(TrainerCallback):
    """Counts what every expert gets; OmniTrainer adds it for `log_expert_load` and `router_bias_update_speed`.

    Attributes:
        history: (step, load) of each log.
    """

    def __init__(self, model: nn.Module, bias_speed: float = 0.0, picture: bool = True) -> None:
        """
        Args:
            model: prepared.
            bias_speed: what a router's bias moves by after each optimizer step, towards even load; 0 leaves it.
            picture: draw `expert_load.png` into the output directory at the end (needs the "plot" extra).

        Raises:
            UnsupportedError: a model without experts, or a speed for routers that have no such bias.
        """
        base = hf.base_model(model)
        state = get_parallel_state(model)
        self.counter = ExpertCounter(base, state.ep_size, state.pp_group)
        self.biases = find_biases(base, self.counter.modules, self.counter.first) if bias_speed else []
        with nullcontext() if state.pp_group is None else together("Looking for the routers' biases"):
            if bias_speed and not self.biases and self.counter.modules:
                raise UnsupportedError(
                    f"`router_bias_update_speed` ({bias_speed}) has no effect on {type(base).__name__}: its routers "
                    "have no `e_score_correction_bias`. Leave it at 0, and set `output_router_logits` for a balancing "
                    "loss."
                )
        self.bias_speed, self.picture = bias_speed, picture
        self.history: list[tuple[int, ExpertLoad]] = []
        self._since_log: list[ExpertLoad] = []

    def take(self, step: int) -> dict[str, float]:
        """The figures since the last log. Collective."""
        self._since_log.append(self.counter.take())
        load = _added(self._since_log)
        self._since_log = []
        self.history.append((step, load))
        return load.metrics()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.bias_speed:  # a stage of a pipeline without experts takes part
            load = self.counter.take()
            self._since_log.append(load)
            update_biases(self.biases, load.tokens, self.bias_speed)

    def on_train_end(self, args: Any, state: object, control: object, **kwargs: object) -> None:
        main = not dist.is_initialized() or dist.get_rank() == 0
        if self.picture and main and self.history and importlib.util.find_spec("matplotlib"):
            draw_expert_load(self.history, Path(args.output_dir) / PICTURE)


def _added(loads: list[ExpertLoad]) -> ExpertLoad:
    known = [load.entropy for load in loads if load.entropy is not None]
    tokens: Tensor = sum((load.tokens for load in loads[1:]), loads[0].tokens)
    dropped = [load.dropped for load in loads if load.dropped is not None]
    entropy = sum(known) / len(known) if known else None
    return ExpertLoad(tokens, entropy, sum(dropped) if dropped else None, loads[0].ep_size)


def draw_expert_load(history: list[tuple[int, ExpertLoad]], path: Path) -> None:
    """One panel a layer: experts over steps, coloured by their load over the mean."""
    from matplotlib.figure import Figure

    layers = len(history[0][1].tokens)
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for layer, axis in enumerate(axes):
        if layer >= layers:
            axis.set_axis_off()
            continue
        loads = [load.tokens[layer].double() / load.tokens[layer].double().mean().clamp(min=1) for _, load in history]
        table = [[float(load[expert]) for load in loads] for expert in range(len(loads[0]))]
        image = axis.imshow(table, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        places = sorted({0, len(history) - 1})
        axis.set_xticks(places, [str(history[place][0]) for place in places])
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_ylabel("expert", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes.tolist(), label="tokens over the mean (1 is even)")
    figure.supxlabel("step", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
