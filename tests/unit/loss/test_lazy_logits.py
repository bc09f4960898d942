"""Lazy logits behave like the logits that they stand for; they compute them only when somebody looks at the values."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import nested_detach

from hf_veomni.errors import UnsupportedError
from hf_veomni.loss import LazyLogits, attach_chunked_loss
from tests.models import VOCABULARY, build_model, padded_batch

LABELS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> PreTrainedModel:
    model = build_model("llama", dtype=torch.float64)
    attach_chunked_loss(model, chunk_tokens=4)
    return model


def _hidden() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 64, generator=generator, dtype=torch.float64, requires_grad=True)


def _pair(model: PreTrainedModel) -> tuple[Any, Tensor]:
    """Lazy logits, and real logits of the same values."""
    hidden = _hidden()
    return model.lm_head(hidden), F.linear(hidden, model.lm_head.weight)


def _computed(logits: Any) -> bool:
    return logits.recipe.real is not None


QUERIES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "size": lambda x: (x.size(), x.size(-1)),
    "dim": lambda x: (x.dim(), x.ndim, x.ndimension()),
    "numel": lambda x: (x.numel(), x.nelement(), torch.numel(x), len(x)),
    "dtype": lambda x: (x.dtype, x.type(), x.is_floating_point(), torch.is_floating_point(x), x.is_complex()),
    "bytes": lambda x: (x.element_size(), x.itemsize, x.nbytes),
    "device": lambda x: (x.device, x.is_cuda, x.is_cpu, x.is_meta, x.get_device(), x.layout, x.is_sparse),
    "autograd": lambda x: (x.requires_grad, x.is_leaf, x.grad_fn is None),
    "memory": lambda x: (x.is_contiguous(), x.stride()),
    "is tensor": lambda x: (torch.is_tensor(x), isinstance(x, Tensor)),
}


@pytest.mark.parametrize("query", QUERIES)
def test_queries_compute_nothing(model, query):
    chunked, real = _pair(model)
    assert QUERIES[query](chunked) == QUERIES[query](real)
    assert not _computed(chunked)


def test_repr_says_what_it_is(model):
    chunked, _ = _pair(model)
    expected = "LazyLogits(shape=(2, 9, 97), dtype=torch.float64, device=cpu, not computed"
    assert (
        repr(chunked).startswith(expected) and f"{chunked}".startswith(expected) and str(chunked).startswith(expected)
    )
    assert not _computed(chunked)


def _in_place(x: Tensor) -> Tensor:
    x *= 3
    x.div_(2.5).add_(1).sub_(0.25)
    x /= 2
    return x.tanh_()


RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "cohere": lambda x: x * 0.5,
    "granite": lambda x: x / 3.0,
    "gemma": lambda x: torch.tanh(x / 30.0) * 30.0,
    "from the left": lambda x: 1 + 2 * x,
    "tensor scalar": lambda x: torch.tensor(0.5) * (x * torch.tensor(2.0)) - torch.tensor(1),
    "torch functions": lambda x: torch.sub(torch.add(torch.div(torch.mul(x, 2), 3), 1), 0.5),
    "float": lambda x: x.float(),
    "casts": lambda x: x.to(torch.float32).double().to(dtype=torch.float32).type(torch.float64),
    "low precision": lambda x: x.bfloat16().float(),
    "same dtype": lambda x: x.to(torch.float64).to("cpu").double(),
    "in place": _in_place,
    "views": lambda x: x[:, :, :][...][0:].contiguous().view(2, 9, VOCABULARY).reshape(x.shape) * 2,
    "clone": lambda x: x.clone() * 2,
}


@pytest.mark.parametrize("name", RECORDED)
def test_elementwise_functions_are_recorded(model, name):
    chunked, real = _pair(model)
    chunked, real = RECORDED[name](chunked), RECORDED[name](real.clone())
    assert isinstance(chunked, LazyLogits) and chunked.dtype == real.dtype
    ours = torch.autograd.grad(model.loss_function(chunked, LABELS), model.lm_head.weight)
    assert not _computed(chunked)
    theirs = torch.autograd.grad(model.loss_function(real, LABELS), model.lm_head.weight)
    loose = real.dtype != torch.float64 or name in ("casts", "low precision")
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if loose else 1e-10, atol=1e-5 if loose else 1e-12)
    torch.testing.assert_close(chunked + torch.zeros(1, dtype=chunked.dtype), real, rtol=1e-12, atol=1e-12)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(-1),
    "argmax": lambda x: x.argmax(-1),
    "slice": lambda x: x[:, -1],
    "shift": lambda x: x[..., :-1, :].contiguous(),
    "list index": lambda x: x[[0]],
    "vector scale": lambda x: x * torch.ones(VOCABULARY),
    "reversed division": lambda x: 1 / (x.abs() + 1),
    "alpha": lambda x: x.add(1, alpha=2),
    "rounding": lambda x: x.div(2, rounding_mode="floor"),
    "flatten": lambda x: x.view(-1, VOCABULARY),
    "concatenate": lambda x: torch.cat([x, x]),
    "item": lambda x: x[0, 0, 0].item(),
    "list": lambda x: x.tolist(),
    "data": lambda x: x.data,
    "transpose": lambda x: x.mT,
    "numpy": lambda x: x.detach().numpy().tolist(),
    "compare": lambda x: x == x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "meta": lambda x: x.to("meta").shape,
    "norm": lambda x: torch.linalg.vector_norm(x),
}


@pytest.mark.parametrize("name", LOOKS)
def test_any_look_gives_the_real_values(model, name):
    chunked, real = _pair(model)
    seen = LOOKS[name](chunked)
    torch.testing.assert_close(seen, LOOKS[name](real), rtol=1e-12, atol=1e-12)
    assert not isinstance(seen, LazyLogits)


def test_gradients_flow_through_a_look_and_through_the_loss(model):
    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        loss = model.loss_function(logits, LABELS) + logits.logsumexp(-1).square().mean()
        return torch.autograd.grad(loss, model.lm_head.weight)

    chunked, real = _pair(model)
    torch.testing.assert_close(gradients(chunked), gradients(real), rtol=1e-10, atol=1e-12)


def test_a_look_without_grad_does_not_cut_the_graph_of_the_loss(model):
    chunked, real = _pair(model)
    with torch.no_grad():
        assert not chunked.softmax(-1).requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(model.loss_function(chunked, LABELS), model.lm_head.weight),
        torch.autograd.grad(model.loss_function(real, LABELS), model.lm_head.weight),
        rtol=1e-10,
        atol=1e-12,
    )


def test_changes_in_place_reach_the_loss(model):
    chunked, real = _pair(model)
    real = real.clone()
    for logits in (chunked, real):
        logits[..., 5] = -1e4
        logits[:, 2].mul_(3)
    torch.testing.assert_close(model.loss_function(chunked, LABELS), model.loss_function(real, LABELS))


def test_a_learned_scale_gets_its_gradient(model):
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    chunked, real = _pair(model)
    ours = torch.autograd.grad(model.loss_function(chunked * scale, LABELS), scale)
    torch.testing.assert_close(ours, torch.autograd.grad(model.loss_function(real * scale, LABELS), scale))


def test_a_scale_that_changes_later_is_kept_as_it_was(model):
    scale = torch.tensor(2.0)
    chunked, real = _pair(model)
    scaled = chunked * scale
    scale.fill_(7.0)
    torch.testing.assert_close(scaled.exp(), (real * 2.0).exp())


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


@pytest.mark.parametrize("change", [lambda x: x, lambda x: torch.tanh(x) * 2, lambda x: x.mul_(0.5)])
def test_an_autograd_function_gets_values_and_gives_gradients(model, change):
    chunked, real = _pair(model)
    chunked, real = change(chunked), change(real.clone())
    results = []
    for logits in (chunked, real):
        loss = _SumOfSquares.apply(logits)
        results.append((loss.detach(), *torch.autograd.grad(loss, model.lm_head.weight)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_an_autograd_function_of_the_logits_of_a_tied_model():
    model = build_model("gemma2", dtype=torch.float64)
    batch = padded_batch([7, 5]) | {"use_cache": False}
    gradients = []
    for chunked in (False, True):
        detach = attach_chunked_loss(model, chunked=chunked)
        loss = _SumOfSquares.apply(model(**batch).logits)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        detach()
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)  # its norms compute in fp32


def test_an_autograd_function_after_a_change_in_place_is_refused(model):
    chunked, _ = _pair(model)
    chunked[..., 5] = 0
    with pytest.raises(UnsupportedError, match=r"changed in place.*pass `logits \+ 0`"):
        _SumOfSquares.apply(chunked).backward()
    _SumOfSquares.apply(chunked + 0).backward()


def test_a_parametrized_head(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    hidden, inputs = _hidden(), list(model.lm_head.parameters())
    gradients = [
        torch.autograd.grad(use(model.lm_head(hidden)), inputs)
        for use in (
            lambda x: model.loss_function(x, LABELS),
            lambda x: model.loss_function(x.softmax(-1).log(), LABELS),
            lambda x: _SumOfSquares.apply(x),
            lambda x: _SumOfSquares.apply(x.abs()),
        )
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-9, atol=1e-12)


def test_hooks_and_kept_gradients_see_the_gradient_of_the_loss(model):
    chunked, real = _pair(model)
    seen: list[Tensor] = []
    for logits in (chunked, real):
        logits.retain_grad()
        logits.register_hook(lambda grad: seen.append(grad))
        model.loss_function(logits, LABELS).backward()
    torch.testing.assert_close(chunked.grad, real.grad)
    torch.testing.assert_close(*seen)


def test_detach_is_free_and_has_no_graph(model):
    chunked, real = _pair(model)
    detached = nested_detach((chunked,))[0]
    assert isinstance(detached, LazyLogits) and not detached.requires_grad and not _computed(chunked)
    assert not detached.exp().requires_grad
    torch.testing.assert_close(detached.exp(), real.exp().detach())


@pytest.mark.parametrize("use", ["loss", "look", "detach", "nothing"])
def test_nothing_is_kept_alive(use):
    """Without the garbage collector: a cycle would hold a step's activations until it runs."""
    model = build_model("llama")
    attach_chunked_loss(model)
    gc.disable()
    try:
        out = model(**padded_batch([7, 5]), use_cache=False)
        embedded = weakref.ref(out.logits.recipe.call.hidden)
        kept = out.logits.detach() if use == "detach" else None
        if use == "look":
            out.logits.exp()
        if use != "nothing":
            out.loss.backward()
        del out
        assert embedded() is None
        assert kept is None or kept.exp().shape == (2, 7, VOCABULARY)
    finally:
        gc.enable()


