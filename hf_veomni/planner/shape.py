"""What a plan needs to know of a model: its parameters and the kind of its layers, read from it on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_experts
from hf_veomni.fsdp.wrap import plan_units
from hf_veomni.hf.build import builder
from hf_veomni.sequence.inspect import ShardPoints, find_shard_points

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class Weight(NamedTuple):
    """One parameter: length of its first dimension, elements of all others together."""

    rows: int
    width: int
    linear: bool = False  # in a layer: every token is multiplied with it, and it may have an adapter

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Weight:
        rows = parameter.shape[0]
        return cls(rows, parameter.numel() // rows, parameter.dim() == 2)

    @property
    def size(self) -> int:
        return self.rows * self.width

    def local(self, ranks: int) -> int:
        """Elements on the fullest of `ranks` ranks, with FSDP2's padding."""
        return ceil(self.rows / ranks) * self.width


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of equal layers, and of what is around it.

    Attributes:
        name: class of the model.
        width: hidden size; inner: intermediate size of the dense MLP, or of each expert.
        layer: parameters of one layer but for its experts.
        head: parameters of the unit that stays gathered from the end of the forward on: last norm and head.
        root: all others: embeddings, and encoders, whose activations are not counted.
        normed: whether queries and keys are normed.
        experts, top_k: 0 for a dense model. wide: the router's weights are fp32, and so what they weigh.
        windows: of each layer, tokens that its attention looks back; 0 for all.
        encoders: parameters of encoders of images, videos and audio.
    """

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    inner: int
    vocabulary: int
    layer: tuple[Weight, ...]
    head: tuple[Weight, ...]
    root: tuple[Weight, ...]
    normed: bool = False
    experts: int = 0
    top_k: int = 0
    wide: bool = False
    context: int = 0
    windows: tuple[int, ...] = ()
    encoders: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of the model of a transformers config.

        Raises:
            UnsupportedError: a model that cannot be cut, or layers that the formulas do not describe.
        """
        with torch.device("meta"):
            model: Any = builder(config, torch.bfloat16)()
        points = find_shard_points(model)
        text = hf.text_config(model)
        layer, sizes = _read_layer(model, points)
        head, root = _read_outer(model, points.layers)
        heads = int(text.num_attention_heads)
        return cls(
            name=type(model).__name__,
            layers=len(points.layers),
            width=int(text.hidden_size),
            heads=heads,
            key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            vocabulary=int(text.vocab_size),
            layer=layer,
            head=head,
            root=root,
            context=int(getattr(text, "max_position_embeddings", 0) or 0),
            windows=_windows(text, len(points.layers)),
            encoders=sum(p.numel() for tower in hf.towers(model) for p in tower.parameters()),
            **sizes,
        )

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all key heads together, or of all value heads."""
        return self.key_value_heads * self.head_width

    @property
    def matmuls(self) -> int:
        """Elements of the weights of one layer that every token is multiplied with, without experts."""
        return sum(w.size for w in self.layer if w.linear)

    @property
    def expert(self) -> int:
        """Elements of one expert."""
        return 3 * self.width * self.inner if self.experts else 0

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def total(self) -> int:
        """All parameters."""
        layer = sum(w.size for w in self.layer) + self.experts * self.expert
        return self.layers * layer + sum(w.size for w in (*self.head, *self.root))

    @property
    def active(self) -> int:
        """Parameters that a token's matmuls read, without the head."""
        return self.layers * (self.matmuls + self.top_k * self.expert)


def _refuse(model: nn.Module, what: str) -> NoReturn:
    raise UnsupportedError(
        f"`hf-veomni plan` has formulas for layers of q/k/v/o projections, two RMS norms, and a gated MLP or stacked "
        f"experts, all alike; {type(model).__name__} has {what}. Name a plan, and `hf-veomni dry-run` says what it "
        "takes."
    )


