"""Loss, logits and gradients of a packed sequence, by the stock model one document at a time and by a prepared model.

What is right comes from the stock model in fp64 on the CPU. What an error may be comes from the stock model in the
dtype and on the device at hand: its own distance from fp64, or a floor where that is smaller by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from benchmarks.on_gpu.families import Batch, to_device

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
MARGIN = 2.0  # over the stock model's own error
APART = 4.0  # times the error of its documents alone: more on a packed sequence are documents that see each other


@dataclass
class Found:
    """All on the CPU in fp64.

    Attributes:
        loss: of the full row, a mean over its targets.
        logits: [S, V].
        gradients: by the name of the parameter.
    """

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Errors:
    """Relative distances: of the loss; of the logits and of the worst gradient, by their largest entries; of all
    gradients together, by their norm."""

    loss: float
    logits: float
    gradient: float
    worst: float
    parameter: str

    def within(self, limits: Errors) -> bool:
        names = ("loss", "logits", "gradient", "worst")
        return all(getattr(self, name) <= getattr(limits, name) for name in names)

    def __str__(self) -> str:
        return f"loss {self.loss:.0e}, logits {self.logits:.0e}, gradient {self.gradient:.0e}, worst {self.worst:.0e}"

    def numbers(self) -> str:
        """In the same order, without the words."""
        return f"{self.loss:.0e} {self.logits:.0e} {self.gradient:.0e} {self.worst:.0e}"


def run_stock(model: Any, documents: list[Batch], device: str) -> Found:
    """The stock model on each document alone."""
    targets = sum(int((document["labels"][:, 1:] != -100).sum()) for document in documents)
    total, logits = 0.0, []
    for document in documents:
        batch = to_device(document, device)
        labels = batch.pop("labels")
        out = model(**batch, use_cache=False).logits
        scores = out[0, :-1] if out.dtype == torch.float64 else out[0, :-1].float()
        loss = F.cross_entropy(scores, labels[0, 1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
        logits.append(out[0].detach().double().cpu())
    return Found(total, torch.cat(logits), _gradients(model))


def run_prepared(model: Any, row: Batch, device: str) -> Found:
    """A prepared model on the packed sequence. Under several ranks a collective, and the same on all of them."""
    from hf_veomni import gather_sequence

    batch = to_device(row, device)
    with torch.no_grad():
        model.eval()
        logits = gather_sequence(model(**batch, use_cache=False).logits, model)[0].double().cpu()
        model.train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return Found(loss.item(), logits, _gradients(model))


def _gradients(model: Any) -> dict[str, Tensor]:
    """Whole gradients under the stock names and layouts; those of sharded experts are brought back to theirs."""
    from hf_veomni.expert import find_layouts

    layouts = find_layouts(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = _full(parameter.grad)
            whole = layouts[name].to_plain(whole) if name in layouts else whole
            found[name] = whole.double().cpu()
    return found


def _full(gradient: Tensor) -> Tensor:
    """All of a gradient, on the CPU. Collective for a sharded one.

    On the host: torch's functional collectives crash on CUDA tensors over gloo.
    """
    if not isinstance(gradient, DTensor):
        return gradient.cpu()
    sizes = {"shape": gradient.shape, "stride": gradient.stride()}
    local, mesh = gradient.to_local().cpu(), _mesh_on_host(gradient.device_mesh)
    return DTensor.from_local(local, mesh, gradient.placements, run_check=False, **sizes).full_tensor()


@lru_cache
def _mesh_on_host(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh)


def _relative(got: Tensor, wanted: Tensor) -> float:
    """max|got - wanted| / max|wanted|; infinite for nan, and for anything but zeros where zeros are wanted."""
    difference, scale = (got - wanted).abs().max().item(), wanted.abs().max().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale and difference == difference else float("inf")


def compare(got: Found, wanted: Found) -> Errors:
    """Errors against the reference.

    Raises:
        ValueError: a gradient that one side has and the other has not, zeros but.
    """
    missing = [name for name, gradient in wanted.gradients.items() if name not in got.gradients and gradient.any()]
    extra = [name for name, gradient in got.gradients.items() if name not in wanted.gradients and gradient.any()]
    if missing or extra:
        raise ValueError(f"gradients differ in names: without {missing[:3]}, besides {extra[:3]}")
    names = [name for name, gradient in wanted.gradients.items() if name in got.gradients and gradient.any()]
    # A bias of keys moves all scores of a query alike, so its gradient is rounding alone.
    names = [name for name in names if not name.endswith("k_proj.bias")]
    errors = {name: _relative(got.gradients[name], wanted.gradients[name]) for name in names}
    off = sum(((got.gradients[name] - wanted.gradients[name]) ** 2).sum() for name in names)
    size = sum((wanted.gradients[name] ** 2).sum() for name in names)
    worst = max(names, key=lambda name: errors[name])
    loss = abs(got.loss - wanted.loss) / abs(wanted.loss)
    gradient = float((torch.as_tensor(off) / torch.as_tensor(size)).sqrt())
    return Errors(loss, _relative(got.logits, wanted.logits), gradient, errors[worst], worst)


def yardstick(family: str, model: Any, documents: list[Batch], row: Batch, device: str, wanted: Found) -> Errors:
    """Errors of the stock model in its dtype on its device; leaves it without gradients.

    One document at a time, and on the packed sequence as well where stock keeps its documents apart: matmuls of other
    shapes round in another way, and towers add up over all images of a row.
    """
    found = []
    for batches in (documents, [row]):
        found.append(compare(run_stock(model, batches, device), wanted))
        model.zero_grad(set_to_none=True)
    if family == "linear" or found[1].gradient > APART * found[0].gradient:
        found.pop()
    numbers = (max(getattr(errors, name) for errors in found) for name in ("loss", "logits", "gradient", "worst"))
    return Errors(*numbers, max(found, key=lambda errors: errors.worst).parameter)


def limits_of(stock: Errors, dtype: torch.dtype) -> Errors:
    """What the errors of a prepared model may be, from those of the stock model."""
    values = [stock.loss, stock.logits, stock.gradient, stock.worst]
    return Errors(*(max(FLOOR[dtype], MARGIN * value) for value in values), stock.parameter)
