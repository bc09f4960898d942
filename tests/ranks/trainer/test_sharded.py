"""Sharded and asynchronous checkpoints on ranks: plain files of them, exact resumption, errors on every rank."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from hf_veomni.checkpoint.background import BackgroundWriter
from hf_veomni.checkpoint.convert import convert
from hf_veomni.checkpoint.manifest import find_damage
from tests.ranks.trainer.test_checkpoint import _assert_continues, _train_and_resume, _trainer, plans
from tests.ranks.training import Run, adapt_experts, full, tiny_mixtral, tiny_model

SHARDED, ASYNC = {"sharded_weights": True}, {"async_save": True}
SAVE = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


class _Experts(Run):
    """A mixture of experts in place of the dense model."""

    def model(self) -> Any:
        return adapt_experts(tiny_mixtral()) if self.lora else tiny_mixtral()


def _save(plan: str, run: Run, directory: Path) -> dict[str, torch.Tensor]:
    trainer = _trainer(plan, run, directory)
    trainer.train()
    return {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}


def _stock_adapter(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(base, folder).state_dict()


@plans
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_converted_model_opens_in_plain_transformers(ranks, tmp_path, world, plan, tied):
    run = Run(config={"tie_word_embeddings": tied}, arguments=SAVE | SHARDED)
    weights = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    checkpoint = tmp_path / "checkpoint-1"
    assert not list(checkpoint.glob("*.safetensors")) and len(list(checkpoint.glob("weights/shard-*"))) == world
    assert find_damage(checkpoint, contents=True) is None
    written = convert(checkpoint, tmp_path / "plain", max_bytes=20_000)
    assert len(written) > 1 and all(path.is_file() for path in written)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = model.state_dict()
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        *(path.name for path in written),
    }


@plans
def test_a_converted_adapter_opens_in_plain_peft(ranks, tmp_path, world, plan):
    run = Run(lora=True, arguments=SAVE | SHARDED)
    weights = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    convert(tmp_path / "checkpoint-1", tmp_path / "plain")
    found = _stock_adapter(tiny_model(), tmp_path / "plain")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    mapping = json.loads((tmp_path / "plain/adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_converted_experts_equal_what_is_saved_plainly(ranks, tmp_path, lora):
    """The layouts of Mixtral's files and of PEFT's, by stock's own loaders."""
    run = _Experts(lora=lora, arguments=SAVE | SHARDED)
    ranks(2).run(_save, "sp=2,ep=2", run, tmp_path / "sharded", timeout=120)
    plain = _Experts(lora=lora, arguments=SAVE)
    ranks(2).run(_save, "sp=2,ep=2", plain, tmp_path / "plain", timeout=120)
    converted, saved = tmp_path / "converted", tmp_path / "plain/checkpoint-1"
    command = ["convert", str(tmp_path / "sharded/checkpoint-1"), str(converted)]
    from hf_veomni.cli import app

    assert CliRunner().invoke(app, command).exit_code == 0
    if lora:
        expected, found = _stock_adapter(tiny_mixtral(), saved), _stock_adapter(tiny_mixtral(), converted)
    else:
        expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
        found = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    names = {path.name for path in saved.glob("*.safetensors")}
    assert {path.name for path in converted.glob("*.safetensors")} == names
    result = CliRunner().invoke(app, ["convert", str(saved), str(tmp_path / "again")])
    assert result.exit_code == 1 and "has no sharded weights" in result.output


@pytest.mark.parametrize("saving", [pytest.param(SHARDED, marks=pytest.mark.slow), ASYNC], ids=["sharded", "async"])
@pytest.mark.parametrize("kind", ["full", "lora", "experts", "experts-lora"])
def test_resume_is_exact(ranks, tmp_path, kind, saving):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "save_total_limit": 2} | saving
    experts = kind.startswith("experts")
    run = (_Experts if experts else Run)(lora=kind.endswith("lora"), num_rows=8, arguments=arguments)
    plan = "sp=2,ep=2" if experts else "dp_shard=2"
    for whole, resumed in ranks(2).run(_train_and_resume, plan, run, tmp_path, plan, timeout=180):
        _assert_continues(whole, resumed, 0.0)
    assert find_damage(tmp_path / "checkpoint-3", contents=True) is None
    assert not (tmp_path / ".incomplete").exists()


