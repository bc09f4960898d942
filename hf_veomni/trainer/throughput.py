"""Tokens a second and MFU of a Trainer, from step to step: evaluation and saving stop the clock.

train begin   step end   log            evaluate    save        step end   log
|--- trained ---------------|                                   |- trained -|
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_veomni.errors import UnsupportedError
from hf_veomni.flops import StepFlops, device_peak, token_places
from hf_veomni.mesh import ParallelState

logger = logging.getLogger(__name__)


class BatchCount:
    """Tokens and FLOPs of the batches that a data rank trains on, summed without waiting for the device.

    Attributes:
        flops: how a batch's FLOPs are counted; None where they are not, of which `where` is told once.
        tokens, total: sums since `restart`.
    """

    def __init__(self, model: nn.Module, where: str) -> None:
        self.where = where
        self.flops: StepFlops | None = None
        try:
            self.flops = StepFlops.from_model(model)
        except UnsupportedError as error:
            logger.warning("No MFU in %s. %s", where, error)
        self.restart()

    def restart(self) -> None:
        """Count from zero again."""
        self.tokens: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of a batch, and its FLOPs as far as they are known."""
        if self.flops is not None:
            try:
                tokens, flops = self.flops.of_batch(batch)
                self.tokens, self.total = self.tokens + tokens, self.total + flops
                return
            except UnsupportedError as error:
                logger.warning("No MFU in %s. %s", self.where, error)
                self.flops = None
        self.tokens = self.tokens + (token_places(batch)[1] > 0).sum().double()


class ThroughputCallback(TrainerCallback):
    """Counts what is trained between two logs; OmniTrainer adds it for `log_throughput`."""

    def __init__(self, model: nn.Module, state: ParallelState, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            model: as it is trained.
            state: its parallel state.
            clock: in seconds.
        """
        self.state, self.clock = state, clock
        self.peak = device_peak(state.device)
        self.count = BatchCount(model, "the log")
        if self.count.flops is not None and self.peak is None:
            logger.warning("No MFU in the log: the peak of this device (%s) is not known.", state.device)
        self._restart()

    def _restart(self) -> None:
        self._begin = self._mark = self.clock()
        self.count.restart()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count one batch of this data rank. Does not wait for the device."""
        self.count.add(batch)

    def take(self) -> dict[str, float]:
        """The figures since the last log.

        Collective: one all-reduce of four numbers over all ranks.
        """
        known = self.count.flops is not None and self.peak is not None
        counts = [self.count.tokens, self.count.total, float(not known), self.peak or 0.0]
        device = self.state.device
        total = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device) for x in counts])
        total[:2] /= self.state.sp_size  # whose ranks share their rows
        if self.state.world_size > 1:
            dist.all_reduce(total)
        tokens, flops, unknown, peak = total.tolist()
        seconds = self.clock() - self._begin
        self._restart()
        if not seconds > 0:
            return {}
        found = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / self.state.world_size,
        }
        return found if unknown else {**found, "mfu": flops / seconds / peak}

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._restart()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._mark = self.clock()

    def on_evaluate(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._skip()

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._skip()

    def _skip(self) -> None:
        """Leave out the time since the last step ended, or since a log or another such call."""
        now = self.clock()
        self._begin += now - self._mark
        self._mark = now
