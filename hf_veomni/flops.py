"""Model flops of a training step, from the model's own shapes, and what devices can do at best: together the MFU.

T tokens, each the i-th of its document; N weights of a matmul, which u of every token's uses meet (1; K / E for one of
E experts of which a token goes to K); Hq query heads with keys of width Dk and values of width Dv; P_i keys that a
token sees: i + 1 (causal), min(i + 1, window), or i mod chunk + 1.

    forward    2 u N T                      weight gradient   2 u N T if the weight is trained
               2 Hq (Dk + Dv) sum(P_i)      input gradient    as the forward, if something before it is trained

So attention counts the causal half within each document, LoRA pays no weight gradients of frozen weights, and what is
computed again (activation checkpointing) counts nothing. "Before" goes by layers: all of the lowest layer with a
trained weight passes gradients on. Embeddings are looked up; norms, rotary embeddings and softmax are left out, as is
usual. The head counts every token. Encoders of images, videos and audio count by `modality/cost.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import on_host
from hf_veomni.modality.cost import Coefficients
from hf_veomni.sequence.backbone import attends, find_layers

# Dense bf16 FLOP/s by a part of the device's name, from the vendors' data sheets (figures "with sparsity" halved).
# NVIDIA: A100, A800, A10 (2021), A10G (AWS G5), L4, L40, L40S, H100, H800, GH200 (2023), H20, H200 (2024), HGX B200,
# GB200 (2025); GeForce by the white papers on Ada and Ampere GA102, bf16 with fp32 accumulation. AMD Instinct: MI300X
# (2023), MI325X (2024), MI355X (2025). What is not surely one of these has no peak here.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI355X": 2516e12,
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
}

_LESSER = re.compile(r"\bMIG\b|Laptop|\bTi\b|\bD\b")  # of the same name, and slower or faster

_TOP_K = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_MODALITIES = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}
_SLIDING, _CHUNKED = "sliding_attention", "chunked_attention"


def device_peak(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a device by the data sheet; None for one that is not listed, every CPU among them."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if _LESSER.search(name):
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


@dataclass(frozen=True)
class _Attention:
    """All layers of one kind of attention.

    Attributes:
        per_pair: FLOPs of a step for each pair of a query and a key that it sees.
        kind: "full" (both directions), "causal", "sliding" or "chunked".
        size: tokens of the window or chunk; 0 for others.
    """

    per_pair: float
    kind: str
    size: int

    def flops(self, place: Tensor, length: Tensor) -> Tensor:
        """Of tokens [..] at these places in documents of these lengths; length 0 marks padding."""
        seen = {
            "full": lambda: length,
            "causal": lambda: place + 1,
            "sliding": lambda: (place + 1).clamp(max=self.size),
            "chunked": lambda: place % max(self.size, 1) + 1,
        }[self.kind]()
        return self.per_pair * (seen * (length > 0)).sum().double()


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward of one model, as a function of the batch.

    Attributes:
        per_token: of all matmuls with weights, those of the layers and of the head.
        attention: by kind.
        encoders: of images, videos and audio, by modality.
        patch_sizes: pixels of a patch's edge, by modality; 0 where patches are given.
    """

    per_token: float
    attention: tuple[_Attention, ...]
    encoders: Mapping[str, Coefficients]
    patch_sizes: Mapping[str, int]

    @classmethod
    def from_model(cls, model: nn.Module) -> StepFlops:
        """Of a transformers model or a `PeftModel`, plain or prepared, as its parameters are trained now.

        Raises:
            UnsupportedError: a model of which some part cannot be counted; the message names it.
        """
        base = hf.base_model(model)
        name = type(base).__name__
        found = None if hf.is_encoder_decoder(base) else find_layers(hf.find_backbone(base))
        if found is None:
            raise UnsupportedError(f"The flops of {name} are not counted: it is no backbone of decoder layers.")
        decoder, layers = found
        head, config = base.get_output_embeddings(), hf.text_config(base)
        level_of = _levels(decoder, layers, head)
        lowest = min((level_of(m) for _, m, p in _parameters(base) if p.requires_grad), default=len(layers) + 1)

        def step(forward: float, level: int, trained: bool) -> float:
            return forward * (1 + (lowest <= level) + trained)

        weights = [*_parameters(decoder), *(_parameters(head) if head is not None else ())]
        per_token = 0.0
        for key, module, parameter in weights:
            forward = 2.0 * _uses(key, module, parameter, config) * parameter.numel()
            per_token += step(forward, level_of(module), parameter.requires_grad)
        kinds: dict[tuple[str, int], float] = {}
        for level, layer in enumerate(layers):
            kind = _kind(name, layer, config, level)
            kinds[kind] = kinds.get(kind, 0.0) + step(_per_pair(name, layer, config), level, lowest <= level)
        attention = tuple(_Attention(per_pair, *kind) for kind, per_pair in kinds.items())
        return cls(per_token, attention, *_encoders(base))

    def of_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens and FLOPs of one batch as the model gets it: float64 scalars where its tensors are, without waiting.

        Raises:
            UnsupportedError: inputs of an encoder that cannot be counted.
        """
        place, length = token_places(batch)
        tokens = (length > 0).sum().double()
        flops = self.per_token * tokens
        for attention in self.attention:
            flops = flops + attention.flops(place, length)
        for name, modality in _MODALITIES.items():
            if isinstance(batch.get(name), Tensor):
                flops = flops + self._encoder_flops(name, modality, batch)
        return tokens, flops

    def _encoder_flops(self, name: str, modality: str, batch: Mapping[str, Any]) -> float:
        if modality not in self.encoders:
            raise UnsupportedError(
                f"The flops of `{name}` are not counted: the model's {modality} encoder is unknown."
            )
        values: Tensor = batch[name]
        patches: Any
        segments: Any = 1
        if modality == "audio":
            masks = [value for key, value in batch.items() if key in ("feature_attention_mask", "input_features_mask")]
            if not masks:
                raise UnsupportedError("The flops of `input_features` without their mask are not counted.")
            patches = on_host(masks[0]).sum(-1) // self.patch_sizes[modality]
        elif isinstance(grid := batch.get(_GRIDS[name]), Tensor):
            patches, segments = on_host(grid).prod(-1), on_host(grid)[:, 0]
        elif values.dim() >= 4 and self.patch_sizes[modality]:
            height, width = (size // self.patch_sizes[modality] for size in values.shape[-2:])
            patches = [height * width] * (values.numel() // values.shape[-3:].numel())
        else:
            raise UnsupportedError(f"The flops of `{name}` {list(values.shape)} are not counted: it has no grid.")
        return float(self.encoders[modality].costs(patches, segments).sum())


def token_places(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, S] place of each token in its document, and tokens of that document, 0 for padding. No wait for the device.

    A document begins where a position is not its left neighbour's plus one; with positions that do not tell (mRoPE
    without a text axis) or none, a row is one document, and the attention mask says what is padding.
    """
    given = next((batch[key] for key in ("input_ids", "inputs_embeds") if isinstance(batch.get(key), Tensor)), None)
    if given is None:
        raise UnsupportedError("The flops of a batch without `input_ids` or `inputs_embeds` are not counted.")
    rows, size = given.shape[:2]
    steps = torch.arange(size, device=given.device).expand(rows, -1)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    starts = batch.get("cu_seq_lens_q")
    begins = steps == 0
    if isinstance(positions, Tensor) and (positions.dim() == 2 or len(positions) == 4):
        text = positions if positions.dim() == 2 else positions[0]
        begins = begins | (text.diff(dim=1, prepend=text[:, :1] - 1) != 1).expand(rows, -1)
    elif isinstance(starts, Tensor):
        begins = begins.index_fill(1, starts[:-1].long(), True)
    real = torch.ones_like(begins)
    if isinstance(mask, Tensor) and mask.shape == (rows, size):
        real = mask != 0
    document = begins.long().cumsum(1) - 1
    length = torch.zeros_like(document).scatter_add_(1, document, real.long())
    before = (length.cumsum(1) - length).gather(1, document)
    place = real.long().cumsum(1) - 1 - before
    return place, length.gather(1, document) * real


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, owner, parameter) of all that a forward can use; PEFT's copies of `modules_to_save` are used, not those
    that they stand for."""
    for name, module in model.named_modules():
        if "original_module" not in name.split("."):
            for key, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{key}" if name else key, module, parameter


def _levels(decoder: nn.Module, layers: nn.ModuleList, head: nn.Module | None) -> Callable[[nn.Module], int]:
    """Where a module stands in the order of the forward: -1 before the layers, then the layer's index, then behind."""
    behind = {head, getattr(decoder, "norm", None)}
    level = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    level |= {module: len(layers) for top in behind if top is not None for module in top.modules()}
    return lambda module: level.get(module, -1)


