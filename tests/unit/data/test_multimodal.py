"""Samples with images, videos and audio in one row: positions, placeholders, columns of items, labels."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from hf_veomni.data import OmniDataCollatorWithPacking, unpack
from tests import processors
from tests.multimodal import build, pictures, qwen2_5_vl, qwen2_audio, samples_of, sounds

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


@pytest.fixture(scope="module")
def qwen():
    return qwen2_5_vl()[1:]


def ids_of(tokenizer, *pieces):
    """Token ids of text, or of a placeholder repeated: ("text", (IMAGE, 4), ...)."""
    text = "".join(piece if isinstance(piece, str) else piece[0] * piece[1] for piece in pieces)
    return tokenizer(text)["input_ids"]


def picture_sample(tokenizer, grids, words=5):
    """A processed sample: for each grid [t, h, w] its placeholders and random patches."""
    tokens = [int(np.prod(grid)) // 4 for grid in grids]
    parts = [part for count in tokens for part in ("a" * words, START, (IMAGE, count), END)]
    patches = sum(map(int, np.prod(grids, axis=1))) if len(grids) else 0
    sample = {"input_ids": ids_of(tokenizer, *parts, "b" * words)}
    if len(grids):
        sample |= {"pixel_values": torch.randn(patches, 96), "image_grid_thw": torch.tensor(grids)}
    return sample


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_the_model(family):
    model, processor = build(family)
    tokenizer, config = processor.tokenizer, model.config
    frames = 1 if family == "qwen2_5_vl" else 3  # Qwen3-VL puts time stamps between the frames
    video = [part for _ in range(frames) for part in ("t", START, (VIDEO, 6 if frames == 3 else 18), END)]
    samples = [
        {"input_ids": ids_of(tokenizer, "only words")},
        picture_sample(tokenizer, [[1, 4, 6], [1, 2, 8]]),
        {
            "input_ids": ids_of(tokenizer, "see ", *video, "then ", START, (IMAGE, 4), END),
            "pixel_values_videos": torch.randn(72, 96),
            "video_grid_thw": torch.tensor([[3, 4, 6]]),
            "second_per_grid_ts": [1.5],
            "pixel_values": torch.randn(16, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ]
    row = OmniDataCollatorWithPacking(model_config=config, pad_to_multiple_of=16)(samples)
    length = row["input_ids"].shape[1]
    assert row["position_ids"].shape == (4, 1, length) and length % 16 == 0
    begin = 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        columns = {key: torch.as_tensor(value) for key, value in sample.items() if key.endswith(("thw", "ts"))}
        wanted = model.model.get_rope_index(ids, mm_token_type_ids=types, **columns)[0]
        found = row["position_ids"][..., begin : begin + ids.shape[1]]
        assert torch.equal(found[1:], wanted)
        assert found[0, 0].tolist() == list(range(ids.shape[1]))
        begin += ids.shape[1]
    assert row["position_ids"][:, 0, begin:].tolist() == [list(range(length - begin))] * 4


def test_positions_of_sounds_are_those_of_the_model():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 16}
    audio = {"encoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 16}
    text = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"audio_token_id": 300, "image_token_id": 301, "video_token_id": 302, "audio_start_token_id": 303}
    tokens |= {"audio_end_token_id": 304, "vision_start_token_id": 305, "vision_end_token_id": 306}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = Qwen2_5OmniThinkerConfig(
        text_config=text, audio_config=audio | {"num_mel_bins": 8}, vision_config=vision, **tokens
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    ids = [1, 2, 303, *[300] * 5, 304, 3, 305, *[301] * 4, 306, 4]
    mask = torch.ones(1, 20, dtype=torch.long)
    heard = {"input_ids": [7, 303, *[300] * 5, 304], "input_features": torch.randn(1, 8, 20)}
    both = {"input_ids": ids, "input_features": torch.randn(1, 8, 20), "feature_attention_mask": mask}
    both |= {"pixel_values": torch.randn(16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    row = OmniDataCollatorWithPacking(model_config=config)([both, heard | {"feature_attention_mask": mask}])
    wanted = model.get_rope_index(
        torch.tensor([ids]),
        image_grid_thw=both["image_grid_thw"],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        audio_seqlens=mask.sum(-1),
    )[0]
    assert torch.equal(row["position_ids"][1:, :, : len(ids)], wanted)
    assert row["position_ids"][:, 0, len(ids) :].tolist() == [list(range(8))] * 4
    assert row["input_features"].shape == (2, 8, 20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3), min_size=1, max_size=5))
def test_items_and_tokens_keep_their_order(qwen, shapes):
    config, processor = qwen
    samples = [picture_sample(processor.tokenizer, [[1, 2 * h, 2 * w] for h, w in grids]) for grids in shapes]
    row = OmniDataCollatorWithPacking(model_config=config)(samples)
    for name in ("pixel_values", "image_grid_thw"):
        parts = [sample[name] for sample in samples if name in sample]
        assert (name in row) == bool(parts)
        assert not parts or torch.equal(row[name], torch.cat(parts))
    assert row["input_ids"][0].tolist() == [token for sample in samples for token in sample["input_ids"]]
    documents = unpack(row)
    assert [document["input_ids"].tolist() for document in documents] == [s["input_ids"] for s in samples]
    assert all(document["position_ids"].shape == (4, len(document["labels"])) for document in documents)
    labels = row["labels"][0]
    assert (labels[row["input_ids"][0] == config.image_token_id] == -100).all()
    assert int((labels == -100).sum()) == sum(
        1 + sample["input_ids"].count(config.image_token_id) for sample in samples
    )


def test_processor_output_goes_in_as_it_is(qwen):
    config, processor = qwen
    outputs = [
        processor(text=[s["text"]], images=[s["images"]] if "images" in s else None, return_tensors="pt")
        for s in samples_of("qwen2_5_vl")
    ]
    given_row = OmniDataCollatorWithPacking(model_config=config)(outputs)
    raw_row = OmniDataCollatorWithPacking(processor=processor, model_config=config)(samples_of("qwen2_5_vl"))
    assert given_row.keys() == raw_row.keys()
    assert all(torch.equal(given_row[name], raw_row[name]) for name in raw_row)
    assert given_row["mm_token_type_ids"].shape == given_row["input_ids"].shape


def test_pictures_behind_an_axis_of_rows_are_joined_and_padded():
    processor = processors.idefics()
    collator = OmniDataCollatorWithPacking(processor=processor)
    samples = [{"text": "<image>", "images": [picture]} for picture in pictures()[:2]]
    alone, row = [collator([sample]) for sample in samples], collator(samples)
    assert [part["pixel_values"].shape[1] for part in alone] == [5, 5]
    assert torch.equal(row["pixel_values"], torch.cat([part["pixel_values"] for part in alone], dim=1))
    small = {name: value[..., :16, :] for name, value in alone[0].items() if name.startswith("pixel")}
    small = {"input_ids": alone[0]["input_ids"], **small}
    mixed = OmniDataCollatorWithPacking()([small, {k: v for k, v in alone[1].items() if k in small}])
    assert mixed["pixel_values"].shape == (1, 10, 3, 32, 32)
    assert not mixed["pixel_attention_mask"][0, :5, 16:].any() and mixed["pixel_attention_mask"][0, 5:, 16:].all()


def test_sounds_of_other_lengths_are_filled_up_where_a_mask_tells():
    lengths = [30, 50]
    samples = [{"input_ids": [1], "input_features": torch.ones(1, 4, n)} for n in lengths]
    with pytest.raises(
        ValueError, match=r"`input_features` has shape \[1, 4, 30\] in sample 0 .* mask of the padding"
    ):
        OmniDataCollatorWithPacking()(samples)
    masked = [s | {"feature_attention_mask": torch.ones(1, n)} for s, n in zip(samples, lengths, strict=True)]
    row = OmniDataCollatorWithPacking()(masked)
    assert row["input_features"].shape == (2, 4, 50) and row["input_features"][0].sum() == 4 * 30
    assert row["feature_attention_mask"].sum(-1).tolist() == [30, 50]
    with pytest.raises(ValueError, match="sample 1 of the batch: `feature_attention_mask` is missing here"):
        OmniDataCollatorWithPacking()([masked[0], samples[1]])


def test_misaligned_features_name_sample_modality_and_counts(qwen):
    config, processor = qwen
    good = picture_sample(processor.tokenizer, [[1, 4, 4]])
    cases = {
        r"sample 1 of the batch: 3 image placeholder tokens \(\d+\) in `input_ids` and 4 image features": good
        | {"input_ids": ids_of(processor.tokenizer, START, (IMAGE, 3), END)},
        r"sample 1 of the batch: 4 image placeholder tokens .* and 0 image features": {"input_ids": good["input_ids"]},
        r"sample 1 of the batch: 0 image placeholder tokens .* and 4 image features": good | {"input_ids": [1, 2]},
        r"`pixel_values` has 15 image patches and `image_grid_thw` describes 16": good
        | {"pixel_values": good["pixel_values"][1:]},
        r"sample 1 of the batch: 2 video placeholder tokens .* and 0 video features": good
        | {"input_ids": [*good["input_ids"], *[config.video_token_id] * 2]},
    }
    collator = OmniDataCollatorWithPacking(model_config=config)
    collator([good, good])
    for message, sample in cases.items():
        with pytest.raises(ValueError, match=message):
            collator([good, sample])


def test_misaligned_sounds_and_tiles_are_named():
    _, config, processor = qwen2_audio()
    encoded = dict(
        processor(text=[f"a {processors.SOUND}"], audio=[sounds()[0]], sampling_rate=16_000, return_tensors="pt")
    )
    tokens = int((encoded["input_ids"] == config.audio_token_index).sum())
    short = encoded | {"feature_attention_mask": encoded["feature_attention_mask"].clone()}
    short["feature_attention_mask"][0, 20:] = 0
    collator = OmniDataCollatorWithPacking(model_config=config)
    collator([encoded])
    with pytest.raises(ValueError, match=rf"{tokens} audio placeholder tokens .* and 5 audio features"):
        collator([short])
    model, processor = build("idefics3")
    encoded = dict(processor(text=["<image>"], images=[[pictures()[1]]], return_tensors="pt"))
    for key in ({"model_config": model.config}, {"processor": processor}):
        collator = OmniDataCollatorWithPacking(**key)
        collator([encoded])
        cut = encoded | {name: encoded[name][:, 1:] for name in ("pixel_values", "pixel_attention_mask")}
        with pytest.raises(ValueError, match=r"20 image placeholder tokens .* and 16 image features"):
            collator([cut])


def test_what_cannot_be_packed_is_refused(qwen):
    config, processor = qwen
    sample = picture_sample(processor.tokenizer, [[1, 4, 4]])
    collator = OmniDataCollatorWithPacking()
    for bad, message in (
        (sample, "has `image_grid_thw` and no `position_ids`.* give `model_config=model.config`, or `get_pos_id`"),
        (sample | {"aspect_ratio_ids": [1]}, "key `aspect_ratio_ids` that cannot be packed.*in `item_columns`"),
        (sample | {"pixel_values": [[1.0], [1.0, 2.0]]}, "`pixel_values` is no array of numbers but list"),
        (sample | {"document_lengths": [1, len(sample["input_ids"]) - 1]}, "pixel_values, .* beside 2 documents"),
    ):
        with pytest.raises(ValueError, match=message):
            collator([bad])
    broken = OmniDataCollatorWithPacking(get_pos_id=lambda input_ids: input_ids + 1)
    with pytest.raises(ValueError, match="first axis does not count 0, 1, 2"):
        broken([{"input_ids": [5, 6]}])
    with pytest.raises(ValueError, match=re.escape("`on_error` ('ignore') must be one of 'raise', 'skip'")):
        OmniDataCollatorWithPacking(on_error="ignore")


def test_further_columns_and_positions_of_ones_own():
    seen = []

    def get_pos_id(input_ids, latents=None, **features):
        seen.append((input_ids.tolist(), latents))
        return torch.arange(input_ids.shape[1])[None]

    collator = OmniDataCollatorWithPacking(get_pos_id=get_pos_id, item_columns=["latents"])
    row = collator([{"input_ids": [5, 6], "latents": [[1.0], [2.0]]}, {"input_ids": [7]}])
    assert row["latents"].tolist() == [[1.0], [2.0]] and row["position_ids"].tolist() == [[0, 1, 0]]
    assert [ids for ids, _ in seen] == [[[5, 6]], [[7]]] and seen[1][1] is None


MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}],
    },
    {"role": "assistant", "content": "A digit."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "A nought."},
]


@pytest.mark.parametrize("marked", [False, True], ids=["by turns", "by marks"])
@pytest.mark.parametrize(
    "train_on, expected", [("assistant", "A digit.<|im_end|>A nought.<|im_end|>"), ("last", "A nought.<|im_end|>")]
)
def test_labels_are_left_on_chosen_turns(qwen, marked, train_on, expected):
    processor = processors.qwen_vl(marked=marked)
    collator = OmniDataCollatorWithPacking(processor=processor, model_config=qwen[0], train_on=train_on)
    sample = {"messages": MESSAGES, "images": [pictures()[0]]}
    row = collator([sample, sample])
    kept = row["labels"][0][row["labels"][0] != -100]
    assert processor.tokenizer.decode(kept) == expected * 2
    assert torch.equal(kept, row["input_ids"][0][row["labels"][0] != -100])


def test_parts_of_messages_that_are_not_known_are_kept_or_refused(qwen):
    collator = OmniDataCollatorWithPacking(processor=processors.qwen_vl(), model_config=qwen[0])
    for kind, read_as in (("image_url", "image"), ("input_audio", "audio")):
        with pytest.raises(ValueError, match=f"type '{kind}' .* is not read here: give .*'{read_as}', 'path'"):
            collator([{"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": "a"}}]}]}])
    processor = processors.qwen_vl()
    processor.chat_template = "{% for p in messages[0]['content'] %}{{ p['type'] }} {{ p['thinking'] }}{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "text": None}]}]
    row = OmniDataCollatorWithPacking(processor=processor)([{"messages": messages}])
    assert processor.tokenizer.decode(row["input_ids"][0]) == "thinking hm"


def test_numbers_of_items_keep_their_fractions():
    samples = [{"input_ids": [1], "second_per_grid_ts": [1]}, {"input_ids": [2], "second_per_grid_ts": [0.5]}]
    assert OmniDataCollatorWithPacking()(samples)["second_per_grid_ts"].tolist() == [1, 0.5]


def test_columns_of_none_are_columns_that_a_sample_lacks(qwen):
    config, processor = qwen
    union = dict.fromkeys(("input_ids", "labels", "text", "images", "pixel_values", "image_grid_thw"))
    words, seen = {"input_ids": [1, 2], "labels": [-100, 2]}, samples_of("qwen2_5_vl")[0]
    collator = OmniDataCollatorWithPacking(processor=processor, model_config=config)
    wanted, found = collator([words, seen]), collator([union | words, union | seen])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="`labels` is missing here or elsewhere"):
        collator([words, {"input_ids": [3]}])


def test_given_assistant_masks_choose_labels():
    samples = [{"input_ids": [1, 2, 3, 4], "assistant_masks": [0, 0, 1, 1]}, {"input_ids": [5, 6]}]
    row = OmniDataCollatorWithPacking()(samples)
    assert row["labels"].tolist() == [[-100, -100, 3, 4, -100, 6]] and "assistant_masks" not in row


def test_chosen_turns_that_cannot_be_found_are_refused(qwen):
    processor = processors.qwen_vl()
    collator = OmniDataCollatorWithPacking(processor=processor, train_on="assistant")
    with pytest.raises(ValueError, match="needs the turns of `messages`, and the sample has `text`"):
        collator([{"text": "a"}])
    with pytest.raises(ValueError, match="no turn of the assistant"):
        collator([{"messages": MESSAGES[2:3]}])
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{{ messages | length }}{% endfor %}"
    with pytest.raises(ValueError, match="does not build turn 1 on the turns before it"):
        collator([{"messages": MESSAGES[2:]}])
    with pytest.raises(ValueError, match="2 items in its columns of images and only 1 parts of type 'image'"):
        OmniDataCollatorWithPacking(processor=processors.qwen_vl())([{"messages": MESSAGES, "images": pictures()[:2]}])
    with pytest.raises(ValueError, match="a part of type 'image' in `messages` has no value"):
        OmniDataCollatorWithPacking(processor=processors.qwen_vl())([{"messages": MESSAGES}])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_counted_and_named(qwen, tmp_path, workers):
    from PIL import Image

    config, processor = qwen
    files = []
    for index, picture in enumerate(pictures()):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture).save(files[-1])
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    samples = [{"text": f"{processors.PICTURE} {i}", "images": [name]} for i, name in enumerate(files)]
    collator = OmniDataCollatorWithPacking(processor=processor, model_config=config, on_error="skip")
    loader = DataLoader(samples * 2, batch_size=4, collate_fn=collator, num_workers=workers)
    for row in loader:
        assert row["image_grid_thw"].shape[0] == 3
    assert list(collator.skipped.values()) == [2]
    assert f"'{tmp_path}/1.png' is no image that can be read: OSError" in next(iter(collator.skipped))
    blank = collator(samples[1:2])
    assert blank["labels"].tolist() == [[-100, -100]] and sum(collator.skipped.values()) == 3
    with pytest.raises(ValueError, match=r"1.png' is no image that can be read"):
        OmniDataCollatorWithPacking(processor=processor, model_config=config)(samples)
