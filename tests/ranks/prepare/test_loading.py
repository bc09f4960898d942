"""Models built on the meta device: every rank reads its part of a checkpoint, and holds what the stock model holds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3VLMoeConfig

from tests.models import build_model, packed_batch
from tests.ranks.parity import relative_error
from tests.ranks.stored import build_on_meta, find_differences, find_keys, save_stock, world_size

DENSE_PLANS = ["sp=2", "dp_shard=2", "dp_replicate=2,sp=2"]
EXPERT_PLANS = ["sp=2", "dp_shard=2", "sp=2,ep=2", "dp_shard=2,sp=2,ep=2", "dp_replicate=2,sp=2,ep=2"]
MODELS = {
    "llama": DENSE_PLANS,
    "llama_tied": ["sp=1", *DENSE_PLANS],
    "qwen3_moe": [*EXPERT_PLANS, "dp_shard=4", "dp_shard=2,sp=2,ep=4"],
    "mixtral": EXPERT_PLANS,
    "gpt_oss": EXPERT_PLANS,
    "deepseek_v3": EXPERT_PLANS,
}
CASES = [(name, plan) for name, plans in MODELS.items() for plan in plans]


def _load(directory: str, plan: str, stock: str, dtype: torch.dtype = torch.float32) -> tuple[list[str], float]:
    from hf_veomni import gather_sequence, prepare_omni

    reference = torch.load(stock)
    model = build_on_meta(directory, dtype).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    prepare_omni(model, plan, checkpoint=directory)
    wrong, error = find_differences(model, reference["state"]), 0.0
    if reference["logits"] is not None:
        batch = packed_batch((11, 1, 17, 8))
        with torch.no_grad():
            out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        error = relative_error(gather_sequence(out.logits, model), reference["logits"])
    return wrong, error


def _check(ranks, folder: str, stock: str, plan: str) -> None:
    for wrong, error in ranks(world_size(plan)).run(_load, folder, plan, stock, timeout=120):
        assert wrong == []
        assert error < 1e-5


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_loaded_by_parts_equals_the_stock_model(ranks, checkpoint, name, plan):
    _check(ranks, *checkpoint(name), plan)


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2,ep=2", "dp_shard=2,sp=2,ep=4"])
def test_stacked_files_loaded_by_parts_equal_the_stock_model(ranks, checkpoint, plan):
    _check(ranks, *checkpoint("qwen3_moe", stacked=True), plan)


# One expert a rank of the EP group, so that its rows are sharded: of [gate, up] one rank has gate and one has up. And
# ranks that own no expert at all.
@pytest.mark.parametrize("plan", ["dp_shard=2,sp=2,ep=2", "dp_shard=4"])
@pytest.mark.parametrize("stacked", [False, True])
def test_parts_of_experts_equal_the_stock_model(ranks, checkpoint, stacked, plan):
    _check(ranks, *checkpoint("qwen3_moe", stacked, num_experts=2), plan)


def test_dtypes_are_those_of_from_pretrained(ranks, checkpoint):
    folder = checkpoint("deepseek_v3")[0]
    stock = save_stock(Path(folder), dtype=torch.bfloat16)
    assert len({t.dtype for t in torch.load(stock)["state"].values()}) == 2, "the family keeps nothing in fp32"
    for wrong, _ in ranks(2).run(_load, folder, "sp=2,ep=2", stock, torch.bfloat16, timeout=120):
        assert wrong == []


# ---------------------------------------------------------------------------- files that are transposed


def _vision_model(intermediate: int) -> nn.Module:
    text = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


# gate_up_proj is [4, 2 * intermediate, 64] in memory: with 32 it is square.
@pytest.mark.parametrize("plan", ["dp_shard=2", "dp_shard=2,ep=2", "dp_shard=4,ep=4"])
@pytest.mark.parametrize(("intermediate", "original"), [(24, False), (24, True), (32, False)])
def test_transposed_files_equal_the_stock_model(ranks, tmp_path, intermediate, original, plan):
    model = _vision_model(intermediate)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")[_GATE_UP].shape == (4, 2 * intermediate, 64)
    if original:
        state = load_file(tmp_path / "model.safetensors")
        turned = {k: t.transpose(1, 2).contiguous() if ".experts." in k else t for k, t in state.items()}
        save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stock = save_stock(tmp_path)
    memory = model.state_dict()
    state = torch.load(stock)["state"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in memory.items())
    _check(ranks, str(tmp_path), stock, plan)


_GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


# ---------------------------------------------------------------------------- what a rank reads and holds


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """About 120 MB in eight files, each expert a tensor of its own."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "num_experts": 16, "moe_intermediate_size": 256, "num_hidden_layers": 4}
    model = build_model("qwen3_moe", **sizes, vocab_size=4096, head_dim=64)
    model.save_pretrained(folder, max_shard_size="16MB")
    assert (folder / "model.safetensors.index.json").is_file()
    return str(folder)


class _CountedFile:
    """An open safetensors file that counts the bytes taken from it."""

    read = 0

    def __init__(self, path: str, framework: str) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, framework=framework)

    def __enter__(self) -> _CountedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> Any:
        return self._file.keys()

    def get_slice(self, key: str) -> Any:
        return _CountedSlice(self._file.get_slice(key))

    def get_tensor(self, key: str) -> Tensor:
        return _count(self._file.get_tensor(key))


