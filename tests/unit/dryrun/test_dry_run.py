"""Dry runs on the shapes that one wants to know of, and what they say by hand-made formulas."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig, Qwen3VLConfig
from typer.testing import CliRunner

from hf_veomni import UnsupportedError
from hf_veomni.cli import app
from hf_veomni.dryrun import DryRun, dry_run, image_batch
from hf_veomni.dryrun.progress import telling
from hf_veomni.dryrun.record import StepRecorder
from hf_veomni.dryrun.world import balanced_routes, even_split

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1 << 18,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
LAYERS, WIDTH, HEADS, KEYS, HEAD = 2, 64, 8, 4, 16
DENSE, MOE = LlamaConfig(**SIZES), Qwen3MoeConfig(**SIZES, **EXPERTS)
QUANTIZED = LlamaConfig(**SIZES, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def bytes_of(run: DryRun, kind: str, axis: str) -> tuple[int, int]:
    """(calls, payload)"""
    return next((c.calls, c.payload) for c in run.collectives if (c.kind, c.axis) == (kind, axis))


def test_exchanges_of_a_mixture_of_experts_by_hand() -> None:
    """128 ranks, 16K tokens: bytes by the formulas of docs/architecture.md."""
    several = Qwen3MoeConfig(**SIZES, **{**EXPERTS, "num_experts_per_tok": 8})
    run = dry_run(several, "sp=4,ep=8", 128, tokens=16384, checkpointing=True)
    t = 16384 // 4
    keys = 4 * 1  # each of 4 ranks reads one of 4 key/value heads
    to_heads, back = (HEADS + 2 * keys) * HEAD * t * 2, HEADS * HEAD * t * 2
    # forward, the same in the recomputation, and the backward
    assert bytes_of(run, "all-to-all", "sp") == (6 * LAYERS, 3 * LAYERS * (to_heads + back))
    each = 1 - 8 * 7 / (16 * 15)  # a rank of 2 experts has one of a token's 8
    rows, weights, counts = 8 * round(t * each) * WIDTH * 2, t * 8 * 2, (16 + 8) * 8
    # rows there and back, there again, and both gradients; weights there, there again, and their gradient; which row
    # each pair is in, there and there again
    sent = 5 * rows + 3 * weights + 2 * t * 8 * 4 + counts
    assert bytes_of(run, "all-to-all", "ep") == ((5 + 3 + 2 + 1) * LAYERS, LAYERS * sent)
    experts = 16 // 8 * 3 * 64 * 32 * 2
    assert bytes_of(run, "all-gather", "efsdp") == (2 * LAYERS, 2 * LAYERS * experts)
    assert bytes_of(run, "reduce-scatter", "efsdp") == (LAYERS, LAYERS * experts)
    assert {c.axis: c.ranks for c in run.collectives} == {"sp": 4, "ep": 8, "efsdp": 16, "fsdp": 128}


def test_static_memory_by_hand() -> None:
    run = dry_run(DENSE, "dp_replicate=2,sp=2", 8, tokens=256)
    attention = WIDTH * (HEADS + 2 * KEYS) * HEAD + HEADS * HEAD * WIDTH
    total = LAYERS * (attention + 3 * WIDTH * 128 + 2 * WIDTH) + 2 * 512 * WIDTH + WIDTH
    buffers = HEAD // 2 * 4 * 2  # rope
    assert run.before["parameters"] == pytest.approx(total // 4 * 2 + buffers, abs=buffers)
    assert run.before["optimizer"] == pytest.approx(2 * (total // 4) * 2, rel=0.01)
    assert run.phases["optimizer"] == pytest.approx(2 * run.before["parameters"] + run.before["optimizer"], rel=0.02)


def test_logits_and_scores_are_never_whole() -> None:
    """The CUDA path: no [S, S] in the attention, no [s, V] in the loss."""
    short, long = (dry_run(DENSE, "sp=2", 2, tokens=[n, n]) for n in (4096, 8192))
    assert long.peak.total < 2.1 * short.peak.total
    grown = dry_run(DENSE, "sp=4", 4, tokens=[8192, 8192])
    kept = [run.kept["activations"] for run in (long, grown)]
    assert kept[1] == pytest.approx(kept[0] / 2, rel=0.05)


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
@pytest.mark.parametrize("rank", [0, 3])
def test_adapters_train_alone(rank: int, kernels: str) -> None:
    full, lora = (dry_run(MOE, "sp=2,ep=2", 4, rank=rank, kernels=kernels, tokens=501, lora=r) for r in (None, 4))
    assert lora.before["optimizer"] < full.before["optimizer"] / 2
    assert lora.phases["optimizer"] < full.phases["optimizer"]


def test_mixed_precision_keeps_fp32_shards() -> None:
    plain, mixed = (
        dry_run(DENSE, "", 4, tokens=256, dtype=dtype, mixed_precision=mixed)
        for dtype, mixed in ((torch.bfloat16, False), (torch.float32, True))
    )
    assert mixed.before["parameters"] == pytest.approx(2 * plain.before["parameters"], rel=0.02)
    gathers = [bytes_of(run, "all-gather", "fsdp") for run in (plain, mixed)]
    assert gathers[0] == gathers[1]


def test_what_replicas_reduce_is_communication() -> None:
    """FSDP2 holds the fp32 buffers of all layers' all-reduces until the backward's end."""
    run = dry_run(DENSE, "dp_replicate=4", 4, tokens=16, mixed_precision=True)
    attention = WIDTH * (HEADS + 2 * KEYS) * HEAD + HEADS * HEAD * WIDTH
    layers = LAYERS * (attention + 3 * WIDTH * SIZES["intermediate_size"]) * 4
    assert run.peak.place.phase == "backward"
    assert run.peak.categories["communication"] > layers > 4 * run.peak.categories["activations"]


def test_skew_fills_a_rank() -> None:
    even, full = (dry_run(MOE, "ep=4", 8, tokens=4096, skew=skew) for skew in (1.0, 2.0))
    assert full.peak.total > 1.1 * even.peak.total
    assert bytes_of(even, "all-to-all", "ep")[1] < bytes_of(full, "all-to-all", "ep")[1]


def test_no_tensor_of_a_step_waits_for_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputation ends before what it has launched is landed; a cycle of references would hold all of it."""
    held: list[int] = []
    stock = StepRecorder.__exit__

    def leave(self: StepRecorder, *error: object) -> None:
        live = sum(self.memory.live().values())
        gc.collect()
        held.append(live - sum(self.memory.live().values()))
        stock(self, *error)

    monkeypatch.setattr(StepRecorder, "__exit__", leave)
    dry_run(MOE, "sp=2,ep=4,overlap=chunks", 8, tokens=2048, checkpointing=True)
    assert held == [0]