def _first(config: object, names: tuple[str, ...]) -> int | None:
    """The first of the attributes that is a positive integer."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _uses(name: str, module: nn.Module, parameter: nn.Parameter, config: object) -> float:
    """How many of a token's rows a parameter is multiplied with."""
    last = name.rpartition(".")[2]
    if parameter.dim() < 2 or last.endswith("bias") or isinstance(module, nn.Embedding):
        return 0
    parts = name.split(".")
    if "experts" in parts:
        experts, top_k = _first(config, _EXPERTS), _first(config, _TOP_K)
        if experts is None or top_k is None or getattr(config, "zero_expert_num", 0):
            raise UnsupportedError(f"The flops of '{name}' are not counted: how many experts a token uses is unknown.")
        stacked = parameter.dim() == 3 or isinstance(module, nn.Linear)
        if stacked:
            return top_k / experts
    elif parameter.dim() == 2 and last in ("weight", "lora_A", "lora_B"):
        return 1
    raise UnsupportedError(
        f"The flops of '{name}' {list(parameter.shape)} in {type(module).__name__} are not counted: it is neither a "
        "linear layer nor an expert's."
    )


def _attention_of(name: str, layer: nn.Module) -> Any:
    found = [module for module in layer.modules() if attends(module)]
    if len(found) != 1:
        raise UnsupportedError(
            f"The flops of {name} are not counted: a layer ({type(layer).__name__}) has {len(found)} attentions, "
            "and only one is known."
        )
    return found[0]