def _read_layer(model: nn.Module, points: ShardPoints) -> tuple[tuple[Weight, ...], dict[str, Any]]:
    """Parameters of a layer without its experts, and sizes of its parts, where all layers are alike."""
    layers = list(points.layers)
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers]
    if any(other != shapes[0] for other in shapes):
        _refuse(model, "layers of different shapes")
    if points.mixers or len(points.attentions) != len(layers):
        _refuse(model, "token mixers that are no attention")
    attention: Any = points.attentions[0]
    linear = {module for module in layers[0].modules() if isinstance(module, nn.Linear)}
    parts = {name: module for name, module in attention.named_children() if module in linear}
    if parts.keys() != set(_ATTENTION):
        _refuse(model, f"an attention of {', '.join(parts) or 'no linear layers'}")
    inside = set(layers[0].modules())
    experts: list[Any] = [found.experts for found in find_experts(model) if found.experts in inside]
    rest = {name.rpartition(".")[2]: m for name, m in layers[0].named_modules() if m in linear - set(parts.values())}
    norms = [m for m in layers[0].modules() if type(m).__name__.endswith("RMSNorm")]
    width = int(parts["q_proj"].in_features)
    full = [norm for norm in norms if [p.numel() for p in norm.parameters()] == [width]]
    head_norms = [norm for norm in norms if norm not in full]
    if len(full) != 2 or len(head_norms) not in (0, 2) or any(norm not in attention.modules() for norm in head_norms):
        _refuse(model, f"{len(norms)} RMS norms in a layer, or others")
    if experts and (len(experts) > 1 or rest or not experts[0].has_gate or experts[0].has_bias):
        _refuse(model, "experts with biases, without gates, or beside other layers")
    if not experts and (rest.keys() != set(_MLP) or len(linear) != len(parts) + len(rest)):
        _refuse(model, f"an MLP of {', '.join(rest) or 'no linear layers'}")
    stacked = {p for module in experts for p in module.parameters()}
    own = tuple(Weight.of(p) for p in layers[0].parameters() if p not in stacked)
    sizes: dict[str, Any] = {
        "head_width": parts["q_proj"].out_features // int(hf.text_config(model).num_attention_heads),
        "normed": bool(head_norms),
        "inner": experts[0].down_proj.numel() // (width * experts[0].num_experts)
        if experts
        else rest["gate_proj"].out_features,
    }
    if experts:
        sizes |= {"experts": int(experts[0].num_experts), **_read_router(model, layers[0], width)}
    return own, sizes


def _read_router(model: nn.Module, layer: nn.Module, width: int) -> dict[str, Any]:
    """How many experts a token goes to, and whether it is weighed in fp32: by a call on the meta device."""
    for router in layer.modules():
        top_k = getattr(router, "top_k", None)
        if isinstance(top_k, int) and any(True for _ in router.parameters(recurse=False)):
            try:
                made: Any = router(torch.empty(2, width, dtype=torch.bfloat16, device="meta"))
            except TypeError:  # which asks for more than hidden states
                _refuse(model, f"a router ({type(router).__name__}) with arguments of its own")
            chosen = [x for x in made if isinstance(x, Tensor) and x.shape[-1] == top_k and x.is_floating_point()]
            return {"top_k": top_k, "wide": any(x.dtype == torch.float32 for x in chosen)}
    _refuse(model, "a router that does not say how many experts a token goes to")


def _read_outer(model: Any, layers: Iterable[nn.Module]) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Parameters of the unit that keeps its weights, and of the root, as FSDP2 groups them."""
    inside = {p for layer in layers for p in layer.parameters()}
    groups = [modules for modules, keep in plan_units(model, {}) if keep]
    kept = {p for modules in groups for module in modules for p in module.parameters()} - inside
    others = (p for p in model.parameters() if p not in inside and p not in kept)
    return tuple(map(Weight.of, kept)), tuple(map(Weight.of, others))


def _windows(text: Any, layers: int) -> tuple[int, ...]:
    window, types = getattr(text, "sliding_window", None) or 0, getattr(text, "layer_types", None)
    if types is None:
        slides = window and getattr(text, "use_sliding_window", True)
        return (window if slides else 0,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def iterate_adapters(shape: Shape, rank: int | None) -> Iterator[Weight]:
    """LoRA weights of one layer without its experts: [r, in] and [out, r] beside each linear layer, and the router."""
    for weight in shape.layer if rank else ():
        if weight.linear:
            yield Weight(rank or 0, weight.width)
            yield Weight(weight.rows, rank or 0)


def expert_adapter(shape: Shape, rank: int | None) -> int:
    """Elements of the LoRA weights of one expert; PEFT has twice the rank on gate and up, which are one parameter."""
    if not shape.experts or not rank:
        return 0
    return 2 * rank * (shape.width + 2 * shape.inner) + rank * (shape.inner + shape.width)
