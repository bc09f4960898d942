"""Raw columns that `datasets` stores as JSON text, against the same rows handed over as plain dictionaries."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset, Features, Json, List, Value, load_dataset
from PIL import Image

from hf_veomni.data import OmniDataCollatorWithPacking, mix_datasets, pack_dataset
from tests.multimodal import pictures, qwen2_5_vl


@pytest.fixture(scope="module")
def qwen():
    return qwen2_5_vl()[1:]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def conversations(tmp_path) -> list[dict]:
    names = []
    for index, picture in enumerate(pictures()):
        names.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture).save(names[-1])
    seen = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What {'x' * index}?"}]},
                {"role": "assistant", "content": "42"},
            ],
            "images": [name] if index % 2 else [{"path": name}],
        }
        for index, name in enumerate(names)
    ]
    read = [{"role": "user", "content": "No picture"}, {"role": "assistant", "content": "true"}]
    return [*seen, {"messages": read, "images": []}]


def told(rows, **options) -> list[list[list[int]]]:
    """Tokens and their labels of every document, in order of the tokens, and the sum of all pixels."""
    collator = OmniDataCollatorWithPacking(**options)
    documents, pixels = [], 0.0
    for row in rows:
        batch = collator([row])
        starts = (batch["position_ids"].flatten(1)[0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["input_ids"].shape[1]]
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        documents += [[ids[a:b], labels[a:b]] for a, b in zip(starts, ends, strict=True)]
        pixels += float(batch.get("pixel_values", torch.zeros(1)).double().sum())
    return sorted(documents), round(pixels, 3)


def written(samples, tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, samples)))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_jsonl_equal_plain_rows(qwen, tmp_path, streaming):
    config, processor = qwen
    samples = conversations(tmp_path)
    dataset = load_dataset("json", data_files=written(samples, tmp_path), split="train", streaming=streaming)
    assert "Json" in str(dataset.features["messages"]) and "Json" in str(dataset.features["images"])
    rows = list(pack_dataset(dataset, 400, processor=processor))
    options = {"processor": processor, "model_config": config, "train_on": "assistant"}
    assert len(rows) < len(samples)
    assert told(rows, **options) == told(samples, **options)


@pytest.mark.parametrize(
    "feature", [Json(), List(Json()), {"full": Json(decode=False)}], ids=["column", "list", "raw"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_json_anywhere_in_a_column_is_read(qwen, tmp_path, feature, streaming):
    config, processor = qwen
    samples = conversations(tmp_path)
    feature = feature["full"] if isinstance(feature, dict) else feature
    texts = [
        [json.dumps(m) for m in s["messages"]] if isinstance(feature, List) else json.dumps(s["messages"])
        for s in samples
    ]
    names = [[image["path"] if isinstance(image, dict) else image for image in s["images"]] for s in samples]
    dataset = Dataset.from_dict({"messages": texts, "images": names})
    dataset = dataset.cast(Features({"messages": feature, "images": List(Value("string"))}))
    rows = list(pack_dataset(dataset.to_iterable_dataset() if streaming else dataset, 400, processor=processor))
    options = {"processor": processor, "model_config": config}
    assert told(rows, **options) == told(samples, **options)


def test_mixtures_read_json_and_share_columns_of_different_structure(qwen, tmp_path):
    config, processor = qwen
    samples = conversations(tmp_path)
    seen = load_dataset("json", data_files=written(samples, tmp_path), split="train", streaming=True)
    plain = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "true"}]} for n in range(5)
    ]
    parts = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]}]
    sources = {"seen": seen, "plain": Dataset.from_list(plain), "parts": Dataset.from_list(parts)}
    mixed = mix_datasets(sources, [1, 1, 1], seed=1, stop="all")
    rows = list(pack_dataset(mixed, 400, processor=processor, buffer_size=8))
    options = {"processor": processor, "model_config": config}
    documents, _ = told(rows, **options)
    wanted, _ = told([*samples, *plain, *parts], **options)
    assert {str(document) for document in documents} == {str(document) for document in wanted}


@pytest.mark.parametrize("content", ['{"a": 1}', "1.50", "null", "[1, 2]"])
def test_strings_that_datasets_takes_for_json_are_refused(qwen, tmp_path, content):
    samples = [*conversations(tmp_path), {"messages": [{"role": "user", "content": content}], "images": []}]
    dataset = load_dataset("json", data_files=written(samples, tmp_path), split="train")
    with pytest.raises(
        ValueError, match="sample 5: a turn of 'user' has the content .* hand the samples over in a list"
    ):
        pack_dataset(dataset, 400, processor=qwen[1])