def test_accumulated_gradients_are_there_in_the_next_forward() -> None:
    once, twice = (dry_run(DENSE, "", 2, tokens=64, accumulation=n) for n in (1, 2))
    assert once.kept["gradients"] == 0 and twice.kept["gradients"] == pytest.approx(
        once.before["parameters"], rel=0.01
    )


def test_nothing_is_left_behind() -> None:
    before = dict(AttentionInterface._global_mapping)
    dry_run(DENSE, "sp=2", 2, tokens=64)
    assert not dist.is_initialized()
    assert dict(AttentionInterface._global_mapping) == before
    real = torch.arange(3)
    assert nn.Linear(2, 2).to("cpu").weight.shape == (2, 2) and real.tolist() == [0, 1, 2]


def test_model_of_ones_own() -> None:
    run = dry_run(lambda: AutoModelForCausalLM.from_config(DENSE, dtype=torch.float32), "", 2, tokens=64)
    assert run.model == "LlamaForCausalLM" and run.before["parameters"] > 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kernels": "tpu"}, ValueError, "`kernels` .'tpu'. must be one of cuda, cpu"),
        ({"rank": 4}, ValueError, "`rank` .4. must be one of the 4 ranks"),
        ({"plan": "sp=3"}, ValueError, "must divide the number of ranks"),
        ({"plan": "ep=2"}, UnsupportedError, "ep_size"),
        ({"tokens": 1}, ValueError, "2 tokens or more"),
        ({"skew": 0}, ValueError, "`skew`"),
        ({"skew": 2.0}, ValueError, "`skew` .2.0. is what one rank's experts get"),
        ({"dtype": torch.int8}, ValueError, "`dtype` .torch.int8. must be what parameters are trained in"),
        ({"lora": 0}, ValueError, "`lora` .0. must be a rank"),
        ({"model": QUANTIZED}, UnsupportedError, "has a `quantization_config`"),
        ({"accumulation": 0}, ValueError, "`accumulation`"),
    ],
)
def test_refuses(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        dry_run(**{"model": DENSE, "world_size": 4, "plan": "", "tokens": 64, **options})
    assert not dist.is_initialized()


VISION = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64}
VISION |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
IMAGES = Qwen3VLConfig(text_config={**SIZES, "num_key_value_heads": 4}, vision_config=VISION, **IDS)


