"""All layouts of a world: their number and order, what is said of those that do not fit, and what is written."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    FNetConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)
from typer.testing import CliRunner

from benchmarks.headline import even_split
from hf_veomni import ParallelPlan, UnsupportedError
from hf_veomni.cli import app
from hf_veomni.data.halves import split_batch
from hf_veomni.dryrun.run import text_batch
from hf_veomni.flops import StepFlops
from hf_veomni.planner import find_device, identify_device, known_devices, plan_layouts, report
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.memory import memory_of
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.time import time_of
from hf_veomni.planner.traffic import exchanges

SIZES: dict[str, Any] = {"vocab_size": 151936, "max_position_embeddings": 1 << 18, "tie_word_embeddings": False}
EXPERTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
MOE = Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=48, num_experts=128)
DENSE = LlamaConfig(**SIZES, num_key_value_heads=8, hidden_size=4096, intermediate_size=14336)


def measured_dense(layers: int) -> PreTrainedConfig:
    return LlamaConfig(**{**DENSE.to_dict(), "num_hidden_layers": layers, "vocab_size": 128256})


MEASURED_MOE = Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=21, num_experts=16)


def test_all_layouts_of_128_ranks() -> None:
    began = time.process_time()
    plans = plan_layouts(MOE, 128, "h100-80gb", context=163840)
    assert time.process_time() - began < 5
    assert all(entry.layout.plan.resolve(128).world_size == 128 for entry in plans.entries)
    assert len({e.layout for e in plans.entries}) == len(plans.entries) > 600
    speeds = [entry.tokens_per_second for entry in plans.fitting]
    assert speeds == sorted(speeds, reverse=True) and plans.best is plans.entries[0]
    others = plans.entries[len(plans.fitting) :]
    assert others and [e.over for e in others] == sorted(e.over for e in others) and others[0].over > 0


def test_sizes_of_a_model() -> None:
    shape = Shape.of(MOE)
    assert shape.total == pytest.approx(30.5e9, rel=0.01)  # its name says 30B, with 3B active
    assert shape.active + shape.embedding == pytest.approx(3.3e9, rel=0.1)


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_flops_are_those_of_the_log(config: PreTrainedConfig) -> None:
    """Those that the Trainer's MFU counts on a model of this config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    positions = torch.arange(4096).repeat(2)[None]
    batch = {"input_ids": torch.zeros_like(positions), "position_ids": positions}
    _, flops = StepFlops.from_model(model).of_batch(batch)
    found = time_of(Shape.of(config), Layout(1, 1, 1, 1, True), Job(8192, 4096), find_device("h100-80gb"))
    assert found.flops == pytest.approx(float(flops), rel=0.01)


def test_says_what_does_not_fit() -> None:
    plans = plan_layouts(DENSE, 1, "rtx4090-24gb", context=8192)
    assert not plans.fitting
    with pytest.raises(UnsupportedError, match=r"No layout of 1 ranks of 23.5 GiB .* is over by \d+.\d GiB"):
        _ = plans.best
    assert plan_layouts(DENSE, 8, "h100-80gb", context=8192).best.fits


@pytest.mark.parametrize(
    ("config", "tokens", "document", "measured", "optimizer"),
    [
        # benchmarks/results/on_gpu_nvidia-h100-80gb-hbm3.json: parts dense and experts
        (measured_dense(12), 8192, 1200, 0.358, 0.02786),
        (measured_dense(12), 8192, 8192, 0.389, 0.02785),
        (measured_dense(3), 65536, 2000, 1.06, 0.0129),
        (MEASURED_MOE, 8192, 1200, 0.378, 0.01859),
    ],
)
def test_time_of_the_measured_steps(
    config: PreTrainedConfig, tokens: int, document: int, measured: float, optimizer: float
) -> None:
    found = time_of(Shape.of(config), Layout(1, 1, 1, 1, False), Job(tokens, document), find_device("h100-80gb"))
    assert found.seconds == pytest.approx(measured, rel=0.15)
    assert found.parts["optimizer"] == pytest.approx(optimizer, rel=0.07)


