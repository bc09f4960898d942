"""One micro-batch on one stage: what comes in, what goes out, and the gradients of both.

Shapes: B rows; S' tokens of a padded row; s = S'/sp tokens of this rank; C hidden size; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_veomni.context import current
from hf_veomni.pipeline.link import Link, Posted


class MicroBatch:
    """Lives from the forward of a micro-batch to its backward; `context.current().stage` while its forward runs.

    Attributes:
        loss: of the last stage, scaled as it goes into the backward; None elsewhere.
    """

    def __init__(self, link: Link, again: bool = False) -> None:
        """`again`: whether the rows of the next one have the same shape."""
        self.link, self.again = link, again
        self.loss: Tensor | None = None
        self._in: list[Tensor] = []
        self._out: list[Tensor] = []
        self._sums: Tensor | None = None
        self._back: list[Posted] = []  # gradients of `_out`

    @property
    def is_first(self) -> bool:
        return self.link.is_first

    @property
    def is_last(self) -> bool:
        return self.link.is_last

    @property
    def chunk(self) -> int:
        """Which of the rank's stages it runs through."""
        return self.link.chunk

    def receive(self, like: Tensor) -> Tensor:
        """Hidden states [B, s, C] of the stage before, in place of `like` [B, S', C]."""
        row = current().row
        cut = row is not None and not row.full and self.link.state.sp_size > 1
        rows, length, *rest = like.shape
        shape = rows, length // self.link.state.sp_size if cut else length, *rest
        hidden, sums = self.link.receive(shape, self.again)
        if cut:
            assert row is not None
            row.cut = True  # so that the first layer takes its other arguments alone for uncut
        self._in = [hidden] if sums is None else [hidden, sums]
        if torch.is_grad_enabled():
            for tensor in self._in:
                tensor.requires_grad_()
        self._sums = sums
        return hidden

    def keep(self, hidden: Tensor) -> None:
        """Remember what goes to the stage after."""
        self._out = [hidden]

    def add_router_sums(self, sums: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Choices [E], probabilities [E] and count of this stage's layers, added to those of the stages before.

        A load-balancing loss is made of sums over all layers of a model, so they travel with the hidden states to the
        last stage, and the gradient of the probabilities comes back with that of the hidden states.

        Args:
            sums: of this rank's tokens; None where no layer of this stage has a router.

        Returns:
            The sums of all layers on the last stage, None elsewhere and where there are none.
        """
        if sums is not None:
            packed = torch.cat([sums[0].float(), sums[1].float(), sums[2].float()[None]])
            self._sums = packed if self._sums is None else self._sums + packed
        if not self.is_last or self._sums is None:
            return None
        experts = (len(self._sums) - 1) // 2
        return self._sums[:experts].detach(), self._sums[experts:-1], self._sums[-1].detach()

    def send(self) -> None:
        """Once the forward is through: send what the next stage reads."""
        if self.is_last:
            return
        if self._sums is not None:
            self._out = [self._out[0], self._sums]
        self.link.send(self._out[0], self._sums)
        if torch.is_grad_enabled() and self.link.posts_early:
            self._back = self._post()

    def _post(self) -> list[Posted]:
        return [self.link.post_back(tensor) for tensor in self._out]

    def backward(self) -> None:
        """Gradients of this stage's parameters, and of what it received, which go to the stage before."""
        if self.is_last:
            assert self.loss is not None
            self.loss.backward()
        else:
            gradients = [posted.wait() for posted in self._back or self._post()]
            pairs = [(x, g) for x, g in zip(self._out, gradients, strict=True) if x.requires_grad]
            if pairs:
                tensors, given = zip(*pairs, strict=True)
                torch.autograd.backward(tensors, given)
        if not self.link.is_first:
            found = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in self._in]
            self.link.send_back(*found)
        self.loss, self._in, self._out, self._back, self._sums = None, [], [], [], None
