"""Two sequences in flight give the losses, gradients and gradient norm of the stock model, which runs one after the
other on one rank; with packed rows, activation checkpointing and adapters, on every mesh."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models import build_model, packed_batch
from tests.ranks.parity import Run, Setting, relative_error, whole

PLANS = ["sp=2", "dp_shard=2", "dp_replicate=2", "sp=2,dp_replicate=2", "sp=2,dp_shard=2"]


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("plan", PLANS)
def test_a_pair_equals_one_after_the_other(check, plan: str, checkpointing: bool) -> None:
    check(Setting("llama", micro_batches=2), Run(f"{plan},overlap=pairs", checkpointing=checkpointing))


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3", "gemma3", "gpt_oss", "qwen3_moe", "qwen3_next"])
def test_families_equal_one_rank(check, model: str, checkpointing: bool) -> None:
    check(Setting(model, micro_batches=2), Run("sp=2,overlap=pairs", checkpointing=checkpointing))


@pytest.mark.parametrize("synchronize_each", [False, True])
def test_two_pairs_of_a_window_equal_one_rank(check, synchronize_each: bool) -> None:
    check(Setting("llama", micro_batches=4), Run("sp=2,overlap=pairs", synchronize_each=synchronize_each))


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
def test_adapters_equal_one_rank(check, checkpointing: bool) -> None:
    check(Setting("llama", micro_batches=2, lora=True), Run("sp=2,overlap=pairs", checkpointing=checkpointing))


def test_padded_rows_equal_one_rank(check) -> None:
    check(Setting("llama", micro_batches=2, packed=False), Run("sp=2,overlap=pairs"))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_fp64_equals_one_rank_to_ten_digits(check, plan: str) -> None:
    setting = Setting("llama", micro_batches=2, dtype=torch.float64)
    check(setting, Run(f"{plan},overlap=pairs", chunked_loss=False, checkpointing=True))


def _step(
    plan: str, name: str, checkpointing: bool, at_once: bool, config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[float], Counter[str]]:
    """Gradients and losses of two micro-batches on this rank, and how often parameters were gathered."""
    from hf_veomni import get_parallel_state, prepare_omni, run_pair
    from hf_veomni.comm.gather import ALL_GATHER, REDUCE_SCATTER

    model: Any = prepare_omni(build_model(name, dtype=torch.float64, **config), plan)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rank = get_parallel_state(model).dp_rank
    batches = [packed_batch((9, 1, 14), seed=rank), packed_batch((20, 8 + rank), seed=5 + rank)]

    def compute(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, num_items_in_batch=torch.tensor(40)).loss

    counts: Counter[str] = Counter()
    stock = {name: getattr(dist, name) for name in (ALL_GATHER, REDUCE_SCATTER)}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        counts["gather" if name == ALL_GATHER else "reduce"] += 1
        return stock[name](*args, **kwargs)

    for name in stock:
        setattr(dist, name, partial(counting, name))
    try:
        if at_once:
            losses = run_pair(compute, *batches)
            (losses[0] + losses[1]).backward()
        else:
            losses = [compute(batch) for batch in batches]
            for loss in reversed(losses):  # the newest first, as autograd has it
                loss.backward()
    finally:
        for name, function in stock.items():
            setattr(dist, name, function)
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return gradients, [loss.item() for loss in losses], counts


ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
@pytest.mark.parametrize(
    ("world", "plan", "name", "config"),
    [
        (2, "sp=2,ep=2", "qwen3_moe", ROUTED),
        (2, "dp_shard=2,ep=2", "qwen3_moe", ROUTED),
        (2, "sp=2", "qwen3_5", {}),
        (4, "sp=2,dp_shard=2,ep=2", "qwen3_moe", ROUTED),
        (4, "sp=2,dp_replicate=2,ep=2", "qwen3_moe", ROUTED),
    ],
)
def test_a_pair_equals_one_after_the_other_to_twelve_digits(
    ranks, world: int, plan: str, name: str, config: dict[str, Any], checkpointing: bool
) -> None:
    """Experts under EP, whose own units gather inside of their layers, and linear attention."""
    found = ranks(world).run(_step, f"{plan},overlap=pairs", name, checkpointing, True, config, timeout=120)
    plain = ranks(world).run(_step, plan, name, checkpointing, False, config, timeout=120)
    for (gradients, losses, _), (expected, wanted, _) in zip(found, plain, strict=True):
        assert losses == wanted
        assert gradients.keys() == expected.keys()
        assert max(relative_error(gradients[key], expected[key]) for key in expected) < 1e-12


def test_layers_gather_and_reduce_once_for_both(ranks) -> None:
    """Two layers: in forward and backward of a pair each gathers twice, where two forwards gather four times."""
    layers = 6
    config = {"num_hidden_layers": layers}
    (_, _, pair), _ = ranks(2).run(_step, "dp_shard=2,overlap=pairs", "llama", False, True, config, timeout=120)
    (_, _, plain), _ = ranks(2).run(_step, "dp_shard=2", "llama", False, False, config, timeout=120)
    assert plain["gather"] - pair["gather"] >= 2 * layers - 1  # the last layer may stay for its backward
    assert plain["reduce"] - pair["reduce"] >= layers


def _refused(plan: str, kwargs: dict[str, Any]) -> None:
    from hf_veomni import prepare_omni, run_pair

    model: Any = prepare_omni(build_model("llama"), plan)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    run_pair(lambda batch: model(**batch).loss, packed_batch((5, 6)), packed_batch((7,)))


def test_reentrant_checkpointing_is_refused_on_every_rank(ranks) -> None:
    ranks(2).raises(_refused, "sp=2,overlap=pairs", {"use_reentrant": True}, match="`overlap`.*use_reentrant")


def _compiled() -> None:
    from hf_veomni import compile_layers, prepare_omni

    compile_layers(prepare_omni(build_model("llama"), "sp=2,overlap=pairs"), backend="eager")


def test_compiled_layers_are_refused(ranks) -> None:
    ranks(2).raises(_compiled, match="`overlap`.*compiled layers")


def test_one_rank_has_nothing_to_overlap() -> None:
    from hf_veomni import prepare_omni

    with pytest.raises(ValueError, match=r"`overlap` \('pairs'\) has no effect on one rank.*leave it out"):
        prepare_omni(build_model("llama"), "overlap=pairs")


def _detached() -> list[bool]:
    from hf_veomni import detach_omni, prepare_omni

    model: Any = prepare_omni(build_model("llama"), "dp_shard=2,overlap=pairs")
    before = "_call_impl" in vars(model.model.layers[0])
    detach_omni(model)
    layer = model.model.layers[0]
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    return [before, "_call_impl" in vars(layer), any(type(hook).__name__ == "_Gate" for hook in hooks)]


def test_it_comes_off_again(ranks) -> None:
    assert ranks(2).run(_detached, timeout=60) == [[True, False, False]] * 2


def _failing() -> list[str]:
    """What is raised where the second sequence fails in a layer, and the loss of a pair after that."""
    from hf_veomni import prepare_omni, run_pair

    model: Any = prepare_omni(build_model("llama"), "sp=2,overlap=pairs")
    seen: list[int] = []

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(0)
        if len(seen) == 2:
            raise KeyError("the second sequence")

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    batches = packed_batch((5, 6)), packed_batch((7, 8))
    raised = ""
    try:
        run_pair(lambda batch: model(**batch).loss, *batches)
    except KeyError as error:
        raised = str(error)
    handle.remove()
    losses = run_pair(lambda batch: model(**batch).loss, *batches)
    return [raised, *(f"{loss.item():.5f}" for loss in losses)]


def test_an_error_in_one_sequence_is_raised_and_leaves_nothing_behind(ranks) -> None:
    model = build_model("llama")
    expected = []
    for lengths in ((5, 6), (7, 8)):
        batch = packed_batch(lengths)
        expected.append(f"{model(**batch, use_cache=False).loss.item():.5f}")
    for raised, *losses in ranks(2).run(_failing, timeout=60):
        assert "the second sequence" in raised and losses == expected


def _saved_bytes(checkpointing: bool) -> tuple[int, int]:
    """Bytes that the forward keeps for the backward: of a row of two documents, and of both at once."""
    from hf_veomni import prepare_omni, run_pair

    model: Any = prepare_omni(build_model("llama"), "sp=2,overlap=pairs")
    if checkpointing:
        model.gradient_checkpointing_enable()
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 2:  # neither weights nor their transposes
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no address comes twice
        return tensor

    def measure(function: Any) -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = function()
        found = sum(sizes.values())
        loss.backward()
        kept.clear()
        return found

    kept: list[Tensor] = []
    items = torch.tensor(50)
    full, halves = packed_batch((64, 64)), [packed_batch((64,), seed=seed) for seed in range(2)]

    def compute(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, num_items_in_batch=items).loss

    return measure(lambda: compute(full)), measure(lambda: sum(run_pair(compute, *halves)))


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
def test_two_halves_keep_no_more_than_the_full_row(ranks, checkpointing: bool) -> None:
    for full, halves in ranks(2).run(_saved_bytes, checkpointing, timeout=60):
        assert 0 < halves <= full
