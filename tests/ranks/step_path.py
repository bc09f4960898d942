"""Which files of the package one optimizer step goes through: what docs/architecture.md describes.

A mixture of experts under sp=2, ep=2 with packed sequences, activation checkpointing and router loss, in OmniTrainer.
What is traced begins when the first optimizer step has ended and ends with the second: the log of the first, the
collator of a row, forward, backward, clipping, the optimizer. So what is made once (layouts, the first check of rows)
is left out.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainerCallback

import hf_veomni

PACKAGE = f"{Path(hf_veomni.__file__).parent}/"


@dataclass(frozen=True)
class Trace:
    """Calls into files of the package. Plain data, which ranks can send.

    Attributes:
        functions: file, relative to the package -> its functions (qualified names); both in the order of first calls.
        switches: how often a call went into another file than the call before it in the same thread.
        entries: file -> calls that came from outside of the package.
    """

    functions: dict[str, tuple[str, ...]]
    switches: int
    entries: dict[str, int]

    @property
    def files(self) -> list[str]:
        return list(self.functions)


class Recorder:
    """A profile function for the thread that starts it and for those that begin while it runs.

    Threads that ran before are not seen (a backward on an accelerator has such threads; on the CPU it runs in the
    thread that calls it), nor is code inside of a compiled graph.
    """

    def __init__(self) -> None:
        self._functions: dict[str, dict[str, None]] = {}
        self._entries: dict[str, int] = {}
        self._switches = 0
        self._last: dict[int, str] = {}  # thread -> the file of its last call
        self._outer: Any = None  # somebody else's profile function (a debugger, coverage)

    def start(self) -> None:
        self._outer = sys.getprofile()
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Idempotent; leaves a profile function that somebody has set since."""
        if sys.getprofile() == self._note:
            threading.setprofile(None)
            sys.setprofile(self._outer)

    def result(self) -> Trace:
        return Trace({file: tuple(names) for file, names in self._functions.items()}, self._switches, self._entries)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE):
            return
        file = file.removeprefix(PACKAGE)
        self._functions.setdefault(file, {}).setdefault(frame.f_code.co_qualname)
        thread = threading.get_ident()
        self._switches += file != self._last.get(thread)
        self._last[thread] = file
        caller = frame.f_back
        if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
            self._entries[file] = self._entries.get(file, 0) + 1


class _RecordSecondStep(TrainerCallback):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._recorder.start()
        else:
            self._recorder.stop()


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
    recorder = Recorder()
    trainer = OmniTrainer(
        AutoModelForCausalLM.from_config(config),
        arguments,
        train_dataset=pack_dataset(samples, max_tokens=32),
        data_collator=OmniDataCollatorWithPacking(max_tokens=32),
        callbacks=[_RecordSecondStep(recorder)],
    )
    try:
        trainer.train()
    finally:
        recorder.stop()
    return recorder.result()
