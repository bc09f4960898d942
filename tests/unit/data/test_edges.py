"""Items at the edges: thin images, audio decoders, items of nothing, sizes of one item, tensors in lists."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PIL

from hf_veomni.data import OmniDataCollatorWithPacking, pack_dataset
from hf_veomni.data.media.chat import RawReader
from hf_veomni.data.media.decode import BrokenItemError, audio_samples, read_audio
from hf_veomni.data.media.lengths import SizeReader
from tests import processors
from tests.multimodal import qwen2_5_vl, sounds

PICTURES = {
    "qwen_vl": (processors.qwen_vl, processors.PICTURE),
    "idefics": (processors.idefics, "<image>"),
    "onevision": (processors.onevision, "<image>"),
    "gemma3": (processors.gemma3, "<start_of_image>"),
    "llava": (processors.llava_siglip, "<image>"),
}
SIZES = [(1, 40), (2, 33), (3, 50), (4, 60), (5, 40), (40, 1), (50, 3), (60, 4), (3, 3), (1, 1), (4, 4), (9, 70)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", PICTURES)
def test_thin_pictures_are_measured_as_they_are_made(name, count):
    make, mark = PICTURES[name]
    processor = make()
    reader, sizes = RawReader(processor), SizeReader(processor)
    measured = 0
    for height, width in SIZES:
        sample = {
            "text": f"{mark} {mark}"[: len(mark) * count + count - 1],
            "images": [PIL.new("RGB", (width, height))] * count,
        }
        try:
            tokens = sizes.measure("it", sample).tokens
        except BrokenItemError:
            with pytest.raises(BrokenItemError):
                reader.encode("it", sample)
            continue
        assert tokens == reader.encode("it", sample)["input_ids"].shape[1], (height, width)
        measured += 1
    assert measured > 2


class Decoder:
    """What `datasets.Audio()` gives, as far as it is read."""

    def __init__(self, data: np.ndarray, rate: int):
        self.samples = SimpleNamespace(data=torch.from_numpy(data), sample_rate=rate)

    def get_all_samples(self):
        return self.samples


@pytest.mark.parametrize("rate", [16_000, 8_000, 22_050])
def test_decoders_of_sounds_are_read(rate):
    sound = sounds()[0]
    for data in (sound[None], np.stack([sound, sound])):
        found = read_audio(Decoder(data, rate), 16_000, "it")
        np.testing.assert_allclose(found, read_audio({"array": sound, "sampling_rate": rate}, 16_000, "it"), atol=1e-6)
        assert audio_samples(Decoder(data, rate), 16_000, "it") == len(found)
    processor = processors.qwen_audio()
    sample = {"text": processors.SOUND, "audios": [Decoder(sound[None], rate)]}
    assert (
        SizeReader(processor).measure("it", sample).tokens
        == RawReader(processor).encode("it", sample)["input_ids"].shape[1]
    )


@pytest.mark.parametrize("nothing", [{"images": [None]}, {"image": None}, {"images": [{"bytes": None, "path": None}]}])
def test_items_of_nothing_are_none(nothing):
    model_config, processor = qwen2_5_vl()[1:]
    collator = OmniDataCollatorWithPacking(None, processor, model_config=model_config)
    sample, plain = {"text": "words alone"} | nothing, {"text": "words alone"}
    assert torch.equal(collator([sample])["input_ids"], collator([plain])["input_ids"])
    features = Features({"text": Value("string"), "images": List(Image())})
    source = Dataset.from_list([{"text": "words alone", "images": [None]}], features=features)
    for dataset in (source, source.to_iterable_dataset()):
        (row,) = pack_dataset(dataset, 40, processor=processor)
        assert torch.equal(collator([row])["input_ids"], collator([plain])["input_ids"])


def test_sizes_of_one_item_and_lists_of_tensors():
    config, processor = qwen2_5_vl()[1:]
    (encoded,) = [
        dict(processor(text=[processors.PICTURE], images=[[np.zeros((30, 30, 3), np.uint8)]], return_tensors="pt"))
    ]
    collator = OmniDataCollatorWithPacking(model_config=config)
    wanted = collator([encoded, encoded])
    grid = encoded["image_grid_thw"][0]
    for one in (grid, grid.tolist(), grid.numpy()):
        found = collator([encoded | {"image_grid_thw": one}, encoded])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for wrong in (grid[:2], grid[None, :2], torch.tensor(3)):
        with pytest.raises(ValueError, match=r"`image_grid_thw` has shape .* and must be \[items, 3\]"):
            collator([encoded | {"image_grid_thw": wrong}])
    pixels = encoded["pixel_values"].bfloat16()
    for rows in (list(pixels), tuple(pixels), [list(row) for row in pixels[:, :, None]]):
        found = collator([encoded | {"pixel_values": rows}])["pixel_values"]
        assert found.dtype == torch.bfloat16 and torch.equal(found.flatten(1), pixels)
    with pytest.raises(ValueError, match="`pixel_values` is no array of numbers but list"):
        collator([encoded | {"pixel_values": [pixels[0], pixels[1, :3]]}])