def test_images_are_shared_over_the_ranks_of_a_sequence() -> None:
    batch = image_batch(IMAGES, 2048, [(1, 32, 32)] * 4)
    encoded = []
    for plan in ("", "sp=2", "sp=4"):
        text, run = (dry_run(IMAGES, plan, 4, batch=b, tokens=2048) for b in (None, batch))
        assert any(module.startswith("model.visual.blocks") for _, module, _ in run.modules())
        encoded.append(run.kept["activations"] - text.kept["activations"])
    assert encoded[0] > 1.5 * encoded[1] > 2 * encoded[2] > 0


@pytest.mark.parametrize(
    ("config", "grids", "kind", "message"),
    [
        (DENSE, [(1, 4, 4)], UnsupportedError, "cannot make images for 'llama'"),
        (IMAGES, [(1, 3, 4)], ValueError, "multiples of 2"),
        (IMAGES, [(1, 64, 64)], ValueError, "make 1024 tokens, and `tokens` .100. must hold"),
    ],
)
def test_no_images(config: Any, grids: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        image_batch(config, 100, grids)


def test_a_model_that_asks_for_values_is_named() -> None:
    batch = image_batch(IMAGES, 64, [(1, 8, 8)])
    del batch["position_ids"]  # then the model computes them from the kinds of the tokens
    batch["mm_token_type_ids"] = (batch["input_ids"] == 5).long()
    with pytest.raises(UnsupportedError, match="Qwen3VLForConditionalGeneration asks for values"):
        dry_run(IMAGES, "", 2, batch=batch)
    assert not dist.is_initialized()


def test_command(tmp_path: Path) -> None:
    DENSE.save_pretrained(tmp_path)
    arguments = ["dry-run", str(tmp_path), "--world-size", "4", "--plan", "sp=2", "--tokens", "64", "--documents", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "run.json")])
    assert result.exit_code == 0, result.output
    assert "What the peak is made of" in result.output and "all-to-all" in result.output
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["peak_bytes"] == sum(found["peak"].values()) and found["plan"] == "dp_shard=2,sp=2"
    result = CliRunner().invoke(app, ["dry-run", str(tmp_path / "nowhere"), "--world-size", "4"])
    assert result.exit_code == 2 and "has no config" in " ".join(result.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("options", "passes"), [({"checkpointing": True, "accumulation": 2}, 2), ({"plan": "ep=2,overlap=pairs"}, 2)]
)
def test_layers_are_told_once_forward_and_back(options: dict[str, Any], passes: int) -> None:
    """A recomputation is no layer more, halves are, and the step takes no more memory for it."""
    options = {"plan": "sp=2", "tokens": [32, 32], "kernels": "cpu", **options}
    told: list[tuple[str, int, int]] = []
    with telling(lambda *now: told.append(now)):
        watched = dry_run(MOE, world_size=4, **options)
    for phase in ("forward", "backward"):
        layers = range(1, passes * LAYERS + 1)
        assert [now for now in told if now[0] == phase] == [(phase, layer, passes * LAYERS) for layer in layers]
    assert told[0][0] == "forward" and told[-1][0] == "backward"
    assert watched.to_dict() | {"seconds": 0} == dry_run(MOE, world_size=4, **options).to_dict() | {"seconds": 0}


def test_command_draws_its_progress_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DENSE.save_pretrained(tmp_path)
    arguments = ["dry-run", str(tmp_path), "--world-size", "2", "--tokens", "64", "--json", str(tmp_path / "run.json")]
    assert "layer" not in CliRunner().invoke(app, arguments).stderr  # no terminal
    # Not by the environment: `Dataset.map` of several processes replaces `os.environ`, and rich keeps the first one.
    terminal = partial(Console, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr("hf_veomni.cli_foresight.Console", terminal)
    result = CliRunner().invoke(app, arguments)
    assert "backward" in result.stderr and "layer 2 of 2" in result.stderr and "layer 2 of 2" not in result.stdout
    json.loads((tmp_path / "run.json").read_text())


def test_even_splits() -> None:
    assert even_split(10, 4) == [3, 3, 2, 2] and sum(even_split(7, 8)) == 7
    (route,) = balanced_routes(1.0, torch.zeros(5, 2, dtype=torch.long), 4, None)
    assert route.groups.sizes == [3, 3, 2, 2]
