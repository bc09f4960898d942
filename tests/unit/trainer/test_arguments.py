"""OmniTrainingArguments in one process: what a plan may be, what is refused, what the launcher may have exported."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from transformers import HfArgumentParser
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ParallelPlan
from hf_veomni.trainer import OmniParallelismConfig, OmniTrainingArguments, validation
from hf_veomni.trainer.validation import check_given, check_sharded, release_launcher


def _arguments(tmp_path, **values):
    return OmniTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **values)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("given", [None, "", "dp_shard=1", {"sp_size": 1}, ParallelPlan()], ids=repr)
def test_a_plan_may_be_given_in_any_form(tmp_path, given):
    arguments = _arguments(tmp_path, plan=given)
    assert arguments.plan == ParallelPlan(dp_shard_size=1)
    assert arguments.parallelism_config is None, "nothing to tell accelerate in a world of one"


def test_a_plan_may_be_a_file(tmp_path):
    ParallelPlan(sp_size=1).to_yaml(tmp_path / "plan.yaml")
    assert _arguments(tmp_path, plan=str(tmp_path / "plan.yaml")).plan.world_size == 1


def test_the_command_line_has_it(tmp_path):
    parser = HfArgumentParser(OmniTrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--plan", "sp=1", "--use_cpu", "--report_to", "none"]
    )
    assert arguments.plan.sp_size == 1


def test_it_serialises_and_copies(tmp_path):
    arguments = _arguments(tmp_path, plan="sp=1")
    assert json.loads(arguments.to_json_string())["plan"]["sp_size"] == 1
    assert arguments.to_sanitized_dict()
    assert replace(arguments, learning_rate=1.0).plan == arguments.plan
    assert pickle.loads(pickle.dumps(arguments)).plan == arguments.plan


def test_the_plan_must_fit_the_world(tmp_path):
    with pytest.raises(ValueError, match="must divide the number of ranks"):
        _arguments(tmp_path, plan="sp=2")


def test_a_typo_names_the_nearest_key(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sp'"):
        _arguments(tmp_path, plan="spp=2")


@pytest.mark.parametrize(
    "values",
    [
        {"fsdp": "full_shard"},
        {"fsdp_config": {"version": 2}},
        {"deepspeed": "config.json"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_second_owner_of_the_model_is_refused(tmp_path, values):
    with pytest.raises(ValueError, match=f"`{next(iter(values))}` .* cannot be combined with a plan: .*;"):
        _arguments(tmp_path, **values)


def test_another_parallelism_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`parallelism_config`"):
        _arguments(tmp_path, parallelism_config=ParallelismConfig(dp_replicate_size=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True),
        ("fp16_full_eval", True),
        ("auto_find_batch_size", True),
        ("save_on_each_node", True),
        ("average_tokens_across_devices", False),
        ("ddp_find_unused_parameters", True),
        ("ddp_bucket_cap_mb", 25),
        ("ddp_broadcast_buffers", False),
        ("ddp_static_graph", True),
        ("optim", "adafactor"),
        ("optim", "galore_adamw"),
        ("optim", OptimizerNames.ADAMW_8BIT),
        ("activation_checkpointing_kwargs", {"use_reentrant": True}),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_by_name(tmp_path, name, value):
    arguments = _arguments(tmp_path)
    check_sharded(arguments)
    values = {field: getattr(arguments, field) for field in vars(arguments)} | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` .* cannot be combined with a plan: .+[;,] .+"):
        check_sharded(SimpleNamespace(**values))


def test_optimizers_of_bitsandbytes_name_that_of_torchao(tmp_path):
    for name in ("adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix", "rmsprop_bnb"):
        with pytest.raises(UnsupportedError, match=f"`optim` .'{name}'. .*bitsandbytes.* use adamw_torch_8bit"):
            check_sharded(_arguments(tmp_path, optim=name))


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_optimizers_of_torchao_need_its_package_alone(tmp_path, monkeypatch, optim):
    monkeypatch.setattr(validation, "is_torchao_available", lambda: True)
    check_sharded(_arguments(tmp_path, optim=optim))
    monkeypatch.setattr(validation, "is_torchao_available", lambda: False)
    with pytest.raises(UnsupportedError, match=rf"`optim` .'{optim}'. needs the package torchao.*pip install"):
        _arguments(tmp_path, optim=optim)


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches", "even_batches"])
def test_loader_options_without_effect_are_refused(tmp_path, name):
    arguments = _arguments(tmp_path, accelerator_config=AcceleratorConfig(**{name: name != "even_batches"}))
    check_given(arguments)
    with pytest.raises(ValueError, match=f"`{name}`"):
        check_sharded(arguments)


def _launch(monkeypatch, **sizes):
    """What accelerate 1.15's launcher exports for the files in accelerate_configs/."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    exported = {"DP_REPLICATE": 1, "DP_SHARD": 1, "TP": 1, "CP": 1, "SP": 1} | sizes
    for name, size in exported.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_BACKEND", "torch")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "veomni:sp=1")


def test_the_launchers_switches_are_released(tmp_path, monkeypatch):
    import os

    _launch(monkeypatch)
    arguments = _arguments(tmp_path)
    assert arguments.plan.sp_size == 1
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        assert name not in os.environ
    _arguments(tmp_path)  # a second time in the process


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed shards the model itself"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("FSDP_OFFLOAD_PARAMS", "true", "drop `fsdp_offload_params`"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "`activation_checkpointing=True`"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "Set it to 'no'"),
        ("PARALLELISM_CONFIG_SP_BACKEND", "veomny:sp=2", "must be 'deepspeed' or start with 'veomni:'"),
        ("PARALLELISM_CONFIG_SP_BACKEND", "veomni:sp=2", "differs from the plan in the launcher's yaml"),
        ("PARALLELISM_CONFIG_SP_SIZE", "4", "differs from the plan"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "differs from the plan"),
        ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2", "differs from the plan"),
    ],
)
def test_what_the_launcher_asks_for_beside_the_plan_is_refused(monkeypatch, variable, value, message):
    _launch(monkeypatch)
    release_launcher(ParallelPlan())
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        release_launcher(ParallelPlan())


def test_a_size_that_says_what_the_plan_says_is_fine(monkeypatch):
    _launch(monkeypatch, SP=2)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "veomni:sp=2")
    release_launcher(ParallelPlan(sp_size=2))


def test_the_config_shows_sp_as_accelerates_cp_without_starting_it():
    config = OmniParallelismConfig("sp=4,dp_replicate=2,dp_shard=1")
    assert (config.cp_size, config.sp_size, config.tp_size, config.total_size) == (4, 1, 1, 8)
    assert not config.cp_enabled and not config.sp_enabled
    assert config.non_dp_dim_names == ["cp"] and config.dp_dim_names == ["dp_replicate"]
    assert pickle.loads(pickle.dumps(config)).plan == config.plan
