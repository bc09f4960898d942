"""The loss on real ranks: shards of the sequence in fp64, and heads whose weight FSDP2 gathers and frees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_veomni.errors import UnsupportedError
from hf_veomni.loss import LazyLogits, attach_chunked_loss
from tests.models import VOCABULARY, build_model

HIDDEN = 64


def _head(chunked: bool, group: Any, freeze: bool = False) -> nn.Module:
    """Only the head and the loss of the model are used: the hidden states are the input."""
    model = build_model("llama", dtype=torch.float64)
    model.lm_head.weight.requires_grad_(not freeze)
    attach_chunked_loss(model, group, chunked=chunked, chunk_tokens=3)
    return model


def _rows(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, length, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    labels[0, : length // 2] = -100
    labels[:, -1] = 3
    return hidden, labels


def _score(model: Any, hidden: Tensor, **targets: Any) -> tuple[Tensor, list[Tensor]]:
    hidden = hidden.clone().requires_grad_()
    logits = torch.tanh(model.lm_head(hidden) / 3) * 3
    loss = model.loss_function(logits, vocab_size=VOCABULARY, **targets)
    loss.backward()
    assert not isinstance(logits, LazyLogits) or logits.recipe.real is None
    return loss.detach(), [p for p in (hidden.grad, model.lm_head.weight.grad) if p is not None]


def _shift(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def _one_rank(length: int, num_items: float | None, freeze: bool) -> tuple[Tensor, list[Tensor]]:
    hidden, labels = _rows(length)
    return _score(_head(False, None, freeze), hidden, labels=labels, num_items_in_batch=num_items)


def _sharded(
    length: int, chunked: bool, num_items: float | None, how: str, freeze: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Loss, gradient of the full hidden states and of the weight, averaged over the ranks as FSDP does."""
    size, rank = dist.get_world_size(), dist.get_rank()
    hidden, labels = _rows(length)
    local = -(-length // size)
    padded = F.pad(hidden, (0, 0, 0, local * size - length))
    shard = slice(rank * local, (rank + 1) * local)
    targets = {
        "full": {"labels": labels},
        "padded": {"labels": F.pad(labels, (0, local * size - length), value=-100)},
        "shifted": {"labels": None, "shift_labels": _shift(labels)},
        "local": {"labels": labels, "shift_labels": F.pad(_shift(labels), (0, size), value=-100)[:, shard]},
    }[how]
    model = _head(chunked, dist.group.WORLD, freeze)
    loss, gradients = _score(model, padded[:, shard], num_items_in_batch=num_items, **targets)
    parts = [torch.empty_like(gradients[0]) for _ in range(size)]
    dist.all_gather(parts, gradients[0])
    whole = torch.cat(parts, dim=1)
    assert not whole[:, length:].any(), "padding has no loss"
    averaged = [whole[:, :length] / size]  # each part has one owner
    for gradient in gradients[1:]:
        dist.all_reduce(gradient)
        averaged.append(gradient / size)
    return loss, averaged


@pytest.mark.parametrize("how", ["full", "padded", "shifted", "local"])
@pytest.mark.parametrize("num_items", [None, 21.0])
@pytest.mark.parametrize("length", [11, 12])
def test_two_shards_equal_one_rank(ranks, length, num_items, how):
    expected = _one_rank(length, num_items, freeze=False)
    for found in ranks(2).run(_sharded, length, True, num_items, how):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(("chunked", "freeze"), [(True, False), (True, True), (False, False)])
def test_four_shards_equal_one_rank(ranks, chunked, freeze):
    # 13 tokens, 4 on each rank: the last rank has one token, whose target lies beyond the row.
    expected = _one_rank(13, None, freeze)
    for found in ranks(4).run(_sharded, 13, chunked, None, "full", freeze):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


def _without_targets(num_items: float | None) -> list[Tensor]:
    hidden, labels = _rows(8)
    rank = dist.get_rank()
    model = _head(True, dist.group.WORLD)
    loss, gradients = _score(
        model,
        hidden[:, rank * 4 : rank * 4 + 4],
        labels=torch.full_like(labels, -100),
        num_items_in_batch=num_items,
    )
    return [loss, *gradients]


def test_shards_without_any_target(ranks):
    for loss, *_ in ranks(2).run(_without_targets, None):
        assert torch.isnan(loss)
    for loss, *gradients in ranks(2).run(_without_targets, 5.0):
        assert loss == 0 and len(gradients) == 2 and not any(g.any() for g in gradients)


def _odd_labels(length: int) -> None:
    hidden, _ = _rows(4)
    _score(_head(True, dist.group.WORLD), hidden, labels=torch.zeros(2, length, dtype=torch.long))


def test_labels_of_another_length_are_refused(ranks):
    ranks(2).raises(_odd_labels, 6, match=r"`labels` of length 6 must be as long as the full row, 8 tokens")
    ranks(2).raises(_odd_labels, 9, match=r"`labels` of length 9 must be as long as the full row, 8 tokens")


ADAPTERS = {
    "none": None,
    "attention": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
IDS = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(7))


def _model(name: str, adapter: str) -> Any:
    model = build_model(name)
    if ADAPTERS[adapter] is None:
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **ADAPTERS[adapter]))


