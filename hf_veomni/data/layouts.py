"""The layouts of raw samples that people have, read as one: messages, or bare text.

    messages               [{"role": "user", "content": "... or parts"}, ...]
    conversations          LLaVA's [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]
    prompt and completion  TRL's, strings or lists of messages
    text                   with the processor's own placeholders

Items may stand in columns and their places be marked by `<image>` and `<audio>` in contents that are strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYOUTS = ("messages", "conversations", "prompt", "completion", "text")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
_MARKS = {"image": "<image>", "audio": "<audio>"}


@dataclass(frozen=True)
class Layout:
    """A raw sample as messages or text.

    Attributes:
        messages: or None for a text.
        text: "" for messages.
        begin: messages, or characters of the text, that are a prompt and no target where turns are chosen.
        completes: whether the sample has a prompt and its completion.
    """

    messages: list[dict[str, Any]] | None
    text: str = ""
    begin: int = 0
    completes: bool = False


def read_layout(where: str, sample: Mapping[str, Any]) -> Layout:
    """Find the layout of a sample.

    Raises:
        ValueError: none of them, several, or one whose parts are of other types; it says how to convert.
    """
    found = [name for name in _LAYOUTS if name in sample]
    if len(found) > 1 and found != ["prompt", "completion"]:
        raise ValueError(
            f"{where} has {' and '.join(f'`{name}`' for name in found)}, of which one is read: remove the rest."
        )
    if found == ["messages"]:
        return Layout(_turns(where, "messages", sample["messages"]))
    if found == ["conversations"]:
        turns = _turns(where, "conversations", sample["conversations"])
        return Layout([_message(where, turn) for turn in turns])
    if found == ["text"] and isinstance(sample["text"], str):
        return Layout(None, sample["text"])
    if found in (["prompt"], ["completion"]):
        raise ValueError(f"{where} has `{found[0]}` alone: give both `prompt` and `completion`, or `messages`.")
    if len(found) == 2:
        prompt, completion = sample["prompt"], sample["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Layout(None, prompt + completion, len(prompt), completes=True)
        if not isinstance(prompt, str) and not isinstance(completion, str):
            begin = _turns(where, "prompt", prompt)
            return Layout([*begin, *_turns(where, "completion", completion)], "", len(begin), completes=True)
        raise ValueError(f"{where}: `prompt` and `completion` must both be strings, or both lists of messages.")
    raise ValueError(
        f"{where}: a raw sample needs `messages`, a string in `text`, `conversations`, or `prompt` and `completion`; "
        "convert others with dataset.map."
    )


def _turns(where: str, name: str, value: Any) -> list[Any]:
    """A column of turns, checked to be a list of mappings."""
    if isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value):
        return list(value)
    kinds = {type(turn).__name__: None for turn in value} if isinstance(value, list | tuple) else ()
    found = f"a list of {', '.join(kinds)}" if kinds else type(value).__name__
    raise ValueError(
        f"{where}: `{name}` is {found}, and must be a list of turns, each a mapping as "
        "{'role': 'user', 'content': '...'}. Of a dataset that hands out batches (`dataset.batch`) give the one "
        "before it, whose rows are single samples; convert others with dataset.map."
    )


def _message(where: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" not in turn or "value" not in turn:
        if turn.get("role") is None:
            raise ValueError(f"{where}: a turn of `conversations` has {list(turn)}, and must have 'from' and 'value'.")
        return dict(turn)
    role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ValueError(
            f"{where}: 'from' ({turn['from']!r}) in `conversations` must be one of {', '.join(map(repr, _ROLES))}: "
            "convert the sample to `messages` with dataset.map."
        )
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": role, "content": turn["value"]} | rest


def _content(where: str, message: Mapping[str, Any]) -> Any:
    """The content of a turn. `datasets` reads a string that happens to be JSON as what it says ("42" as 42), where it
    keeps a column as JSON text; of integers and truth values the string is known."""
    content = message.get("content")
    if isinstance(content, bool | int):
        return json.dumps(content)
    parts = content if isinstance(content, list | tuple) else ()
    said = content is not None or any(value is not None for key, value in message.items() if key != "role")
    if isinstance(content, float | Mapping) or not all(isinstance(part, Mapping) for part in parts) or not said:
        raise ValueError(
            f"{where}: a turn of {message.get('role')!r} has the content {content!r}, and must have a string or a "
            "list of parts. `datasets` reads strings that are JSON as what they say: read such a file by lines with "
            "json.loads, and hand the samples over in a list."
        )
    return content


def with_parts(
    where: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Messages with a part for each item of the columns whose place is marked in a content that is a string.

    Raises:
        ValueError: no turns, a turn without a role, other numbers of marks and items.
    """
    nameless = next((message for message in messages if not isinstance(message.get("role"), str)), None)
    if nameless is not None or not messages:
        found = (
            "there are none" if nameless is None else f"one has {list(nameless)}, and role {nameless.get('role')!r}"
        )
        raise ValueError(f"{where}: turns must have a string as 'role', and {found}.")
    messages = [dict(message) | {"content": _content(where, message)} for message in messages]
    strings = [message["content"] for message in messages if isinstance(message["content"], str)]
    marks = {}
    for kind, values in given.items():
        count = sum(text.count(_MARKS.get(kind, "\0")) for text in strings)
        parts = sum(_parts_without_value(message["content"], kind) for message in messages)
        if count and count + parts != len(values):
            raise ValueError(
                f"{where}: {len(values)} items in its columns of {kind}s and {count} marks {_MARKS[kind]}"
                + (f" beside {parts} parts" if parts else "")
                + " in `messages`: they must be equally many."
            )
        if count:
            marks[_MARKS[kind]] = kind
    if not marks:
        return messages
    pattern = re.compile(f"({'|'.join(map(re.escape, marks))})")
    return [message | _split(message["content"], pattern, marks) for message in messages]


