"""`use_liger_kernel`: Liger's norm, rotary and MLP kernels on a model, beside this package's loss and experts.

Liger has a function for each model type, with a switch for each kernel. What is switched on here works on a rank's
tokens by themselves, so it does not know of plans: the norm and the MLP of a slice, the rotary embedding of a slice
by its slice of the tables. What is not:

- its losses: logits are never whole here already, and rows are cut;
- its experts: tokens travel to their ranks and through grouped matmuls (`expert/`);
- its kernels for vision encoders, which stay stock.

Liger also replaces classes of the model's module, for models that are built later, and the function that rotates
queries and keys. The classes are put back; the function asks for Liger's kernel where queries are on a GPU only. So
other models of the process, a reference model or one on the CPU, are what they were.

Private names of Liger, read in 0.8.5; it is not required, so they are looked for when it is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import trainer

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_experts
from hf_veomni.mesh import is_prepared
from hf_veomni.plan import nearest
from hf_veomni.prepare import on_detach

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_TEXT = frozenset({"rope", "rms_norm", "swiglu"})
_NO_MLP = frozenset({"rope", "rms_norm"})  # experts instead, or none that Liger has
_NO_ROPE = frozenset({"rms_norm", "swiglu"})
_GEMMA = frozenset({"rope", "rms_norm", "geglu"})
# Model type -> the switches that are on. Each was compared with the stock model, outputs and gradients.
KERNELS: Mapping[str, frozenset[str]] = {
    "deepseek_v3": _NO_ROPE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_oss": _NO_MLP,
    "llama": _TEXT,
    "mistral": _TEXT,
    "mixtral": _NO_MLP,
    "olmo2": _TEXT,
    "phi3": _TEXT,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
    "qwen3_moe": _NO_MLP,
    "qwen3_next": _NO_ROPE,
}
# What the MLP kernels compute between the matmuls, whatever the configuration says.
_ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
_ROTARY = "apply_rotary_pos_emb"
_MARK = "_omni_liger"


def check_liger(arguments: Any) -> None:
    """Refuse, before anything is loaded, what `use_liger_kernel` and `liger_kernel_config` cannot be.

    Raises:
        UnsupportedError: no GPU, no Liger, or one of its losses.
        ValueError: a configuration without `use_liger_kernel`.
    """
    config = arguments.liger_kernel_config
    if not arguments.use_liger_kernel:
        if config:
            raise ValueError(
                f"`liger_kernel_config` ({config}) has no effect without `use_liger_kernel=True`: set it, or leave "
                "the configuration out."
            )
        return
    for name in LOSSES:
        if (config or {}).get(name):
            raise UnsupportedError(
                f"`liger_kernel_config` asks for `{name}`, which would take the place of this package's loss: that "
                "one runs without full logits too, and on rows that are cut. Leave it out."
            )
    if arguments.use_cpu or not torch.cuda.is_available():
        where = "`use_cpu` (True)" if torch.cuda.is_available() else "this machine, where torch finds no CUDA device,"
        raise UnsupportedError(
            f"`use_liger_kernel` (True) cannot be combined with {where}: its kernels are Triton's. Leave it out there."
        )
    if find_spec("liger_kernel") is None:
        raise UnsupportedError(
            "`use_liger_kernel` (True) needs the package liger-kernel, which is not installed: "
            "`pip install 'hf-veomni[liger]'`, or leave it out."
        )


@contextmanager
def liger_kernels(model: nn.Module, arguments: Any) -> Iterator[None]:
    """Around the preparation of a model: with Liger's kernels on it, if the arguments say so, until it is detached.

    Raises:
        ValueError: as `apply_liger` does.
    """
    take_off = apply_liger(model, arguments.liger_kernel_config) if arguments.use_liger_kernel else None
    if take_off is None:
        yield
        return
    try:
        yield
    except BaseException:
        take_off()
        raise
    on_detach(hf.base_model(model), [take_off])


def apply_liger(model: nn.Module, config: Mapping[str, bool] | None) -> Callable[[], None] | None:
    """Put Liger's kernels on a model, before it is prepared: what a plan wraps, it wraps with them.

    Args:
        model: a transformers model or a `PeftModel`.
        config: `liger_kernel_config`: switches by name; what it leaves out is as in `KERNELS`.

    Returns:
        What takes them off; None for a model that has them.

    Raises:
        UnsupportedError: a model type that was not compared, a kernel that would take the place of ours, a prepared
            model.
        ValueError: a switch that Liger does not have for it.
    """
    base: Any = hf.base_model(model)
    if hasattr(base, _MARK):
        return None
    if is_prepared(base):
        raise UnsupportedError(
            "`use_liger_kernel` (True) comes before `prepare_omni`, and `model` is prepared already: pass the "
            "model as it was."
        )
    kind = base.config.model_type
    if kind not in KERNELS:
        raise UnsupportedError(
            f"`use_liger_kernel` (True) was not compared with the stock model for the model type '{kind}'. Leave it "
            f"out, or use one of {', '.join(sorted(KERNELS))}."
        )
    functions = getattr(import_module("liger_kernel.transformers.monkey_patch"), "MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    if kind not in functions:
        raise UnsupportedError(
            f"`use_liger_kernel` (True): the installed release of liger-kernel has no function for '{kind}': install "
            "`hf-veomni[liger]`, which asks for one that has."
        )
    function = functions[kind]
    switches = _switches(kind, function, config or {})
    _check_activation(base.config, switches)
    classes = type(base).__mro__  # the first may be the user's own
    code = next(code for code in (sys.modules[one.__module__] for one in classes) if hasattr(code, _ROTARY))
    names, modules = dict(vars(code)), {module: dict(vars(module)) for module in base.modules()}
    function(model=base, **switches)
    for experts in find_experts(base):
        _put_back(vars(experts.experts), modules[experts.experts])
    rotate = getattr(code, _ROTARY)
    _put_back(vars(code), names)
    if rotate is not names[_ROTARY]:
        setattr(code, _ROTARY, _on_gpu(names[_ROTARY], rotate))
    setattr(base, _MARK, True)
    handle = base.register_forward_pre_hook(_drop_skip_logits, with_kwargs=True)
    _leave_to_us()
    added = {module: set(vars(module)) - set(before) for module, before in modules.items()}
    return partial(_take_off, added, partial(setattr, code, _ROTARY, names[_ROTARY]), handle)


def _switches(kind: str, function: Callable[..., None], config: Mapping[str, bool]) -> dict[str, bool]:
    """Every switch of Liger's function for the model type, as it is to be."""
    known = [name for name in inspect.signature(function).parameters if name not in ("model", "kwargs")]
    for name, value in config.items():
        if name not in known:
            raise ValueError(
                f"`liger_kernel_config` has '{name}', which Liger does not have for '{kind}': {nearest(name, known)}."
            )
        if value and name not in KERNELS[kind]:
            raise UnsupportedError(
                f"`liger_kernel_config` asks for '{name}', which is not available for '{kind}': experts, encoders and "
                f"the loss stay as they are. Leave it out; on are {', '.join(sorted(KERNELS[kind]))}."
            )
    return {name: name in KERNELS[kind] and config.get(name, True) for name in known}


