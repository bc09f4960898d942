"""Tensors between neighbouring stages.

Two process groups of the same ranks, one for each direction: in each of them a rank's messages leave and arrive in the
order of the micro-batches, so that none waits behind one that comes the other way (NCCL runs what two ranks exchange
in one group in the order of the calls). Sends do not block; they are waited for at the end of the window.

Rows are as long as the batch says, which all stages read; their dtype, and whether a router's sums travel with the
hidden states, is announced by the first message of a window.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.mesh import ParallelState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Link:
    """What one stage sends and receives within one window."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self._sent: list[tuple[dist.Work | None, Tensor]] = []
        self._received: tuple[torch.dtype, int] | None = None
        self._announced = False

    @property
    def is_first(self) -> bool:
        return self.state.pp_rank == 0

    @property
    def is_last(self) -> bool:
        return self.state.pp_rank == self.state.plan.pp_size - 1

    def send(self, hidden: Tensor, sums: Tensor | None) -> None:
        """Hidden states [B, s, C], and sums of a router (1-D, fp32), to the next stage."""
        if not self._announced:
            header = [_DTYPES.index(hidden.dtype), 0 if sums is None else sums.numel()]
            self._send(torch.tensor(header, device=self.state.device), forward=True)
            self._announced = True
        for tensor in (hidden, sums):
            if tensor is not None:
                self._send(tensor, forward=True)

    def receive(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """What the stage before has sent; `shape` of the hidden states. Blocks."""
        if self._received is None:
            header = self._receive(torch.empty(2, dtype=torch.long, device=self.state.device), forward=True)
            code, size = header.tolist()
            self._received = _DTYPES[code], size
        dtype, size = self._received
        hidden = self._receive(torch.empty(shape, dtype=dtype, device=self.state.device), forward=True)
        if not size:
            return hidden, None
        sums = torch.empty(size, dtype=torch.float32, device=self.state.device)
        return hidden, self._receive(sums, forward=True)

    def send_back(self, *gradients: Tensor) -> None:
        """Gradients of what was received, to the stage before."""
        for gradient in gradients:
            self._send(gradient, forward=False)

    def receive_back(self, like: Tensor) -> Tensor:
        """The gradient of a tensor that was sent. Blocks."""
        return self._receive(torch.empty_like(like, memory_format=torch.contiguous_format), forward=False)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def _send(self, tensor: Tensor, forward: bool) -> None:
        tensor = tensor.detach().contiguous()
        group = self.state.pp_group if forward else self.state.pp_back_group
        place = self.state.pp_rank + (1 if forward else -1)
        self._sent.append((dist.isend(tensor, group=group, group_dst=place), tensor))

    def _receive(self, tensor: Tensor, forward: bool) -> Tensor:
        group = self.state.pp_group if forward else self.state.pp_back_group
        dist.recv(tensor, group=group, group_src=self.state.pp_rank + (-1 if forward else 1))
        return tensor