def _split(content: object, pattern: re.Pattern[str], marks: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(content, str) or not pattern.search(content):
        return {}
    pieces = [piece for piece in pattern.split(content) if piece]
    return {"content": [{"type": marks[p]} if p in marks else {"type": "text", "text": p} for p in pieces]}


def _parts_without_value(content: Any, kind: str) -> int:
    if isinstance(content, str) or content is None:
        return 0
    return sum(part.get("type") == kind and all(part.get(k) is None for k in part if k != "type") for part in content)


def template_options(where: str, extra: Mapping[str, Any], takes: frozenset[str]) -> dict[str, Any]:
    """What goes to the chat template of the columns beside a conversation, and of `chat_template_kwargs` among them.

    Args:
        takes: names that the template reads.

    Raises:
        ValueError: a name that it does not read, or tools that are no list.
    """
    options = {name: value for name, value in extra.items() if name != "chat_template_kwargs"}
    kwargs = extra.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"{where}: `chat_template_kwargs` ({type(kwargs).__name__}) must be a mapping of names to values."
        )
    options |= {name: value for name, value in kwargs.items() if value is not None}
    for name in options:
        if name not in takes:
            known = f"it reads {', '.join(sorted(takes))}" if takes else "it reads nothing else, or there is none"
            raise ValueError(
                f"{where}: `{name}` would be lost: the chat template does not read it ({known}). Remove it "
                f"(dataset.remove_columns('{name}')), or name it in `item_columns` if it holds items of the sample."
            )
    if isinstance(options.get("tools"), str):
        try:
            options["tools"] = json.loads(options["tools"])
        except ValueError as error:
            raise ValueError(f"{where}: `tools` is a string that is no JSON: {error}") from error
    return {name: without_none(value) for name, value in options.items()}


def without_none(value: object) -> Any:
    """Without the keys of nothing that arrow adds: it gives every structure of a column the keys of all."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value
