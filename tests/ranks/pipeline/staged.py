"""Compare the stages of a pipeline with the untouched stock model in one process, over several optimizer steps.

The reference never packs, pads, shards or cuts: it runs every document alone, and its window is the mean over the
targets of all micro-batches of all data ranks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models import count_targets
from tests.ranks.parity import Setting, _exact_loss, documents, make_batches, make_model, relative_error, whole


def _windows(setting: Setting, steps: int) -> list[list[dict[str, Any]]]:
    """Micro-batches of each step: of the first one those of `setting`, then others of the same lengths."""
    (first,) = make_batches(setting)
    windows = [first]
    for step in range(1, steps):
        windows.append([{**b, "input_ids": (b["input_ids"] + step).clamp(max=96)} for b in first])
    return windows


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def compute_reference(setting: Setting, path: Path, steps: int = 3) -> None:
    """Losses and norms of the stock model's steps, and the gradients of the first one."""
    model = make_model(setting)
    optimizer = _optimizer(model)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for batches in _windows(setting, steps):
        items, total = sum(count_targets(batch) for batch in batches), 0.0
        for batch in batches:
            for _, _, document in documents(batch):
                out = model(**document, num_items_in_batch=items, use_cache=False)
                loss = out.loss if setting.dtype != torch.float64 else _exact_loss(out.logits, document, items)
                loss.backward()
                total += loss.item()
        if "gradients" not in found:
            found["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found["losses"].append(total)
        found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    torch.save(found, path)


def measure(setting: Setting, plan: str, path: str, steps: int = 3, checkpointing: bool = False) -> dict[str, Any]:
    """On every rank: what the reference says against the stages' windows; relative errors of this rank."""
    from hf_veomni import clip_grad_norm_, get_parallel_state, prepare_omni, run_window
    from hf_veomni.expert import find_layouts

    reference = torch.load(path)
    model: Any = make_model(setting)
    prepare_omni(model, plan, chunked_loss=setting.dtype != torch.float64)
    state = get_parallel_state(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = _optimizer(model)
    errors: dict[str, Any] = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "parameter": "", "names": []}
    for step, batches in enumerate(_windows(setting, steps)):
        loss = run_window(model, batches[state.dp_rank :: state.dp_size])
        errors["loss"] = max(errors["loss"], abs(loss.item() / reference["losses"][step] - 1))
        if step == 0:
            layouts = find_layouts(model)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    got = whole(parameter.grad)
                    got = layouts[name].to_plain(got) if name in layouts else got
                    if name not in reference["gradients"]:  # the second name of tied embeddings
                        name = "model.embed_tokens.weight"
                    error = relative_error(got, reference["gradients"][name])
                    if error >= errors["gradient"]:
                        errors["gradient"], errors["parameter"] = error, name
                    errors["names"].append(name)
        norm = clip_grad_norm_(model.parameters(), 1.0).item()
        errors["norm"] = max(errors["norm"], abs(norm / reference["norms"][step] - 1))
        optimizer.step()
        optimizer.zero_grad()
    errors["held"] = sum(p.numel() for p in model.parameters())
    return errors


def check(
    ranks: Any,
    tmp_path: Path,
    setting: Setting,
    plan: str,
    world: int,
    limit: float = 2e-6,
    steps: int = 3,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run both sides and compare. Each gradient of the model must be on some stage."""
    path = tmp_path / "reference.pt"
    compute_reference(replace(setting, dp_size=1), path, steps)
    found = ranks(world).run(measure, setting, plan, str(path), steps, timeout=180, **options)
    print([{**each, "names": len(each["names"])} for each in found])
    wanted = torch.load(path)["gradients"].keys()
    assert {name for each in found for name in each["names"]} >= wanted
    for each in found:
        for kind in ("loss", "norm", "gradient"):
            assert each[kind] <= limit, (kind, each[kind], each["parameter"])
    return found
