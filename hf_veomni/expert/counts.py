"""How many tokens each expert got, and how sure its router was: counted while the model trains.

Shapes: L layers with experts, E experts of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert.dispatch import count_pairs
from hf_veomni.expert.forward import counts_tokens, is_training_forward, start_rows, stop_rows
from hf_veomni.expert.layout import ExpertsModule, find_experts

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class ExpertLoad:
    """What the experts did since the last look, over all ranks and micro-batches. Padding counts: it is computed too;
    batches that only keep a rank in step do not.

    Attributes:
        tokens: [L, E] (token, expert) pairs, on the CPU.
        entropy: mean entropy of the routers' softmax over that of an even one, 0 to 1; None where a family does not
            show its router's logits.
        dropped: pairs that a router chose and no expert computed; None where experts are not sharded over ranks.
        ep_size: ranks that share each layer's experts.
    """

    tokens: Tensor
    entropy: float | None
    dropped: int | None
    ep_size: int

    def metrics(self) -> dict[str, float]:
        """Plain figures for a log; a load of 1 is even. Empty where nothing was counted."""
        if not self.tokens.sum():
            return {}
        by_rank = self.tokens.unflatten(1, (self.ep_size, -1)).sum(2)
        found = {
            "expert_load_max": float(_over_mean(self.tokens).max()),
            "expert_load_max_mean": float(_over_mean(self.tokens).amax(1).mean()),
            "expert_rank_load_max": float(_over_mean(by_rank).max()),
            "experts_without_tokens": float((self.tokens == 0).sum()),
        }
        if self.entropy is not None:
            found["router_entropy"] = self.entropy
        if self.dropped is not None:
            found["dropped_tokens"] = float(self.dropped)
        return found


def _over_mean(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return tokens / tokens.mean(1, keepdim=True).clamp(min=1)


class ExpertCounter:
    """Counts on the device while a model trains; `take` adds up over the ranks and starts again."""

    def __init__(self, model: nn.Module, ep_size: int, stages: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            model: the transformers model inside a prepared one.
            ep_size: of its plan.
            stages: of a pipeline, each of which has some of the layers: the ranks with this one's place in each.

        Collective: with `stages` an all-gather over them of how many experts each of their layers has.

        Raises:
            UnsupportedError: the model has no experts that transformers stacks, or layers of different numbers.
        """
        self.modules: list[ExpertsModule] = [m for m in find_experts(model) if hf.is_experts_module(m.experts)]
        self.ep_size = ep_size
        found: list[list[int]] = [[module.num_experts * ep_size for module in self.modules]]
        place = 0
        if stages is not None:
            place, mine = dist.get_rank(stages), found[0]
            found = [[]] * dist.get_world_size(stages)
            dist.all_gather_object(found, mine, group=stages)
        self.first, self.num_layers = sum(map(len, found[:place])), sum(map(len, found))
        sizes = sorted({size for stage in found for size in stage})
        if len(sizes) != 1:
            raise UnsupportedError(
                f"{type(model).__name__} has no experts to count."
                if not sizes
                else f"{type(model).__name__} has layers of {sizes} experts: counts of one table need equal ones."
            )
        self.num_experts = sizes[0]
        self._model = model
        self._tokens: Tensor | None = None
        self._uncounted = 0  # pairs of batches that count nowhere
        self._entropy: tuple[Tensor, int] | None = None  # sum over routers and micro-batches, and how many they are
        for module in self.modules:
            start_rows(module.experts)
        self._handles = [
            module.outer.register_forward_pre_hook(_CountTokens(self, layer), with_kwargs=True)
            for layer, module in enumerate(self.modules, self.first)
        ]
        routers = list(hf.find_routers(model))
        self._num_routers = len(routers)
        self._handles += [router.register_forward_hook(_NoteEntropy(self, index)) for router, index in routers]

    def detach(self) -> None:
        """Remove its hooks."""
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            stop_rows(module.experts)

    @property
    def counts(self) -> bool:
        """Whether the running forward is one that trains."""
        return is_training_forward(self._model)

    def add(self, layer: int, top_k_index: Tensor) -> None:
        """Count the pairs of (token, expert) of a layer; `top_k_index` [tokens, K], local."""
        if not counts_tokens():
            self._uncounted += top_k_index.numel()
            return
        if self._tokens is None:
            shape = (self.num_layers, self.num_experts)
            self._tokens = torch.zeros(shape, dtype=torch.long, device=top_k_index.device)
        self._tokens[layer] += count_pairs(top_k_index.reshape(-1), self.num_experts)

    def note_entropy(self, logits: Tensor) -> None:
        """Add the mean entropy of a router's choice, 1 for all experts alike; `logits` [tokens, E]."""
        if not counts_tokens():
            return
        scores = logits.detach().float().log_softmax(-1)
        mean = -(scores.exp() * scores).sum(-1).mean() / log(logits.shape[-1])
        total, number = self._entropy or (torch.zeros_like(mean), 0)
        self._entropy = total + mean, number + 1

    def take(self) -> ExpertLoad:
        """The load of all ranks since the last call.

        Collective: one all-reduce of L * E + 3 numbers over all ranks.
        """
        # The model's, also where nothing was counted: NCCL reduces nothing that is on the CPU.
        device = next(self._model.parameters()).device
        shape = (self.num_layers, self.num_experts)
        tokens = torch.zeros(shape, dtype=torch.long, device=device) if self._tokens is None else self._tokens
        total, number = self._entropy or (torch.zeros((), device=device), 1)
        entropy = total.double() / number * self._num_routers  # of which a pipeline's stages may have unlike numbers
        sharded = self.ep_size > 1
        computed = sum(start_rows(module.experts) for module in self.modules) - self._uncounted
        extra = torch.tensor([float(self._num_routers * (self._entropy is not None)), float(computed)]).double()
        both = torch.cat([tokens.flatten().double(), entropy[None], extra.to(device)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(both)
        both = both.cpu()
        self._tokens = self._entropy = None
        self._uncounted = 0
        counts = both[:-3].round().long().view(shape)
        return ExpertLoad(
            tokens=counts,
            entropy=float(both[-3] / both[-2]) if both[-2] else None,
            dropped=int(counts.sum() - both[-1].round().long()) if sharded else None,
            ep_size=self.ep_size,
        )


class _CountTokens:
    def __init__(self, counter: ExpertCounter, layer: int) -> None:
        self.counter, self.layer = counter, layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.counter.counts:
            self.counter.add(self.layer, args[1] if len(args) > 1 else kwargs["top_k_index"])


class _NoteEntropy:
    def __init__(self, counter: ExpertCounter, index: int) -> None:
        self.counter, self.index = counter, index

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.counter.counts:
            self.counter.note_entropy(output[self.index] if isinstance(output, tuple) else output)


def find_biases(model: nn.Module, modules: Sequence[ExpertsModule], first: int = 0) -> list[tuple[nn.Module, int]]:
    """Modules with a router bias that balances the load (DeepSeek-V3), and the place in `modules` of their layer.

    `first`: the place of the first of them among the layers of all stages.
    """
    found = []
    for name, module in model.named_modules():
        if BIAS in module._buffers or BIAS in module._parameters:  # its own: wrappers of PEFT show that of another
            owners = [n for n, experts in enumerate(modules, first) if f"{name}.".startswith(_block(experts.name))]
            if owners:
                found.append((module, owners[-1]))
    return found


def _block(experts: str) -> str:
    """The block that experts and their router are in: "layers.3.mlp." of "layers.3.mlp.experts"."""
    return experts.partition("experts")[0]


@torch.no_grad()
def update_biases(biases: Sequence[tuple[nn.Module, int]], tokens: Tensor, speed: float) -> None:
    """Raise the bias of experts that got fewer tokens than the mean by `speed`, and lower the others'.

    Args:
        tokens: [L, E] of all ranks, the same on each.

    A bias buffer in bf16 or fp16 becomes fp32: steps would be rounded away.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; auxiliary-loss-free balancing (arXiv 2408.15664).
    """
    for module, layer in biases:
        bias: Tensor = getattr(module, BIAS)
        load = tokens[layer].double()
        if bias.dtype in (torch.bfloat16, torch.float16) and BIAS in module._buffers:
            bias = bias.float()
            setattr(module, BIAS, bias)
        step = (speed * torch.sign(load.mean() - load)).to(bias.device, bias.dtype).view(bias.shape)
        if isinstance(bias, DTensor):
            step = distribute_tensor(step, bias.device_mesh, bias.placements)
        bias.add_(step)
