"""Sum of token losses from lazy logits, a chunk of logits at a time.

Shapes: N scored tokens of this rank, C hidden size, V vocabulary; v classes of a block.

A plain linear head, the usual case, goes through one autograd function. Its forward walks over chunks of tokens:

    frozen head     logits [n, V] -> loss, and the gradient of the hidden states at once    2 matmuls, as many as stock
    trained head    logits [n, V] -> loss, and each token's log-sum-exp                     1 matmul

and the backward of a trained head walks over blocks of the vocabulary, for which the log-sum-exp is what was missing:

    logits [N, v] -> gradient [N, v] -> hidden += ..., and rows v of the weight's gradient, complete    3 matmuls

So the weight's gradient is rounded once, as in stock, and needs no fp32 copy of the weight's size; the price is one
more matmul (4 instead of 3). Any other head (an adapter on it, a saved module) is called chunk by chunk under
activation checkpointing, where autograd finds all that it uses.

Matmuls run in the dtype of the model (or of autocast), and their results are upcast to fp32. Step by step, what is
between them moves 78 bytes a logit through memory in forward and backward, most of them fp32 copies of bf16 logits,
which takes as long as a matmul and a half. On an accelerator it is compiled into one pass: the logits are read as the
matmul wrote them and their gradient is written as the next one reads it, 16 bytes.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) with reduction "sum" is not used: with bf16 it adds up the loss
in bf16 and rounds the weight's gradient after each chunk (benchmarks/loss_memory.py shows both); it keeps gradients
until the loss object dies, or else forbids a second backward; and it takes neither scaled logits nor label smoothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply, knows, on_host
from hf_veomni.loss.head import Op, autocast, replay
from hf_veomni.loss.lazy_logits import Recipe

# Logits of a block from which on a compilation of some seconds is worth it.
_LEAST_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class _Settings:
    """What the linear path needs beside tensors."""

    ops: tuple[Op, ...]  # recorded functions
    dtype: torch.dtype  # of the matmuls
    sum_dtype: torch.dtype
    label_smoothing: float
    chunk_elements: int  # logits held at once

    @property
    def plain(self) -> bool:
        """Whether the loss is the cross entropy of the head's own output."""
        return not self.ops and not self.label_smoothing


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which losses are summed: fp64 for fp64 logits, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_sum_exp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of all classes, and the logit of the target; [N, v] and [N] to fp32 [N] and [N]."""
    top = logits.amax(1).float()
    norm = (logits.float() - top[:, None]).exp().sum(1)
    return norm.log() + top, logits.gather(1, targets[:, None]).squeeze(1).float()


def loss_gradient(logits: Tensor, lse: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """(softmax - one-hot) * scale in the dtype of the logits; [N, v].

    Args:
        lse: log-sum-exp of all classes, fp32 [N].
        targets: columns of this block, others if the target is in another block; [N].
        scale: scalar.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (columns == targets[:, None]).float()
    return (((logits.float() - lse[:, None]).exp() - one_hot) * scale).to(logits.dtype)


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all sizes, and anew for each dtype and state of the process (inference mode, TF32, a default
    device). Beyond its limit of 8 torch says so and runs the function as it is, where `fullgraph` would raise."""
    return torch.compile(function, dynamic=True)


@torch.compiler.disable
def can_compile(logits: Tensor) -> bool:
    """Whether the compiled functions take these, which the first call tries. Not beneath a mode that wants to see
    every operator: a dry run, a counter of FLOPs."""
    return (
        logits.is_cuda
        and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and logits.numel() >= _LEAST_ELEMENTS
        and not is_in_torch_dispatch_mode()
        and _works(logits.device, logits.dtype)
    )


@lru_cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Compile, and compare with the same functions step by step."""
    generator = torch.Generator(device).manual_seed(0)  # the global one is left alone
    logits = torch.randn(64, 4096, device=device, generator=generator).to(dtype)
    targets, scale = torch.arange(64, device=device) * 64, torch.full((), 0.5, device=device)
    try:
        lse, chosen = compiled(log_sum_exp)(logits, targets)
        found = [lse, chosen, compiled(loss_gradient)(logits, lse, targets, scale)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler of this device says
        warnings.warn(
            f"The loss is computed step by step, since it could not be compiled: {error!r:.500}", stacklevel=3
        )
        return False
    lse, chosen = log_sum_exp(logits, targets)
    wanted = [lse, chosen, loss_gradient(logits, lse, targets, scale)]
    errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True)]
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    if max(errors) > limit:
        warnings.warn(f"The compiled loss is off by {max(errors):.0e}: it is computed step by step.", stacklevel=3)
    return max(errors) <= limit


