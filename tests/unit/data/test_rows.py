"""`pack_dataset` over samples with images and audio: sizes before decoding, rows that are read late, streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PIL
from torch.utils.data import DataLoader

from hf_veomni import BalancedBatchSampler
from hf_veomni.data import OmniDataCollatorWithPacking, mix_datasets, pack_dataset, unpack
from hf_veomni.data.media.chat import RawReader
from hf_veomni.data.media.lengths import SizeReader
from hf_veomni.modality import CostModel
from tests import processors
from tests.multimodal import pictures, qwen2_5_vl, qwen2_audio, sounds, write_wav

MAKERS = {
    "qwen_vl": (processors.qwen_vl, processors.PICTURE, "images"),
    "idefics": (processors.idefics, "<image>", "images"),
    "onevision": (processors.onevision, "<image>", "images"),
    "gemma3": (processors.gemma3, "\n<start_of_image>\n", "images"),
    "qwen_audio": (processors.qwen_audio, processors.SOUND, "audios"),
}


@pytest.fixture(scope="module")
def qwen():
    return qwen2_5_vl()[1:]


@pytest.fixture
def picture_files(tmp_path):
    names = []
    for index in range(12):
        source = pictures()[index % 4]
        piece = source[: 20 + 2 * index, : 24 + index]
        names.append(str(tmp_path / f"{index:02}.png"))
        PIL.fromarray(piece).save(names[-1])
    return names


def text_and_pictures(names):
    return [{"text": f"{processors.PICTURE} is {'x' * (3 * i)}", "images": [name]} for i, name in enumerate(names)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_sizes_from_headers_are_those_of_the_processor(name, count):
    make, mark, column = MAKERS[name]
    processor = make()
    random = np.random.default_rng(0)
    reader, sizes = RawReader(processor), SizeReader(processor)
    for index in range(8):
        if column == "images":
            shapes = random.integers(9, 120, (count, 2))
            items = [random.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
        else:
            items = [random.standard_normal(int(n)).astype(np.float32) for n in random.integers(400, 40_000, count)]
        sample = {"text": " and ".join(["one", *[mark] * count]) + "." * index, column: items}
        assert sizes.measure("it", sample).tokens == reader.encode("it", sample)["input_ids"].shape[1]


def test_nothing_is_decoded_before_a_row_is_read(qwen, picture_files, monkeypatch):
    config, processor = qwen
    source = Dataset.from_list(text_and_pictures(picture_files))

    def load(self):
        raise AssertionError(f"{self.filename} is decoded")

    with monkeypatch.context() as patched:
        patched.setattr("PIL.ImageFile.ImageFile.load", load)
        patched.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        packed = pack_dataset(source, 160, processor=processor)
        with pytest.raises(ValueError, match="is decoded"):
            OmniDataCollatorWithPacking(160, processor)([packed[0]])
    assert 2 <= len(packed) < 12 and sum(len(row["samples"]) for row in packed) == 12
    collator = OmniDataCollatorWithPacking(160, processor, model_config=config)
    for row in packed:
        batch = collator([row])
        assert batch["input_ids"].shape[1] == sum(row["document_lengths"]) <= 160
        starts = (batch["position_ids"][0, 0] == 0).nonzero().flatten().tolist()
        assert np.diff([*starts, batch["input_ids"].shape[1]]).tolist() == row["document_lengths"]
        assert len(batch["image_grid_thw"]) == len(row["samples"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("processed", [False, True])
def test_rows_hold_every_sample_once(qwen, picture_files, streaming, processed):
    config, processor = qwen
    samples = text_and_pictures(picture_files) + [{"text": "words alone", "images": []}]
    collator = OmniDataCollatorWithPacking(400, processor, model_config=config)
    alone = [collator([sample]) for sample in samples]
    source = Dataset.from_list(samples)
    if processed:
        outputs = [RawReader(processor).encode("it", sample) for sample in samples]
        outputs = [
            {
                name: value[0] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value
                for name, value in output.items()
            }
            for output in outputs
        ]
        source = Dataset.from_list([{name: value.tolist() for name, value in output.items()} for output in outputs])
    if streaming:
        source = source.to_iterable_dataset()
    rows = list(pack_dataset(source, 400, processor=None if processed else processor))
    assert len(rows) < 6
    batches = [collator([row]) for row in rows]
    wanted = sorted(batch["input_ids"][0].tolist() for batch in alone)
    found = []
    for row, batch in zip(rows, batches, strict=True):
        found += [part.tolist() for part in batch["input_ids"][0].split(row["document_lengths"])]
    assert sorted(found) == wanted
    pixels = sum(float(batch["pixel_values"].double().sum()) for batch in batches)
    assert pixels == pytest.approx(sum(float(b["pixel_values"].double().sum()) for b in alone if "pixel_values" in b))


def test_sounds_of_a_datasets_audio_column_are_packed_undecoded(tmp_path):
    _, config, processor = qwen2_audio()
    files = [write_wav(tmp_path / f"{i}.wav", sound) for i, sound in enumerate(sounds())]
    features = Features({"text": Value("string"), "audios": List(Audio(sampling_rate=16_000))})
    source = Dataset.from_list(
        [{"text": processors.SOUND, "audios": [{"path": name, "bytes": None}]} for name in files]
    ).cast(features)
    collator = OmniDataCollatorWithPacking(200, processor, model_config=config)
    for dataset in (source, source.to_iterable_dataset()):
        rows = list(pack_dataset(dataset, 200, processor=processor))
        batches = [collator([row]) for row in rows]
        assert sum(len(batch["input_features"]) for batch in batches) == 4
        assert [b["input_ids"].shape[1] for b in batches] == [sum(row["document_lengths"]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_headers_raise_or_are_skipped(qwen, picture_files, streaming, caplog):
    open(picture_files[3], "wb").write(b"no picture")
    source = Dataset.from_list(text_and_pictures(picture_files))
    source = source.to_iterable_dataset() if streaming else source
    with pytest.raises(ValueError, match="03.png' is no image that can be read"):
        list(pack_dataset(source, 200, processor=qwen[1]))
    caplog.clear()
    rows = list(pack_dataset(source, 200, processor=qwen[1], on_error="skip"))
    names = [sample["images"][0] for row in rows for sample in row["samples"]]
    assert sorted(names) == picture_files[:3] + picture_files[4:]
    assert "skipped 1 samples of 12 that cannot be read" in caplog.text and "03.png" in caplog.text


def test_what_cannot_be_packed_late_is_refused(qwen, picture_files):
    source = Dataset.from_list(text_and_pictures(picture_files))
    with pytest.raises(ValueError, match="sample 0 is raw .* give `processor=`"):
        pack_dataset(source, 200)
    with pytest.raises(ValueError, match=r"`overlong` \('split'\) would cut through images or audio"):
        pack_dataset(source, 200, overlong="split", processor=qwen[1])
    with pytest.raises(
        ValueError, match="sample 0 has .* tokens, more than `max_tokens`.* or choose overlong='drop'.$"
    ):
        pack_dataset(source, 8, processor=qwen[1])
    assert sum(len(r["samples"]) for r in pack_dataset(source, 40, overlong="drop", processor=qwen[1])) < 12


@pytest.mark.parametrize("samples", [True, False])
def test_a_buffer_of_which_nothing_is_left_makes_no_row(qwen, picture_files, samples):
    documents = [{"input_ids": [1] * n} for n in (9, 9, 2, 3)]
    if samples:
        documents = [{"text": f"{processors.PICTURE} is", "images": [name]} for name in picture_files[:2]]
        documents += [{"text": "ab", "images": None}] * 2
    stream = Dataset.from_list(documents).to_iterable_dataset()
    rows = list(pack_dataset(stream, 8, overlong="drop", buffer_size=2, processor=qwen[1] if samples else None))
    assert [len(row["document_lengths"]) for row in rows] == [2]


def test_costs_come_from_the_model_and_balance_the_batches(qwen, picture_files):
    config, processor = qwen
    model = CostModel.from_config(config)
    samples = text_and_pictures(picture_files)
    packed = pack_dataset(Dataset.from_list(samples), 100, processor=processor, cost=model.costs)
    plan = packed.with_format(None)
    lengths = [sum(row) for row in plan["document_lengths"]]
    wanted = []
    for row in packed:
        total = 0.0
        for sample, tokens in zip(row["samples"], row["document_lengths"], strict=True):
            grid = RawReader(processor).encode("it", sample)["image_grid_thw"]
            total += float(model.costs(["text", "image"], [tokens, int(grid.prod())], [1, 1]).sum())
        wanted.append(total)
    np.testing.assert_allclose(plan["cost"][:], wanted)
    sampler = BalancedBatchSampler(plan["cost"][:], 200, lengths=lengths, num_ranks=2)
    collator = OmniDataCollatorWithPacking(200, processor, model_config=config)
    loader = DataLoader(packed, batch_sampler=sampler, collate_fn=collator, num_workers=2)
    assert all(batch["input_ids"].shape[1] <= 200 for batch in loader)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_mixture_of_sources_resumes_in_the_middle(qwen, picture_files, stop):
    config, processor = qwen
    seen = Dataset.from_list(text_and_pictures(picture_files * 4)).to_iterable_dataset()
    read = Dataset.from_list([{"text": f"only words {i}"} for i in range(80)]).to_iterable_dataset()

    def packed() -> IterableDataset:
        mixed = mix_datasets({"seen": seen, "read": read}, {"seen": 0.7, "read": 0.3}, seed=0)
        return pack_dataset(mixed, 300, processor=processor, buffer_size=16)

    whole = list(packed())
    texts = [sample["text"] for row in whole for sample in row["samples"]]
    share = sum(text.startswith("only") for text in texts) / len(texts)
    assert 0.2 < share < 0.45
    first, got = packed(), []
    for row in first:
        got.append(row)
        if len(got) == stop:
            break
    second = packed()
    second.load_state_dict(first.state_dict())
    assert got + list(second) == whole
    collator = OmniDataCollatorWithPacking(300, processor, model_config=config)
    first, second = (list(DataLoader(packed(), batch_size=1, collate_fn=collator, num_workers=1)) for _ in range(2))
    assert len(first) > 10 and len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_text_alone_needs_a_tokenizer_only():
    tokenizer = processors.byte_tokenizer()
    source = Dataset.from_list([{"text": "x" * count} for count in (5, 9, 3, 7)])
    packed = pack_dataset(source, 12, processor=tokenizer)
    batches = [OmniDataCollatorWithPacking(12, tokenizer)([row]) for row in packed]
    assert [batch["input_ids"].shape[1] for batch in batches] == [12, 12]


def test_a_mixture_takes_columns_of_all_sources(picture_files):
    seen = Dataset.from_list(text_and_pictures(picture_files)).cast_column("images", List(Image()))
    read = Dataset.from_list([{"text": f"words {i}", "kind": 3} for i in range(12)])
    mixed = list(mix_datasets([seen, read.to_iterable_dataset()], [1, 1], seed=1, stop="all"))
    assert {tuple(sorted(sample)) for sample in mixed} == {("images", "kind", "text")}
    assert sorted({s["images"][0]["path"] for s in mixed if s["images"] is not None}) == picture_files
    assert sorted({s["text"] for s in mixed if s["kind"] == 3}) == sorted(read["text"][:])


def test_a_mixture_that_makes_no_sense_is_refused():
    one = Dataset.from_list([{"text": "a"}])
    for sources, weights, message in (
        ([one], [1, 2], "2 weights for 1 sources"),
        ([one, one], [1, 0], r"Weight \(0\) of source 1 must be above 0"),
        ({"a": one}, {"b": 1}, "`weights` names b and `sources` a"),
        (
            {"a": one, "b": Dataset.from_list([{"text": 3}])},
            None,
            "Column `text` is .*int64.* in source b and .*string",
        ),
        ([], None, "at least one source"),
        ([one, [1]], None, "Source 1 is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_datasets(sources, weights)
    with pytest.raises(ValueError, match=r"`stop` \('never'\) must be one of 'first', 'all'"):
        mix_datasets([one], stop="never")


def test_a_size_that_the_processor_refuses_is_named_or_skipped(qwen, picture_files):
    PIL.fromarray(np.zeros((2, 600, 3), np.uint8)).save(picture_files[5])
    source = Dataset.from_list(text_and_pictures(picture_files))
    with pytest.raises(ValueError, match=r"05.png': .* refuses an image of size \(2, 600\): .* ratio"):
        pack_dataset(source, 200, processor=qwen[1])
    rows = pack_dataset(source, 200, processor=qwen[1], on_error="skip")
    assert sum(len(row["samples"]) for row in rows) == 11


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_raw_and_tokenised_samples_share_rows(qwen, picture_files, streaming, labels):
    config, processor = qwen
    words = [{"input_ids": [7, 8, 9]} | ({"labels": [-100, 8, -100]} if labels else {}) for _ in range(4)]
    union = dict.fromkeys(("text", "images", "input_ids", *(["labels"] if labels else [])))
    source = Dataset.from_list([union | sample for sample in text_and_pictures(picture_files)[:4] + words])
    source = source.to_iterable_dataset() if streaming else source
    rows = list(pack_dataset(source, 120, processor=processor))
    collator = OmniDataCollatorWithPacking(120, processor, model_config=config)
    batches = [collator([row]) for row in rows]
    assert sum(len(batch["image_grid_thw"]) for batch in batches if "image_grid_thw" in batch) == 4
    documents = [document for batch in batches for document in unpack(batch)]
    short = [d["labels"].tolist() for d in documents if len(d["labels"]) == 3]
    assert len(documents) == 8 and short == [[-100, 8, -100 if labels else 9]] * 4
    with pytest.raises(ValueError, match=r"sample 1 has no `input_ids`, `messages`, `text`"):
        pack_dataset(Dataset.from_list([union | words[0], union]), 120, processor=processor)


def test_errors_name_samples_by_their_numbers_in_the_dataset(qwen, picture_files):
    source = Dataset.from_list(text_and_pictures(picture_files))
    packed = pack_dataset(source, 120, processor=qwen[1])
    row = packed[len(packed) - 1]
    index, number = len(row["samples"]) - 1, row["documents"][-1]
    with pytest.raises(ValueError, match=rf"^sample {index} of the batch \(sample {number} of the dataset\)"):
        OmniDataCollatorWithPacking(120, qwen[1])([row | {"samples": [*row["samples"][:-1], {"text": 3}]}])
