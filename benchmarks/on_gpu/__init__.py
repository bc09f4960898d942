"""All that is to be known on a GPU, measured by one command within minutes: see `benchmarks/on_gpu.sh`.

    limits      versions, and what the device does at best: a matmul, a copy
    rates       what it does at the shapes of real layers
    liger       Liger's kernels on the model, where they are installed: parity, and a step with them and without
    kernels     the tests with the marker `gpu`
    parity      loss, logits and gradients against stock transformers in fp64, in fp32 and bf16, by family
    ranks       the same on two ranks that share the device: sp=2, sp=2 with ep=2
    trainer     OmniTrainer against a loop around the stock model, and the job of `make demo`
    syncs       how often a step waits for the device, and where
    dense       a slice of Llama-3-8B at 8K to 64K packed tokens: time, MFU, memory, next to stock
    experts     a slice of Qwen3-30B-A3B with the experts that one of 8 ranks has
    loss        the loss in chunks against the full logits: time, memory, sizes of a chunk

One part a file; `runner` starts each in a process of its own and `part` is what it gets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One part.

    Attributes:
        module: has `run(part)`.
        seconds: its share of the budget, in seconds of the default one.
        alone: nothing runs beside it, since it measures time.
    """

    module: str
    seconds: float
    alone: bool = False


# In the order in which they start. Those that measure no time run side by side.
PARTS = {
    "limits": Spec("benchmarks.on_gpu.limits", 45, alone=True),
    "rates": Spec("benchmarks.on_gpu.rates", 60, alone=True),
    "liger": Spec("benchmarks.on_gpu.liger", 100, alone=True),
    "kernels": Spec("benchmarks.on_gpu.kernels", 180),
    "parity": Spec("benchmarks.on_gpu.parity", 180),
    "ranks": Spec("benchmarks.on_gpu.ranks", 180),
    "trainer": Spec("benchmarks.on_gpu.trainer", 150),
    "syncs": Spec("benchmarks.on_gpu.syncs", 100),
    "dense": Spec("benchmarks.on_gpu.dense", 140, alone=True),
    "experts": Spec("benchmarks.on_gpu.experts", 80, alone=True),
    "loss": Spec("benchmarks.on_gpu.loss", 50, alone=True),
}
BUDGET = 560.0
