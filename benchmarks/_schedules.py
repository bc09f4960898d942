"""A model behind the simulated link (`_link.py`), trained with one schedule of its exchanges; and models in ratio.

This process is rank 0, or the busiest, of as many equal ranks as its plan has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks._link import Link
from benchmarks._memory import MemoryLog
from hf_veomni import ParallelPlan, prepare_omni, run_pair
from hf_veomni.comm import all_to_all
from hf_veomni.expert import dispatch
from hf_veomni.expert.dispatch import rows_per_token
from hf_veomni.flops import PEAKS, StepFlops

RANKS = 8
VOCABULARY = 512
SCHEDULES = ("plain", "chunks", "pairs", "transformers")
UNBUNDLED, KEPT = ", a row a pair", ", attention kept"  # behind a schedule

_COMMON = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "max_position_embeddings": 65536}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


def mixture(hidden: int, width: int, heads: int, kv_heads: int, head_dim: int = 128, **options: Any) -> Any:
    """Config of a mixture of 128 experts of `width`, of which a token goes to 8."""
    given = {"hidden_size": hidden, "moe_intermediate_size": width, "intermediate_size": 3 * hidden}
    given |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return AutoConfig.for_model("qwen3_moe", **given | _EXPERTS | _COMMON | options)


def dense(hidden: int, width: int, heads: int, kv_heads: int, **options: Any) -> Any:
    """Config of a dense model."""
    given = {"hidden_size": hidden, "intermediate_size": width}
    given |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**given | _COMMON | options)


@dataclass(frozen=True)
class Shapes:
    """A model in ratio, and the one whose ratio it is.

    Attributes:
        config, real: take what is to differ.
        tokens: of a rank, at both sizes; a sequence has `RANKS` times as many under SP.
        axis: "ep" or "sp".
    """

    model: str
    config: Callable[..., Any]
    real: Callable[..., Any]
    axis: str
    tokens: int
    real_tokens: int


SHAPES = {
    "experts": Shapes(
        "Qwen3-30B-A3B",
        lambda **options: mixture(512, 192, 8, 1, **options),
        lambda **options: mixture(2048, 768, 32, 4, **options),
        "ep",
        512,
        8192,
    ),
    "dense": Shapes(
        "Llama-3-8B",
        lambda **options: dense(512, 1792, 32, 8, **options),
        lambda **options: dense(4096, 14336, 32, 8, **options),
        "sp",
        512,
        4096,
    ),
}

# (device, link, bytes a second and direction of one device, by the data sheet; a network card for each device)
DEVICES = [
    ("H100", "NVLink 4", 450e9),
    ("H100", "InfiniBand NDR 400", 50e9),
    ("H100", "Ethernet 200", 25e9),
    ("H100", "Ethernet 100", 12.5e9),
    ("H200", "NVLink 4", 450e9),
    ("B200", "NVLink 5", 900e9),
    ("B200", "InfiniBand XDR 800", 100e9),
    ("A100", "NVLink 3", 300e9),
    ("A100", "InfiniBand HDR 200", 25e9),
    ("L40S", "PCIe 4 x16", 32e9),
    ("RTX 4090", "PCIe 4 x16", 32e9),
]
REACHED = 0.5, 0.8  # of the peak flops by a layer without its exchanges, and of the link's rate by an all-to-all


def ratio_of(shapes: Shapes, device: str, bandwidth: float) -> float:
    """Seconds of the link over seconds of compute of one token in one layer, forward and backward, in bf16."""
    config = shapes.real()
    hidden, width = config.hidden_size, config.num_attention_heads * (config.head_dim or 0)
    both = width + config.num_key_value_heads * config.head_dim
    length = shapes.real_tokens * (RANKS if shapes.axis == "sp" else 1)
    if shapes.axis == "ep":
        mlp = config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size + hidden * config.num_experts
        moved = 2 * rows_per_token(config.num_experts_per_tok, config.num_experts, RANKS) * hidden
    else:
        mlp, moved = 3 * hidden * config.intermediate_size, 2 * both
    flops = 6 * (2 * hidden * both + mlp) + 3 * 4 * width * length / 2
    sent = 2 * 2 * moved * (RANKS - 1) / RANKS  # there and, for the gradient, back; two bytes each
    return (sent / (REACHED[1] * bandwidth)) / (flops / (REACHED[0] * PEAKS[device]))


class Bench:
    """One model behind one link, prepared for one schedule, and two sequences that a step trains."""

    def __init__(
        self, config: Any, plan: Mapping[str, int], schedule: str, checkpointing: bool, link: Link, tokens: int
    ) -> None:
        """
        Args:
            plan: sizes, for example {"ep_size": 8}.
            schedule: of `SCHEDULES`; with `UNBUNDLED` behind it each pair of a token and an expert travels alone,
                with `KEPT` checkpointing keeps what attention has computed and exchanged.
            tokens: of a rank and sequence.
        """
        self.label, self.link = schedule, link
        self.schedule = schedule = schedule.removesuffix(UNBUNDLED).removesuffix(KEPT)
        rules = {"*.self_attn": {"checkpointing": "keep"}} if self.label.endswith(KEPT) else {}
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(config).train()
        flops = StepFlops.from_model(stock)
        overlap = {"plain": "none", "transformers": "none"}.get(schedule, schedule)
        self.around = stock_experts if schedule == "transformers" else nullcontext
        if self.label.endswith(UNBUNDLED):
            self.around = one_row_a_pair
        with self.around():
            self.model: Any = prepare_omni(
                stock, ParallelPlan.from_dict({**plan, "overlap": overlap, "modules": rules})
            )
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        length, vocabulary = tokens * plan.get("sp_size", 1), config.vocab_size
        ids = torch.randint(0, vocabulary, (2, 1, length), generator=torch.Generator().manual_seed(1))
        self.batches = [{"input_ids": row, "labels": row} for row in ids]
        self.flops = sum(float(flops.of_batch(batch)[1]) for batch in self.batches) / plan.get("sp_size", 1)
        self.tokens = 2 * tokens

    def step(self, log: MemoryLog | None = None) -> None:
        """Forward and backward of both sequences."""
        self.model.zero_grad()
        self.link.reset()
        with self.around():
            if self.schedule == "pairs":
                self._finish(torch.stack(run_pair(self._loss, *self.batches)).sum(), log)
            else:
                for batch in self.batches:
                    self._finish(self._loss(batch), log)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    @staticmethod
    def _finish(loss: Tensor, log: MemoryLog | None) -> None:
        if log is not None:
            log.mark("loss")
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's; none with stock experts, which order rows in their own way: equal ranks hold others then."""
        if self.schedule == "transformers":
            return {}
        return {name: p.grad.to_local().clone() for name, p in self.model.named_parameters()}

    def memory(self) -> dict[str, int]:
        """Bytes of activations: what the last forward keeps, and the most that is ever live."""
        log = MemoryLog()
        log.label_gradients(self.model)
        with log:
            self.step(log)
        return {"held": log.at("loss", "activation"), "peak": log.peak("activation")[0]}