class _CountedSlice:
    def __init__(self, part: Any) -> None:
        self._part, self.get_shape, self.get_dtype = part, part.get_shape, part.get_dtype

    def __getitem__(self, box: Any) -> Tensor:
        return _count(self._part[box])


def _count(tensor: Tensor) -> Tensor:
    _CountedFile.read += tensor.numel() * tensor.element_size()
    return tensor


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


class _Peak(threading.Thread):
    """The most memory that this process had while the block ran, above what it had before; no pages of files."""

    def __enter__(self) -> _Peak:
        self.begin, self.bytes, self.over = _status("RssAnon"), 0, threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.bytes = max(self.bytes, _status("RssAnon") - self.begin)

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        self.join()


def _measure(directory: str, plan: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes read, peak of memory above the start, bytes of parameters held."""
    from hf_veomni import prepare_omni
    from hf_veomni.checkpoint import lazy

    stock, _CountedFile.read = lazy.safe_open, 0
    lazy.safe_open = _CountedFile  # type: ignore[assignment, misc]
    try:
        model = build_on_meta(directory, dtype)
        with _Peak() as peak:
            prepare_omni(model, plan, checkpoint=directory)
    finally:
        lazy.safe_open = stock  # type: ignore[misc]
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    return _CountedFile.read, peak.bytes, held


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2,ep=2", "dp_shard=4", "dp_shard=2,sp=2,ep=2"])
def test_a_rank_reads_and_holds_its_share(ranks, large, plan):
    total = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    size = world_size(plan)
    found = ranks(size).run(_measure, large, plan, torch.float32, timeout=120)
    print(f"{plan}: of {total} bytes (read, peak, held): {found}")
    for read, peak, held in found:
        assert read <= 1.05 * total / size
        assert held <= 1.05 * total / size
        assert peak <= 1.05 * total / size + 40e6  # what it holds, the tensor that it reads now, and the allocator
    assert sum(read for read, _, _ in found) >= total * 0.99


def test_another_dtype_than_the_files_holds_half(ranks, large):
    total = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    for read, _, held in ranks(2).run(_measure, large, "sp=2,ep=2", torch.bfloat16, timeout=120):
        assert read <= 1.05 * total / 2 and held <= 1.05 * total / 4


# ---------------------------------------------------------------------------- there and back


def _round_trip(directory: str, plan: str, target: str) -> None:
    import torch.distributed as dist

    from hf_veomni import prepare_omni
    from hf_veomni.checkpoint import save_plain

    model = build_on_meta(directory)
    prepare_omni(model, plan, checkpoint=directory)
    save_plain(model, target, write=dist.get_rank() == 0)


@pytest.mark.parametrize(
    ("name", "stacked", "plan"),
    [
        ("qwen3_moe", False, "dp_shard=2,sp=2,ep=2"),
        ("qwen3_moe", True, "sp=2,ep=2"),
        ("llama_tied", False, "sp=2"),
        ("deepseek_v3", False, "sp=2,ep=2"),
    ],
)
def test_saved_again_opens_in_transformers(ranks, checkpoint, tmp_path, name, stacked, plan):
    folder, stock = checkpoint(name, stacked)
    target = tmp_path / "saved"
    ranks(world_size(plan)).run(_round_trip, folder, plan, str(target), timeout=120)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert find_differences(model, torch.load(stock)["state"]) == []
    assert find_keys(target) == find_keys(Path(folder))  # the layout of the files that were read


def _load_again(directory: str, other: str, plan: str) -> tuple[list[str], int]:
    from hf_veomni import prepare_omni
    from hf_veomni.checkpoint import lazy, load_plain

    model = build_on_meta(directory)
    prepare_omni(model, plan, checkpoint=other)
    stock, _CountedFile.read = lazy.safe_open, 0
    lazy.safe_open = _CountedFile  # type: ignore[assignment, misc]
    try:
        load_plain(model, directory)
    finally:
        lazy.safe_open = stock  # type: ignore[misc]
    return find_differences(model, torch.load(Path(directory) / "stock-float32.pt")["state"]), _CountedFile.read


@pytest.mark.parametrize("plan", ["sp=2", "sp=2,ep=2"])
def test_load_plain_reads_parts_of_files_with_single_experts(ranks, checkpoint, tmp_path, plan):
    folder = checkpoint("qwen3_moe")[0]
    build_model("qwen3_moe", seed=1).save_pretrained(tmp_path)
    total = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    for wrong, read in ranks(2).run(_load_again, folder, str(tmp_path), plan, timeout=60):
        assert wrong == []
        assert 0 < read <= 0.52 * total


# ---------------------------------------------------------------------------- training


def _train_step(directory: str, plan: str) -> list[float]:
    from hf_veomni import clip_grad_norm_, prepare_omni

    losses = []
    for meta in (True, False):
        model: Any = build_on_meta(directory) if meta else AutoModelForCausalLM.from_pretrained(directory)
        prepare_omni(model.train(), plan, checkpoint=directory if meta else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in (0, 1):
            loss = model(**packed_batch((9, 14, 6), seed=seed)).loss
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item(), norm.item()]
    return losses


@pytest.mark.parametrize(("name", "plan"), [("llama_tied", "sp=2"), ("qwen3_moe", "dp_shard=2,sp=2,ep=2")])
def test_trains_as_a_model_that_was_loaded_whole(ranks, checkpoint, name, plan):
    for losses in ranks(world_size(plan)).run(_train_step, checkpoint(name)[0], plan, timeout=120):
        assert losses[:4] == losses[4:]