def test_the_fullest_rank_has_the_time_of_its_heads() -> None:
    """Of 16 heads over 3 ranks the first has 6."""
    shape, job, device = Shape.of(DENSE), Job(3 * 8192, 3 * 8192), find_device("h100-80gb")
    heads = shape.attention.heads
    alone, three = (time_of(shape, Layout(1, 1, sp, 1, True), job, device).parts["attention"] for sp in (1, 3))
    assert three == pytest.approx(alone * -(-heads // 3) / heads)


def test_groups_that_straddle_nodes_are_slow() -> None:
    """sp=3 on nodes of 8: ranks 6 and 7 are in another node than rank 8. On 6 ranks no group is."""
    device = find_device("h100-80gb")

    def seconds(layout: Layout) -> float:
        found = exchanges(Shape.of(DENSE), layout, Job(3 * 8192, 8192))
        return next(exchange.seconds(device) for exchange in found if exchange.axis == "sp")

    assert seconds(Layout(1, 8, 3, 1, True)) > 3 * seconds(Layout(1, 2, 3, 1, True))


def test_tied_embeddings_beside_an_encoder() -> None:
    """A model that sees has its encoder in one unit with what is tied; that counts as in its text model."""
    text = {"num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": True}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "out_hidden_size": 1024}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    sees = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    shapes = [Shape.of(config) for config in (Qwen3Config(**text, vocab_size=sees.text_config.vocab_size), sees)]
    assert all(shape.tied for shape in shapes)
    alone, beside = (memory_of(shape, Layout(1, 8, 1, 1, True), Job(4096, 4096)).total for shape in shapes)
    assert alone < beside < alone + 20 * shapes[1].encoders


def test_says_that_encoders_are_not_in_it() -> None:
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "out_hidden_size": 1024}
    text = {"num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 4, "head_dim": 128}
    sees = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    for config, notes in ((sees, True), (Qwen3Config(**text), False)):
        plans = plan_layouts(config, 2, "h100-80gb", context=4096)
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(next(iter(report.render(plans, 1))))
        header = report.accelerate_config(plans, plans.best, "x")
        texts = console.export_text(), header, *report.to_dict(plans)["notes"]
        assert [report.WITHOUT_ENCODERS in text for text in texts] == [notes] * len(texts)
        assert len(texts) == 2 + notes


@pytest.mark.parametrize(
    ("config", "tokens", "measured"),
    [(measured_dense(12), 8192, 43880006144), (MEASURED_MOE, 8192, 50602102272)],
)
def test_memory_of_the_measured_steps(config: PreTrainedConfig, tokens: int, measured: int) -> None:
    """`max_memory_allocated` of an H100, from the same file."""
    found = memory_of(Shape.of(config), Layout(1, 1, 1, 1, False), Job(tokens, tokens // 7))
    assert found.total == pytest.approx(measured, rel=0.05)


def test_pairs_want_two_sequences() -> None:
    def overlaps(**options: Any) -> set[str]:
        plans = plan_layouts(DENSE, 8, "h100-80gb", context=8192, **options)
        return {entry.layout.overlap for entry in plans.entries if entry.layout.pp == 1}

    assert overlaps() == {"none", "chunks"}
    assert overlaps(document=4096) == overlaps(accumulation=2) == {"none", "chunks", "pairs"}
    assert overlaps(document=4096, without=["pairs"]) == {"none", "chunks"}


@pytest.mark.parametrize("lengths", [[64] * 2, [64] * 5, [64, 64, 64, 64, 16], [64, 64, 64, 16]])
def test_pairs_cut_between_documents(lengths: list[int]) -> None:
    """The larger half is that of the Trainer's own cut."""
    halves = split_batch(text_batch(lengths), 8)
    assert halves is not None
    layout, job = Layout(1, 8, 2, 1, True, "pairs"), Job(sum(lengths), 64)
    assert 2 * layout.sequence(job) == max(half["input_ids"].shape[1] for half in halves)


def test_pairs_hide_what_plain_exposes() -> None:
    plans = plan_layouts(MOE, 16, "h100-80gb", context=32768, accumulation=2)
    plain, pairs = (plans.find(Layout(1, 1, 16, 16, True, overlap)) for overlap in ("none", "pairs"))
    exposed = [entry.time.parts["sp"] + entry.time.parts["ep"] for entry in (plain, pairs)]
    assert exposed[1] < exposed[0] / 2 and pairs.memory.total > plain.memory.total


def test_links_between_nodes_cost() -> None:
    device = find_device("h100-80gb")
    slow, fast = (plan_layouts(MOE, 16, d, context=32768) for d in (device, replace(device, node=16)))
    wanted = Layout(1, 1, 16, 16, True)
    seconds = [next(e for e in plans.entries if e.layout == wanted).time.parts for plans in (slow, fast)]
    assert seconds[0]["sp"] > 2 * seconds[1]["sp"] and seconds[0]["matmul"] == seconds[1]["matmul"]


def test_batch_is_accumulated() -> None:
    plans = plan_layouts(DENSE, 8, "h100-80gb", context=8192, batch=32)
    entry = next(e for e in plans.entries if e.layout == Layout(1, 8, 1, 1, True))
    assert entry.layout.accumulation(plans.job) == 4
    assert entry.tokens_per_second == pytest.approx(32 * 8192 / entry.time.seconds)


def test_full_weights_that_do_not_fit_are_said() -> None:
    """`prepare_omni` moves all weights onto the device before it shards them, unless each rank reads its part."""
    large = LlamaConfig(
        **SIZES, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=80,
    )  # fmt: skip
    said = []
    for config in (large, DENSE):
        plans = plan_layouts(config, 16, "h100-80gb", context=16384)
        for entry in plans.entries:
            assert entry.loading >= plans.shape.total * 2 // entry.layout.pp
            assert plans.loads(entry) is (entry.loading + entry.reserved <= plans.device.memory_gib * 2**30)
        alone = next(entry for entry in plans.fitting if entry.layout.pp == 1)
        assert alone.loading == plans.shape.total * 2 + alone.memory.categories["parameters"]
        text = report.accelerate_config(plans, alone, "one.yaml")
        console = Console(width=200, file=io.StringIO())
        console.print(next(iter(report.render(plans))))
        table = console.file.getvalue()  # type: ignore[attr-defined]
        found = report.to_dict(plans)["entries"][plans.entries.index(alone)]
        assert found["loading_bytes"] == alone.loading + alone.reserved
        said.append(("checkpoint=" in text, "checkpoint=" in table, not found["loads"]))
        assert ("every rank loads the weights" in text) is found["loads"]
    assert said == [(True,) * 3, (False,) * 3]


def test_own_device(tmp_path: Path) -> None:
    values = {k: v for k, v in vars(find_device("h100-80gb")).items() if k not in ("measured", "source", "name")}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "memory_gib": 40}))
    assert find_device(path).memory_gib == 40
    path.write_text(yaml.safe_dump({**values, "memory_gb": 40}))
    with pytest.raises(ValueError, match=r"unknown key 'memory_gb': did you mean 'memory_gib'"):
        find_device(path)
    path.write_text(yaml.safe_dump({"memory_gib": 40}))
    with pytest.raises(ValueError, match="lacks .*matmul_tflops"):
        find_device(path)
    wrong = {
        "node": [(0, "a number above 0"), (2.5, "a whole number")],
        "memory_gib": [(float("nan"), "a number above 0"), (float("inf"), "a number above 0"), ("80", "a number")],
        "name": [(7, "a text")],
        "measured": [(3, "a list of names"), ([3], "a list of names")],
    }
    for key, value, message in ((key, *each) for key, cases in wrong.items() for each in cases):
        path.write_text(yaml.safe_dump({**values, key: value}))
        with pytest.raises(ValueError, match=f"`{key}` .* of device .* must be {message}"):
            find_device(path)
    path.write_text(yaml.safe_dump({**values, 5: 3}))
    with pytest.raises(ValueError, match="unknown key '5'"):
        find_device(path)
    assert all(device.source for device in known_devices().values())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"device": "h100"}, ValueError, "'h100'. is not in the table: did you mean 'h100-80gb'"),
        ({"world_size": 0}, ValueError, "`world_size` .0. must be a positive integer"),
        ({"context": 1 << 20}, ValueError, "longer than the model's context"),
        ({"document": 8192}, ValueError, "`document` .8192. must not be longer than `context` .4096."),
        ({"lora": 0}, ValueError, "`lora` .0."),
        ({"fp32": True}, ValueError, "`fp32` .True. needs `mixed_precision`"),
        ({"model": MptConfig()}, UnsupportedError, "an attention of Wqkv, out_proj.*dry-run"),
        ({"model": GPTNeoXConfig(num_hidden_layers=2)}, UnsupportedError, "an attention of query_key_value, dense"),
        ({"model": Qwen2MoeConfig(num_hidden_layers=2)}, UnsupportedError, "an MLP of .*shared_expert_gate"),
        ({"without": ["pipeline"]}, ValueError, "'pipeline', which is unknown: .*Valid: chunks, pairs, pp"),
        ({"model": FNetConfig()}, UnsupportedError, "has no shard points"),
        (
            {"model": LlamaConfig(quantization_config={"quant_method": "fp8"})},
            UnsupportedError,
            "_config` .fp8.*delete",
        ),
        ({"model": GptOssConfig(num_hidden_layers=2)}, UnsupportedError, "self_attn.sinks. .GptOssAttention.*dry-run"),
        ({"model": Gemma2Config(num_hidden_layers=2)}, UnsupportedError, "RMS norms in a layer"),
        ({"model": "./nowhere"}, ValueError, "has no config"),
    ],
)
def test_refuses(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan_layouts(**{"model": MOE, "world_size": 8, "device": "h100-80gb", "context": 4096, **options})


@pytest.mark.parametrize(
    "rope",
    [{"factor": 4.0, "original_max_position_embeddings": 32768}, {"factor": 4.0}],
)
def test_context_of_a_scaled_rotary_embedding(rope: dict[str, Any]) -> None:
    """Qwen's configs state 32,768 tokens, and YaRN makes 131,072 of them."""
    scaled = {"rope_type": "yarn", "rope_theta": 1e6, **rope}
    config = Qwen3Config(num_hidden_layers=2, max_position_embeddings=32768, rope_parameters=scaled)
    assert plan_layouts(config, 8, "h100-80gb", context=131072).entries
    with pytest.raises(ValueError, match=r"longer than the model's context .131072"):
        plan_layouts(config, 8, "h100-80gb", context=131073)


@pytest.mark.parametrize("plan", ["pp=2,pp_layers=1+3", "pp=2,pp_stages=2"])
def test_stages_that_a_plan_cuts_by_itself_are_not_estimated(plan: str) -> None:
    with pytest.raises(UnsupportedError, match="`pp_layers` or `pp_stages`"):
        Layout.of(plan, 4, False)


def test_json_has_what_the_table_has() -> None:
    plans = plan_layouts(DENSE, 8, "h100-80gb", context=4096, accumulation=2, mixed_precision=True)
    found = report.to_dict(plans, 1)
    assert (found["accumulation"], found["mixed_precision"], found["fp32"]) == (2, True, False)
    (entry,) = found["entries"]
    best = plans.entries[0]
    assert entry["device_bytes"] == best.memory.total + best.reserved <= found["device_gib"] * 2**30


def test_split_over_mixed_hardware_by_hand() -> None:
    """A fast rank takes n s (matmuls) or n^2 s (attention) for n tokens; a slow one twice, or 4 times, as long."""
    assert even_split(lambda n: 1.0 * n, lambda n: 2.0 * n, 300) == 100  # 200 s each, where equal ones take 300
    assert even_split(lambda n: 1.0 * n * n, lambda n: 4.0 * n * n, 300) == 100
    # 3 n + n^2 = 2 (300 - n) + (300 - n)^2 / 4 between 100 and 101
    assert even_split(lambda n: 2 * n + n * n / 4, lambda n: 3.0 * n + n * n, 300) == 100


def test_slow_ranks_and_the_split_that_evens_them_out() -> None:
    """Of rates one half of the others' in everything, all seconds are twice as many."""
    shape, layout = Shape.of(DENSE), Layout(1, 8, 1, 1, True)
    fast = find_device("h100-80gb")
    names = [name for name in vars(fast) if name.endswith(("_tflops", "_gbs"))]
    slow = replace(fast, **{name: getattr(fast, name) / 2 for name in names})

    def seconds(device: Any, tokens: int) -> float:
        return time_of(shape, layout, Job(tokens, 2048), device).seconds

    assert seconds(slow, 65536) == pytest.approx(2 * seconds(fast, 65536), rel=0.01)
    share = even_split(partial(seconds, fast), partial(seconds, slow), 131072)
    assert seconds(slow, share) == pytest.approx(seconds(fast, 131072 - share), rel=0.01)
    # Work grows with the tokens beside what the optimizer takes: a third of them, up to that.
    assert share == pytest.approx(131072 / 3, rel=0.02)


def test_command_writes_what_accelerate_reads(tmp_path: Path) -> None:
    DENSE.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--world-size", "8", "--device", "h100-80gb", "--context", "32768"]
    files = {"--json": "plans.json", "--picture": "plans.png", "--write": "plan.yaml"}
    for option, name in files.items():
        arguments += [option, str(tmp_path / name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "layouts fit" in result.output and "The fastest that fits" in result.output
    found = json.loads((tmp_path / "plans.json").read_text())
    assert found["entries"][0]["fits"] and len(found["entries"]) == found["layouts"]
    written = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    plan = written["parallelism_config"]["parallelism_config_sp_backend"].removeprefix("veomni:")
    assert ParallelPlan.parse(plan).resolve(8) == ParallelPlan.parse(found["entries"][0]["plan"]).resolve(8)
    assert (tmp_path / "plans.png").stat().st_size > 10_000
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--world-size", "1", "--device", "rtx4090-24gb"])
    assert result.exit_code == 1 and "comes nearest" in result.output.replace("\n", " ")


def test_files_that_could_not_start_or_be_written(tmp_path: Path) -> None:
    DENSE.save_pretrained(tmp_path)
    common = ["plan", str(tmp_path), "--device", "h100-80gb"]
    for options, message in (
        (
            ["--world-size", "12", "--write", str(tmp_path / "plan.yaml")],
            "`world_size` (12) must be a multiple of the 8",
        ),
        (["--world-size", "8", "--write", str(tmp_path)], "is a folder"),
        (["--world-size", "8", "--json", str(tmp_path / "no/plans.json")], "does not exist: make"),
        (["--world-size", "8", "--picture", str(tmp_path / "x.foo")], "must end in one of"),
    ):
        result = CliRunner().invoke(app, [*common, *options], terminal_width=200)
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output


@pytest.mark.parametrize(("mixed", "said"), [(True, "bf16"), (False, "no")])
def test_precision_in_a_file_is_that_of_its_estimate(mixed: bool, said: str) -> None:
    plans = plan_layouts(LlamaConfig(num_hidden_layers=2), 1, "h100-80gb", context=2048, mixed_precision=mixed)
    written = yaml.safe_load(report.accelerate_config(plans, plans.best, "one.yaml"))
    assert written["mixed_precision"] == said


def test_a_device_by_its_name() -> None:
    assert identify_device("NVIDIA H100 80GB HBM3", 79.2) == find_device("h100-80gb")
    assert identify_device("NVIDIA A100-SXM4-40GB", 39.4) == find_device("a100-40gb")
    for name, memory in (
        ("NVIDIA H100 PCIe", 79.2),
        ("NVIDIA A100-PCIE-40GB", 39.4),
        ("NVIDIA A10G", 22.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5),
    ):
        with pytest.raises(UnsupportedError, match=f"'{name}' with {memory:.1f} GiB is not in the table"):
            identify_device(name, memory)


def test_config_of_a_plan_alone_says_something() -> None:
    plans = plan_layouts(LlamaConfig(num_hidden_layers=2), 1, "h100-80gb", context=2048)
    text = report.accelerate_config(plans, plans.best, "one.yaml", "a test")
    backend = yaml.safe_load(text)["parallelism_config"]["parallelism_config_sp_backend"]
    assert backend == "veomni:dp_shard=1" and "# For: a test" in text
