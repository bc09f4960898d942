"""Torch files of all weights, as DeepSpeed's zero_to_fp32.py and FSDP's FULL_STATE_DICT leave them.

Both write `torch.save` of the model's state dict. What else they leave is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_veomni import OmniTrainer, OmniTrainingArguments, ParallelPlan, prepare_omni
from hf_veomni.checkpoint.convert import convert
from hf_veomni.errors import UnsupportedError
from tests.ranks.training import Run, lora_model, tiny_mixtral, tiny_model

MODELS: dict[str, Callable[[], Any]] = {
    "dense": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "experts": tiny_mixtral,
}


def _write(model: Any, folder: Path, name: str) -> Path:
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if not name.endswith(".json"):
        torch.save(state, folder / name)
        return folder
    places = {key: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, key in enumerate(state)}
    for file in set(places.values()):
        torch.save({key: state[key] for key in state if places[key] == file}, folder / file)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model.bin.index.json"])
def test_a_torch_file_becomes_what_stock_opens(tmp_path: Path, kind: str, name: str) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "stock")
    written = convert(_write(model, tmp_path / "foreign", name), tmp_path / "plain")
    assert [path.name for path in written] == ["model.safetensors"]
    for folder in ("plain", "stock"):
        found, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not list((tmp_path / "plain").glob("*.bin*"))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_meta_is_filled_from_it(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    folder = _write(model, tmp_path / "foreign", "pytorch_model_fsdp.bin")
    with torch.device("meta"):
        empty = type(model)(model.config)
    filled: Any = prepare_omni(empty, ParallelPlan(), checkpoint=folder)
    assert all(torch.equal(filled.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (
            "pytorch_model_fsdp_0/.metadata",
            r"FSDP's sharded weights \('pytorch_model_fsdp_0/.*accelerate merge-weights",
        ),
        ("pytorch_model_fsdp_rank1.bin", "FSDP's weights of one rank each .*FULL_STATE_DICT"),
        ("pytorch_model_fsdp_0_rank1.bin", "FSDP's weights of one rank each .*FULL_STATE_DICT"),
        ("global_step5/mp_rank_00_model_states.pt", "DeepSpeed's partitions .*zero_to_fp32.py"),
        ("global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "DeepSpeed's partitions .*zero_to_fp32.py"),
    ],
)
def test_weights_in_parts_are_refused_by_name(tmp_path: Path, path: str, match: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    with pytest.raises(UnsupportedError, match=match):
        convert(tmp_path, tmp_path / "out")
    with torch.device("meta"):
        empty = type(tiny_model())(tiny_model().config)
    with pytest.raises(UnsupportedError, match=match):
        prepare_omni(empty, ParallelPlan(), checkpoint=tmp_path)


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/ran",)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"a": _Runs()}, "as a torch file of tensors alone"),
        ({"module": {"a": torch.ones(1)}}, "holds a dict under 'module'"),
        ([torch.ones(1)], "holds a list and must hold tensors by name"),
        (b"", "as a torch file of tensors alone"),
        (tiny_model(num_hidden_layers=3).state_dict(), r"has 'model.layers.2.* of another model"),
        (tiny_model(num_hidden_layers=1).state_dict(), r"lacks 'model.layers.1"),
        (tiny_model(intermediate_size=24).state_dict(), r"has shape \(24, 32\), and in .* \(48, 32\)"),
        (lora_model().state_dict(), "lacks .* with adapters"),
    ],
    ids=["code", "nested", "list", "empty", "deeper", "shallower", "narrower", "adapters"],
)
def test_what_is_no_state_dict_of_the_model_is_refused(tmp_path: Path, state: Any, match: str) -> None:
    config = tiny_model().config
    config.architectures = [type(tiny_model()).__name__]
    config.save_pretrained(tmp_path)
    if isinstance(state, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(state)
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torch_file_without_a_config_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "../other.bin"}}, "outside of its folder"),
        ({"weight_map": {"a": "pytorch_model-1.bin"}}, "'pytorch_model-1.bin' of .* does not exist"),
        ({"weight_map": 3}, "cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, index: Any, match: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tmp_path / "out")


def test_a_run_of_fsdp_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its optimizer's state is another; `True` passes over it, with the reason."""
    run = Run(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    arguments = run.all_arguments(output_dir=str(tmp_path))
    Trainer(model=run.model(), args=TrainingArguments(**arguments), **run.data()).train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**arguments), **run.data())
    with pytest.raises(
        UnsupportedError, match=r"optimizer \('optimizer.bin'\) is as DeepSpeed or FSDP .*hf-veomni conv"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"No complete checkpoint .*checkpoint-1: its optimizer \('optimizer.bin'\)"):
        trainer.train(resume_from_checkpoint=True)
