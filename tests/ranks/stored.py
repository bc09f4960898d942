"""Checkpoints of the zoo as stock transformers writes them, and what it makes of them: for tests of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.models import build_model, packed_batch
from tests.ranks.parity import document_lengths, whole


def world_size(plan: str) -> int:
    if plan == "sp=1":
        return 1
    return 4 if plan.count("=2") - plan.count("ep=2") > 1 or "=4" in plan else 2


def build_on_meta(directory: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = AutoConfig.from_pretrained(directory)
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def find_state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def save_stock(directory: Path, batch: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> str:
    """What plain transformers makes of a folder: its tensors, and logits of each document."""
    config = AutoConfig.from_pretrained(directory)
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    stock = auto.from_pretrained(directory, dtype=dtype)
    logits = []
    if batch is not None:
        with torch.no_grad():
            parts = batch["input_ids"].split(document_lengths(batch), 1)
            logits = [stock(part, use_cache=False).logits for part in parts]
    path = directory / f"stock-{str(dtype)[6:]}.pt"
    torch.save({"state": find_state(stock), "logits": torch.cat(logits, 1) if logits else None}, path)
    return str(path)


def find_differences(model: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    found = find_state(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    pairs = {name: (whole(tensor.detach()), expected[name]) for name, tensor in found.items()}
    return [name for name, (got, wanted) in pairs.items() if got.dtype != wanted.dtype or not torch.equal(got, wanted)]


def find_keys(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.safetensors") for key in load_file(path)}


def save_as_in_memory(model: nn.Module, folder: Path) -> None:
    for path in folder.glob("model*safetensors*"):
        path.unlink()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(folder: Path, name: str, stacked: bool = False, **overrides: Any) -> tuple[str, str]:
    """A model of the zoo in `folder` as stock transformers saves it, in several files; and where `save_stock` wrote.

    Args:
        stacked: with the tensors as they are in memory, where a family has its experts one by one in files.
        overrides: of the configuration.
    """
    model = build_model(name, **overrides)
    for key, buffer in model.named_buffers():
        if "correction_bias" in key:
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if stacked:
        assert not any("experts.gate_up_proj" in key for key in find_keys(folder)), "already stacked"
        save_as_in_memory(model, folder)
    return str(folder), save_stock(folder, packed_batch((11, 1, 17, 8)))
