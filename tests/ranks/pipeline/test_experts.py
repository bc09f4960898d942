"""What experts of all stages got is counted once, and balancing biases follow the counts, as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks.expert.test_expert_load import ROWS, BiasRun, _train

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "plan", "world"),
    [
        ("deepseek_v3", "pp=2", 2),
        pytest.param("qwen3_moe", "pp=2", 2, marks=SLOW),
        pytest.param("dense_first", "pp=2,dp_shard=2,ep=2", 4, marks=SLOW),
        pytest.param("deepseek_v3", "pp=4", 4, marks=SLOW),
    ],
)
def test_counts_and_biases_equal_one_process(ranks, tmp_path: Path, name: str, plan: str, world: int) -> None:
    config = {"num_hidden_layers": 4}
    arguments = {"log_expert_load": True, "learning_rate": 0.0, "num_train_epochs": 1}
    if name == "dense_first":  # the whole first stage has no experts
        name, config = "qwen3_moe", config | {"mlp_only_layers": [0, 1]}
    if name == "deepseek_v3":
        arguments["router_bias_update_speed"] = 0.01
    one = BiasRun(name=name, config=config, num_rows=ROWS, arguments=arguments | {"gradient_accumulation_steps": 4})
    logs, expected, wanted = _train("", one, tmp_path)
    many = BiasRun(
        name=name, config=config, num_rows=ROWS,
        arguments=arguments | {"gradient_accumulation_steps": 2 if "dp_shard" in plan else 4},
    )  # fmt: skip
    biases = []
    ep = 2 if "ep=2" in plan else 1
    for log, tokens in zip(logs, expected, strict=True):  # one process is one rank of experts, whose load is even
        by_rank = tokens.double().unflatten(1, (ep, -1)).sum(2)
        log["expert_rank_load_max"] = float((by_rank / by_rank.mean(1, keepdim=True)).max())
    for found_logs, found, held in ranks(world).run(_train, plan, many, tmp_path, timeout=180):
        assert torch.equal(torch.stack(found), torch.stack(expected))
        for log, wanted_log in zip(found_logs, logs, strict=True):
            assert {key: log[key] for key in wanted_log} == pytest.approx(wanted_log, rel=1e-5)
        biases.append(held)
    if wanted:
        size = len(biases) // (4 if "pp=4" in plan else 2)
        joined = [bias for stage in biases[::size] for bias in stage]
        assert len(joined) == len(wanted) and all(torch.equal(a, b) for a, b in zip(joined, wanted, strict=True))
