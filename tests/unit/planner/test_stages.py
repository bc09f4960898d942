"""Pipelines in the planner: time against the schedule itself, memory against dry runs of what a stage holds."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3VLConfig

from hf_veomni.dryrun import dry_run
from hf_veomni.pipeline.schedule import one_forward_one_backward
from hf_veomni.planner import find_device, plan_layouts
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.memory import stages_of
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.time import time_of

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1 << 17,
    "tie_word_embeddings": False,
}
H100 = find_device("h100-80gb")


def simulate(stages: int, count: int, forward: float, backward: float, way: float) -> float:
    """When the last stage to end is through all its actions."""
    ended: dict[tuple[int, bool, int], float] = {}
    free = [0.0] * stages
    left = [one_forward_one_backward(stage, stages, count) for stage in range(stages)]
    while any(left):
        for stage in range(stages):
            while left[stage]:
                back, index, _ = left[stage][0]
                before = (stage + 1, True, index) if back else (stage - 1, False, index)
                inside = 0 <= before[0] < stages
                if inside and before not in ended:
                    break
                begin = max(free[stage], ended[before] + way if inside else 0.0)
                free[stage] = ended[stage, back, index] = begin + (backward if back else forward)
                left[stage].pop(0)
    return max(free)


@pytest.mark.parametrize(("stages", "count"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 12), (8, 32), (8, 3)])
def test_time_is_that_of_the_schedule(stages: int, count: int) -> None:
    shape = Shape.of(LlamaConfig(**SIZES, num_hidden_layers=2 * stages))
    layout, job = Layout(1, 8, 1, 1, False, pp=stages), Job(8192, 8192, accumulation=count)
    parts = dict(time_of(shape, layout, job, H100).parts)
    del parts["optimizer"]
    alone = sum(parts[name] for name in ("matmul", "attention", "rest", "loss", "fsdp")) / count
    way = 2 * 8192 * 2048 / (H100.inter_gbs * 1e9) + H100.inter_us * 1e-6
    assert sum(parts.values()) == pytest.approx(simulate(stages, count, alone / 3, 2 * alone / 3, way), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sp", [1, 2])
def test_memory_is_that_of_a_model_of_a_stages_layers(checkpointing: bool, sp: int) -> None:
    """A stage of 3 layers holds what a model of 3 layers does; the first of two stages has a second micro-batch in
    flight, and each has its messages until the window ends."""
    layout, job = Layout(1, 4 // sp, sp, 1, checkpointing, pp=2), Job(8192, 4096, accumulation=4)
    run = dry_run(
        LlamaConfig(**SIZES, num_hidden_layers=3), f"sp={sp}", 4, tokens=[4096] * 2, checkpointing=checkpointing,
        accumulation=4,
    )  # fmt: skip
    first, last = stages_of(Shape.of(LlamaConfig(**SIZES, num_hidden_layers=6)), layout, job)
    messages = 4 * 8192 // sp * 2048 * 2
    assert last.total - messages == pytest.approx(run.peak.total, rel=0.05)
    if not checkpointing:  # else the peak of the model is at its loss, which the first stage has not
        assert first.total - messages == pytest.approx(run.peak.total + run.kept["activations"], rel=0.05)


def test_stages_are_searched_where_the_model_can_be_cut() -> None:
    shape = Shape.of(LlamaConfig(**SIZES, num_hidden_layers=6))
    plans = plan_layouts(LlamaConfig(**SIZES, num_hidden_layers=6), 16, H100, context=8192, accumulation=16)
    sizes = {entry.layout.pp for entry in plans.entries}
    assert shape.cuts and sizes == {1, 2, 4}  # 6 layers are not enough for 8 stages
    assert all(entry.layout.plan.resolve(16).world_size == 16 for entry in plans.entries)
    assert {entry.layout.pp for entry in plan_layouts(
        LlamaConfig(**SIZES, num_hidden_layers=6), 16, H100, context=8192, without=["pp"]
    ).entries} == {1}  # fmt: skip
    text = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    vision = {"depth": 2, "hidden_size": 128, "num_heads": 4, "out_hidden_size": 256, "deepstack_visual_indexes": [0]}
    sees = Qwen3VLConfig(text_config={**text, "num_key_value_heads": 2, "head_dim": 64}, vision_config=vision)
    assert not Shape.of(sees).cuts
