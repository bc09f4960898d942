"""The example scripts under `accelerate launch`, on a random model with SmolLM2's head counts (9 and 3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from make_moe_checkpoint import make_moe_checkpoint
from tests.e2e.launching import launch, python

LORA = "examples/finetune_lora.py"
LOOP = "examples/accelerate_loop.py"
STEPS = 4


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path) -> list[str]:
    return ["--model", str(tiny_checkpoint), "--max_tokens", "512", "--max_steps", str(STEPS), "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def one_process(arguments: list[str], folder: Path) -> Path:
    """Output folder of the LoRA job in one process, no launcher; two rows a step."""
    python(LORA, *arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(folder / "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def two_ranks(arguments: list[str], folder: Path) -> tuple[Path, str]:
    """Output folder and printed text of the LoRA job over two ranks, each row cut in two; two rows a step."""
    output = folder / "sp2"
    accumulate = ["--gradient_accumulation_steps", "2"]
    _, text = launch("cpu_sp2.yaml", LORA, *arguments, *accumulate, "--output_dir", str(output))
    return output, text


@pytest.mark.slow
def test_chats_of_ones_own_equal_one_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sums = [(f"What is {n} + {n}?", f"It is {2 * n}.") for n in range(64)]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in sums
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--model", str(tiny_checkpoint), "--data", str(tmp_path / "chats.jsonl"), "--max_tokens", "128"]
    options += ["--dtype", "float32", "--max_steps", "4"]
    launch("cpu_sp2.yaml", LORA, *options, "--output_dir", str(tmp_path / "two"))
    python(LORA, *options, "--output_dir", str(tmp_path / "one"))
    found, wanted = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert found["train_losses"] == pytest.approx(wanted["train_losses"], rel=1e-5)
    assert found["eval_loss_after"] == pytest.approx(wanted["eval_loss_after"], rel=1e-5)
    _, text = python(LORA, *options[:2], "--data", "nowhere.jsonl", check=False)
    assert "`data` (nowhere.jsonl) is no file: give a jsonl with `messages`" in text


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def assert_same_adapter(output: Path, expected: Path) -> None:
    """Tensor by tensor; lora_B starts at zero, so what it holds is what was learned."""
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (output, expected))
    assert found.keys() == wanted.keys()
    learned = max(tensor.abs().max() for name, tensor in wanted.items() if "lora_B" in name)
    assert learned > 1e-4
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-3 * learned, name


def test_lora_job_equals_one_process(two_ranks: tuple[Path, str], one_process: Path) -> None:
    output, _ = two_ranks
    found, wanted = metrics(output), metrics(one_process)
    assert (found["world_size"], wanted["world_size"]) == (2, 1)
    assert len(found["train_losses"]) == STEPS
    assert found["train_losses"] == pytest.approx(wanted["train_losses"], rel=1e-5)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
    assert_same_adapter(output, one_process)


def test_lora_job_learns_and_reports(two_ranks: tuple[Path, str]) -> None:
    output, text = two_ranks
    found = metrics(output)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert len(found["peak_memory"]) == 2 and all(0.1 < rank["host_gb"] < 10 for rank in found["peak_memory"])
    assert f"{STEPS}/{STEPS}" in text, "no progress bar"
    for line in ("before: ", "after: ", "train loss", "evaluation loss", "peak of rank 1"):
        assert text.count(line) == 1, line


def assert_opens_in_plain_peft(adapter: Path, checkpoint: Path) -> None:
    """It changes the logits, and merged weights give the same ones."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = plain(tokens).logits
        tuned = PeftModel.from_pretrained(plain, adapter)
        after = tuned(tokens).logits
        merged = tuned.merge_and_unload()(tokens).logits
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(merged, after)


def test_adapter_opens_in_plain_peft(two_ranks: tuple[Path, str], tiny_checkpoint: Path) -> None:
    assert_opens_in_plain_peft(two_ranks[0], tiny_checkpoint)


