"""What else is done with a model in stages: evaluation, saving, building from meta; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import build_model, packed_batch, padded_batch
from tests.ranks.parity import relative_error


def _evaluate(name: str, plan: str) -> tuple[float, torch.Tensor]:
    from hf_veomni import gather_sequence, prepare_omni

    model: Any = prepare_omni(build_model(name), plan).eval()
    with torch.no_grad():
        out = model(**padded_batch((23, 37)))
    return out.loss.item(), gather_sequence(out.logits, model)


@pytest.mark.parametrize(("name", "plan", "world"), [("gemma3", "pp=2", 2), ("qwen3_moe", "pp=2,sp=2,ep=2", 4)])
def test_every_stage_has_the_answer_of_the_last(ranks, name: str, plan: str, world: int) -> None:
    batch = padded_batch((23, 37))
    with torch.no_grad():
        wanted = build_model(name).eval()(**batch)
    real = batch["attention_mask"].bool()
    for loss, logits in ranks(world).run(_evaluate, name, plan, timeout=120):
        assert loss == pytest.approx(wanted.loss.item(), rel=1e-6)
        assert relative_error(logits[real], wanted.logits[real]) < 2e-6


def _train_and_save(path: str, source: str | None, name: str, plan: str) -> int:
    """One step of SGD, then `save_pretrained`. Returns how many parameters this rank's stage has."""
    from hf_veomni import get_parallel_state, prepare_omni, run_window
    from tests.models import ZOO  # noqa: F401

    if source is None:
        model: Any = build_model(name)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(build_model(name).config)
    model.train()
    prepare_omni(model, plan, checkpoint=source)
    assert get_parallel_state(model).plan.pp_size == 2
    assert not any(p.is_meta for p in model.parameters())
    run_window(model, [packed_batch((5, 23, 13), seed=0), packed_batch((3, 1, 9), seed=1)])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
@pytest.mark.parametrize("from_meta", [False, True], ids=["", "from_meta"])
def test_saved_model_is_the_plain_one(ranks, tmp_path: Path, name: str, from_meta: bool) -> None:
    stock = build_model(name)
    stock.save_pretrained(tmp_path / "before")
    batches = [packed_batch((5, 23, 13), seed=0), packed_batch((3, 1, 9), seed=1)]
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        stock(**batch, num_items_in_batch=items, use_cache=False).loss.backward()
    torch.optim.SGD(stock.parameters(), lr=0.1).step()
    source = str(tmp_path / "before") if from_meta else None
    held = ranks(2).run(_train_and_save, str(tmp_path / "after"), source, name, "pp=2", timeout=120)
    assert max(held) < 0.75 * sum(p.numel() for p in stock.parameters())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    wanted = dict(stock.named_parameters())
    assert dict(saved.named_parameters()).keys() == wanted.keys()
    for key, parameter in saved.named_parameters():
        assert relative_error(parameter, wanted[key]) < 2e-6, key


def _with_gradients() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model("llama"), "pp=2")(**packed_batch((5, 3)))


def _generate() -> None:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(build_model("llama"), "pp=2")
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def _hidden_states() -> None:
    from hf_veomni import prepare_omni

    with torch.no_grad():
        prepare_omni(build_model("llama"), "pp=2")(**packed_batch((5, 3)), output_hidden_states=True)


def _different_batches() -> None:
    from hf_veomni import prepare_omni, run_window

    model = prepare_omni(build_model("llama"), "pp=2")
    run_window(model, [packed_batch((5, 3), seed=torch.distributed.get_rank())])


def _too_many_stages() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model("llama", num_hidden_layers=1), "pp=2")


def _rules() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(build_model("llama"), {"pp": 2, "modules": {"lm_head": {"fsdp": "keep"}}})


def _no_labels() -> None:
    from hf_veomni import prepare_omni, run_window

    run_window(prepare_omni(build_model("llama"), "pp=2"), [{"input_ids": torch.tensor([[5, 6, 7]])}])


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (_with_gradients, r"hand the window's batches to `run_window\(model, batches\)`"),
        (_generate, "has no `generate`"),
        (_hidden_states, r"`output_hidden_states` \(True\) cannot be combined with `pp_size` \(2\)"),
        (_different_batches, "The ranks of data rank 0 were given different batches"),
        (_too_many_stages, r"`pp_size` \(2\) must not exceed the number of layers \(1\)"),
        (_rules, r"`modules` .* cannot be combined with `pp_size` \(2\)"),
        (_no_labels, "A batch has no `labels`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refusals(ranks, case, match: str) -> None:
    ranks(2).raises(case, match=match)


_ROUTED = {"num_hidden_layers": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}


def _router_loss(path: str, name: str, overrides: dict[str, Any], plan: str) -> dict[str, Any]:
    from hf_veomni import clip_grad_norm_, prepare_omni, run_window
    from tests.ranks.parity import whole

    reference = torch.load(path)
    model = prepare_omni(build_model(name, **overrides), plan)
    loss = run_window(model, [packed_batch((length,), seed=length) for length in (23, 31, 12)])
    worst = {"loss": abs(loss.item() / reference["loss"] - 1)}
    for key, parameter in model.named_parameters():
        worst[key] = relative_error(whole(parameter.grad), reference["gradients"][key])
    worst["norm"] = abs(clip_grad_norm_(model.parameters(), 1e9).item() / reference["norm"] - 1)
    return worst


@pytest.mark.parametrize(
    ("name", "plan", "world"),
    [
        ("qwen3_moe", "pp=2", 2),
        pytest.param("qwen3_moe", "pp=4", 4, marks=pytest.mark.slow),
        pytest.param("mixtral", "pp=2,sp=2,ep=2", 4, marks=pytest.mark.slow),
        pytest.param("dense_first", "pp=4", 4, marks=pytest.mark.slow),
        pytest.param("dense_last", "pp=4", 4, marks=pytest.mark.slow),
    ],
)
def test_router_loss_is_that_of_all_layers(ranks, tmp_path: Path, name: str, plan: str, world: int) -> None:
    overrides = dict(_ROUTED)
    if name.startswith("dense"):
        overrides["mlp_only_layers"] = [0] if name == "dense_first" else [3]
        name = "qwen3_moe"
    stock = build_model(name, **overrides)
    batches = [packed_batch((length,), seed=length) for length in (23, 31, 12)]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        out = stock(**batch, use_cache=False)  # the mean over its targets, and the router's loss of its tokens
        assert out.aux_loss.item() > 0.5
        loss = out.loss * count / sum(counts)
        loss.backward()
        total += loss.item()
    gradients = {key: p.grad for key, p in stock.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 1e9).item()
    torch.save({"loss": total, "gradients": gradients, "norm": norm}, tmp_path / "reference.pt")
    found = ranks(world).run(_router_loss, str(tmp_path / "reference.pt"), name, overrides, plan, timeout=120)
    for worst in found:
        assert max(worst.values()) < 2e-6, worst
