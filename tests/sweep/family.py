"""One family: the stock model on full rows against the prepared one on two ranks or more. Runs on every rank."""

from __future__ import annotations

import copy
import inspect
import re
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_veomni.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # relative to the largest entry, fp32
EXACT = 1e-8  # in fp64, without the casts to fp32 of a family's own code
_OFFERED = re.compile(r"'([^']+)': \{'sp': 'gather'\}")
# What a stock model says that misses an input beside the tokens.
_WANTS_MORE = re.compile(
    r"missing \d+ required|NoneType|specify|pixel_values|input_features|bbox|must be Tensor, not None"
)
Batch = dict[str, Tensor]


@dataclass
class Record:
    """What the sweep found in a family. `outcome`: works, refused, wrong, crashes, not_applicable, unbuildable."""

    model_type: str
    folder: str = ""
    kind: str = ""
    model_class: str = ""
    outcome: str = ""
    reason: str = ""
    loss: str = ""  # "model": the model's own with labels; "sweep": of gathered logits or hidden states
    dtype: str = "float32"
    error: float = 0.0  # the worst, relative
    where: str = ""
    padded: str = ""  # "works", or why not
    packed: str = ""
    trainer: str = ""  # what OmniTrainer logs, against the stock Trainer in one process
    seconds: float = 0.0
    fp32_error: float | None = None
    rule: str = ""  # names of modules that run under the plan's rule "sp: gather", which the error suggests
    exact_error: float | None = None  # the worst in fp64, None where the family does not run in it

    def end(self, outcome: str, reason: object) -> Record:
        self.outcome, self.reason = outcome, _line(reason)
        return self


def _line(reason: object) -> str:
    if isinstance(reason, BaseException):
        kind = type(reason).__name__
        text = " ".join(str(reason).split())[:400]
        return text if isinstance(reason, UnsupportedError) else f"{kind}: {text}"
    return str(reason)


