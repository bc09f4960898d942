import re
from collections import Counter
from pydoc_data.topics import topics

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_veomni.data import mix_datasets, pack_dataset, unpack

STRATEGIES = ("best_fit", "sequential")
documents = st.lists(st.integers(0, 20), min_size=1, max_size=40).filter(any)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def samples_of(lengths, labels=False):
    """Documents whose tokens tell which document and which place they come from."""
    samples = []
    for number, length in enumerate(lengths):
        ids = [1000 * number + place for place in range(length)]
        samples.append(
            {"input_ids": ids} | ({"labels": [-100] * (length // 2) + ids[length // 2 :]} if labels else {})
        )
    return samples


def as_stream(samples, **kwargs):
    return IterableDataset.from_generator(lambda: iter(samples), **kwargs)


def in_both_kinds(samples):
    return Dataset.from_list(samples), Dataset.from_list(samples).to_iterable_dataset()


def assert_rows_are_right(rows, max_tokens):
    for row in rows:
        tokens = len(row["input_ids"])
        assert 0 < tokens <= max_tokens
        assert sum(row["document_lengths"]) == tokens and min(row["document_lengths"]) > 0
        assert row["position_ids"] == [place for length in row["document_lengths"] for place in range(length)]
        assert all(label == -100 for label, place in zip(row["labels"], row["position_ids"], strict=True) if not place)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("labels", [False, True])
@settings(max_examples=25, deadline=None)
@given(lengths=documents, buffer=st.integers(1, 50))
def test_unpacking_gives_the_documents_back(strategy, labels, lengths, buffer):
    samples = samples_of(lengths, labels)
    source = Dataset.from_list(samples)
    expected = Counter()
    for sample in samples:
        if sample["input_ids"]:
            targets = sample.get("labels", sample["input_ids"])
            expected[tuple(sample["input_ids"]), (-100, *targets[1:])] += 1
    for packed in (
        pack_dataset(source, 20, strategy),
        pack_dataset(source.to_iterable_dataset(), 20, strategy, buffer_size=buffer),
    ):
        rows = list(packed)
        assert_rows_are_right(rows, 20)
        found = Counter()
        for row in rows:
            for document in unpack(row):
                found[tuple(document["input_ids"].tolist()), tuple(document["labels"].tolist())] += 1
        assert found == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streaming_equals_map_style_within_one_buffer(strategy):
    source, stream = in_both_kinds(samples_of([7, 3, 9, 2, 0, 8, 1, 5, 10], labels=True))
    assert list(pack_dataset(source, 10, strategy)) == list(pack_dataset(stream, 10, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packing_is_deterministic_and_keeps_the_order_of_the_source(strategy):
    source = Dataset.from_list(samples_of(np.random.default_rng(0).integers(1, 30, 200)))
    packed = pack_dataset(source, 64, strategy)
    assert list(packed) == list(pack_dataset(source, 64, strategy))
    firsts = [row["input_ids"][0] for row in packed]
    assert firsts == sorted(firsts)
    assert list(pack_dataset(source.shuffle(seed=0), 64, strategy)) != list(packed)


def test_sequential_keeps_the_order_of_every_document():
    source = Dataset.from_list(samples_of(np.random.default_rng(0).integers(1, 30, 200)))
    flat = [token for row in pack_dataset(source, 64, "sequential") for token in row["input_ids"]]
    assert flat == [token for sample in source for token in sample["input_ids"]]


def test_processes_change_nothing():
    source = Dataset.from_list(samples_of(np.random.default_rng(0).integers(1, 30, 200)))
    assert list(pack_dataset(source, 64, num_proc=2)) == list(pack_dataset(source, 64))


def test_selected_and_shuffled_rows_are_read_through_their_index():
    source = Dataset.from_list(samples_of([5, 3, 8, 2]))
    packed = pack_dataset(source.select([3, 1]), 10)
    assert [row["input_ids"] for row in packed] == [[3000, 3001, 1000, 1001, 1002]]


def test_the_format_of_the_source_is_kept():
    packed = pack_dataset(Dataset.from_list(samples_of([5, 3])).with_format("torch"), 10)
    assert packed[0]["input_ids"].tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002]


def test_only_the_columns_that_a_format_shows_are_packed():
    source = Dataset.from_list(samples_of([5, 3], labels=True)).with_format("numpy", columns=["input_ids"])
    stream = mix_datasets([source])
    assert pack_dataset(source, 10)[0]["labels"].tolist() == [-100, 1, 2, 3, 4, -100, 1001, 1002]
    assert [sorted(sample) for sample in stream] == [["input_ids"], ["input_ids"]]


@pytest.mark.parametrize("call", [lambda dataset: pack_dataset(dataset, 10), lambda dataset: mix_datasets([dataset])])
def test_a_transform_that_would_be_left_out_is_refused(call):
    source = Dataset.from_list(samples_of([5, 3])).with_transform(lambda batch: {"input_ids": [[1]]})
    with pytest.raises(ValueError, match="has a transform .* apply it with dataset.map"):
        call(source)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_token_types_and_list_types(dtype, kind):
    value = datasets.Value(dtype)
    feature = {
        "list": datasets.List(value),
        "large": datasets.LargeList(value),
        "fixed": datasets.List(value, length=4),
    }
    source = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    packed = pack_dataset(source.cast_column("input_ids", feature[kind]), 8)
    assert packed.features["input_ids"].feature.dtype == dtype
    assert packed[0]["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed[0]["labels"] == [-100, 2, 3, 4, -100, 6, 7, 8]


def test_a_dataset_on_disk_is_packed_to_disk_and_found_again(tmp_path):
    Dataset.from_list(samples_of([5, 3, 8, 2])).save_to_disk(tmp_path / "source")
    source = datasets.load_from_disk(tmp_path / "source")
    packed = pack_dataset(source, 10)
    written = packed.cache_files[0]["filename"]
    assert pack_dataset(datasets.load_from_disk(tmp_path / "source"), 10).cache_files[0]["filename"] == written
    for other in (
        pack_dataset(source, 11),
        pack_dataset(source, 10, "sequential"),
        pack_dataset(source.select([1]), 10),
    ):
        assert other.cache_files[0]["filename"] != written
    assert list(packed) == list(pack_dataset(Dataset.from_list(samples_of([5, 3, 8, 2])), 10))


# Documents that are too long, empty or padded


@pytest.mark.parametrize("kind", [0, 1])
def test_a_document_over_max_tokens_is_named(kind):
    source = in_both_kinds(samples_of([4, 3, 12, 15]))[kind]
    message = r"sample 2 has 12 tokens, more than `max_tokens` \(10\), and 1 more .*overlong='split'"
    with pytest.raises(ValueError, match=message):
        list(pack_dataset(source, 10))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "overlong, pieces",
    [
        ("split", [(0, 4), (1000, 10), (1010, 10), (1020, 3), (2000, 10), (3000, 10), (3010, 10)]),
        ("truncate", [(0, 4), (1000, 10), (2000, 10), (3000, 10)]),
        ("drop", [(0, 4), (2000, 10)]),
    ],
)
def test_overlong_documents(kind, overlong, pieces):
    source = in_both_kinds(samples_of([4, 23, 10, 20]))[kind]
    rows = list(pack_dataset(source, 10, overlong=overlong))
    assert_rows_are_right(rows, 10)
    found = [(int(document["input_ids"][0]), len(document["input_ids"])) for row in rows for document in unpack(row)]
    assert sorted(found) == pieces


def test_pieces_of_a_document_far_longer_than_a_row():
    sample = {"input_ids": list(range(5003)), "labels": list(range(5003))}
    rows = list(pack_dataset(Dataset.from_list([sample, {"input_ids": [7], "labels": [7]}]), 50, overlong="split"))
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted([*range(5003), 7])
    assert len(rows) == 101


def test_dropped_and_empty_documents_are_counted(caplog):
    source = Dataset.from_list(samples_of([3, 0, 0, 12]))
    pack_dataset(source, 10, overlong="drop")
    assert "skipped 2 empty documents, the first is sample 1" in caplog.text
    assert "dropped 1 documents of more than 10 tokens" in caplog.text


@pytest.mark.parametrize("lengths", [[], [12, 12]])
def test_nothing_to_pack_is_an_error(lengths):
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    source = Dataset.from_dict({"input_ids": [s["input_ids"] for s in samples_of(lengths)]}, features=features)
    with pytest.raises(ValueError, match="(N|n)othing .*to pack"):
        pack_dataset(source, 10, overlong="drop")


def test_a_buffer_without_documents_gives_no_rows():
    stream = Dataset.from_list(samples_of([12, 12, 3])).to_iterable_dataset()
    rows = list(pack_dataset(stream, 10, overlong="drop", buffer_size=2))
    assert [row["input_ids"] for row in rows] == [[2000, 2001, 2002]]


@pytest.mark.parametrize("kind", [0, 1])
def test_padding_is_cut_off(kind):
    samples = [
        {"input_ids": [9, 9, 1, 2], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, 1, 2]},
        {"input_ids": [3, 4, 5, 9], "attention_mask": [1, 1, 1, 0], "labels": [3, 4, 5, -100]},
        {"input_ids": [9, 9, 9, 9], "attention_mask": [0, 0, 0, 0], "labels": [-100] * 4},
        {"input_ids": [6, 7, 8, 0], "attention_mask": [1, 1, 1, 1], "labels": [6, 7, 8, 0]},
    ]
    (row,) = pack_dataset(in_both_kinds(samples)[kind], 10)
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert row["labels"] == [-100, 2, -100, 4, 5, -100, 7, 8, 0]
    assert "attention_mask" not in row


# Columns


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "bad, message",
    [
        ({"labels": [1, 2]}, "sample 3: `labels` has 2 elements and `input_ids` has 3"),
        ({"weights": [0.0] * 4}, "sample 3: `weights` has 4 elements and `input_ids` has 3"),
        ({"labels": None}, "sample 3: `labels` is missing"),
        ({"attention_mask": [1, 0, 1]}, "sample 3: `attention_mask` has zeros between ones"),
        ({"position_ids": [0, 1, 0]}, "sample 3: `position_ids` do not count 0, 1, 2"),
        ({"input_ids": [1, None, 3]}, "`input_ids` has missing values inside a list"),
    ],
)
def test_a_bad_sample_is_named(kind, bad, message):
    good = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "weights": [0.5] * 3}
    good |= {"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]}
    source = in_both_kinds([good, good, good, good | bad, good])[kind]
    options = {"buffer_size": 2} if kind else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        list(pack_dataset(source, 10, columns=["weights"], **options))


@pytest.mark.parametrize("kind", [0, 1])
def test_named_columns_are_carried_and_text_is_dropped(kind):
    samples = [
        {
            "input_ids": [1, 2],
            "completion_mask": [0, 1],
            "weights": [0.5, 1.5],
            "text": "a",
            "messages": [{"role": "b"}],
        },
        {"input_ids": [3], "completion_mask": [1], "weights": [2.5], "text": "c", "messages": []},
    ]
    packed = pack_dataset(in_both_kinds(samples)[kind], 4, columns=["weights", "completion_mask"])
    assert packed.column_names == [
        *("input_ids", "labels", "position_ids", "weights", "completion_mask", "document_lengths")
    ]
    (row,) = packed
    assert row["weights"] == [0.5, 1.5, 2.5] and row["completion_mask"] == [0, 1, 1]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "column, value, columns, message",
    [
        ("completion_mask", [0, 1], (), r"`completion_mask` \(.*would be lost: name it in `columns`"),
        ("images", ["a.png"], (), "`images` belongs to images, audio or video, and cannot be packed beside"),
        ("photo", {"bytes": b"x", "path": None}, (), "`photo` belongs to images"),
        ("weights", [[0.5], [0.5]], ("weights",), r"`weights` \(.* must hold one list of numbers a sample"),
        ("weights", [0.5, 0.5], ("weight",), "names 'weight', which cannot be carried: did you mean 'weights'"),
        ("document_lengths", [2], (), "is packed already"),
        ("labels", [0.5, 0.5], (), "must hold lists of integers"),
    ],
)
def test_columns_that_would_be_lost_or_cannot_be_packed_are_refused(kind, column, value, columns, message):
    source = in_both_kinds([{"input_ids": [1, 2], column: value}])[kind]
    with pytest.raises(ValueError, match=message):
        pack_dataset(source, 4, columns=columns)


def test_an_image_feature_is_refused_under_any_name():
    source = Dataset.from_dict({"input_ids": [[1, 2]], "scan": [None]})
    with pytest.raises(ValueError, match="`scan` belongs to images"):
        pack_dataset(source.cast_column("scan", datasets.Image()), 4)


@pytest.mark.parametrize("column", [{"text": "a"}, {"input_ids": "a"}, {"input_ids": [0.5]}])
def test_what_is_not_tokenised_is_refused(column):
    with pytest.raises(ValueError, match="tokenise|one list of numbers a sample"):
        pack_dataset(Dataset.from_list([column]), 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, r"`max_tokens` \(0\) must be a positive integer"),
        ({"max_tokens": True}, r"`max_tokens` \(True\) must be a positive integer"),
        ({"strategy": "best"}, r"`strategy` \('best'\) must be one of 'best_fit', 'sequential'"),
        ({"overlong": "cut"}, r"`overlong` \('cut'\) must be one of 'error', 'split', 'truncate', 'drop'"),
        ({"buffer_size": 5}, r"`buffer_size` \(5\) has no effect on a Dataset"),
        ({"dataset": [{"input_ids": [1]}]}, r"`dataset` \(list\) must be a datasets.Dataset or IterableDataset"),
        ({"dataset": datasets.DatasetDict()}, "give one split"),
        ({"dataset": as_stream(samples_of([1])), "num_proc": 2}, r"`num_proc` \(2\) has no effect on an IterableData"),
        ({"dataset": as_stream(samples_of([1])), "buffer_size": 0}, r"`buffer_size` \(0\) must be a positive integer"),
        ({"dataset": as_stream([])}, "no samples"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        pack_dataset(**({"dataset": Dataset.from_list(samples_of([1])), "max_tokens": 4} | options))


# Real text


@pytest.fixture(scope="module")
def pydoc_bytes():
    return Dataset.from_list([{"input_ids": list(text.encode()), "topic": name} for name, text in topics.items()])


def fewest_rows(lengths: list[int], max_tokens: int) -> int:
    """A lower bound on rows (Martello and Toth 1990, L2): what is longer than half a row needs one of its own."""
    pieces = [max_tokens for length in lengths for _ in range(length // max_tokens)]
    pieces += [length % max_tokens for length in lengths if length % max_tokens]

    def bound(small: int) -> int:
        alone = sum(piece > max_tokens - small for piece in pieces)
        large = [piece for piece in pieces if max_tokens // 2 < piece <= max_tokens - small]
        rest = sum(piece for piece in pieces if small <= piece <= max_tokens // 2)
        room = sum(max_tokens - piece for piece in large)
        return alone + len(large) + max(0, -((room - rest) // max_tokens))

    return max(map(bound, range(max_tokens // 2 + 1)))


@pytest.mark.parametrize("max_tokens", [1024, 2048])
def test_real_text_fills_its_rows(pydoc_bytes, max_tokens):
    packed = pack_dataset(pydoc_bytes, max_tokens, overlong="split")
    assert len(packed) <= fewest_rows(list(map(len, pydoc_bytes["input_ids"])), max_tokens) + 1
    found = Counter(token for row in packed for token in row["input_ids"])
    assert found == Counter(token for sample in pydoc_bytes for token in sample["input_ids"])


def test_real_text_comes_back_whole(pydoc_bytes):
    longest = max(map(len, pydoc_bytes["input_ids"]))
    packed = pack_dataset(pydoc_bytes, longest)
    texts = Counter(bytes(document["input_ids"].tolist()).decode() for row in packed for document in unpack(row))
    assert texts == Counter(topics.values())
