"""Models built on the meta device: every rank reads its part of a checkpoint, and holds what the stock model holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3VLMoeConfig

from tests.models import build_model, packed_batch
from tests.ranks.parity import document_lengths, relative_error, whole

DENSE_PLANS = ["sp=2", "dp_shard=2", "dp_replicate=2,sp=2"]
EXPERT_PLANS = ["sp=2", "dp_shard=2", "sp=2,ep=2", "dp_shard=2,sp=2,ep=2", "dp_replicate=2,sp=2,ep=2"]
MODELS = {
    "llama": DENSE_PLANS,
    "llama_tied": DENSE_PLANS,
    "qwen3_moe": [*EXPERT_PLANS, "dp_shard=4", "dp_shard=2,sp=2,ep=4"],
    "mixtral": EXPERT_PLANS,
    "gpt_oss": EXPERT_PLANS,
    "deepseek_v3": EXPERT_PLANS,
}
CASES = [(name, plan) for name, plans in MODELS.items() for plan in plans]


def _size(plan: str) -> int:
    return 4 if plan.count("=2") - plan.count("ep=2") > 1 or "=4" in plan else 2


def _build(directory: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = AutoConfig.from_pretrained(directory)
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _save_stock(directory: Path, batch: dict[str, Tensor] | None = None) -> str:
    """What plain transformers makes of a folder: its tensors, and logits of each document."""
    config = AutoConfig.from_pretrained(directory)
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    stock = auto.from_pretrained(directory)
    logits = []
    if batch is not None:
        with torch.no_grad():
            parts = batch["input_ids"].split(document_lengths(batch), 1)
            logits = [stock(part, use_cache=False).logits for part in parts]
    path = directory / "stock.pt"
    torch.save({"state": _state(stock), "logits": torch.cat(logits, 1) if logits else None}, path)
    return str(path)


def _differences(model: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    found = _state(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return [name for name, tensor in found.items() if not torch.equal(whole(tensor.detach()), expected[name])]


def _load(directory: str, plan: str, stock: str) -> tuple[list[str], float]:
    from hf_veomni import gather_sequence, prepare_omni

    reference = torch.load(stock)
    model = _build(directory).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    prepare_omni(model, plan, checkpoint=directory)
    wrong, error = _differences(model, reference["state"]), 0.0
    if reference["logits"] is not None:
        batch = packed_batch((11, 1, 17, 8))
        with torch.no_grad():
            out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        error = relative_error(gather_sequence(out.logits, model), reference["logits"])
    return wrong, error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[..., tuple[str, str]]:
    """Folder of a model of the zoo as stock transformers saves it, and its tensors and logits."""
    known: dict[Any, tuple[str, str]] = {}

    def find(name: str, stacked: bool = False) -> tuple[str, str]:
        if (name, stacked) not in known:
            folder = tmp_path_factory.mktemp(name)
            model = build_model(name)
            for key, buffer in model.named_buffers():
                if "correction_bias" in key:
                    buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
            model.save_pretrained(folder, max_shard_size="60KB")
            assert len(list(folder.glob("*.safetensors"))) > 2
            if stacked:
                assert not any("experts.gate_up_proj" in key for key in _keys(folder)), "already stacked"
                _save_as_in_memory(model, folder)
            known[name, stacked] = str(folder), _save_stock(folder, packed_batch((11, 1, 17, 8)))
        return known[name, stacked]

    return find


def _keys(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.safetensors") for key in load_file(path)}


def _save_as_in_memory(model: nn.Module, folder: Path) -> None:
    for path in folder.glob("model*safetensors*"):
        path.unlink()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _check(ranks, folder: str, stock: str, plan: str) -> None:
    for wrong, error in ranks(_size(plan)).run(_load, folder, plan, stock, timeout=120):
        assert wrong == []
        assert error < 1e-5


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_loaded_by_parts_equals_the_stock_model(ranks, checkpoint, name, plan):
    _check(ranks, *checkpoint(name), plan)


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2,ep=2", "dp_shard=2,sp=2,ep=4"])
def test_stacked_files_loaded_by_parts_equal_the_stock_model(ranks, checkpoint, plan):
    _check(ranks, *checkpoint("qwen3_moe", stacked=True), plan)


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
    stock = _save_stock(tmp_path)
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
        model = _build(directory, dtype)
        with _Peak() as peak:
            prepare_omni(model, plan, checkpoint=directory)
    finally:
        lazy.safe_open = stock  # type: ignore[misc]
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    return _CountedFile.read, peak.bytes, held


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2,ep=2", "dp_shard=4", "dp_shard=2,sp=2,ep=2"])
def test_a_rank_reads_and_holds_its_share(ranks, large, plan):
    total = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    size = _size(plan)
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

    model = _build(directory)
    prepare_omni(model, plan, checkpoint=directory)
    save_plain(model, target, write=dist.get_rank() == 0)


@pytest.mark.parametrize(
    ("name", "plan"), [("qwen3_moe", "dp_shard=2,sp=2,ep=2"), ("llama_tied", "sp=2"), ("deepseek_v3", "sp=2,ep=2")]
)
def test_saved_again_opens_in_transformers(ranks, checkpoint, tmp_path, name, plan):
    folder, stock = checkpoint(name)
    target = tmp_path / "saved"
    ranks(_size(plan)).run(_round_trip, folder, plan, str(target), timeout=120)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert _differences(model, torch.load(stock)["state"]) == []
    assert _keys(target) == _keys(Path(folder))  # the layout of the original files


# ---------------------------------------------------------------------------- training and adapters


def _train_step(directory: str, plan: str) -> list[float]:
    from hf_veomni import clip_grad_norm_, prepare_omni

    losses = []
    for meta in (True, False):
        model: Any = _build(directory) if meta else AutoModelForCausalLM.from_pretrained(directory)
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
    for losses in ranks(_size(plan)).run(_train_step, checkpoint(name)[0], plan, timeout=120):
        assert losses[:4] == losses[4:]


def _adapters(directory: str, plan: str, stock: str, kind: Any, real: bool) -> dict[str, Tensor]:
    import torch.distributed as dist

    from hf_veomni import prepare_omni
    from hf_veomni.expert import find_layouts

    torch.manual_seed(dist.get_rank() if kind is not False else 5)
    model: Any = get_peft_model(_build(directory), _lora(kind), low_cpu_mem_usage=True)
    if real:
        for module in model.modules():
            for part in ("lora_A", "lora_B"):
                if hasattr(module, part):
                    getattr(module, part).to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
    prepare_omni(model, plan, checkpoint=directory)
    expected = torch.load(stock)["state"]
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(whole(parameter.detach()), expected[name.replace("base_layer.", "")]), name
    model(**packed_batch((9, 14, 6))).loss.backward()
    layouts = find_layouts(model)
    found = {name: whole(p.detach()) for name, p in model.named_parameters() if "lora_" in name}
    return {name: layouts[name].to_plain(t) if name in layouts else t for name, t in found.items()}


def _lora(kind: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=kind)


@pytest.mark.parametrize("plan", ["sp=2", "sp=2,ep=2"])
@pytest.mark.parametrize(("kind", "real"), [(True, False), ("gaussian", False), (False, False), (True, True)])
def test_adapters_are_initialised_as_peft_does_and_alike(ranks, checkpoint, plan, kind, real):
    folder, stock = checkpoint("qwen3_moe")
    found = ranks(2).run(_adapters, folder, plan, stock, kind, real, timeout=120)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), _lora(kind))
    expected = {name: p.detach() for name, p in plain.named_parameters() if "lora_" in name}
    assert found[0].keys() == expected.keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
        assert tensor.shape == expected[name].shape
        if real:
            assert 0.7 < tensor.std() < 1.3
        elif "lora_B" in name and kind is not False:
            assert not tensor.any()
        else:
            assert 0.5 < tensor.std() / expected[name].std() < 2, name


# ---------------------------------------------------------------------------- refusals


def _refused(directory: str, change: str, plan: str) -> None:
    import torch.distributed as dist

    from hf_veomni import prepare_omni

    model: Any = _build(directory)
    where: Any = directory
    if change == "no checkpoint":
        where = None
    elif change == "real":
        model.to_empty(device="cpu")
    elif change == "half":
        model.model.norm.to_empty(device="cpu")
    elif change == "folder" and dist.get_rank() == 1:
        where = os.path.join(directory, "nowhere")
    elif change == "larger":
        model.resize_token_embeddings(101, mean_resizing=False)
    elif change == "head":
        model.register_parameter("extra", nn.Parameter(torch.empty(3, device="meta")))
    elif change == "quantized":
        model.config.quantization_config = {"quant_method": "mxfp4"}
    elif change == "pissa":
        model = get_peft_model(model, _lora("gaussian"), low_cpu_mem_usage=True)
        model.peft_config["default"].init_lora_weights = "pissa"
    elif change == "saved":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    elif change == "dora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True), low_cpu_mem_usage=True)
    prepare_omni(model, plan, checkpoint=where)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("no checkpoint", r"'model\.embed_tokens\.weight' is on the meta device: name the weights with"),
        ("real", "has its weights already: leave it out"),
        ("half", r"'model\.norm\.weight' has values and others are on the meta device"),
        ("folder", "nowhere'?.* cannot be opened"),
        ("larger", r"has shape \(97, 64\) there and \(101, 64\) in the model"),
        ("head", "it lacks 'extra'"),
        ("quantized", "has a `quantization_config`"),
        ("pissa", r"`init_lora_weights` \('pissa'\)"),
        ("saved", r"lm_head\.original_module\.weight' is on the meta device.*`modules_to_save`"),
        ("dora", r"lora_magnitude_vector\.default\.weight' is on the meta device.*DoRA"),
    ],
)
def test_refuses_on_every_rank(ranks, checkpoint, change, match):
    ranks(2).raises(_refused, checkpoint("llama")[0], change, "sp=2", match=match)


def _changed(folder: str, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    AutoConfig.from_pretrained(folder).save_pretrained(target)
    state = {key: tensor for path in Path(folder).glob("*.safetensors") for key, tensor in load_file(path).items()}
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.layers.1.mlp.experts.2.up_proj.weight"), r"mlp\.experts\.gate_up_proj'"),
        (lambda s: s.pop("model.norm.weight"), r"lacks 'model\.norm\.weight'"),
        (lambda s: s.update(surprise=torch.zeros(2)), "the model has no 'surprise'"),
    ],
    ids=["an expert", "a norm", "a surprise"],
)
def test_refuses_files_that_do_not_fit(ranks, checkpoint, tmp_path, change, match):
    folder = _changed(checkpoint("qwen3_moe")[0], tmp_path, change)
    ranks(2).raises(_refused, folder, "", "sp=2,ep=2", match=match)


def _refused_and_used(directory: str) -> bool:
    """A model that was refused is as it was, so another call with the right folder goes through."""
    from hf_veomni import prepare_omni

    model = _build(directory)
    try:
        prepare_omni(model, "sp=2,ep=2", checkpoint=os.path.join(directory, "nowhere"))
    except ValueError:
        prepare_omni(model, "sp=2,ep=2", checkpoint=directory)
        return model(**packed_batch((9, 14))).loss.isfinite().item()
    return False


def test_a_refused_model_is_as_it_was(ranks, checkpoint):
    assert ranks(2).run(_refused_and_used, checkpoint("qwen3_moe")[0], timeout=60) == [True, True]
