"""Reads the shape of a model on the meta device, and refuses by name what the formulas do not describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.attention.varlen import KERNEL_MAX_WIDTH
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_experts
from hf_veomni.fsdp.wrap import plan_units
from hf_veomni.hf.build import builder
from hf_veomni.pipeline.chain import find_chain
from hf_veomni.planner.shape import Attention, Layer, Shape, Weight
from hf_veomni.sequence.inspect import find_shard_points

# Names of the linear layers of what the formulas describe.
_SEPARATE, _FUSED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}
_LATENT = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
_LATENT_QUERIES = ({"q_proj"}, {"q_a_proj", "q_b_proj"})
_GATED, _FUSED_GATED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}


def read_shape(config: Any) -> Shape:
    """See `Shape.of`."""
    if given := getattr(config, "quantization_config", None):
        method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        raise UnsupportedError(
            f"The config has a `quantization_config` ({method or type(given).__name__}), and the formulas are for "
            "weights in bf16 or fp32: delete it from the config to plan for these."
        )
    with torch.device("meta"):
        model: Any = builder(config, torch.bfloat16)()
    points = find_shard_points(model)
    if not points.layers:
        raise ValueError(f"The config of {type(model).__name__} has no layers: set `num_hidden_layers` above 0.")
    if points.mixers or len(points.attentions) != len(points.layers):
        _refuse(model, "token mixers that are no attention")
    text = hf.text_config(model)
    experts = {found.experts for found in find_experts(model)}
    found: dict[tuple, tuple[Layer, Attention]] = {}
    order = []
    for layer, attention in zip(points.layers, points.attentions, strict=True):
        sizes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        if sizes not in found:
            found[sizes] = _Reader(model, text, layer, attention, experts).read()
        order.append(list(found).index(sizes))
    kinds, attentions = zip(*found.values(), strict=True)
    if any(other != attentions[0] for other in attentions):
        _refuse(model, "layers with attention of different sizes")
    head, root, tied = _read_outer(model, points.layers)
    return Shape(
        name=type(model).__name__,
        width=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        attention=attentions[0],
        kinds=kinds,
        order=tuple(order),
        head=head,
        root=root,
        context=_context(text),
        windows=_windows(text, len(points.layers)),
        encoders=sum(p.numel() for tower in hf.towers(model) for p in tower.parameters()),
        cuts=not hf.towers(model) and _can_be_cut(model),
        tied=tied,
    )


def _can_be_cut(model: nn.Module) -> bool:
    try:
        find_chain(model)
    except UnsupportedError:
        return False
    return True


def _refuse(model: nn.Module, what: str) -> NoReturn:
    raise UnsupportedError(
        "`hf-veomni plan` has formulas for layers of attention with q/k/v/o projections (qkv in one, or latent as "
        "DeepSeek's), two RMS norms, and a gated MLP, or stacked experts with or without such an MLP beside them; "
        f"{type(model).__name__} has {what}. Name a plan, and `hf-veomni dry-run` says what it takes."
    )


class _Reader:
    """Reads one layer."""

    def __init__(self, model: nn.Module, text: Any, layer: nn.Module, attention: nn.Module, experts: set) -> None:
        self.model, self.text, self.layer, self.attention = model, text, layer, attention
        self.width = int(text.hidden_size)
        inside = list(layer.modules())
        self.experts: list[Any] = [m for m in inside if m in experts]
        self.linear = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        self.norms = [m for m in inside if type(m).__name__.endswith("RMSNorm")]

    def read(self) -> tuple[Layer, Attention]:
        of_attention = {name: m for name, m in self.attention.named_modules() if isinstance(m, nn.Linear)}
        rest = {name: m for name, m in self.linear.items() if m not in of_attention.values()}
        found = self._read_attention(of_attention)
        outer = [norm for norm in self.norms if norm not in set(self.attention.modules())]
        if len(outer) != 2 or any([p.numel() for p in norm.parameters()] != [self.width] for norm in outer):
            _refuse(self.model, f"{len(outer)} RMS norms in a layer beside its attention, or others")
        stacked = {p for module in self.experts for p in module.parameters()}
        self._check_parameters(stacked)
        weights = tuple(Weight.of(p) for p in self.layer.parameters() if p not in stacked)
        mlp, fused = self._read_mlp(rest)
        if not self.experts:
            if not mlp:
                _refuse(self.model, "layers without an MLP")
            return Layer(weights, self.width, mlp, fused), found
        if len(self.experts) > 1 or not self.experts[0].has_gate or self.experts[0].has_bias or fused:
            _refuse(self.model, "experts with biases, without gates, or beside other layers")
        experts = self.experts[0]
        number = int(experts.num_experts)
        inner = experts.down_proj.numel() // (self.width * number)
        return Layer(weights, self.width, inner, False, number, shared=mlp, **self._read_router()), found

    def _check_parameters(self, stacked: set) -> None:
        """Refuse parameters that belong to nothing of what the formulas know."""
        known = {*self.linear.values(), *self.norms}
        for name, module in self.layer.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p not in stacked]
            router = self.experts and isinstance(getattr(module, "top_k", None), int) and own == ["weight"]
            if own and module not in known and not router:
                _refuse(self.model, f"`{'.'.join(filter(None, (name, own[0])))}` ({type(module).__name__}) in a layer")

    def _read_attention(self, linear: Mapping[str, Any]) -> Attention:
        text, names = self.text, set(linear)
        inner = [name for name, m in self.attention.named_modules() if m in self.norms]
        heads = int(text.num_attention_heads)
        rope: Any = getattr(text, "rope_parameters", None) or {}
        share = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else 1.0
        if names in [_LATENT | queries for queries in _LATENT_QUERIES]:
            return self._read_latent(linear, inner, heads)
        groups = int(getattr(text, "num_key_value_heads", None) or heads)
        if names not in (_SEPARATE, _FUSED) or len(inner) not in (0, 2):
            _refuse(self.model, f"an attention of {', '.join([*linear, *inner]) or 'no linear layers'}")
        width = linear["o_proj"].in_features // heads
        if width > KERNEL_MAX_WIDTH:
            _refuse(self.model, f"heads of {width} columns, above the {KERNEL_MAX_WIDTH} of the varlen kernel")
        fused = names == _FUSED
        wanted = {"qkv_proj": (heads + 2 * groups) * width, "q_proj": heads * width}
        wanted |= {"k_proj": groups * width, "v_proj": groups * width}
        for name, module in linear.items():
            if name != "o_proj" and module.out_features != wanted[name]:
                _refuse(self.model, f"`{name}` with {module.out_features} columns, not {wanted[name]}")
        rotated = int(width * share)
        return Attention(heads, groups, width, width, rotated, fused or share < 1, bool(inner), fused)

    def _read_latent(self, linear: Mapping[str, Any], inner: list[str], heads: int) -> Attention:
        text = self.text
        low = linear["q_a_proj"].out_features if "q_a_proj" in linear else 0
        if len(inner) != 1 + bool(low):
            _refuse(self.model, f"latent attention with the norms {', '.join(inner) or 'of no kind'}")
        width = int(text.qk_nope_head_dim + text.qk_rope_head_dim)
        if width > KERNEL_MAX_WIDTH:
            _refuse(self.model, f"heads of {width} columns, above the {KERNEL_MAX_WIDTH} of the varlen kernel")
        return Attention(
            heads,
            heads,
            width,
            int(text.v_head_dim),
            int(text.qk_rope_head_dim),
            joins=True,
            latent=int(text.kv_lora_rank),
            low=low,
            complex=text.model_type == "deepseek_v2",
        )

    def _read_mlp(self, linear: Mapping[str, Any]) -> tuple[int, bool]:
        """Intermediate size of the MLP (0: none), and whether gate and up are one projection."""
        names = {name.rpartition(".")[2] for name in linear}
        parents = {name.rpartition(".")[0] for name in linear}
        if not linear:
            return 0, False
        if len(parents) > 1 or len(linear) != len(names) or names not in (_GATED, _FUSED_GATED):
            _refuse(self.model, f"an MLP of {', '.join(linear)}")
        down = next(m for name, m in linear.items() if name.endswith("down_proj"))
        return int(down.in_features), names == _FUSED_GATED

    def _read_router(self) -> dict[str, Any]:
        """How many experts a token goes to, and what is computed in fp32: by a call on the meta device."""
        for router in self.layer.modules():
            top_k = getattr(router, "top_k", None)
            if not isinstance(top_k, int) or not any(True for _ in router.parameters(recurse=False)):
                continue
            kept: list[Tensor] = []

            def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(x)
                return x

            try:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    made: Any = router(torch.empty(2, self.width, dtype=torch.bfloat16, device="meta"))
            except TypeError:  # which asks for more than hidden states
                _refuse(self.model, f"a router ({type(router).__name__}) with arguments of its own")
            chosen = [x for x in made if isinstance(x, Tensor) and x.shape[-1] == top_k and x.is_floating_point()]
            casts = any(x.dtype == torch.float32 and x.shape == (2, self.width) for x in kept)
            return {"top_k": top_k, "wide": any(x.dtype == torch.float32 for x in chosen), "casts": casts}
        _refuse(self.model, "a router that does not say how many experts a token goes to")


def _read_outer(model: Any, layers: Iterable[nn.Module]) -> tuple[tuple[Weight, ...], tuple[Weight, ...], bool]:
    """Parameters of the unit that keeps its weights, and of the root, as FSDP2 groups them, and whether the embeddings
    are in the former. A root whose embeddings are the head's is like it: it is gathered from the loss to the end."""
    inside = {p for layer in layers for p in layer.parameters()}
    groups = [modules for modules, keep in plan_units(model, {}) if keep]
    kept = dict.fromkeys(p for modules in groups for module in modules for p in module.parameters() if p not in inside)
    embedding, head = (
        getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    tied = embedding is not None and embedding is head
    others = [p for p in model.parameters() if p not in inside and p not in kept]
    if tied and embedding not in kept:
        kept, others = {**kept, **dict.fromkeys(others)}, []
    return tuple(map(Weight.of, kept)), tuple(map(Weight.of, others)), tied


def _context(text: Any) -> int:
    """Tokens that it was made for, and that a scaled rotary embedding (YaRN) makes of these; 0 where it has no limit.

    Configs state either in `max_position_embeddings`: Qwen's have the length before scaling.
    """
    stated = int(getattr(text, "max_position_embeddings", 0) or 0)
    rope: Any = getattr(text, "rope_parameters", None) or {}
    each = [rope, *rope.values()] if isinstance(rope, dict) else []
    scaled = [
        int(one["factor"] * (one.get("original_max_position_embeddings") or stated))
        for one in each
        if isinstance(one, dict) and isinstance(one.get("factor"), (int, float))
    ]
    return max([stated, *scaled]) if stated else 0


def _windows(text: Any, layers: int) -> tuple[int, ...]:
    window, types = getattr(text, "sliding_window", None) or 0, getattr(text, "layer_types", None)
    if types is None:
        slides = window and getattr(text, "use_sliding_window", True)
        return (window if slides else 0,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