def _steps(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Two accumulated micro-batches."""
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def _shard(model: Any, units: str) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    tied = [base.model.embed_tokens] * base.config.tie_word_embeddings
    if units == "one unit":
        fully_shard([*tied, base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
    elif units in ("head alone", "head freed"):
        fully_shard(base.lm_head, mesh=mesh, reshard_after_forward=units == "head freed")
    fully_shard(base, mesh=mesh)


def _fsdp(name: str, adapter: str, units: str) -> dict[str, Tensor]:
    model = _model(name, adapter)
    attach_chunked_loss(model, chunk_tokens=4)
    _shard(model, units)
    return _steps(model, IDS[dist.get_rank() :][:1])


@pytest.mark.parametrize(
    ("name", "adapter", "units"),
    [
        ("llama", "none", "one unit"),
        ("llama", "none", "head alone"),
        ("llama", "none", "root"),
        ("llama_tied", "none", "one unit"),
        ("llama_tied", "none", "root"),
        ("llama", "attention", "one unit"),
        ("llama_tied", "attention", "one unit"),
        ("llama", "head", "one unit"),
        ("llama", "saved head", "root"),
        ("gemma2", "none", "one unit"),
    ],
)
def test_gradients_under_fsdp_equal_one_process(ranks, name, adapter, units):
    expected = _steps(_model(name, adapter), IDS)
    for gradients in ranks(2).run(_fsdp, name, adapter, units):
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).norm() / expected[key].norm() < 1e-5, key


def test_a_head_that_is_freed_after_its_forward_gives_a_clear_error(ranks):
    ranks(2).raises(_fsdp, "llama", "none", "head freed", kind="UnsupportedError", match="keep the head gathered")


def _two_forwards(name: str, adapter: str, chunked: bool) -> dict[str, Tensor]:
    """Both before one backward, as preference losses do: FSDP frees the head's weight between their backwards."""
    model = _model(name, adapter)
    attach_chunked_loss(model, chunk_tokens=4, chunked=chunked)
    if chunked:
        _shard(model, "one unit")
    ids = IDS[dist.get_rank() :][:1] if chunked else IDS
    losses = [model(input_ids=x, labels=x, use_cache=False).loss for x in (ids, ids.flip(1))]
    (losses[0] - 2 * losses[1]).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}


@pytest.mark.parametrize(("name", "adapter"), [("llama", "none"), ("llama_tied", "none"), ("llama", "head")])
def test_two_forwards_before_one_backward(ranks, name, adapter):
    expected = _two_forwards(name, adapter, chunked=False)
    for gradients in ranks(2).run(_two_forwards, name, adapter, True):
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).norm() / expected[key].norm() < 1e-5, key


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] / ctx.saved_tensors[0].numel() * grads[0]


def _function_of_logits(name: str, loss_too: bool, chunked: bool) -> dict[str, Tensor]:
    model = _model(name, "none")
    attach_chunked_loss(model, chunk_tokens=4, chunked=chunked)
    if chunked:
        _shard(model, "one unit")
    ids = IDS[dist.get_rank() :][:1] if chunked else IDS
    for _ in range(2):
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (_Square.apply(out.logits) + loss_too * out.loss).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}


@pytest.mark.parametrize("loss_too", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_autograd_function_of_the_logits_under_fsdp(ranks, name, loss_too):
    expected = _function_of_logits(name, loss_too, chunked=False)
    for gradients in ranks(2).run(_function_of_logits, name, loss_too, True):
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).norm() / expected[key].norm() < 1e-5, key


def _late_looks() -> tuple[bool, list[str]]:
    model = _model("llama", "none")
    attach_chunked_loss(model)
    _shard(model, "one unit")
    ids = IDS[dist.get_rank() :][:1]
    early, late = (model(input_ids=ids, labels=ids, use_cache=False) for _ in range(2))
    seen = early.logits.exp()
    (early.loss + late.loss).backward()
    messages = []
    for _ in range(2):  # freed; and gathered again for another forward, perhaps with other weights
        try:
            late.logits.exp()
        except UnsupportedError as error:
            messages.append(str(error))
        model(input_ids=ids, labels=ids, use_cache=False)
    return torch.equal(early.logits.exp(), seen), messages


def test_a_look_after_backward_gives_a_clear_error(ranks):
    for same, messages in ranks(2).run(_late_looks):
        assert same, "logits that were computed before stay"
        assert len(messages) == 2 and all("backward" in message for message in messages)
