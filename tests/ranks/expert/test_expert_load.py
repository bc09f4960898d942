"""What experts got is counted once over all ranks, and the balancing bias follows the counts of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.models import VOCABULARY, build_model
from tests.ranks.training import Run

ROWS = 8


@dataclass(frozen=True)
class BiasRun(Run):
    """A small DeepSeek-V3 (its vocabulary is larger than the rows')."""

    name: str = "qwen3_moe"
    config: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return build_model(self.name, **self.config)


def _train(plan: str, run: BiasRun, directory: Path) -> tuple[list[dict[str, float]], list[Tensor], list[Tensor]]:
    """Logs, counts of each log, and the routers' biases."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(directory)))
    trainer = OmniTrainer(model=run.model(), args=arguments, **run.data())
    trainer.train()
    callback = trainer._expert_load
    assert callback is not None
    biases = [b.detach().clone() for name, b in trainer.model.named_buffers() if name.endswith("correction_bias")]
    logs = [
        {key: value for key, value in entry.items() if "expert" in key or "router" in key or "dropped" in key}
        for entry in trainer.state.log_history
        if "expert_load_max" in entry
    ]
    return logs, [load.tokens for _, load in callback.history], biases


def _tokens(run: BiasRun) -> int:
    """Tokens of an epoch, without what fills rows up."""
    return sum(len(run.dataset(run.num_rows, 0)[i]["input_ids"]) for i in range(run.num_rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", ["dp_shard=4,ep=2", "dp_shard=2,sp=2,ep=4", "dp_replicate=2,dp_shard=2,ep=2"])
def test_counts_equal_one_process(ranks, tmp_path, plan, checkpointing):
    arguments = {"log_expert_load": True, "activation_checkpointing": checkpointing, "num_train_epochs": 1}
    frozen = BiasRun(num_rows=ROWS, arguments=arguments | {"learning_rate": 0.0})
    _, expected, _ = _train("", frozen, tmp_path)
    (logs, found, _), *others = ranks(4).run(_train, plan, frozen, tmp_path, timeout=120)
    total, wanted = torch.stack(found).sum(0), torch.stack(expected).sum(0)
    pairs = 2 * _tokens(frozen)
    assert wanted.sum(1).tolist() == [pairs, pairs], "two experts a token, in each of two layers"
    if "sp=2" not in plan:  # a dummy token fills odd rows up there
        assert torch.equal(total, wanted)
    else:
        assert 0 <= int((total - wanted).sum()) <= 2 * 2 * ROWS and bool((total >= wanted).all())
    assert all(log["dropped_tokens"] == 0 and 0 < log["router_entropy"] <= 1 for log in logs)
    assert [other[0] for other in others] == [logs] * 3, "the same figures on every rank"
    assert (tmp_path / "expert_load.png").stat().st_size > 5000


@pytest.mark.parametrize("plan", ["dp_shard=4,ep=2", "dp_shard=2,dp_replicate=2,ep=2"])
def test_bias_follows_the_counts_of_all_ranks(ranks, tmp_path, plan):
    arguments = {"router_bias_update_speed": 0.01, "log_expert_load": True, "learning_rate": 0.0}
    arguments |= {"num_train_epochs": 1, "gradient_accumulation_steps": 1}
    one = BiasRun(name="deepseek_v3", num_rows=ROWS, arguments=arguments | {"gradient_accumulation_steps": 4})
    _, tokens, expected = _train("", one, tmp_path)
    assert expected and any(bool(bias.abs().max() > 0.005) for bias in expected)
    many = BiasRun(name="deepseek_v3", num_rows=ROWS, arguments=arguments)
    for _, found_tokens, found in ranks(4).run(_train, plan, many, tmp_path, timeout=120):
        assert torch.equal(torch.stack(found_tokens), torch.stack(tokens))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("model", ["deepseek_v3", "minimax_m2"])
def test_bias_of_a_bf16_model_moves_by_small_steps(model):
    """At 1 the next bf16 numbers are 0.004 and 0.008 away."""
    from hf_veomni.expert import find_biases, update_biases
    from hf_veomni.expert.layout import find_experts

    stock: Any = build_model(model, dtype=torch.bfloat16)
    modules = find_experts(stock)
    biases = find_biases(stock, modules)
    for module, _ in biases:
        module.get_buffer("e_score_correction_bias").fill_(1)
    for _ in range(8):
        update_biases(biases, torch.tensor([[0, 2, 1, 1]]).expand(len(modules), 4), 0.001)
    found = [bias for name, bias in stock.named_buffers() if name.endswith("correction_bias")]
    assert found and all(bias.tolist() == pytest.approx([1.008, 0.992, 1, 1], abs=1e-6) for bias in found)
    assert stock(torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16


def test_bias_in_modules_to_save_moves_once():
    """PEFT's wrapper shows the bias of the module inside as its own."""
    from hf_veomni.expert import find_biases, update_biases
    from hf_veomni.expert.layout import find_experts

    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["gate"])
    stock: Any = get_peft_model(build_model("deepseek_v3"), config)  # type: ignore[arg-type]
    modules = find_experts(stock)
    update_biases(find_biases(stock, modules), torch.tensor([[0, 2, 1, 1]]), 0.5)
    found = [bias.tolist() for name, bias in stock.named_buffers() if name.endswith("correction_bias")]
    assert found == [[0.5, -0.5, 0, 0]] * 2


def test_a_speed_without_a_bias_is_refused(tmp_path):
    run = BiasRun(arguments={"router_bias_update_speed": 0.1})
    with pytest.raises(ValueError, match=r"`router_bias_update_speed` \(0.1\) has no effect on Qwen3MoeForCausalLM"):
        _train("", run, tmp_path)


def test_dense_models_have_nothing_to_count(tmp_path):
    assert VOCABULARY > 61, "rows of the training harness fit the models of the zoo"
    with pytest.raises(ValueError, match="has no experts to count"):
        _train("", BiasRun(name="llama", arguments={"log_expert_load": True}), tmp_path)
