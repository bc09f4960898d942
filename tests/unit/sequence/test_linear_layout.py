"""Index arithmetic of linear attention, against a loop over documents, in fp64 and without ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_veomni.attention.documents import Documents
from hf_veomni.sequence.mixers.functions import MixerCall, by_document
from hf_veomni.sequence.mixers.layout import conv_layout, scan_layout

ROWS = [
    [(24,)],
    [(1, 1, 1, 21)],
    [(5, 7, 12)],
    [(11, 2, 11)],
    [(1,) * 24],
    [(24,), (3, 21)],
    [(6, 6, 6, 6), (1, 22, 1), (12, 12)],
]


def _convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    reach = weight.shape[-1] - 1
    return F.conv1d(F.pad(x, (reach, 0)), weight[:, None], torch.arange(2.0, dtype=x.dtype) + 1, groups=2)


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_convolution_on_columns_equals_one_for_each_document(lengths, kernel, sp_size):
    """At 12 ranks of 2 tokens, a kernel of 4 reaches over two ranks."""
    documents = Documents.from_lengths(lengths)
    x = torch.randn(len(lengths), 2, 24, dtype=torch.float64)
    weight = torch.randn(2, kernel, dtype=torch.float64)
    wanted = torch.empty_like(x)
    for row, begin, end in documents.spans():
        wanted[row : row + 1, :, begin:end] = _convolve(x[row : row + 1, :, begin:end], weight)
    part = 24 // sp_size
    tail = min(part, kernel - 1) if sp_size > 1 else 0
    tails = [x[..., (r + 1) * part - tail : (r + 1) * part] for r in range(sp_size)]
    for rank in range(sp_size):
        local = slice(rank * part, (rank + 1) * part)
        columns = torch.cat([*tails, F.pad(x[..., local], (0, 1))], dim=-1)
        layout = conv_layout(documents, kernel, sp_size, rank)
        source = columns.gather(2, layout.source[:, None].expand(-1, 2, -1))
        found = _convolve(source, weight).gather(2, layout.result[:, None].expand(-1, 2, -1))
        torch.testing.assert_close(found, wanted[..., local], rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_scan_in_batches_equals_one_for_each_document(lengths, chunk):
    documents = Documents.from_lengths(lengths)
    call = MixerCall(documents, {}, None, 0, 1)
    x = torch.randn(len(lengths), 24, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.cat([x[row, begin:end].cumsum(0) for row, begin, end in documents.spans()]).view_as(x)
    found = by_document(call, lambda x: x.cumsum(1), (x,), chunk)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    given = torch.randn_like(x)
    grads = [torch.autograd.grad(out, x, given)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


def test_documents_of_as_many_chunks_share_a_batch():
    layout = scan_layout(Documents.from_lengths([(3, 9, 4, 8)]), 4)
    assert [batch.tolist() for batch in layout.batches] == [
        [[0, 1, 2, 2], [12, 13, 14, 15]],
        [[16, 17, 18, 19, 20, 21, 22, 23]],
        [[3, 4, 5, 6, 7, 8, 9, 10, 11]],
    ]