def _per_pair(name: str, layer: nn.Module, config: Any) -> float:
    """FLOPs of one query and one key in the forward of a layer: scores and values of all heads."""
    module = _attention_of(name, layer)
    heads = _first(module, ("num_heads", "num_attention_heads")) or _first(config, ("num_attention_heads",))
    width = _first(module, ("head_dim",)) or _first(config, ("head_dim",))
    if width is None and heads:
        width = config.hidden_size // heads
    keys, values = _first(module, ("qk_head_dim",)) or width, _first(module, ("v_head_dim",)) or width
    if not heads or not keys or not values:
        raise UnsupportedError(f"The flops of {name} are not counted: the heads of its attention are unknown.")
    return 2.0 * heads * (keys + values)


def _kind(name: str, layer: nn.Module, config: Any, level: int) -> tuple[str, int]:
    """Which keys a layer's queries see, and tokens of its window or chunk."""
    if not getattr(_attention_of(name, layer), "is_causal", True):
        return "full", 0
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        slides = window is not None and getattr(config, "use_sliding_window", True)
        return ("sliding", int(window or 0)) if slides else ("causal", 0)
    if types[level] == _SLIDING:
        return ("sliding", int(window)) if window else ("causal", 0)
    if types[level] == _CHUNKED:
        return "chunked", int(config.attention_chunk_size)
    if types[level] == "full_attention":
        return "causal", 0
    raise UnsupportedError(f"The flops of {name} are not counted: a layer of type '{types[level]}' is unknown.")


def _encoders(base: Any) -> tuple[dict[str, Coefficients], dict[str, int]]:
    """What encoders cost, by modality; those that cannot be read are left out, and raise where a batch needs them."""
    found: dict[str, Coefficients] = {}
    sizes: dict[str, int] = {}
    towers = hf.towers(base)
    for modality in ("image", "video", "audio"):
        tower: Any = base.get_encoder(modality=modality)
        if tower not in towers or getattr(tower, "config", None) is None:
            continue
        training = "trained" if any(p.requires_grad for p in tower.parameters()) else "frozen"
        try:
            found[modality] = Coefficients.from_config(tower.config, modality, training)
        except UnsupportedError:
            continue
        # Audio: mel frames of an encoder's frame, after one halving (Whisper, Qwen2.5-Omni) or three (Qwen3-Omni).
        mel = 8 if getattr(tower.config, "n_window_infer", None) else 2
        sizes[modality] = mel if modality == "audio" else _first(tower.config, ("patch_size",)) or 0
    return found, sizes