def _check_activation(config: Any, switches: Mapping[str, bool]) -> None:
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    for name, known in _ACTIVATIONS.items():
        if switches.get(name) and found not in known:
            raise UnsupportedError(
                f"`use_liger_kernel` (True): Liger's MLP computes {known[0]}, and this model's activation is "
                f"{found!r}. Give `liger_kernel_config={{'{name}': False}}`."
            )


def _put_back(found: dict[str, Any], before: Mapping[str, Any]) -> None:
    for name in [name for name in found if name not in before]:
        del found[name]
    found.update({name: value for name, value in before.items() if found.get(name) is not value})


def _on_gpu(stock: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """Rotates by Liger's kernel where there is Triton, and as before elsewhere."""

    @wraps(stock)
    def rotate(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fast if q.is_cuda else stock)(q, *args, **kwargs)

    return rotate


def _take_off(added: Mapping[nn.Module, set[str]], restore_rotary: Callable[[], None], handle: Any) -> None:
    handle.remove()
    restore_rotary()
    for module, names in added.items():
        for name in names:
            vars(module).pop(name, None)


def _drop_skip_logits(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What Trainer passes to Liger's loss in evaluation."""
    return args, {name: value for name, value in kwargs.items() if name != "skip_logits"}


def _leave_to_us() -> None:
    """Keep Trainer, when it begins to train, from putting kernels of Liger's choice, its loss among them, on a model
    that has them from here."""
    code: Any = trainer
    stock = code.apply_liger_kernel
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def apply(model: nn.Module, kernel_config: Any) -> None:
        if not any(hasattr(module, _MARK) for module in model.modules()):
            stock(model, kernel_config)

    code.apply_liger_kernel = apply