def test_accelerate_loop_equals_trainer(two_ranks: tuple[Path, str], arguments: list[str], folder: Path) -> None:
    output = folder / "loop"
    launch("cpu_sp2.yaml", LOOP, *arguments, "--accumulation", "2", "--output_dir", str(output))
    assert metrics(output)["train_losses"] == pytest.approx(metrics(two_ranks[0])["train_losses"], rel=1e-5)
    assert_same_adapter(output, two_ranks[0])


@pytest.mark.slow
def test_two_data_ranks_equal_accumulation(one_process: Path, arguments: list[str], folder: Path) -> None:
    """Two data ranks read the two rows that one process accumulates over; each row is cut in two besides."""
    output = folder / "sp2_dp2"
    launch("cpu_sp2_dp2.yaml", LOOP, *arguments, "--output_dir", str(output))
    assert metrics(output)["world_size"] == 4
    assert metrics(output)["train_losses"] == pytest.approx(metrics(one_process)["train_losses"], rel=1e-5)
    assert_same_adapter(output, one_process)


@pytest.fixture(scope="module")
def experts(tiny_checkpoint: Path, arguments: list[str], folder: Path) -> tuple[Path, Path, str]:
    """An upcycled checkpoint, and output folder and text of the LoRA job on attention and experts over four ranks."""
    checkpoint, output = make_moe_checkpoint(folder / "moe", tiny_checkpoint), folder / "ep2"
    command = [*arguments, "--model", str(checkpoint), "--lora_experts", "--output_dir", str(output)]
    return checkpoint, output, launch("cpu_4_sp2_ep2.yaml", LORA, *command)[1]


def test_sharded_experts_equal_one_process(
    experts: tuple[Path, Path, str], arguments: list[str], folder: Path
) -> None:
    """Two data ranks, each row cut in two, experts over two ranks; one process reads the same two rows a step."""
    checkpoint, output, text = experts
    command = [*arguments, "--model", str(checkpoint), "--lora_experts", "--gradient_accumulation_steps", "2"]
    python(LORA, *command, "--output_dir", str(folder / "ep1"))
    found, wanted = metrics(output), metrics(folder / "ep1")
    assert found["world_size"] == 4 and f"{STEPS}/{STEPS}" in text
    for name in ("train_losses", "eval_loss_before", "eval_loss_after"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert_same_adapter(output, folder / "ep1")


def test_adapter_on_experts_opens_in_plain_peft(experts: tuple[Path, Path, str]) -> None:
    checkpoint, output, _ = experts
    names = load_file(output / "adapter_model.safetensors").keys()
    assert any(".mlp.experts." in name for name in names) and any(".q_proj." in name for name in names)
    assert_opens_in_plain_peft(output, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "accumulation"), [("cpu_hsdp.yaml", 1), ("cpu_sp4.yaml", 4)])
def test_four_ranks_equal_accumulation(config: str, accumulation: int, arguments: list[str], tmp_path: Path) -> None:
    """Four rows a step: over four data ranks (HSDP), or one after the other with each row cut in four."""
    python(LORA, *arguments, "--gradient_accumulation_steps", "4", "--output_dir", str(tmp_path / "one"))
    accumulate = ["--gradient_accumulation_steps", str(accumulation)]
    launch(config, LORA, *arguments, *accumulate, "--output_dir", str(tmp_path / "four"))
    found, wanted = metrics(tmp_path / "four"), metrics(tmp_path / "one")
    assert found["world_size"] == 4
    assert found["train_losses"] == pytest.approx(wanted["train_losses"], rel=1e-5)
    assert found["eval_loss_after"] == pytest.approx(wanted["eval_loss_after"], rel=1e-5)
    assert_same_adapter(tmp_path / "four", tmp_path / "one")


def test_missing_checkpoint_stops_every_rank(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["--model", str(tmp_path / "nowhere"), "--output_dir", str(output)]
    status, text = launch("cpu_sp2.yaml", LORA, *command, check=False, limit=60)
    assert status != 0
    assert text.count("make checkpoint") == 2, text[-3000:]
    assert not output.exists()
