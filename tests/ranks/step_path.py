"""Which files of the package one optimizer step goes through: what docs/architecture.md describes.

A mixture of experts under sp=2, ep=2 with packed rows, activation checkpointing and router loss, in OmniTrainer. What
is traced begins when the first optimizer step has ended and ends with the second: the collator of a row, forward,
backward, clipping, the optimizer.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainerCallback

PACKAGE = str(Path(__file__).parents[2] / "hf_veomni") + "/"


@dataclass
class Trace:
    """Calls into files of the package, in order.

    Attributes:
        files: in the order of their first call, relative to the package.
        switches: how often a call went into another file than the one before.
        entries: calls that came from outside of the package.
        functions: file -> its functions, in the order of their first call.
    """

    files: list[str] = field(default_factory=list)
    switches: int = 0
    entries: Counter[str] = field(default_factory=Counter)
    functions: dict[str, list[str]] = field(default_factory=dict)
    _last: str = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        name = frame.f_code.co_filename.removeprefix(PACKAGE)
        if name not in self.functions:
            self.files.append(name)
            self.functions[name] = []
        function = frame.f_code.co_qualname
        if function not in self.functions[name]:
            self.functions[name].append(function)
        self.switches += name != self._last
        self._last = name
        caller = frame.f_back
        if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
            self.entries[name] += 1

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)


class _Tracer(TrainerCallback):
    def __init__(self) -> None:
        self.trace = Trace()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.setprofile(self.trace if state.global_step == 1 else None)


def trace_step(folder: str) -> Trace:
    """The second optimizer step on this rank. Collective, on two ranks."""
    from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset

    config = Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        output_router_logits=True, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    samples = Dataset.from_dict({"input_ids": [list(range(3, 3 + n)) for n in (20, 9, 3, 30, 12, 20, 31, 17)]})
    arguments = OmniTrainingArguments(
        folder, plan="sp=2,ep=2", max_steps=2, per_device_train_batch_size=1, gradient_checkpointing=True,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
        dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    tracer = _Tracer()
    trainer = OmniTrainer(
        AutoModelForCausalLM.from_config(config),
        arguments,
        train_dataset=pack_dataset(samples, max_tokens=32),
        data_collator=OmniDataCollatorWithPacking(max_tokens=32),
        callbacks=[tracer],
    )
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    return tracer.trace
