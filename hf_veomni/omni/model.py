"""`OmniModel`: encoders -> foundation -> decoders as one `PreTrainedModel`. Knows nothing of parallelism.

    input_ids  [B, S]   text, and placeholders: one for each feature of an encoder, one for each code of a decoder
    embeddings [B, S, H] of the text; at placeholders what the encoders give, or the decoder's embedding of a code
    hidden     [B, S, H] -> logits of the text head, and of the decoder's head where rows have codes

Shapes: B rows, S tokens of a row, H width of the foundation, N items of a modality, n tokens of an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hf_veomni.omni.config import DECODERS, ENCODERS, OmniConfig
from hf_veomni.omni.parts import AudioEncoder, FoundationMixin, ImageDecoder, VisionEncoder

_INPUTS = (*ENCODERS.values(), *DECODERS.values())


@dataclass
class OmniOutput(CausalLMOutputWithPast):
    """Output of `OmniModel`. `image_logits` [B, S, codes] are there if `image_codes` were given.

    `aux_loss` is the foundation's router loss, where its config asks for it; `loss` contains it.
    """

    image_logits: Tensor | None = None
    aux_loss: Tensor | None = None


class OmniModel(PreTrainedModel, GenerationMixin):
    """Encoders, a foundation and decoders, composed from an `OmniConfig` (see `build_omni_model`).

    A subclass may name other classes for the parts, each built as `cls(config of the part, H, options)`; the
    foundation's class, None for what `AutoModelForCausalLM` chooses, is a `PreTrainedModel` built from its config.
    """

    config_class = OmniConfig
    config: Any
    encoder_classes: Mapping[str, Any] = {"vision": VisionEncoder, "audio": AudioEncoder}
    decoder_classes: Mapping[str, Any] = {"image": ImageDecoder}
    foundation_class: type[PreTrainedModel] | None = None

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

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
        self.encoders: Any = self._build(self.encoder_classes, config.encoders, width)
        self.decoders: Any = self._build(self.decoder_classes, config.decoders, width)
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

    def _build(self, classes: Mapping[str, Any], parts: Mapping[str, Any], width: int) -> nn.ModuleDict:
        configs = {name: getattr(self.config, f"{name}_config") for name in parts}
        return nn.ModuleDict({name: classes[name](configs[name], width, part) for name, part in parts.items()})

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
        """The foundation's stack."""
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

    def embed_inputs(self, input_ids: Tensor, features: Mapping[str, Tensor | None]) -> Tensor:
        """Embeddings [B, S, H]: of the text, and at placeholders of the features (by keyword of the forward).

        With gradients a part whose modality is missing runs a dummy item, so that its parameters get zeros.

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
                if torch.is_grad_enabled() and (self.training or any(p.requires_grad for p in part.parameters())):
                    embeddings = embeddings + part.lm_dummy().to(embeddings.dtype)
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

    def _split_labels(self, labels: Tensor, input_ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(labels of the text head, labels of the image head), both [B, S]: codes stand at learnt placeholders."""
        mask = input_ids == self._token_id("decoders.image")
        spread = torch.full_like(labels, -100).masked_scatter(mask, codes.reshape(-1).to(labels))
        return labels.masked_fill(mask, -100), spread.masked_fill(labels == -100, -100)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        **kwargs: Any,
    ) -> OmniOutput:
        """Logits of the text head, of the image head where codes are given, and with `labels` the loss.

        One rule for the loss: the loss of each target, text or code, the codes' times their `loss_weight`, summed and
        divided by the number of targets (or `num_items_in_batch`).

        Args:
            input_ids: [B, S], text and placeholders.
            labels: [B, S], not shifted; -100 is not learnt. At placeholders of codes any other value stands for "learn
                the code".
            pixel_values, input_features: items of the rows in order, [N, ...] as the processors make them.
            image_codes: [N, n] codes of the pictures in the rows, in order (`decoders["image"].lm_encode`).

        Raises:
            ValueError: placeholders that do not match the features.
        """
        features = {"pixel_values": pixel_values, "input_features": input_features, "image_codes": image_codes}
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if input_ids is not None:
            inputs_embeds = self.embed_inputs(input_ids, features)
            if position_ids is None and past_key_values is None:
                position_ids = self.get_pos_id(input_ids, attention_mask=attention_mask, **features)
        elif any(value is not None for value in features.values()):
            raise ValueError("Features need `input_ids`, which say where they go: leave `inputs_embeds` out.")
        stock = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        out, hidden = self._run_foundation(
            inputs_embeds=inputs_embeds, use_cache=use_cache, logits_to_keep=logits_to_keep, **stock, **kwargs
        )
        image_logits = None if image_codes is None else self._image_logits(hidden, logits_to_keep)
        loss, text = None, self.config.get_text_config(decoder=True)
        if labels is not None and image_codes is None:
            loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        elif labels is not None and input_ids is not None and image_codes is not None and image_logits is not None:
            words, codes = self._split_labels(labels, input_ids, image_codes)
            kwargs["num_items_in_batch"] = _num_targets(labels, kwargs)
            loss = self.loss_function(logits=out.logits, labels=words, vocab_size=text.vocab_size, **kwargs)
            drawn = self.loss_function(logits=image_logits, labels=codes, vocab_size=image_logits.shape[-1], **kwargs)
            loss = loss + self.config.decoders["image"]["loss_weight"] * drawn
        aux_loss = getattr(out, "aux_loss", None)
        if loss is not None and aux_loss is not None:
            loss = loss + self.foundation.router_aux_loss_coef * aux_loss
        return OmniOutput(
            loss, out.logits, out.past_key_values, out.hidden_states, out.attentions, image_logits, aux_loss
        )

    def _run_foundation(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Output of the causal LM, and what its stack hands to its head."""
        hidden: list[Tensor] = []
        hook = self.get_decoder().register_forward_hook(lambda module, args, out: hidden.append(out[0]))
        try:
            return self.foundation(**inputs), hidden[0]
        finally:
            hook.remove()

    def _image_logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return self.decoders["image"].lm_head(kept)[0]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Features enter with the prompt; later steps have its keys and values in the cache."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.update({key: None for key in _INPUTS if key in inputs})
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """Rows for beams and several answers: features are repeated item by item, which is right for one a row."""
        ids = kwargs.get("input_ids")
        for (name, _), key in self._keyed(self.encoders, ENCODERS) if expand_size > 1 else ():
            if kwargs.get(key) is not None and ids is not None:
                counts = (ids == self._token_id(f"encoders.{name}")).sum(1)
                if len(kwargs[key]) != len(ids) or bool((counts != counts[0]).any()):
                    raise ValueError(
                        f"`{key}` has {len(kwargs[key])} items for {len(ids)} prompts: beams and several answers need "
                        "one item in each prompt. Use num_beams=1 and num_return_sequences=1."
                    )
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, for text: placeholders, which stand for nothing that is said, are never chosen."""
        placeholders = [part["token_id"] for part in (*self.config.encoders.values(), *self.config.decoders.values())]
        if placeholders:
            kwargs.setdefault("suppress_tokens", placeholders)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def generate_image(
        self,
        input_ids: Tensor,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **features: Any,
    ) -> tuple[Tensor, Tensor]:
        """Draw a picture after each prompt.

        Args:
            input_ids: prompts [B, S] of one length, up to the place where a picture begins.
            do_sample: choose codes at random, by the head's probabilities; else the likeliest.
            features: other inputs of the forward that belong to the prompt.

        Returns:
            Codes [B, n] and pictures [B, channels, size, size].

        Raises:
            ValueError: the model has no image decoder.
        """
        if "image" not in self.decoders:
            raise ValueError("This model has no image decoder: add `decoders: {image: ...}` to its config.")
        decoder: Any = self.decoders["image"]
        if features.get("image_codes") is None:
            features["image_codes"] = input_ids.new_zeros(0)
        out = self(input_ids=input_ids, use_cache=True, logits_to_keep=1, **features)
        codes: list[Tensor] = []
        placeholder = torch.full_like(input_ids[:, :1], self._token_id("decoders.image"))
        while True:
            logits = out.image_logits[:, -1]
            if do_sample:
                chances = (logits.float() / temperature).softmax(-1)
                codes.append(torch.multinomial(chances, 1, generator=generator))
            else:
                codes.append(logits.argmax(-1, keepdim=True))
            if len(codes) == decoder.num_codes:
                drawn = torch.cat(codes, 1)
                return drawn, decoder.decode(drawn)
            out = self(input_ids=placeholder, image_codes=codes[-1], past_key_values=out.past_key_values)


def _num_targets(labels: Tensor, kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("shift_labels") is not None:
        raise ValueError("`shift_labels` cannot be split over the heads of text and codes: pass `labels`, unshifted.")
    given = kwargs.get("num_items_in_batch")
    return (labels[:, 1:] != -100).sum() if given is None else given


AutoConfig.register(OmniConfig.model_type, OmniConfig)
AutoModel.register(OmniConfig, OmniModel)
AutoModelForCausalLM.register(OmniConfig, OmniModel)

__all__ = ["OmniModel", "OmniOutput"]
