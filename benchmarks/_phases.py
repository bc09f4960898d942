"""Where the time of a training step goes: attention, its projections, MLP, loss, optimizer, and what is left.

Marks are set by hooks at the borders of the modules, and by hooks of the tensors that cross these borders, which the
backward calls when their gradient is there. For Llama-like models without activation checkpointing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PHASES = ("projections", "attention", "mlp", "loss", "optimizer", "rest")


class PhaseClock:
    """Seconds of the phases of one step, forward and backward together."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # (the phase that begins, when)
        self._handles: list[Any] = []

    def mark(self, phase: str) -> None:
        """From now on it is `phase`."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.process_time()))

    def seconds(self) -> dict[str, float]:
        """Sums by phase, between the first mark and the last."""
        total: Counter[str] = Counter()
        if self._cuda:
            torch.cuda.synchronize()
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total[phase] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        return {phase: total[phase] for phase in PHASES}

    def attach(self, model: nn.Module) -> None:
        """Set the hooks. The loss begins where the backbone ends, and in the backward it is what comes first."""
        for layer in model.get_decoder().layers:
            attention = layer.self_attn
            self._between(attention, "projections", "rest")
            self._inside(attention.o_proj, "projections", "attention")
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                self._after(projection, "attention", "projections")
            self._between(layer.mlp, "mlp", "rest")
        self._after(model.get_decoder(), "loss", "rest")

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, value: Any, phase: str) -> None:
        tensor = value if isinstance(value, Tensor) else value[0]
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(phase))

    def _pre(self, module: nn.Module, action: Callable[[Tensor], None]) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            action(args[0] if args else kwargs["hidden_states"])

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _post(self, module: nn.Module, action: Callable[[Any], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _, args, output: action(output)))

    def _between(self, module: nn.Module, phase: str, outside: str) -> None:
        """`phase` inside of the module, `outside` around it, in both directions."""
        self._pre(module, lambda x: (self.mark(phase), self._on_gradient(x, outside))[0])
        self._post(module, lambda out: (self.mark(outside), self._on_gradient(out, phase))[0])

    def _inside(self, module: nn.Module, phase: str, before: str) -> None:
        """`phase` from this module on, `before` ahead of it (behind it, in the backward)."""
        self._pre(module, lambda x: (self.mark(phase), self._on_gradient(x, before))[0])

    def _after(self, module: nn.Module, phase: str, inside: str) -> None:
        """`phase` behind this module; once the gradient of its output is there, it is `inside`."""

        def action(output: Any) -> None:
            self.mark(phase)
            self._on_gradient(output if isinstance(output, Tensor) else output[0], inside)

        self._post(module, action)