def _block_loss_gradient(
    block: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    vocabulary: int,
    smoothing: float,
    first: int = 0,
    scale: Tensor | None = None,
) -> Tensor:
    """Gradient of the summed loss, times `scale`, for a block of the head's output.

    Args:
        block: output of the head for classes first, first + 1, ...; [n, v].
        logits: `block` after the recorded functions, with a graph to it if there are any.
        probabilities: softmax of the logits over all V classes, for these classes; [n, v]. Overwritten.
        targets: class indices; [n].

    Returns:
        softmax - (1 - smoothing) * one-hot - smoothing / V, taken back through the recorded functions; [n, v].
    """
    grad = probabilities
    if smoothing:
        grad -= smoothing / vocabulary
    inside = (targets >= first) & (targets < first + block.shape[1])
    column = torch.where(inside, targets - first, 0)[:, None]
    grad.scatter_add_(1, column, ((smoothing - 1.0) * inside).to(grad.dtype)[:, None])
    if scale is not None:
        grad *= scale  # before the cast: a gradient scaler keeps small fp16 values from vanishing
    if logits is block:
        return grad.to(block.dtype)
    return torch.autograd.grad(logits, block, grad.to(logits.dtype))[0]


def _scores(logits: Tensor, settings: _Settings) -> Tensor:
    """Logits to be overwritten: recorded functions may need their results again, the head alone does not."""
    return logits.detach().to(settings.sum_dtype, copy=bool(settings.ops))


def _leaf_and_logits(block: Tensor, ops: tuple[Op, ...]) -> tuple[Tensor, Tensor]:
    """The head's output, and the logits that the recorded functions make of it."""
    if not ops:
        return block, block
    with torch.enable_grad():
        leaf = block.detach().requires_grad_()
        return leaf, replay(ops, leaf)


