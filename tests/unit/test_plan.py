"""ParallelPlan: strings, yaml, environment, resolution, refusals."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_veomni.plan import ParallelPlan


def test_string_and_full_names_give_the_same_plan():
    plan = ParallelPlan.from_string("sp=2, dp_shard=4,dp_replicate=3")
    assert plan == ParallelPlan(sp_size=2, dp_shard_size=4, dp_replicate_size=3)
    assert plan == ParallelPlan.from_dict({"sp_size": 2, "dp": 4, "dp_replicate_size": 3})
    assert str(plan) == "dp_replicate=3,dp_shard=4,sp=2"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_str_reads_back(replicate, shard, sp):
    plan = ParallelPlan(dp_replicate_size=replicate, dp_shard_size=shard, sp_size=sp)
    text = str(plan)
    back = ParallelPlan() if text == "single" else ParallelPlan.from_string(text)
    assert back.resolve(plan.world_size) == plan.resolve(plan.world_size)


def test_yaml_round_trip(tmp_path):
    plan = ParallelPlan(sp_size=2, modules={"lm_head": {"fsdp": "keep"}})
    plan.to_yaml(tmp_path / "plan.yaml")
    assert ParallelPlan.from_yaml(tmp_path / "plan.yaml") == plan
    assert ParallelPlan.parse(str(tmp_path / "plan.yaml")) == plan


def test_layers_of_stages_in_text_and_yaml(tmp_path):
    plan = ParallelPlan.from_string("pp=2,pp_layers=10+6")
    assert plan == ParallelPlan(pp_size=2, pp_layers=(10, 6)) != ParallelPlan(pp_size=2)
    plan.to_yaml(tmp_path / "plan.yaml")
    assert ParallelPlan.from_yaml(tmp_path / "plan.yaml") == plan and str(plan) == "pp=2,pp_layers=10+6"
    assert ParallelPlan.from_string("pp=2,pp_layers=10+6").resolve(4).pp_layers == (10, 6)
    several = ParallelPlan.from_string("pp=2,pp_stages=2,pp_layers=1+2+3+4")
    several.to_yaml(tmp_path / "several.yaml")
    assert ParallelPlan.from_yaml(tmp_path / "several.yaml") == several == ParallelPlan.parse(str(several))
    assert several.pp_stages == 2 and hash(several) != hash(ParallelPlan(pp_size=2))


def test_resolve_takes_what_is_left_of_the_world():
    plan = ParallelPlan(sp_size=2, dp_replicate_size=2).resolve(16)
    assert (plan.dp_shard_size, plan.fsdp_size, plan.dp_size, plan.world_size) == (4, 8, 8, 16)
    assert ParallelPlan(sp_size=2, ep_size=4).resolve(4).efsdp_size == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParallelPlan.from_string("sq=2"), r"Unknown plan key 'sq': did you mean 'sp'"),
        (lambda: ParallelPlan.from_string("SP=2"), r"Unknown plan key 'SP': did you mean 'sp'\?$"),
        (lambda: ParallelPlan.from_string("fsdp=8"), r"Unknown plan key 'fsdp': .*write dp_shard=N"),
        (lambda: ParallelPlan.from_string("tp=2"), r"Unknown plan key 'tp': there is no tensor parallelism"),
        (lambda: ParallelPlan.from_dict({"cp_size": 2}), r"Unknown plan key 'cp_size': .*write sp=N"),
        (lambda: ParallelPlan.from_string("sp=two"), r"'sp=two'.*name=integer"),
        (lambda: ParallelPlan.from_string("sp"), r"must be name=integer"),
        (lambda: ParallelPlan.from_string("sp=2,sp=4"), r"'sp' appears twice"),
        (lambda: ParallelPlan.from_dict({"sp": 2, "sp_size": 2}), r"a second time"),
        (lambda: ParallelPlan(sp_size=0), r"`sp_size` \(0\) must be a positive integer"),
        (lambda: ParallelPlan(sp_size=True), r"positive integer"),
        (
            lambda: ParallelPlan(pp_size=2, overlap="pairs"),
            r"`overlap` \('pairs'\) cannot be combined with `pp_size` \(2\)",
        ),
        (
            lambda: ParallelPlan.from_string("pp=2,pp_layers=3"),
            r"`pp_layers` \('3'\) .* \(2 \* 1\) stages",
        ),
        (lambda: ParallelPlan(pp_size=2, pp_layers=(3, 0)), r"`pp_layers` \(\(3, 0\)\) must have a positive number"),
        (lambda: ParallelPlan.from_string("pp=2,pp_layers=a+b"), r"`pp_layers` \('a\+b'\)"),
        (lambda: ParallelPlan.from_string("pp_layers=7"), r"`pp_layers` \('7'\) .* \(`pp_size` is 1\): leave it out"),
        (lambda: ParallelPlan(pp_stages=2), r"`pp_stages` \(2\) must be a positive integer, and 1 without a pipeline"),
        (lambda: ParallelPlan(pp_size=2, pp_stages=0), r"`pp_stages` \(0\) must be"),
        (lambda: ParallelPlan(dp_shard_size=8, ep_size=6), r"`ep_size` \(6\) must divide .*\(8\): use 1, 2, 4, 8"),
        (lambda: ParallelPlan(ep_size=3).resolve(4), r"`ep_size` \(3\) must divide"),
        (lambda: ParallelPlan(sp_size=3).resolve(4), r"= 3\) must divide the number of ranks \(4\)"),
        (lambda: ParallelPlan(sp_size=2, dp_shard_size=4).resolve(4), r"= 8\) must equal the number of ranks \(4\)"),
        (lambda: ParallelPlan(modules={"lm_head": {"fsdq": "keep"}}), r"Unknown rule 'fsdq'.*did you mean 'fsdp'"),
        (lambda: ParallelPlan(modules={"lm_head": {"fsdp": "kept"}}), r"'fsdp' \('kept'\).*did you mean 'keep'"),
        (lambda: ParallelPlan(modules={"lm_head": {}}), r"must map rule names"),
        (
            lambda: ParallelPlan(modules={"lm_heat": {"fsdp": "keep"}}).match_modules(["lm_head"]),
            r"Near: \['lm_head'\]",
        ),
        (
            lambda: ParallelPlan(overlap="pair"),
            r"`overlap` \('pair'\) is unknown: did you mean 'pairs'.*chunks, none, pairs",
        ),
        (lambda: ParallelPlan.from_string("sp=2,overlap=2"), r"`overlap` \(2\) is unknown"),
        (lambda: ParallelPlan().fsdp_size, r"call `plan.resolve"),
        (lambda: ParallelPlan.parse("missing.yaml"), r"'missing.yaml' does not exist"),
        (lambda: ParallelPlan.parse(3), r"`plan` \(3\) must be"),
    ],
)
def test_bad_plans_name_value_rule_and_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_env_reads_what_accelerate_launch_passes_on(monkeypatch):
    monkeypatch.delenv("HF_VEOMNI_PLAN", raising=False)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "deepspeed")
    assert ParallelPlan.from_env() == ParallelPlan()
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "veomni:sp=2")
    assert ParallelPlan.parse(None) == ParallelPlan(sp_size=2)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "veomni:spp=2")
    with pytest.raises(ValueError, match="Unknown plan key 'spp'"):
        ParallelPlan.from_env()
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "veomni:sp=2")
    monkeypatch.setenv("HF_VEOMNI_PLAN", "sp=4")
    with pytest.raises(ValueError, match="differ: set one"):
        ParallelPlan.from_env()


def test_plan_imports_no_torch():
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('plan', sys.argv[1])"
    code += "; m = u.module_from_spec(s); sys.modules['plan'] = m; s.loader.exec_module(m)"
    code += "; assert 'torch' not in sys.modules"
    import hf_veomni.plan

    subprocess.run([sys.executable, "-c", code, hf_veomni.plan.__file__], check=True, timeout=60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sp_size: 2\nsp_size: 4\n", r"has the key 'sp_size' twice \(line 2\)"),
        ("modules:\n  lm_head: {fsdp: keep, fsdp: free}\n", r"has the key 'fsdp' twice"),
        ("sp_size: 2\n---\nsp_size: 4\n", r"holds 2 documents"),
        ("sp_size: [2\n", r"is not yaml"),
        ("sp_size:\t2: 3\n", r"is not yaml"),
        ("- sp\n", r"must hold a mapping"),
        ("", r"must hold a mapping"),
    ],
)
def test_plan_files_say_one_thing(tmp_path, text, message):
    from hf_veomni.omni import OmniConfig

    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"Plan file '{path}' {message}"):
        ParallelPlan.from_yaml(path)
    with pytest.raises(ValueError, match=f"Config file '{path}' {message}"):
        OmniConfig.from_yaml(path)


def test_equal_plans_have_one_hash():
    rules = {"lm_head": {"fsdp": "keep"}, "*.mlp": {"fsdp": "free"}}
    plans = [ParallelPlan(sp_size=2, modules=rules), ParallelPlan(sp_size=2, modules=dict(reversed(rules.items())))]
    assert plans[0] == plans[1] and hash(plans[0]) == hash(plans[1])
    assert len({*plans, ParallelPlan(sp_size=2), ParallelPlan.from_string("sp=2"), ParallelPlan()}) == 3


@pytest.mark.parametrize("backend", ["veomni", "veomni=sp=2", "Veomni:sp=2", "sp=2"])
def test_a_backend_that_names_no_plan_is_refused(monkeypatch, backend):
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", backend)
    with pytest.raises(ValueError, match=f"`parallelism_config_sp_backend` .'{backend}'.*with the colon"):
        ParallelPlan.from_env()


@pytest.mark.parametrize("overlap", ["chunks", "pairs"])
def test_overlap_is_part_of_a_plan(tmp_path, overlap):
    plan = ParallelPlan.from_string(f"sp=2,overlap={overlap}")
    assert plan.overlap == overlap and str(plan) == f"sp=2,overlap={overlap}"
    assert ParallelPlan.from_dict(plan.to_dict()) == plan != ParallelPlan(sp_size=2)
    assert plan.resolve(4).overlap == overlap and hash(plan) != hash(ParallelPlan(sp_size=2))
    plan.to_yaml(tmp_path / "plan.yaml")
    assert ParallelPlan.from_yaml(tmp_path / "plan.yaml") == plan
    assert ParallelPlan.from_string("overlap=none") == ParallelPlan()
    with pytest.raises(ValueError, match=r"`overlap` \('chunk'\) is unknown: did you mean 'chunks'"):
        ParallelPlan(overlap="chunk")
