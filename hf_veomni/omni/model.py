"""`OmniModel`: encoders -> foundation -> decoders as one `PreTrainedModel`. Knows nothing of parallelism.

    input_ids  [B, S]   text, and placeholders: one for each feature of an encoder, one for each code of a decoder
    embeddings [B, S, C] of the text; at placeholders what the encoders give, or the decoder's embedding of a code
    hidden     [B, S, C] -> logits of the text head, and of the decoder's head where rows have codes

Shapes: B rows, S tokens of a row, C width of the foundation, N items of a modality, n tokens of an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.omni.config import CONFIG_FIELDS, DECODERS, ENCODERS, OmniConfig
from hf_veomni.omni.decoders import AudioDecoder, ImageDecoder
from hf_veomni.omni.generation import OmniGenerationMixin
from hf_veomni.omni.parts import AudioEncoder, FoundationMixin, VisionEncoder, zero_of


@dataclass
class OmniOutput(CausalLMOutputWithPast):
    """Output of `OmniModel`. `image_logits`, `audio_logits` [B, S, codes] are there if such codes were given.

    `aux_loss` is the foundation's router loss, where its config asks for it; `loss` contains it.
    """

    image_logits: Tensor | None = None
    audio_logits: Tensor | None = None
    aux_loss: Tensor | None = None


class OmniModel(PreTrainedModel, OmniGenerationMixin):
    """Encoders, a foundation and decoders, composed from an `OmniConfig` (see `build_omni_model`).

    A subclass may name other classes for the parts, each built as `cls(config of the part, C, options)`; the
    foundation's class, None for what `AutoModelForCausalLM` chooses, is a `PreTrainedModel` built from its config.
    """

    config_class = OmniConfig
    config: Any
    encoder_classes: Mapping[str, Any] = {"vision": VisionEncoder, "audio": AudioEncoder}
    decoder_classes: Mapping[str, Any] = {"image": ImageDecoder, "audio": AudioDecoder}
    foundation_class: type[PreTrainedModel] | None = None

    # Features enter the row before it reaches the foundation's backbone, so that it may be cut there.
    merges_full_features = True
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [*hf.CACHE_NAMES]

    def __init__(self, config: Any) -> None:
        super().__init__(OmniConfig.parse(config))
        text = config.text_config
        self.foundation: Any = (
            AutoModelForCausalLM.from_config(text)
            if self.foundation_class is None
            else self.foundation_class._from_config(text)
        )
        config.text_config = self.foundation.config
        width = text.get_text_config(decoder=True).hidden_size
        self.encoders: Any = self._build("encoders", self.encoder_classes, width)
        self.decoders: Any = self._build("decoders", self.decoder_classes, width)
        self.loss_type = "ForCausalLM"
        inside = [module for module in self.modules() if isinstance(module, PreTrainedModel) and module is not self]
        self._no_split_modules = sorted({name for module in inside for name in module._no_split_modules or ()})
        self.post_init()
        self._freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; what the config freezes stays frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _freeze(self) -> None:
        if self.config.foundation["freeze"]:
            self.foundation.requires_grad_(False)
        for part in (*self.encoders.values(), *self.decoders.values()):
            if hasattr(part, "freeze"):
                part.freeze()

    def _build(self, group: str, classes: Mapping[str, Any], width: int) -> nn.ModuleDict:
        parts = getattr(self.config, group)
        configs = {name: getattr(self.config, CONFIG_FIELDS[f"{group}.{name}"]) for name in parts}
        return nn.ModuleDict({name: classes[name](configs[name], width, part) for name, part in parts.items()})

    def modules_outside_forward(self) -> list[str]:
        """Names of the VQ models, which `lm_encode` and `decode` of the decoders call, and the forward never."""
        return [f"decoders.{name}.vq" for name, part in self.decoders.items() if hasattr(part, "vq")]

    def train(self, mode: bool = True) -> OmniModel:
        """Training mode, but for encoders and VQ models without a trainable parameter: no dropout in frozen towers."""
        super().train(mode)
        towers: list[Any] = [part.tower for part in self.encoders.values() if hasattr(part, "tower")]
        towers += [part.vq for part in self.decoders.values() if hasattr(part, "vq")]
        for tower in towers:
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def get_decoder(self) -> nn.Module:
        """The foundation's backbone."""
        return self.foundation.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The foundation's token embeddings."""
        return self.foundation.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.foundation.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The foundation's text head."""
        return self.foundation.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.foundation.set_output_embeddings(new_embeddings)

    def get_pos_id(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Position ids of full rows, as the foundation numbers them (`FoundationMixin.get_pos_id`)."""
        own = getattr(self.foundation, "get_pos_id", None)
        return own(input_ids, **inputs) if own is not None else FoundationMixin().get_pos_id(input_ids, **inputs)

    def embed_inputs(self, input_ids: Tensor, features: Mapping[str, Tensor | None], dummies: bool = True) -> Tensor:
        """Embeddings [B, S, C]: of the text, and at placeholders of the features (by keyword of the forward).

        With `dummies` a part whose modality is missing runs a dummy item: its parameters get gradients of zeros, and
        every caller runs the same modules whatever its rows hold.

        Raises:
            ValueError: placeholders that do not match the features, before an encoder runs; features without a part.
        """
        parts = {f"encoders.{name}": (part, key) for (name, part), key in self._keyed(self.encoders, ENCODERS)}
        parts |= {f"decoders.{name}": (part, key) for (name, part), key in self._keyed(self.decoders, DECODERS)}
        known = {key for _, key in parts.values()}
        if extra := [key for key, value in features.items() if value is not None and key not in known]:
            raise ValueError(f"`{extra[0]}` has no part in this model, which has {sorted(parts)}: leave it out.")
        masks = {name: input_ids == self._token_id(name) for name in parts}
        for name, (part, key) in parts.items():
            value = features.get(key)
            given = 0 if value is None else part.count_tokens(value) if name[0] == "e" else value.numel()
            self._check_count(name, key, int(masks[name].sum()), given)
        embeddings = self.get_input_embeddings()(input_ids)
        for name, (part, key) in parts.items():
            value = features.get(key)
            if value is None:
                if dummies:
                    zero = part.lm_dummy() if name[0] == "e" else zero_of(part.embed(input_ids.new_zeros(1)))
                    embeddings = embeddings + zero.to(embeddings.dtype)
                continue
            found = part.lm_encode(value) if name[0] == "e" else part.embed(value)
            found = found.reshape(-1, embeddings.shape[-1]).to(embeddings.dtype)
            self._check_count(name, key, int(masks[name].sum()), len(found))
            embeddings = embeddings.masked_scatter(masks[name][..., None].expand_as(embeddings), found)
        return embeddings

    def _keyed(self, parts: nn.ModuleDict, keywords: Mapping[str, str]) -> list[tuple[tuple[str, Any], str]]:
        return [((name, part), keywords[name]) for name, part in parts.items()]

    def _token_id(self, path: str) -> int:
        group, _, name = path.partition(".")
        return getattr(self.config, group)[name]["token_id"]

    def _check_count(self, path: str, key: str, wanted: int, given: int | None) -> None:
        if given is None or wanted == given:
            return
        modality, token = path.partition(".")[2], self._token_id(path)
        raise ValueError(
            f"{modality}: `input_ids` hold {wanted} placeholders (token {token}), and `{key}` gives {given} tokens: "
            "each needs one of the other. Check the prompt, and that no row was cut."
        )

    def _split_labels(
        self, labels: Tensor, input_ids: Tensor, codes: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(labels of the text head, those of the codes' heads), each [B, S]: codes stand at learnt placeholders."""
        heads: dict[str, Tensor] = {}
        words = labels
        for name, values in codes.items():
            mask = input_ids == self._token_id(f"decoders.{name}")
            spread = torch.full_like(labels, -100).masked_scatter(mask, values.reshape(-1).to(labels))
            heads[name] = spread.masked_fill(labels == -100, -100)
            words = words.masked_fill(mask, -100)
        return words, heads

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        audio_codes: Tensor | None = None,
        cache: Any = None,
        **kwargs: object,
    ) -> OmniOutput:
        """Logits of the text head, of the heads whose codes are given, and with `labels` the loss.

        One rule for the loss: the loss of each target, text or code, the codes' times their `loss_weight`, summed and
        divided by the number of targets (or `num_items_in_batch`).

        Args:
            input_ids: [B, S], text and placeholders.
            labels: [B, S], not shifted; -100 is not learnt. At placeholders of codes any other value stands for "learn
                the code".
            pixel_values, input_features: items of the rows in order, [N, ...] as the processors make them.
            image_codes, audio_codes: [N, n] codes of the items in the rows, in order (`lm_encode` of the decoder).
            cache, past_key_values: the names of the foundation's cache in transformers 5.24 and before; either works.

        Raises:
            ValueError: placeholders that do not match the features.
        """
        codes = {name: c for name, c in (("image", image_codes), ("audio", audio_codes)) if c is not None}
        features = {"pixel_values": pixel_values, "input_features": input_features}
        features |= {"image_codes": image_codes, "audio_codes": audio_codes}
        cache = past_key_values if cache is None else cache
        begins = cache is None or cache.get_seq_length() == 0
        inputs_embeds = self._to_embeddings(input_ids, inputs_embeds, features, dummies=begins)
        if input_ids is not None and position_ids is None and cache is None:
            position_ids = self.get_pos_id(input_ids, attention_mask=attention_mask, **features)
        stock = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        stock |= {hf.CACHE: cache, "logits_to_keep": logits_to_keep}
        out, hidden = self._run_foundation(inputs_embeds=inputs_embeds, **stock, **kwargs)
        kept = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits, idle = self._run_heads(kept, codes, dummies=begins and input_ids is not None)
        loss = None
        if labels is not None:
            loss = sum(idle, self._sum_losses(self.loss_function, out, logits, labels, input_ids, codes, kwargs))
        return OmniOutput(
            loss=loss,
            logits=out.logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_logits=logits.get("image"),
            audio_logits=logits.get("audio"),
            aux_loss=getattr(out, "aux_loss", None),
            **{hf.CACHE: out.get(hf.CACHE)},
        )

    def _to_embeddings(
        self, input_ids: Tensor | None, embeds: Tensor | None, features: Mapping[str, Tensor | None], dummies: bool
    ) -> Tensor:
        """Embeddings of a row, which is given as ids and features or as embeddings alone."""
        if input_ids is not None and embeds is None:
            return self.embed_inputs(input_ids, features, dummies=dummies)
        if input_ids is not None or embeds is None:
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if any(value is not None for value in features.values()):
            raise ValueError("Features need `input_ids`, which say where they go: leave `inputs_embeds` out.")
        return embeds

    def _run_heads(
        self, hidden: Tensor, codes: Mapping[str, Tensor], dummies: bool
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Logits of the heads whose codes are given, and a zero that hangs on each of the others, with `dummies`.

        In the order of the decoders, with codes and without, since ranks with other rows run the same modules.
        """
        wanted = [name for name in self.decoders if name in codes or dummies]
        logits = {name: self.decoders[name].lm_head(hidden if name in codes else hidden[:, :1])[0] for name in wanted}
        return logits, [zero_of(logits.pop(name)) for name in wanted if name not in codes]

    def _sum_losses(
        self,
        loss_function: Any,
        out: Any,
        heads: Mapping[str, Tensor],
        labels: Tensor,
        input_ids: Tensor | None,
        codes: Mapping[str, Tensor],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Loss of the text's logits and of those of the codes' `heads`, and the router's of the foundation's `out`."""
        size, text, targets = self.config.get_text_config(decoder=True).vocab_size, labels, {}
        if codes and input_ids is not None:
            kwargs["num_items_in_batch"] = _num_targets(labels, kwargs)
            text, targets = self._split_labels(labels, input_ids, codes)
        loss = loss_function(logits=out.logits, labels=text, vocab_size=size, **kwargs)
        for name, logits in heads.items():
            part = loss_function(logits=logits, labels=targets[name], vocab_size=logits.shape[-1], **kwargs)
            loss = loss + self.config.decoders[name]["loss_weight"] * part
        aux_loss = getattr(out, "aux_loss", None)
        return loss if aux_loss is None else loss + self.foundation.router_aux_loss_coef * aux_loss

    def _run_foundation(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Output of the causal LM, and what its backbone hands to its head."""
        hidden: list[Tensor] = []
        hook = self.get_decoder().register_forward_hook(lambda module, args, out: hidden.append(out[0]))
        try:
            return self.foundation(**inputs), hidden[0]
        finally:
            hook.remove()


def _num_targets(labels: Tensor, kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("shift_labels") is not None:
        raise UnsupportedError(
            "`shift_labels` cannot be split over the heads of text and codes: pass `labels`, unshifted."
        )
    given = kwargs.get("num_items_in_batch")
    return (labels[:, 1:] != -100).sum() if given is None else given


AutoConfig.register(OmniConfig.model_type, OmniConfig)
AutoModel.register(OmniConfig, OmniModel)
AutoModelForCausalLM.register(OmniConfig, OmniModel)

__all__ = ["OmniModel", "OmniOutput"]
