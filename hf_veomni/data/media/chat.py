"""Raw samples, text or messages with images and audio, through the model's own processor.

A raw sample holds a conversation or `text` (`layouts` names the forms), and its items in the parts of the messages, or
in order in the columns `images` and `audios` (or `image` and `audio`): paths, bytes, `datasets` structs of both, PIL
images, arrays, decoders of audio clips. Further columns go to the chat template, if it reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_veomni import hf
from hf_veomni.data.layouts import Layout, read_layout, template_options, with_parts, without_none
from hf_veomni.data.media.decode import BrokenItemError, name_of, open_image, read_audio
from hf_veomni.data.modalities import RAW_COLUMNS, TEXT_COLUMNS
from hf_veomni.errors import UnsupportedError

TRAIN_ON = ("all", "assistant", "last")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_VALUE_KEYS = ("path", "url", "bytes")
_SET = frozenset(("messages", "add_generation_prompt", "continue_final_message"))  # by the renderer
_KWARGS = "chat_template_kwargs"
_KINDS, _KEPT = ("text", "image", "audio", "video"), ("type", "text")  # a template puts in placeholders, no values
_FOREIGN = {"image_url": "image", "input_image": "image", "input_audio": "audio", "audio_url": "audio"}  # OpenAI's


@dataclass
class Prompt:
    """A raw sample before its items are decoded.

    Attributes:
        text: what the processor gets, one placeholder an item.
        items: by modality, what was given for each, in order.
        spans: characters of `text` that are trained on, None for all of them.
    """

    text: str
    items: dict[str, list[Any]] = field(default_factory=dict)
    spans: list[tuple[int, int]] | None = None


class RawReader:
    """Reads raw samples with a processor.

    Args:
        processor: the model's processor, or a tokenizer for samples of text alone.
        train_on: "all" tokens, those of all "assistant" turns, or of the "last" one; of a sample with a `completion`
            only turns of it count.
        further: columns that are none of the reader's business.
    """

    def __init__(self, processor: Any, train_on: str = "all", further: Sequence[str] = ()) -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"`train_on` ({train_on!r}) must be one of {', '.join(map(repr, TRAIN_ON))}.")
        self.processor, self.train_on, self.further = processor, train_on, frozenset(further)
        self.tokenizer = getattr(processor, "tokenizer", processor)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of raw samples that are read: those that hold the sample, and those that the template takes."""
        takes = () if self.processor is None else self._takes(tools=True)
        return (*TEXT_COLUMNS, *RAW_COLUMNS, _KWARGS, *sorted(takes))

    def prompt(self, where: str, sample: Mapping[str, Any]) -> Prompt:
        """Text and undecoded items of a sample.

        Raises:
            ValueError: no layout that is known, columns that nobody reads, items that no part asks for, videos, or
                `train_on` with bare text or with a template that does not build a conversation up turn by turn.
        """
        given = _given_items(where, sample)
        layout = read_layout(where, sample)
        read = {*TEXT_COLUMNS, *RAW_COLUMNS, *self.further}
        extra = {name: value for name, value in sample.items() if name not in read}
        if layout.messages is None:
            template_options(where, extra, frozenset())
            if self.train_on != "all" and not layout.completes:
                raise ValueError(
                    f"{where}: train_on={self.train_on!r} needs the turns of `messages`, and the sample has `text`: "
                    "give messages, `prompt` and `completion`, or `input_ids` with `labels`."
                )
            chosen = None if self.train_on == "all" else [(layout.begin, len(layout.text))]
            return Prompt(layout.text, given, chosen)
        options = template_options(where, extra, self._takes(tools=extra.get("tools") is not None))
        messages, items = _plain_messages(where, with_parts(where, layout.messages, given), given)
        text = self._render(messages, **options)
        chosen = None if self.train_on == "all" else self._spans(where, messages, text, layout, options)
        return Prompt(text, items, chosen)

    def encode(self, where: str, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A raw sample as the processor's output, columns [1, T] and items; `assistant_masks` if turns are chosen.

        Raises:
            BrokenItemError: an image or audio clip that cannot be read, by its name.
            ValueError: as `prompt`, and what the processor refuses.
        """
        prompt = self.prompt(where, sample)
        inputs: dict[str, Any] = {}
        if images := prompt.items.get("image"):
            inputs["images"] = [[open_image(v, name_of(v, f"image {i} of {where}")) for i, v in enumerate(images)]]
        if audios := prompt.items.get("audio"):
            rate = sampling_rate(self.processor)
            inputs["audio"] = [read_audio(v, rate, name_of(v, f"audio {i} of {where}")) for i, v in enumerate(audios)]
            inputs["sampling_rate"] = rate
        options = self.text_options(prompt)
        if prompt.spans is not None:
            options["return_offsets_mapping"] = True
            if self.processor is not self.tokenizer:
                options["return_text_replacement_offsets"] = True
        try:
            output = dict(self.processor(text=[prompt.text], return_tensors="pt", **inputs, **options))
        except Exception as error:
            kind = BrokenItemError if inputs else ValueError  # an image of no height, an audio clip of no length, ...
            named = [name_of(v, m) for m, values in prompt.items.items() for v in values]
            what = f"{where} ({', '.join(named)})" if named else where
            raise kind(f"{what}: {type(self.processor).__name__} refuses it: {error}") from error
        offsets, replaced = output.pop("offset_mapping", None), output.pop("text_replacement_offsets", None)
        if prompt.spans is not None:
            if offsets is None or (prompt.items and not replaced):
                raise UnsupportedError(
                    f"{where}: {type(self.processor).__name__} does not tell where its tokens stand in the text, so "
                    f"train_on={self.train_on!r} is impossible: use a fast tokenizer, or give `labels`."
                )
            output["assistant_masks"] = _token_mask(offsets[0], prompt.spans, replaced[0] if replaced else [])
        return output

    def text_options(self, prompt: Prompt) -> dict[str, Any]:
        """A template that begins with the first token of the tokenizer has put it there itself."""
        begin = getattr(self.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if begin and prompt.text.startswith(begin) else {}

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    def _template(self, tools: bool) -> Any:
        own = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(own, Mapping):
            return own["tool_use"] if tools and "tool_use" in own else own.get("default")
        return own

    def _takes(self, tools: bool) -> frozenset[str]:
        """Names that the chat template reads beside the messages."""
        template = self._template(tools)
        if not isinstance(template, str):
            return frozenset()
        return hf.template_variables(template) - _SET - set(self.tokenizer.special_tokens_map)

    def _spans(
        self, where: str, messages: list[dict[str, Any]], text: str, layout: Layout, options: Mapping[str, Any]
    ) -> list[tuple[int, int]]:
        """Characters of the chosen turns: those that the template marks as generated, or else what a turn adds to the
        conversation before it."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [index for index in turns if index >= layout.begin]
        if not turns:
            raise ValueError(
                f"{where}: train_on={self.train_on!r} and no turn of the assistant (roles: "
                f"{', '.join(sorted({str(message['role']) for message in messages}))}): choose train_on='all', or "
                "remove the sample."
            )
        wanted = turns[-1:] if self.train_on == "last" else turns
        template = self._template(options.get("tools") is not None)
        if isinstance(template, str) and _GENERATION.search(template):
            spans = _marked_spans(self.tokenizer, template, messages, options)
            if not spans:
                raise ValueError(f"{where}: the template marks no turn as generated: choose train_on='all'.")
            return spans[-len(wanted) :] if self.train_on == "last" or layout.begin else spans
        return [self._span(where, messages, index, text, options) for index in wanted]

    def _span(
        self, where: str, messages: list[dict[str, Any]], index: int, text: str, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Characters of one turn. The generation prompt may say more than the turn has (an opened thought)."""
        before = self._render(messages[:index], **options) if index else ""
        prompt = self._render(messages[:index], add_generation_prompt=True, **options) if index else ""
        after = self._render(messages[: index + 1], **options)
        begin = len(os.path.commonprefix([prompt, after]))
        if not (text.startswith(after) and begin >= len(before)):
            earlier = "" if self.train_on == "last" else "choose train_on='last', whose turn nothing rewrites, "
            raise UnsupportedError(
                f"{where}: the chat template does not build turn {index} on the turns before it, or rewrites it for "
                f"those behind, so train_on={self.train_on!r} cannot find it: {earlier}mark the turns with "
                "{% generation %} in the template, or give `labels`."
            )
        return begin, len(after.rstrip())


def sampling_rate(processor: object) -> int:
    """Samples a second that the processor's feature extractor takes."""
    maker = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None) or processor
    rate = getattr(maker, "sampling_rate", None)
    if not isinstance(rate, int):
        raise UnsupportedError(
            f"{type(processor).__name__} takes no audio clips: it has no feature extractor with a sampling rate."
        )
    return rate


def _given_items(where: str, sample: Mapping[str, Any]) -> dict[str, list[Any]]:
    given: dict[str, list[Any]] = {}
    for name, modality in RAW_COLUMNS.items():
        value: Any = sample.get(name)
        many = isinstance(value, list | tuple) and name.endswith("s")
        values = [one for one in (value if many else [value]) if not _is_nothing(one)]
        if not values:
            continue
        if modality == "video":
            raise UnsupportedError(
                f"{where}: videos (`{name}`) are not decoded here: run the processor on them first (dataset.map; the "
                "video processors of transformers need torchvision) and pass what it makes, such as "
                "`pixel_values_videos` and `video_grid_thw`, or give some frames as `images`."
            )
        given[modality] = [*given.get(modality, []), *values]
    return given


def _is_nothing(value: object) -> bool:
    """None, or what arrow makes of it in a column of files."""
    return value is None or (isinstance(value, Mapping) and all(inner is None for inner in value.values()))


def _plain_messages(
    where: str, messages: Sequence[Mapping[str, Any]], given: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Messages without item values and empty keys (arrow gives every part the keys of all), and the items in order."""
    waiting = {modality: iter(values) for modality, values in given.items()}
    items: dict[str, list[Any]] = {}
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [{key: value for key, value in part.items() if value is not None} for part in content]
            for part in parts:
                kind = part.get("type", "text")
                if kind in _KINDS[1:]:
                    items.setdefault(kind, []).append(_value(where, part, kind, waiting))
                elif kind in _FOREIGN:
                    raise UnsupportedError(
                        f"{where}: a part of type '{kind}' in `messages` is not read here: give {{'type': "
                        f"'{_FOREIGN[kind]}', 'path': ...}}, with a path or bytes."
                    )
            content = [
                {k: v for k, v in p.items() if k in _KEPT or p.get("type", "text") not in _KINDS} for p in parts
            ]
        kept = {key: without_none(value) for key, value in message.items() if value is not None and key != "content"}
        plain.append(kept | {"content": content})
    for modality, values in given.items():
        if left := len(list(waiting[modality])):
            raise ValueError(
                f"{where}: {len(values)} items in its columns of {modality}s and only {len(values) - left} parts of "
                f"type '{modality}' without a value in `messages`: they must be equally many."
            )
    if "video" in items:
        _given_items(where, {"videos": items["video"]})
    return plain, items


def _value(where: str, part: dict[str, Any], kind: str, waiting: dict[str, Any]) -> Any:
    for key in (kind, *_VALUE_KEYS):
        if key in part:
            return part[key]
    value = next(waiting.get(kind, iter(())), None)
    if value is None:
        raise ValueError(
            f"{where}: a part of type '{kind}' in `messages` has no value, and no column `{kind}s` either."
        )
    return value


def _marked_spans(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return [(int(begin), int(end)) for begin, end in spans[0]]


def _token_mask(
    offsets: object, spans: Sequence[tuple[int, int]], replaced: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """1 for tokens in the spans, [1, T].

    Args:
        offsets: begin and end of each token in the text after placeholders were expanded, [T, 2].
        spans: characters of the text before.
        replaced: `span` and `new_span` of each placeholder, in order.
    """
    ends = [each["span"][1] for each in replaced]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replaced)]
    begin, end = np.asarray(offsets).T
    mask = np.zeros(len(begin), dtype=np.int64)
    for span in spans:
        first, last = (char + gained[int(np.searchsorted(ends, char, side="right"))] for char in span)
        mask |= (begin < last) & (end > first)
    return torch.from_numpy(mask)[None]
