"""What a plan needs to know of a model: sizes of its layers, and of what is around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

from torch import nn


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
class Attention:
    """The attention of every layer.

    Attributes:
        width, values: of a head's queries and keys, and of its values.
        rotated: columns of a head with a rotary embedding; where these are not all, or `joins`, they are joined to
            the others, a copy.
        normed: whether queries and keys are normed.
        fused: whether queries, keys and values are slices of one projection.
        latent: what keys and values are made of for all heads, in latent attention (MLA); 0 for others.
        low: the same of queries; 0 where they are made of the hidden states.
        complex: whether the rotary embedding multiplies complex numbers in fp32.
    """

    heads: int
    key_value_heads: int
    width: int
    values: int
    rotated: int
    joins: bool = False
    normed: bool = False
    fused: bool = False
    latent: int = 0
    low: int = 0
    complex: bool = False

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.width

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.key_value_heads * self.width

    @property
    def out(self) -> int:
        """Width of what all heads make together."""
        return self.heads * self.values


@dataclass(frozen=True)
class Layer:
    """A kind of layer.

    Attributes:
        weights: all parameters but the experts'.
        width: hidden size.
        inner: intermediate size of the dense MLP, or of each expert.
        fused: whether one projection makes gate and up of the dense MLP.
        experts, top_k: 0 for a dense layer.
        shared: intermediate size of the MLP that all tokens go to beside their experts.
        wide: the router's weights are fp32, and so what they weigh.
        casts: the router computes in fp32.
    """

    weights: tuple[Weight, ...]
    width: int
    inner: int
    fused: bool = False
    experts: int = 0
    top_k: int = 0
    shared: int = 0
    wide: bool = False
    casts: bool = False

    @cached_property
    def matmuls(self) -> int:
        """Elements of the weights that every token is multiplied with, without experts."""
        return sum(w.size for w in self.weights if w.linear)

    @property
    def expert(self) -> int:
        """Elements of one expert."""
        return 3 * self.width * self.inner if self.experts else 0

    @cached_property
    def total(self) -> int:
        return sum(w.size for w in self.weights) + self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that a token's matmuls read."""
        return self.matmuls + self.top_k * self.expert

    def adapters(self, rank: int | None) -> Iterator[Weight]:
        """LoRA weights without those of experts: [r, in] and [out, r] beside each linear layer, and the router."""
        for weight in self.weights if rank else ():
            if weight.linear:
                yield Weight(rank or 0, weight.width)
                yield Weight(weight.rows, rank or 0)

    def expert_adapter(self, rank: int | None) -> int:
        """Elements of the LoRA weights of one expert; PEFT has twice the rank on gate and up, one parameter."""
        if not self.experts or not rank:
            return 0
        return 2 * rank * (self.width + 2 * self.inner) + rank * (self.inner + self.width)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and of what is around it.

    Attributes:
        name: class of the model.
        width: hidden size.
        kinds: of layers; order: the kind of each layer.
        head: parameters of the unit that stays gathered from the end of the forward on: last norm and head.
        root: all others: embeddings, and encoders, whose activations are not counted.
        windows: of each layer, tokens that its attention looks back; 0 for all.
        encoders: parameters of encoders of images, videos and audio.
        cuts: whether a pipeline can cut it into stages.
        tied: whether the embeddings are the head's, and in its unit.
        embeds, ends: of a stage: whether the embeddings, and the head, are in it.
    """

    name: str
    width: int
    vocabulary: int
    attention: Attention
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    head: tuple[Weight, ...]
    root: tuple[Weight, ...]
    context: int = 0
    windows: tuple[int, ...] = ()
    encoders: int = 0
    cuts: bool = False
    tied: bool = False
    embeds: bool = True
    ends: bool = True

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of the model of a transformers config.

        Raises:
            UnsupportedError: a model that cannot be cut, or layers that the formulas do not describe.
        """
        from hf_veomni.planner.reading import read_shape  # which makes these

        return read_shape(config)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Each of them."""
        return tuple(self.kinds[kind] for kind in self.order)

    @cached_property
    def counts(self) -> tuple[tuple[Layer, int], ...]:
        """Each kind, and how many layers are of it."""
        return tuple((layer, self.order.count(kind)) for kind, layer in enumerate(self.kinds))

    @property
    def experts(self) -> tuple[int, ...]:
        """How many each kind with experts has."""
        return tuple(layer.experts for layer in self.kinds if layer.experts)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @cached_property
    def total(self) -> int:
        """All parameters."""
        return sum(n * layer.total for layer, n in self.counts) + sum(w.size for w in (*self.head, *self.root))

    @cached_property
    def active(self) -> int:
        """Parameters that a token's matmuls read, without the head."""
        return sum(n * layer.active for layer, n in self.counts)
