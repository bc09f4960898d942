"""Learned positions that do not begin at 0: RoBERTa's and ESM's at the padding token plus one, Nystromformer's at 2.

Packed sequences count the tokens of each document from 0. What such a model itself gives a document alone is made
here.

Shapes: B rows; S tokens of the full row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_veomni.sequence.backbone import own_names

_MAKER = "create_position_ids_from_input_ids"


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the positions of a backbone begin.

    Attributes:
        owner: the module that would make them.
        padding: the token that it does not count; the first position is the next number. None where a buffer of
            positions, `owner.position_ids`, says where they begin.
        limit: tokens of the longest document that its table has positions for, None without a table.
    """

    owner: nn.Module
    padding: int | None
    limit: int | None

    def positions(self, counts: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """The model's own positions of the documents of rows, from their counts of tokens.

        Args:
            counts: [B or 1, S], from 0 in each document. Positions that begin elsewhere, behind the padding, are the
                model's own already and are returned as they are.
            input_ids: [B, S] or None.
            mask: [B, S], 0 for padding, or None.
        """
        first = counts[:, :1]
        if mask is not None and mask.dim() == 2:
            first = counts.expand(len(mask), -1).gather(1, mask.ne(0).int().argmax(dim=1, keepdim=True))
        if self.padding is None:
            begin: Tensor = self.owner.get_buffer("position_ids").flatten()[:1]
            return torch.where(first == 0, counts + begin.to(counts.device), counts)
        own = counts + self.padding + 1
        if input_ids is not None:  # padding tokens are not counted, and are where the table has zeros
            counted = input_ids.ne(self.padding).long()
            before = counted.cumsum(dim=1) - counted
            index = torch.arange(counts.shape[1], device=counts.device) - counts
            begins = before.gather(1, index.clamp(min=0).expand_as(before))
            own = (before + 1 - begins) * counted + self.padding
        return torch.where(first == 0, own, counts)


def find_origin(backbone: nn.Module, layers: Iterable[nn.Module]) -> Origin | None:
    """Where the positions of a backbone begin, None if at 0 or if it has no learned ones."""
    inside = {module for layer in layers for module in layer.modules()}
    for module in backbone.modules():
        if module in inside:
            continue
        table = getattr(module, "position_embeddings", None)
        rows = table.num_embeddings if isinstance(table, nn.Embedding) else None
        padding = getattr(module, "padding_idx", None)
        if _MAKER in own_names(type(module)) and isinstance(padding, int):
            if rows is None and not isinstance(getattr(module, "weights", None), Tensor):
                continue  # an ESM whose positions are rotary
            limit = None if rows is None else rows - padding - 1
            return Origin(module, padding, limit)
        buffer = getattr(module, "position_ids", None)
        if rows is not None and isinstance(buffer, Tensor) and buffer.numel():
            if buffer.is_meta or int(buffer.flatten()[0]):
                return Origin(module, None, None)
    return None
