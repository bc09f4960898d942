"""What an omni model generates: text, codes of images, codes of audio clips.

Shapes: B prompts, S tokens of a prompt, n codes of an item.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.omni.config import DECODERS, ENCODERS
from hf_veomni.omni.decoders import write_wav

INPUTS = (*ENCODERS.values(), *DECODERS.values())


class OmniGenerationMixin(GenerationMixin):
    """`generate`, `generate_image` and `generate_audio` of an `OmniModel`.

    Of a prepared model all ranks call them together, the ranks of an SP group with the same prompts.
    """

    config: Any
    encoders: Any
    decoders: Any

    @override
    def prepare_inputs_for_generation(
        self: object, input_ids: Tensor, *args: object, is_first_iteration: bool | None = False, **kwargs: object
    ) -> dict[str, Any]:
        """Features enter with the prompt; later steps have its keys and values in the cache."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.update({key: None for key in INPUTS if key in inputs})
        return inputs

    @override
    def _expand_inputs_for_generation(self: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        """Rows for beams and several answers: features are repeated item by item, which is right for one a row."""
        ids = kwargs.get("input_ids")
        for (name, _), key in self._keyed(self.encoders, ENCODERS) if expand_size > 1 else ():
            if kwargs.get(key) is not None and ids is not None:
                counts = (ids == self._token_id(f"encoders.{name}")).sum(1)
                if len(kwargs[key]) != len(ids) or bool((counts != counts[0]).any()):
                    raise UnsupportedError(
                        f"`{key}` has {len(kwargs[key])} items for {len(ids)} prompts: beams and several answers need "
                        "one item in each prompt. Use num_beams=1 and num_return_sequences=1."
                    )
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]

    @override
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, for text: placeholders, which stand for nothing that is said, are never chosen."""
        placeholders = [part["token_id"] for part in (*self.config.encoders.values(), *self.config.decoders.values())]
        if placeholders:
            kwargs.setdefault("suppress_tokens", placeholders)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def generate_image(self, input_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Draw an image after each prompt.

        Args:
            input_ids: prompts [B, S] of one length, up to the place where an image begins.
            options: `do_sample`, `temperature`, `generator`: choose codes at random, by the head's probabilities; else
                the likeliest. Anything else is an input of the forward that belongs to the prompt.

        Returns:
            Codes [B, n] and images [B, channels, size, size].

        Raises:
            ValueError: the model has no image decoder.
        """
        codes = self._generate_codes("image", input_ids, **options)
        return codes, self.decoders["image"].decode(codes)

    def generate_audio(
        self,
        input_ids: Tensor,
        *,
        frames: int | None = None,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Make an audio clip after each prompt.

        Args:
            input_ids, options: as in `generate_image`.
            frames: length of the audio clips; by default the config's `frames`.
            path: a wav file to write; of several prompts the files are called `name-0.wav`, `name-1.wav`, ...

        Returns:
            Codes [B, n] and audio clips [B, samples] between -1 and 1.

        Raises:
            ValueError: the model has no audio decoder.
        """
        decoder = self.decoders["audio"] if "audio" in self.decoders else None
        count = None if frames is None or decoder is None else frames * decoder.num_codebooks
        codes = self._generate_codes("audio", input_ids, num_codes=count, **options)
        clips = self.decoders["audio"].decode(codes)
        for number, clip in enumerate(clips if path is not None else ()):
            assert path is not None
            name = Path(path) if len(clips) == 1 else Path(path).with_stem(f"{Path(path).stem}-{number}")
            write_wav(name, clip, self.decoders["audio"].sampling_rate)
        return codes, clips

    @torch.no_grad()
    def _generate_codes(
        self: Any,
        name: str,
        input_ids: Tensor,
        *,
        num_codes: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **features: Any,
    ) -> Tensor:
        """Codes [B, n] of one item after each prompt."""
        if name not in self.decoders:
            raise ValueError(f"This model has no {name} decoder: add `decoders: {{{name}: ...}}` to its config.")
        decoder, key = self.decoders[name], DECODERS[name]
        if features.get(key) is None:
            features[key] = input_ids.new_zeros(0)
        out = self(input_ids=input_ids, use_cache=True, logits_to_keep=1, **features)
        codes: list[Tensor] = []
        placeholder = torch.full_like(input_ids[:, :1], self._token_id(f"decoders.{name}"))
        while True:
            logits = out[f"{name}_logits"][:, -1].float()
            allowed = decoder.allowed(len(codes))
            if allowed is not None:
                logits = logits.masked_fill(~allowed, float("-inf"))
            if do_sample:
                chances = (logits / temperature).softmax(-1)
                codes.append(torch.multinomial(chances, 1, generator=generator))
            else:
                codes.append(logits.argmax(-1, keepdim=True))
            if len(codes) == (num_codes or decoder.num_codes):
                return torch.cat(codes, 1)
            out = self(input_ids=placeholder, **{hf.CACHE: out[hf.CACHE], key: codes[-1]})


require_overrides(OmniGenerationMixin)


__all__ = ["INPUTS", "OmniGenerationMixin"]