@contextmanager
def stock_experts() -> Iterator[None]:
    """transformers' own exchange of tokens in place of ours; its functional collectives go over the link, blocking."""
    from transformers.distributed import expert_parallel

    from hf_veomni.expert import attach

    class Stock(expert_parallel.AllToAllEP):
        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.tp_mesh: Any = _NoTensorParallel()  # which rank holds which tokens is ours to say

    found: list[tuple[Any, str, Any]] = [
        (attach, "ExpertsForward", Stock),
        (expert_parallel, "all_to_all_single_autograd", lambda x, receive, send, g: all_to_all(x, g, send, receive)),
        (expert_parallel, "_WaitTensor", _Landed),
    ]
    before = [getattr(owner, name) for owner, name, _ in found]
    for owner, name, ours in found:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), stock in zip(found, before, strict=True):
            setattr(owner, name, stock)


@contextmanager
def one_row_a_pair() -> Iterator[None]:
    """Whatever bundles would save."""
    stock, dispatch.saves_bytes = dispatch.saves_bytes, lambda *sizes: False
    try:
        yield
    finally:
        dispatch.saves_bytes = stock


class _NoTensorParallel:
    def size(self) -> int:
        return 1


class _Landed:
    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return x


def popularity(num_experts: int) -> Tensor:
    """How often each expert is chosen: log-normal, so that the busiest of 8 ranks has about 1.5 times the mean."""
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(3)).exp()


def busiest_rank(num_experts: int) -> int:
    return int(popularity(num_experts).view(RANKS, -1).sum(1).argmax())


@contextmanager
def skewed_routing(model: nn.Module) -> Iterator[None]:
    """The router's weights, but experts drawn by popularity, without repeats, the same at each call of a length."""
    handles = []

    def route(router: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = output[-1]
        generator = torch.Generator().manual_seed(len(index))
        popular = popularity(router.num_experts).log()
        noise = -torch.rand(len(index), len(popular), generator=generator).log().neg().log()
        return (*output[:-1], (popular + noise).topk(index.shape[-1]).indices)

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            handles.append(module.register_forward_hook(route))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
