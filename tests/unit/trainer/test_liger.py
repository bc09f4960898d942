"""`use_liger_kernel`: which of Liger's kernels are put on a model, and that its loss and its experts are not.

Liger's kernels are Triton's, so a package of the same names stands in for it: functions that note their switches, and
kernels in torch. Where the real package is installed, its own functions are called, with its kernels alone replaced.
"""

from __future__ import annotations

import inspect
import sys
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import trainer as stock_trainer
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_moe import modeling_qwen3_moe

from hf_veomni import OmniTrainer, OmniTrainingArguments, ParallelPlan, detach_omni, prepare_omni
from hf_veomni.errors import UnsupportedError
from hf_veomni.trainer import liger
from tests.liger_formulas import PACKAGE, put_formulas
from tests.models import ZOO, build_model, packed_batch
from tests.ranks.training import Run


def _norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    variance = hidden.float().pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden.dtype)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _wrong(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError("one of Liger's losses or experts ran")


class Fake:
    """Liger's functions for Llama and Qwen3-MoE, as they are in 0.8.5 but for the kernels."""

    def __init__(self) -> None:
        self.switches: list[dict[str, bool]] = []
        self.rotations = 0
        self.functions = {
            "llama": function_of(self, modeling_llama, "Llama"),
            "deepseek_v3": function_of(self, modeling_deepseek_v3, "DeepseekV3"),
            "qwen3_moe": function_of(self, modeling_qwen3_moe, "Qwen3Moe"),
        }


def function_of(fake: Fake, code: Any, prefix: str) -> Any:
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        fake.rotations += 1
        return q, k

    def apply(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        fake.switches.append({name: value for name, value in locals().items() if isinstance(value, bool)})
        if rope:
            code.apply_rotary_pos_emb = rotate
        if fused_linear_cross_entropy:
            model.forward = MethodType(_wrong, model)
        if rms_norm:
            setattr(code, f"{prefix}RMSNorm", nn.Identity)
        for module in model.modules():
            name, kernel = type(module).__name__, None
            if rms_norm and name == f"{prefix}RMSNorm":
                kernel = _norm
            if swiglu and (name == f"{prefix}MLP" or hasattr(module, "gate_up_proj")):
                kernel = _wrong if hasattr(module, "gate_up_proj") else _mlp
            if kernel is not None:
                module.calls = 0
                vars(module)["forward"] = MethodType(kernel, module)

    return apply


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    for name in ("liger_kernel", "liger_kernel.transformers", PACKAGE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[PACKAGE], "MODEL_TYPE_TO_APPLY_LIGER_FN", made.functions, raising=False)
    monkeypatch.setattr(stock_trainer, "apply_liger_kernel", vars(stock_trainer)["apply_liger_kernel"])
    return made


def _given(**values: Any) -> Any:
    return SimpleNamespace(**{"use_liger_kernel": True, "liger_kernel_config": None, "use_cpu": False, **values})


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_the_loss_and_the_experts_stay_ours(fake: Fake, name: str) -> None:
    batch = packed_batch((9, 14))
    stock = prepare_omni(build_model(name), "sp=1")
    expected = stock(**batch).loss
    expected.backward()
    code = sys.modules[type(stock).__module__]
    before = dict(vars(code))
    model = build_model(name)
    with liger.liger_kernels(model, _given()):
        prepare_omni(model, "sp=1")
    on = {"llama": {"rope", "rms_norm", "swiglu"}, "qwen3_moe": {"rope", "rms_norm"}}
    wanted = on.get(name, {"rms_norm", "swiglu"})
    switches = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu")
    assert fake.switches == [{switch: switch in wanted for switch in switches}]
    seen: list[dict[str, Any]] = []
    model.get_decoder().register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    found = model(**batch, skip_logits=True).loss  # as Trainer calls it in evaluation
    assert seen and "skip_logits" not in seen[0]
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    called = {type(m).__name__ for m in model.modules() if getattr(m, "calls", 0)}
    assert len(called) == len(wanted - {"rope"}) and fake.rotations == 0  # no kernel for what is on the CPU
    changed = {key for key, value in vars(code).items() if before.get(key) is not value}
    assert changed == ({"apply_rotary_pos_emb"} if "rope" in wanted else set())
    detach_omni(model)
    assert vars(code) == before and not any({"forward", "calls"} & set(vars(m)) for m in model.modules())


def test_tiles_are_of_the_mlp_with_the_kernel(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_veomni.tiles

    monkeypatch.setattr(hf_veomni.tiles, "TILE", 8)
    model: Any = build_model("llama")
    with liger.liger_kernels(model, _given()):
        prepare_omni(model, ParallelPlan(modules={"*.mlp": {"tokens": "tiled"}}))
    mlp = model.model.layers[0].mlp
    mlp.calls = 0
    model(**packed_batch((9, 14)))
    assert mlp.calls == 3


def test_a_model_that_is_refused_has_no_kernels(fake: Fake) -> None:
    model = build_model("llama")
    with pytest.raises(ValueError, match="ep"), liger.liger_kernels(model, _given()):
        prepare_omni(model, "ep=2")
    assert fake.switches and not any("forward" in vars(m) for m in model.modules())
    prepared = prepare_omni(build_model("llama"), "sp=1")
    with pytest.raises(UnsupportedError, match="prepared already"):
        liger.apply_liger(prepared, None)


def test_trainer_puts_nothing_of_its_own_on_top(fake: Fake) -> None:
    """It would, when it begins to train, its loss among them; and hands that loss an argument in evaluation."""
    found = []
    for kernels in (False, True):
        run = Run(num_rows=2, eval_rows=2, arguments={"max_steps": 1, "gradient_accumulation_steps": 1})
        args = OmniTrainingArguments(**run.all_arguments(plan="sp=1"))
        args.use_liger_kernel = kernels  # on a machine without a GPU
        trainer = OmniTrainer(run.model(), args, **run.data())
        found.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert len(fake.switches) == 1 and args.use_liger_kernel
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"liger_kernel_config": {"cross_entropy": True}}, UnsupportedError, "`cross_entropy`.*Leave it out"),
        (
            {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
            UnsupportedError,
            "`fused_linear_cross_entropy`.*this package's loss",
        ),
        ({"use_cpu": True}, UnsupportedError, "`use_cpu`.*Triton"),
        ({"use_liger_kernel": False, "liger_kernel_config": {"rope": True}}, ValueError, "no effect without"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: True)
    with pytest.raises(error, match=message):
        liger.check_liger(_given(**values))


def test_a_machine_without_a_gpu_or_without_liger(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UnsupportedError, match=r"`use_liger_kernel` \(True\) cannot be combined with this machine.*Leave it"
    ):
        OmniTrainingArguments(str(tmp_path), use_liger_kernel=True, report_to=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"needs the package liger-kernel.*pip install"):
        liger.check_liger(_given())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("cohere", {}, "model type 'cohere'.*use one of .*llama"),
        ("qwen3_moe", {"swiglu": True}, "'swiglu', which is not available for 'qwen3_moe'.*experts"),
        ("llama", {"rms_nrom": False}, "did you mean 'rms_norm'"),
        ("qwen3", {}, "installed release of liger-kernel has no function for 'qwen3'"),
    ],
)
def test_what_a_model_cannot_have_is_refused(fake: Fake, name: str, config: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        liger.apply_liger(build_model(name), config)
    assert not fake.switches


def test_another_activation_is_noticed(fake: Fake) -> None:
    model = build_model("llama", hidden_act="gelu")
    with pytest.raises(UnsupportedError, match=r"computes silu, .* is 'gelu'.*'swiglu': False"):
        liger.apply_liger(model, None)
    liger.apply_liger(model, {"swiglu": False})


def test_a_switch_can_be_left_off(fake: Fake) -> None:
    liger.apply_liger(build_model("llama"), {"rope": False, "fused_linear_cross_entropy": False})
    assert [name for name, on in fake.switches[0].items() if on] == ["rms_norm", "swiglu"]


def test_a_model_that_stays_stock_is_refused(fake: Fake, tmp_path: Any) -> None:
    args = OmniTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    args.use_liger_kernel = True
    with pytest.raises(UnsupportedError, match=r"`use_liger_kernel` \(True\) needs a transformers model"):
        OmniTrainer(nn.Linear(2, 2), args)


def test_the_real_package_has_these_switches() -> None:
    pytest.importorskip("triton")
    patch = pytest.importorskip(PACKAGE)
    for kind, wanted in liger.KERNELS.items():
        known = inspect.signature(patch.MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
        assert wanted | set(liger.LOSSES) <= set(known), kind


def _gradients(name: str, kernels: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model: Any = build_model(name)
    take_off = liger.apply_liger(model, None) if kernels else None
    ids = torch.arange(22).view(2, 11) + 3
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    if take_off is not None:
        assert any("forward" in vars(module) for module in model.modules())
        take_off()
    return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name, (kind, _, _) in ZOO.items() if kind in liger.KERNELS])
def test_the_kernels_give_what_the_stock_model_gives(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip(PACKAGE)
    put_formulas(monkeypatch)
    (logits, gradients), (expected, wanted) = _gradients(name, True), _gradients(name, False)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).abs().max() <= 2e-5 * max(float(gradient.abs().max()), 1e-6), key
