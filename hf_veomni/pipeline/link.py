"""Tensors between neighbouring stages.

Two process groups of the same ranks, one for each direction: in each of them a rank's messages leave and arrive in the
order of the micro-batches, so that none waits behind one that comes the other way (NCCL runs what two ranks exchange
in one group in the order of the calls). With several stages a rank, what goes from the last rank to the first has two
more, since of two ranks it would go against the others. Sends do not block; they are waited for at the end of the
window. Receives are posted before what is computed until they are wanted, so that a message travels under it: of a
gradient, with one stage a rank, when its hidden states have left; of hidden states when those of the micro-batch
before have come, if its rows are of the same shape.

Rows are as long as the batch says, which all stages read; their dtype, and whether a router's sums travel with the
hidden states, is announced by the first message of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.mesh import ParallelState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Posted(NamedTuple):
    """A tensor on its way."""

    work: dist.Work | None
    tensor: Tensor

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Link:
    """What one stage sends and receives within one window.

    Args:
        chunk: which of the rank's stages.
    """

    def __init__(self, state: ParallelState, chunk: int = 0) -> None:
        self.state, self.chunk = state, chunk
        self._sent: list[tuple[dist.Work | None, Tensor]] = []
        self._received: tuple[torch.dtype, int] | None = None
        self._ahead: list[Posted] = []
        self._announced = False

    @property
    def is_first(self) -> bool:
        return self.state.pp_rank == 0 and self.chunk == 0

    @property
    def is_last(self) -> bool:
        plan = self.state.plan
        return self.state.pp_rank == plan.pp_size - 1 and self.chunk == plan.pp_stages - 1

    @property
    def posts_early(self) -> bool:
        """Whether gradients come back in the order in which hidden states have left."""
        return self.state.plan.pp_stages == 1

    def send(self, hidden: Tensor, sums: Tensor | None) -> None:
        """Hidden states [B, s, C], and sums of a router (1-D, fp32), to the next stage."""
        if not self._announced:
            header = [_DTYPES.index(hidden.dtype), 0 if sums is None else sums.numel()]
            self._send(torch.tensor(header, device=self.state.device), forward=True)
            self._announced = True
        for tensor in (hidden, sums):
            if tensor is not None:
                self._send(tensor, forward=True)

    def receive(self, shape: tuple[int, ...], again: bool = False) -> tuple[Tensor, Tensor | None]:
        """What the stage before has sent; `shape` of the hidden states. Blocks.

        Args:
            again: whether the next ones have the same shape.
        """
        if self._received is None:
            header = self._post(torch.empty(2, dtype=torch.long, device=self.state.device), forward=True).wait()
            code, size = header.tolist()
            self._received = _DTYPES[code], size
        posted = self._ahead or self._post_forward(shape)
        self._ahead = self._post_forward(shape) if again else []
        hidden, *sums = [each.wait() for each in posted]
        assert tuple(hidden.shape) == shape, (hidden.shape, shape)
        return hidden, sums[0] if sums else None

    def _post_forward(self, shape: tuple[int, ...]) -> list[Posted]:
        assert self._received is not None
        dtype, size = self._received
        found = [self._post(torch.empty(shape, dtype=dtype, device=self.state.device), forward=True)]
        if size:
            found.append(self._post(torch.empty(size, dtype=torch.float32, device=self.state.device), forward=True))
        return found

    def send_back(self, *gradients: Tensor) -> None:
        """Gradients of what was received, to the stage before."""
        for gradient in gradients:
            self._send(gradient, forward=False)

    def post_back(self, like: Tensor) -> Posted:
        """The gradient of a tensor that was sent; `wait` for it."""
        return self._post(torch.empty_like(like, memory_format=torch.contiguous_format), forward=False)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def _send(self, tensor: Tensor, forward: bool) -> None:
        tensor = tensor.detach().contiguous()
        group, place = self._neighbour(forward, 1 if forward else -1)
        self._sent.append((dist.isend(tensor, group=group, group_dst=place), tensor))

    def _post(self, tensor: Tensor, forward: bool) -> Posted:
        group, place = self._neighbour(forward, -1 if forward else 1)
        return Posted(dist.irecv(tensor, group=group, group_src=place), tensor)

    def _neighbour(self, forward: bool, step: int) -> tuple[dist.ProcessGroup | None, int]:
        """Process group and rank of the stage before or after this one."""
        state, place = self.state, self.state.pp_rank + step
        if 0 <= place < state.plan.pp_size:
            return (state.pp_group if forward else state.pp_back_group), place
        return (state.pp_wrap_group if forward else state.pp_wrap_back_group), place % state.plan.pp_size