def test_outputs_pass_through_the_usual_utilities(model):
    out = model(**padded_batch([7, 5]), use_cache=False)
    leaves: list[Any] = []
    tree_map(lambda x: leaves.append(x) or x, out)
    assert any(leaf is out.logits for leaf in leaves)
    low = out.logits.bfloat16()
    assert convert_to_fp32({"logits": low})["logits"].dtype == torch.float32
    assert not _computed(out.logits)


def test_saving_stores_real_logits(model):
    chunked, real = _pair(model)
    file = io.BytesIO()
    torch.save(chunked.detach(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()))
    assert type(loaded) is Tensor
    torch.testing.assert_close(loaded, real.detach())
    assert type(copy.deepcopy(chunked.detach())) is Tensor


def test_a_look_after_backward_is_right_until_the_weights_change(model):
    out = model(**padded_batch([7, 5]), use_cache=False)
    late = model(**padded_batch([7, 5]), use_cache=False)
    (out.loss + late.loss).backward()
    assert out.logits.exp().shape == (2, 7, VOCABULARY)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(UnsupportedError, match="Look at them before backward and before the optimizer steps"):
        late.logits.exp()
    assert out.logits.exp().shape == (2, 7, VOCABULARY), "computed before the step, so still there"


def test_a_freed_weight_gives_a_clear_error(model):
    logits = model.lm_head(_hidden())
    model.lm_head.weight.untyped_storage().resize_(0)
    for use in (lambda: logits.exp(), lambda: model.loss_function(logits, LABELS)):
        with pytest.raises(
            UnsupportedError, match=r"freed by FSDP.*model.eval\(\), or prepare_omni\(..., chunked_loss=False"
        ):
            use()