class StaysFp64(TorchDispatchMode):
    """Casts to fp32 in a family's own code leave fp64 as it is, so that nothing is rounded but once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _StockFails(Exception):
    """The stock model itself does not take these rows."""


@dataclass
class Rows:
    """Inputs of one run and what is compared of it."""

    inputs: Batch
    real: Tensor  # bool [B, S] of the output: which tokens count
    documents: list[tuple[int, int]] = field(default_factory=list)  # of a packed sequence

    def real_of(self, output: Tensor) -> Tensor:
        """`real` of an output, which some heads compute for all tokens but the first."""
        return self.real[:, -output.shape[1] :]


def sweep_family(model_type: str, plan: str = "sp=2") -> dict[str, Any]:
    """The record of a family, the same on every rank."""
    warnings.filterwarnings("ignore")
    begin = time.monotonic()
    record = _sweep(model_type, plan, torch.float32)
    if record.outcome in ("works", "wrong"):
        with StaysFp64():
            exact = _sweep(model_type, plan, torch.float64)
        exact.exact_error, exact.fp32_error = exact.error, record.error
        if exact.outcome == "wrong" or (record.outcome, exact.outcome) == ("wrong", "works"):
            record = exact
        elif exact.outcome == "works":
            record.exact_error = exact.error
    record.seconds = round(time.monotonic() - begin, 2)
    return asdict(record)


def _sweep(model_type: str, plan: str, dtype: torch.dtype) -> Record:
    from tests.sweep import tiny

    record = Record(model_type, dtype=str(dtype).removeprefix("torch."))
    try:
        record.folder = tiny.folder_of(model_type)
        record.kind, model_class = tiny.choose_class(model_type)
        record.model_class = model_class.__name__
        takes = inspect.signature(model_class.forward).parameters
        if "input_ids" not in takes and "decoder_input_ids" not in takes:
            return record.end("not_applicable", "takes no token ids")
        config = tiny.tiny_config(model_type)
        if dtype == torch.float64:  # torch's grouped matmul has no fp64
            tiny.use_plain_experts(config)
        model = tiny.build(config, model_class, dtype)
    except tiny.NoText as error:
        return record.end("not_applicable", str(error))
    except Exception as error:
        return record.end("unbuildable", error)
    return _Comparison(record, model, plan).run()


class _Comparison:
    """Stock and prepared model of one family, and what was found."""

    def __init__(self, record: Record, model: nn.Module, plan: str) -> None:
        self.record, self.model, self.plan = record, model, plan
        self.copy = copy.deepcopy(model)  # some keep states of their last row, which cannot be copied
        self.dtype = next(model.parameters()).dtype
        self.limit = TOLERANCE if self.dtype == torch.float32 else EXACT
        self.takes = inspect.signature(type(model).forward).parameters
        self.with_labels = record.kind != "base" and "labels" in self.takes

    def run(self) -> Record:
        from tests.sweep import rows

        plain = rows.plain(self.model, self.record.kind, self.takes)
        try:
            stock = self._stock(plain)
        except Exception as error:
            try:
                stock = self._stock(rows.with_pictures(self.model, plain))
            except Exception:
                return self._unusable(error)
            plain = rows.with_pictures(self.model, plain)
        if not torch.isfinite(stock[1]).all() or not torch.isfinite(stock[0]):
            return self.record.end("unbuildable", "the stock model's outputs are not finite")
        others: dict[str, Rows | None] = {"padded": rows.padded(self.model, self.record.kind, self.takes)}
        others["packed"] = rows.packed(self.model, self.record.kind, self.takes)
        return self._prepared(plain, others)

    def _unusable(self, error: Exception) -> Record:
        others = {"pixel_values", "input_features", "bbox"} & set(self.takes)
        if self.record.kind == "base" and others and _WANTS_MORE.search(str(error)):
            return self.record.end("not_applicable", "every row needs an image, audio or boxes beside its tokens")
        return self.record.end("unbuildable", f"the stock model does not run: {_line(error)}")

    def _prepared(self, plain: Rows, others: dict[str, Rows | None]) -> Record:
        record = self.record
        try:
            prepared = self._prepare()
        except Exception as error:
            return record.end("refused" if isinstance(error, UnsupportedError) else "crashes", error)
        try:
            error, where = self._compare(prepared, plain)
        except Exception as error:
            return record.end("refused" if isinstance(error, UnsupportedError) else "crashes", error)
        record.error, record.where = max(record.error, error), where
        if not error <= self.limit:
            return record.end("wrong", f"{where} is off by {error:.1e} relative")
        record.outcome = "works"
        for name, case in others.items():
            if case is None:
                setattr(record, name, "does not apply")
                continue
            try:
                error, where = self._compare(prepared, case)
            except _StockFails as found:
                setattr(record, name, f"the stock model does not take it: {_line(found.args[0])}")
                continue
            except Exception as found:
                setattr(record, name, ("" if isinstance(found, UnsupportedError) else "crashes: ") + _line(found))
                continue
            if not error <= self.limit:
                return record.end("wrong", f"{name} rows: {where} is off by {error:.1e} relative")
            setattr(record, name, "works")
            record.error = max(record.error, error)
        return record

    def _prepare(self) -> nn.Module:
        """The copy, prepared; with the rules of a plan by which a refusal says that it would run, where it does."""
        from hf_veomni import ParallelPlan, prepare_omni

        plan, rules = ParallelPlan.parse(self.plan), {}
        self.copy.load_state_dict(self.model.state_dict())  # what batch norms have seen
        while True:
            try:
                return prepare_omni(self.copy, replace(plan, modules=rules))
            except UnsupportedError as error:
                offered = [pattern for pattern in _OFFERED.findall(str(error)) if pattern not in rules]
                if not offered:
                    raise
                rules.update({pattern: {"sp": "gather"} for pattern in offered})
                self.record.rule = ", ".join(rules)

    def _stock(self, rows: Rows) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, output and gradients of the stock model; of a packed sequence, document by document."""
        self.model.zero_grad(set_to_none=True)
        if not rows.documents:
            inputs = rows.inputs if self.with_labels else _without_labels(rows.inputs)
            out = self.model(**inputs)
            hidden = _output(out)
            loss = out.loss if self.with_labels and getattr(out, "loss", None) is not None else None
            if loss is None:
                self.with_labels = False
                loss = self._walk_loss(hidden, rows)
        else:
            pieces = []
            for first, last in rows.documents:
                alone = {k: v[:, first:last] for k, v in rows.inputs.items() if k != "position_ids"}
                pieces.append(_output(self.model(**alone)))
            hidden = torch.cat(pieces, dim=1)
            loss = self._walk_loss(hidden, rows)
        loss.backward()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return loss.detach(), hidden.detach(), gradients

    def _reference(self, rows: Rows) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        try:
            return self._stock(rows)
        except Exception as error:
            raise _StockFails(error) from error

    def _walk_loss(self, hidden: Tensor, rows: Rows) -> Tensor:
        """A loss of the whole output: every token and every feature with a weight of its own."""
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.dtype)
        return (hidden * weight * rows.real_of(hidden)[..., None]).sum() / hidden[0].numel() ** 0.5

    def _compare(self, prepared: nn.Module, rows: Rows) -> tuple[float, str]:
        from hf_veomni import gather_sequence

        wanted_loss, wanted, gradients = self._reference(rows)
        for parameter in prepared.parameters():
            parameter.grad = None
        own_loss = self.with_labels and not rows.documents
        if own_loss:
            try:
                loss = prepared(**rows.inputs).loss
                self.record.loss = self.record.loss or "model"
            except UnsupportedError as error:
                if "No loss over a cut row" not in str(error):
                    raise
                self.with_labels = own_loss = False
                self.record.loss = "sweep"
                wanted_loss, wanted, gradients = self._reference(rows)
        if not own_loss:
            hidden = gather_sequence(_output(prepared(**_without_labels(rows.inputs))), prepared)
            loss = self._walk_loss(hidden, rows)
            self.record.loss = self.record.loss or "sweep"
        else:
            with torch.no_grad():
                prepared.eval()
                hidden = gather_sequence(_output(prepared(**_without_labels(rows.inputs))), prepared)
                prepared.train()
                self.model.eval()  # batch norms compute otherwise
                wanted = _output(self.model(**_without_labels(rows.inputs)))
                self.model.train()
        loss.backward()
        worst = (relative(loss.detach(), wanted_loss), "loss")
        worst = max(worst, (relative(_real(hidden.detach(), rows), _real(wanted, rows)), "output"))
        got = {n: p.grad for n, p in prepared.named_parameters() if p.grad is not None}
        floor = self._floor(gradients)
        # A gradient of zeros on one side and none on the other is the same training step.
        for name in sorted(got.keys() | gradients.keys()):
            value = got.get(name)
            value = value.full_tensor() if isinstance(value, DTensor) else value
            expected = gradients.get(name)
            value = torch.zeros_like(expected) if value is None else value
            expected = torch.zeros_like(value) if expected is None else expected
            worst = max(worst, (relative(value, expected, floor=floor), name))
        return worst

    def _floor(self, gradients: dict[str, Tensor]) -> float:
        """Gradients that are zero but for rounding (a key's bias under softmax) are compared with the largest."""
        return 1e-3 * max((float(g.abs().max()) for g in gradients.values()), default=0.0)


def relative(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    difference = float((got.double() - wanted.double()).abs().max())
    scale = max(float(wanted.double().abs().max()), floor)
    if difference == 0:
        return 0.0
    return difference / scale if scale and difference == difference else float("inf")


def _real(output: Tensor, rows: Rows) -> Tensor:
    return output[rows.real_of(output)]


def _without_labels(inputs: Batch) -> Batch:
    return {k: v for k, v in inputs.items() if k != "labels"}


def _output(out: Any) -> Tensor:
    """What is compared: logits, else the last hidden states, else the first tensor [B, S, ..]."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor) and value.dim() == 3:
            return value
    values = out.to_tuple() if hasattr(out, "to_tuple") else out if isinstance(out, tuple) else (out,)
    for value in values:
        if isinstance(value, Tensor) and value.dim() == 3:
            return value
    raise TypeError(f"no output with one entry for each token: {type(out).__name__}")
