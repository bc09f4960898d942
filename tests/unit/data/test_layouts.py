"""Layouts of raw samples that people have, what stands beside them, and the turns that are chosen."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_veomni.data import OmniDataCollatorWithPacking, pack_dataset
from tests import processors
from tests.multimodal import pictures, qwen2_5_vl

# Qwen3's manner: thoughts of earlier turns are left out, and the generation prompt may say more than the turn has.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content is defined and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}({{ t.function.parameters | tojson }}){% endfor %}]"
    "{% endif %}"
    "{{ system_note }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def qwen():
    return qwen2_5_vl()[1:]


def tokenizer(template: str):
    made = processors.byte_tokenizer()
    made.chat_template = template
    return made


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


PARTS = [
    {"role": "system", "content": "Look."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
    {"role": "assistant", "content": "A nought."},
]
MARKED = [PARTS[0], {"role": "user", "content": "<image>\nWhat?"}, PARTS[2]]
LAYOUTS = {
    "llava": {
        "conversations": [
            {"from": "system", "value": "Look."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A nought."},
        ]
    },
    "roles": {"conversations": MARKED},
    "marks": {"messages": MARKED},
    "completion": {"prompt": PARTS[:2], "completion": PARTS[2:]},
    "completion and marks": {"prompt": MARKED[:2], "completion": MARKED[2:]},
}


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_as_messages(qwen, layout, column):
    config, processor = qwen
    items = {column: pictures()[0] if column == "image" else [pictures()[0]]}
    for train_on in ("all", "assistant", "last"):
        collator = OmniDataCollatorWithPacking(None, processor, model_config=config, train_on=train_on)
        assert same(collator([LAYOUTS[layout] | items]), collator([{"messages": PARTS} | items]))
    source = Dataset.from_list([LAYOUTS[layout] | {column: str(column)}], on_mixed_types="use_json")
    with pytest.raises(ValueError, match="'images?' is no image"):  # it got as far as the file
        pack_dataset(source, 200, processor=processor)


def test_prompts_and_completions_of_text():
    collator = OmniDataCollatorWithPacking(None, processors.byte_tokenizer(), train_on="assistant")
    row = collator([{"prompt": "One and ", "completion": "one is two"}])
    assert collator.processor.decode(row["labels"][0][row["labels"][0] != -100]) == "one is two"
    assert collator.processor.decode(row["input_ids"][0]) == "One and one is two"
    talk = {"prompt": [*TALK, TALK[0]], "completion": TALK[1:]}
    for marked in (False, True):
        made = tokenizer(processors.chat_template(marked=marked))
        row = OmniDataCollatorWithPacking(None, made, train_on="assistant")([talk])
        assert made.decode(row["labels"][0][row["labels"][0] != -100]) == "Yes<|im_end|>"


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"prompt": "a"}, "has `prompt` alone: give both `prompt` and `completion`"),
        ({"prompt": "a", "completion": TALK}, "must both be strings, or both lists"),
        ({"messages": TALK, "text": "a"}, "has `messages` and `text`, of which one is read"),
        (
            {"conversations": [{"from": "me", "value": "a"}]},
            r"'from' \('me'\) in `conversations` must be one of 'human'",
        ),
        ({"conversations": [{"text": "a"}]}, r"has \['text'\], and must have 'from' and 'value'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"'from' \(\['human'\]\) in `conversations`"),
        (
            {"messages": [TALK, TALK]},
            r"`messages` is a list of list, and must be a list of turns.*before it, whose rows",
        ),
        ({"messages": ["a"]}, "`messages` is a list of str, and must be a list of turns"),
        ({"messages": "a"}, "`messages` is str, and must be a list of turns"),
        ({"messages": TALK[0]}, "`messages` is dict, and must be a list of turns"),
        ({"messages": [("user", "a")]}, "`messages` is a list of tuple, and must be a list of turns"),
        ({"conversations": [["a"]]}, "`conversations` is a list of list, and must be a list of turns"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "`prompt` is a list of str, and must be a list of turns"),
        ({"prompt": TALK[:1], "completion": TALK[1]}, "`completion` is dict, and must be a list of turns"),
        ({"messages": [{"content": "a"}]}, r"must have a string as 'role', and one has \['content'\], and role None"),
        ({"input_ids": [[3, 4], [5]]}, "`input_ids` must be one number a token"),
        ({"messages": []}, "must have a string as 'role', and there are none"),
        ({"messages": MARKED, "images": [1, 2]}, "2 items in its columns of images and 1 marks <image>"),
        ({"messages": TALK, "labels": [1]}, "`labels` would be lost: the chat template does not read it"),
        ({"text": "a", "tools": []}, "`tools` would be lost"),
        ({"messages": TALK, "tools": "{"}, "`tools` is a string that is no JSON"),
        (
            {"messages": TALK, "chat_template_kwargs": {"loud": 1}},
            r"`loud` would be lost: .* \(it reads system_note, tools\)",
        ),
    ],
)
def test_what_no_layout_has_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        OmniDataCollatorWithPacking(None, tokenizer(TOOLS))([sample])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row", [{"messages": TALK}, {"conversations": MARKED[1:]}, {"prompt": "a", "completion": "b"}]
)
def test_a_dataset_that_hands_out_batches_is_refused(row, streaming):
    source: Any = Dataset.from_list([row] * 4)
    source = source.to_iterable_dataset() if streaming else source
    with pytest.raises(ValueError, match="is a list of .* and must be a list of turns.*`dataset.batch`.*before it"):
        list(pack_dataset(source.batch(2), 200, processor=tokenizer(TOOLS)))


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"where": "here"}}}
OTHER = {"type": "function", "function": {"name": "go", "parameters": {"far": True}}}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_template_reads_goes_to_it(streaming):
    made = tokenizer(TOOLS)
    samples = [
        {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"system_note": "!"}},
        {"messages": TALK, "tools": [OTHER], "chat_template_kwargs": {"system_note": "?"}},
        {"messages": TALK, "tools": [], "chat_template_kwargs": None},
    ]
    wanted = [
        made.apply_chat_template(s["messages"], tools=s["tools"], tokenize=False, **(s["chat_template_kwargs"] or {}))
        for s in samples
    ]
    assert "look" in wanted[0] and wanted[1].endswith("<|im_end|>\n") and "?" in wanted[1]
    collator = OmniDataCollatorWithPacking(None, made)
    assert [made.decode(collator([sample])["input_ids"][0]) for sample in samples] == wanted
    source = Dataset.from_list(samples)
    packed = pack_dataset(source.to_iterable_dataset() if streaming else source, 400, processor=made)
    (row,) = packed
    row = collator([row])
    ends = [*(row["position_ids"][0] == 0).nonzero().flatten().tolist(), row["input_ids"].shape[1]]
    found = [made.decode(row["input_ids"][0, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    assert sorted(found) == sorted(wanted)
    assert {"tools", "chat_template_kwargs", "system_note"} <= set(collator.reads)
    one = {"messages": TALK, "system_note": "a column of its own"}
    assert made.decode(collator([one])["input_ids"][0]).startswith("a column of its own<|im_start|>")


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nobody_reads_are_refused_where_rows_are_packed(qwen, streaming):
    for sample, name in (
        ({"messages": TALK, "source": "web"}, "source"),
        ({"messages": TALK, "tools": [TOOL]}, "tools"),
        ({"input_ids": [1, 2], "image_grid_thw": [[1, 2, 2]], "aspect_ratio_ids": [1]}, "aspect_ratio_ids"),
    ):
        source = Dataset.from_list([sample])
        source = source.to_iterable_dataset() if streaming else source
        with pytest.raises(ValueError, match=rf"`{name}` would be lost.*remove_columns\(\['{name}'\]\)"):
            list(pack_dataset(source, 200, processor=tokenizer(processors.chat_template())))


def test_the_last_turn_is_found_where_earlier_ones_are_rewritten():
    made = tokenizer(THINKS)
    turns = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "A", "reasoning_content": "hm"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "B", "reasoning_content": "so"},
    ]
    for options in ({}, {"enable_thinking": False}):
        row = OmniDataCollatorWithPacking(None, made, train_on="last")([{"messages": turns, **options}])
        assert made.decode(row["labels"][0][row["labels"][0] != -100]) in (
            "<think>so</think>B<|im_end|>",
            "so</think>B<|im_end|>",
        )
    with pytest.raises(ValueError, match=re.escape("choose train_on='last', whose turn nothing rewrites")):
        OmniDataCollatorWithPacking(None, made, train_on="assistant")([{"messages": turns}])
    with pytest.raises(ValueError, match="rewrites it for those behind"):  # the last turn, rewritten too
        OmniDataCollatorWithPacking(None, made, train_on="last")([{"messages": [*turns, turns[0]]}])