def _score_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk of n tokens: loss (scalar), log-sum-exp [n], and the gradient of the hidden states [n, C] if wanted.

    A function of its own, so that the chunk's logits are freed before the next ones are made.
    """
    vocabulary, smoothing = weight.shape[0], settings.label_smoothing
    block, logits = _leaf_and_logits(F.linear(hidden, weight, bias), settings.ops)
    if settings.plain and can_compile(block):  # type: ignore[call-issue]
        lse, of_target = compiled(log_sum_exp)(block, targets)
        loss = (lse - of_target).sum()
        if not with_gradient:
            return loss, lse, None
        return loss, lse, compiled(loss_gradient)(block, lse, targets, torch.ones_like(loss)) @ weight
    scores = _scores(logits, settings)
    of_target = scores.gather(1, targets[:, None]).squeeze(1)
    uniform = scores.sum() * (smoothing / vocabulary) if smoothing else 0.0
    top = scores.amax(1)
    weights = scores.sub_(top[:, None]).exp_()
    norm = weights.sum(1)
    lse = norm.log() + top
    loss = (lse - (1 - smoothing) * of_target).sum() - uniform
    if not with_gradient:
        return loss, lse, None
    softmax = weights.div_(norm[:, None])
    return loss, lse, _block_loss_gradient(block, logits, softmax, targets, vocabulary, smoothing) @ weight


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden [N, C], weight [V, C], bias [V] or None, targets [N]) -> sum of token losses, scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        at_once = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        total = hidden.new_zeros((), dtype=settings.sum_dtype)
        lse = hidden.new_empty(len(hidden), dtype=settings.sum_dtype)
        grad_hidden = torch.empty_like(hidden) if at_once else None
        with autocast(hidden.device.type, None):
            w, b = weight.to(settings.dtype), None if bias is None else bias.to(settings.dtype)
            for start, end in _ranges(len(hidden), settings.chunk_elements // len(weight)):
                h = hidden[start:end].to(settings.dtype)
                loss, norms, grad = _score_tokens(h, w, b, targets[start:end], settings, at_once)
                total += loss
                lse[start:end] = norms
                if grad_hidden is not None and grad is not None:
                    grad_hidden[start:end] = grad
        ctx.settings = settings
        ctx.at_once = at_once
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise UnsupportedError(
                "The chunked loss has no second derivatives: use prepare_omni(..., chunked_loss=False)."
            )
        if ctx.at_once:
            (grad_hidden,) = ctx.saved_tensors
            return (grad_hidden * grads[0]).to(grad_hidden.dtype), None, None, None, None
        with autocast(grads[0].device.type, None):
            return *_backward_by_vocabulary(ctx, grads[0]), None, None


def _backward_by_vocabulary(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, recomputing the logits for blocks of the vocabulary."""
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    settings: _Settings = ctx.settings
    h = hidden.to(settings.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias else None
    for start, end in _ranges(len(weight), settings.chunk_elements // max(1, len(hidden))):
        w = weight[start:end].to(settings.dtype)
        b = None if bias is None else bias[start:end].to(settings.dtype)
        grad = _score_classes(h, w, b, targets, lse, settings, start, len(weight), scale)
        if grad_hidden is not None:
            grad_hidden += grad @ w
        if grad_weight is not None:
            grad_weight[start:end] = grad.T @ h
        if grad_bias is not None:
            grad_bias[start:end] = grad.sum(0, dtype=lse.dtype)
        del grad  # before the next block is made
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _score_classes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    settings: _Settings,
    first: int,
    vocabulary: int,
    scale: Tensor,
) -> Tensor:
    """One block of v classes: gradient of the head's output for all tokens, times `scale`; [N, v]."""
    block, logits = _leaf_and_logits(F.linear(hidden, weight, bias), settings.ops)
    if settings.plain and can_compile(block):  # type: ignore[call-issue]
        return compiled(loss_gradient)(block, lse, targets - first, scale)
    softmax = _scores(logits, settings).sub_(lse[:, None]).exp_()
    return _block_loss_gradient(
        block, logits, softmax, targets, vocabulary, settings.label_smoothing, first=first, scale=scale
    )


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    step = max(1, step if step < 64 else step // 64 * 64)  # complete tiles of a matmul
    return ((start, min(start + step, length)) for start in range(0, length, step))


def _by_checkpoint(recipe: Recipe, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """The sum over chunks of tokens for any head, recomputed in backward."""

    def part(h: Tensor, target: Tensor) -> Tensor:
        logits = replay(recipe.ops, recipe.call.run(h))
        return F.cross_entropy(
            logits.to(full_precision(logits.dtype)), target, reduction="sum", label_smoothing=label_smoothing
        )

    step = recipe.call.chunk_tokens
    parts = zip(hidden.split(step), targets.split(step), strict=True)
    return torch.stack([checkpoint(part, h, t, use_reentrant=False) for h, t in parts]).sum()


@torch.compiler.disable  # of a compiled model: sizes follow from the labels, and what is compiled here stays so
def summed_loss(recipe: Recipe, targets: Tensor, ignore_index: int, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the token losses of logits that were not computed.

    Tokens without a target are left out before the head is applied, so they cost nothing.

    Args:
        recipe: of the lazy logits, [..., V].
        targets: class indices [...], or `ignore_index`.
        label_smoothing: weight of the uniform distribution over the vocabulary.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits), with the gradients of hidden states and head.

    Raises:
        RuntimeError: FSDP has freed the head's weight.
    """
    call = recipe.call
    call.check_gathered()
    hidden, targets = call.hidden.flatten(0, -2), apply(Tensor.flatten, targets)
    dry = isinstance(targets, FakeTensor) or targets.is_meta  # has no values: every token counts
    if knows(targets) or not dry:
        # Waits for the device unless the host knows the labels.
        scored = on_host(apply(Tensor.ne, targets, ignore_index)).nonzero().squeeze(1)
        if len(scored) < len(targets):
            scored = scored.to(targets.device, non_blocking=True)
            hidden, targets = hidden.index_select(0, scored), targets.index_select(0, scored)
    if call.weight is None:
        return _by_checkpoint(recipe, hidden, targets, label_smoothing)
    settings = _Settings(
        recipe.ops, call.dtype, full_precision(recipe.dtype), label_smoothing, call.chunk_tokens * call.vocabulary
    )
    return _LinearCrossEntropy.apply(hidden, call.weight, call.bias, targets, settings)