def test_one_process_saves_beside_training(tmp_path):
    run = Run(arguments=SAVE | ASYNC | {"max_steps": 2})
    weights = _save("", run, tmp_path)
    convert(tmp_path / "checkpoint-2", tmp_path / "plain")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def _best(plan: str, run: Run, directory: Path) -> tuple[list[str], str]:
    trainer = _trainer(plan, run, directory)
    trainer.train()
    return sorted(path.name for path in directory.glob("checkpoint-*")), str(trainer.state.best_model_checkpoint)


def test_the_best_model_and_the_limit_hold_beside_training(ranks, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    arguments |= SAVE | ASYNC | {"max_steps": 4, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    kept, best = ranks(2).run(_best, "sp=2", Run(num_rows=8, eval_rows=2, arguments=arguments), tmp_path, timeout=120)[
        0
    ]
    assert len(kept) == 2 and kept[-1] == "checkpoint-4" and Path(best).name in kept


class _Wait(TrainerCallback):
    """Lets the save beside training end before the next step, so that the step is where its error shows."""

    trainer: Any = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        writer = self.trainer._saver._writer
        error = writer.wait(20)
        self.trainer._saver._error = error


def _fails(plan: str, directory: Path, rank: int) -> str:
    """The error that training ends in on this rank, when `rank` has no space beside it after the first step."""
    wait = _Wait()
    mine = dist.get_rank() == rank
    run = Run(arguments=SAVE | ASYNC | {"max_steps": 4})
    trainer = _trainer(plan, run, directory, callbacks=[wait] if mine else [])
    wait.trainer = trainer
    start = BackgroundWriter._open

    def start_with_little_space(writer: BackgroundWriter) -> Any:
        process = start(writer)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        return process

    try:
        with pytest.MonkeyPatch.context() as patch:
            if mine:
                patch.setattr(BackgroundWriter, "_open", start_with_little_space)
            trainer.train()
    except Exception as error:
        return f"step {trainer.state.global_step}, {type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_beside_training_reaches_every_rank_at_the_next_step(ranks, tmp_path, rank):
    errors = ranks(2).run(_fails, "sp=2", tmp_path, rank, timeout=90)
    assert all("step 1" in error and "beside training" in error for error in errors), errors
    assert "File too large" in errors[rank]
    assert not list(tmp_path.glob("checkpoint-*"))


def _other_rank(plan: str, run: Run, directory: Path) -> None:
    _trainer(plan, run, directory).train(resume_from_checkpoint=True)


def test_a_sharded_checkpoint_of_another_model_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2).run(_save, "sp=2", Run(arguments=SAVE | SHARDED), tmp_path, timeout=120)
    shallow = Run(config={"num_hidden_layers": 1}, arguments={"max_steps": 2})
    ranks(2).raises(_other_rank, "sp=2", shallow, tmp_path, match="of another model", timeout=60)
    wide = Run(config={"hidden_size": 64}, arguments={"max_steps": 2})
    ranks(2).raises(_other_rank, "sp=2", wide, tmp_path, match="of another model", timeout=60)


class _NeverDone(BackgroundWriter):
    """On rank 1 the part failed, and there was no room for the note that rank 0's writer waits for."""

    failed: Exception | None = None
    given_up = False  # else the next save would find this one under way

    def wait(self, seconds: float | None = None) -> Exception | None:
        if self.failed is None:
            assert seconds is not None, "waits without looking"
            time.sleep(seconds)
        return self.failed

    @property
    def busy(self) -> bool:
        return self.failed is None

    def cancel(self) -> None:
        self.given_up = True
        super().cancel()


def _last_save(early: bool) -> tuple[str, float, bool]:
    from hf_veomni.trainer.saving import CheckpointSaver

    saver = CheckpointSaver(beside=True)
    saver._writer, saver._target = (writer := _NeverDone()), Path("checkpoint-8")
    if dist.get_rank() == 1:
        error = OSError("No space left on device")
        saver._error, writer.failed = (error, None) if early else (None, error)
    begin = time.monotonic()
    try:
        saver.finish()
    except OSError as error:
        return str(error), time.monotonic() - begin, writer.given_up
    return "", 0.0, False


@pytest.mark.parametrize("early", [False, True])
def test_the_last_save_ends_where_a_rank_failed_without_a_note(ranks, early):
    for message, seconds, given_up in ranks(2).run(_last_save, early, timeout=30):
        assert "No space left on device" in message and seconds < 10 and given_up
