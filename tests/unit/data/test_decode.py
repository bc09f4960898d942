"""Images and audio from files, bytes and arrays, and their sizes from headers alone."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_veomni.data.media.decode import BrokenItemError, audio_samples, image_size, open_image, read_audio, resample
from tests.multimodal import pictures, sounds, write_wav


def riff(kind: int, channels: int, rate: int, bits: int, data: bytes, before: bytes = b"") -> bytes:
    step = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * step, step, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + before + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def encoded(samples: np.ndarray, kind: int, bits: int) -> bytes:
    if kind == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return (np.round(samples * 127) + 128).astype("u1").tobytes()
    whole = np.round(samples * (2 ** (bits - 1) - 1)).astype("<i4")
    return b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in whole)


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_wav_of_every_kind(kind, bits):
    samples = sounds()[0][:300]
    content = riff(kind, 1, 16_000, bits, encoded(samples, kind, bits), before=b"LIST\x03\x00\x00\x00abc\x00")
    found = read_audio(content, 16_000, "it")
    assert found.dtype == np.float32 and audio_samples(content, 16_000, "it") == len(found) == 300
    np.testing.assert_allclose(found, samples, atol=2 ** -(min(bits, 24) - 2) if kind == 1 else 1e-7)


def test_channels_become_one_and_files_structs_and_arrays_are_alike(tmp_path):
    left, right = sounds()[0][:100], np.zeros(100, dtype=np.float32)
    both = np.stack([left, right], axis=1).reshape(-1)
    content = riff(3, 2, 16_000, 32, encoded(both, 3, 32))
    np.testing.assert_allclose(read_audio(content, 16_000, "it"), left / 2)
    path = write_wav(tmp_path / "a.wav", left)
    wanted = read_audio(path, 16_000, "it")
    for value in ({"path": path, "bytes": None}, {"path": None, "bytes": open(path, "rb").read()}):
        assert (read_audio(value, 16_000, "it") == wanted).all() and audio_samples(value, 16_000, "it") == 100
    for value in (left, left.tolist(), {"array": left, "sampling_rate": 16_000}):
        assert (read_audio(value, 16_000, "it") == left).all() and audio_samples(value, 16_000, "it") == 100
    whole = np.array([0, 16_384, -32_768], dtype=np.int16)
    assert read_audio(whole, 16_000, "it").tolist() == [0, 0.5, -1]


@pytest.mark.parametrize("rate, new_rate", [(44_100, 16_000), (8_000, 16_000), (22_050, 16_000), (48_000, 16_000)])
def test_resampling_keeps_a_tone_and_takes_away_what_does_not_fit(rate, new_rate):
    times, new_times = np.arange(rate) / rate, np.arange(new_rate) / new_rate
    tone = np.sin(2 * np.pi * 1000 * times + 0.3).astype(np.float32)
    found = resample(tone, rate, new_rate)
    inner = slice(200, -200)
    np.testing.assert_allclose(found[inner], np.sin(2 * np.pi * 1000 * new_times + 0.3)[inner], atol=2e-3)
    if rate > new_rate:
        high = np.sin(2 * np.pi * 0.6 * new_rate * times).astype(np.float32)
        assert np.abs(resample(high, rate, new_rate)[inner]).max() < 2e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100]))
def test_length_from_the_header_is_that_of_the_sound(count, rate):
    content = riff(1, 1, rate, 16, encoded(np.linspace(-1, 1, count), 1, 16))
    assert audio_samples(content, 16_000, "it") == len(read_audio(content, 16_000, "it"))


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_pictures_of_every_kind(tmp_path):
    array = pictures()[1]
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    image.save(path)
    for value in (
        array,
        array.transpose(2, 0, 1),
        image,
        path,
        str(path),
        saved(image, "PNG"),
        {"bytes": None, "path": str(path)},
    ):
        assert (np.asarray(open_image(value, "it")) == array).all() and image_size(value, "it") == array.shape[:2]
    gray = open_image(saved(image.convert("P"), "GIF"), "it")
    assert gray.mode == "RGB" and gray.size == image.size


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_has_its_upright_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(pictures()[1]), "JPEG", exif=exif)
    image = open_image(content, "it")
    assert image_size(content, "it") == (image.height, image.width)
    assert (image.height > image.width) == (orientation in (6, 8))


def test_what_is_broken_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    wav = riff(1, 1, 16_000, 16, bytes(200))
    for content, why in (
        (wav[:-50], "ends after 150 of 200 bytes"),
        (wav[:30], "ends"),
        (b"OggS", "pip install soundfile"),
        (riff(7, 1, 8_000, 8, bytes(200)), "pip install soundfile"),
    ):
        for read in (read_audio, audio_samples):
            with pytest.raises(BrokenItemError, match=f"^'a.wav' is no audio that can be read: .*{why}"):
                read(content, 16_000, "'a.wav'")
    streamed = riff(1, 1, 16_000, 16, bytes(200)).replace(b"data\xc8\x00\x00\x00", b"data\xff\xff\xff\xff")
    assert len(read_audio(streamed, 16_000, "it")) == audio_samples(streamed, 16_000, "it") == 100
    for value in (np.array([]), np.array([np.nan]), np.zeros((2, 2, 2))):
        with pytest.raises(BrokenItemError, match="^it "):
            read_audio(value, 16_000, "it")
    for value, why in (
        (b"no", "UnidentifiedImageError"),
        ("gone.png", "FileNotFoundError"),
        (np.zeros((2, 2)), "uint8"),
        (3, "int"),
    ):
        for read in (open_image, image_size):
            with pytest.raises(BrokenItemError, match=why):
                read(value, "it")


def test_pictures_of_16_bits_keep_their_upper_8():
    deep = np.tile(np.linspace(0, 65_535, 64).astype(np.uint16), (40, 1))
    for form in ("PNG", "TIFF"):
        found = np.asarray(open_image(saved(Image.fromarray(deep), form), "it"))
        assert (found == (deep >> 8)[..., None]).all()
    for unknown in (deep.astype(np.int32), deep.astype(np.float32)):
        for read in (open_image, image_size):
            with pytest.raises(BrokenItemError, match="no known white.*convert it to 8 or 16 bits"):
                read(saved(Image.fromarray(unknown), "TIFF"), "it")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 4, 5), (4, 5, 3), (3, 4, 5), (4, 5, 4)])
def test_arrays_of_pictures_of_every_shape(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    wanted = np.asarray(open_image(array, "it"))
    for value in (array, array.tolist(), torch.from_numpy(array)):
        assert (np.asarray(open_image(value, "it")) == wanted).all() and image_size(value, "it") == (4, 5)
    for bad in (array.astype(int).tolist() + [256], np.zeros((4, 4, 5), np.uint8)):
        with pytest.raises(BrokenItemError):
            open_image(bad, "it")


def test_arrays_of_sounds_of_every_shape():
    both = np.stack([sounds()[0][:100], sounds()[1][:100]])
    for value in (both, both.T, torch.from_numpy(both).requires_grad_(), {"array": both, "sampling_rate": 16_000}):
        np.testing.assert_allclose(read_audio(value, 16_000, "it"), both.mean(axis=0), rtol=1e-6)
        assert audio_samples(value, 16_000, "it") == 100
    whole = np.array([0, 16_384, -32_768], dtype=np.int16)
    for value in (whole.tolist(), whole.astype(np.int64), np.array([128, 255], np.uint8)):  # silence, or a step
        for read in (read_audio, audio_samples):
            with pytest.raises(BrokenItemError, match="loudest value is not known: give floats"):
                read(value, 16_000, "it")


@pytest.mark.parametrize("form, coding", [("FLAC", None), ("MP3", None), ("WAV", "ULAW"), ("WAV", "MS_ADPCM")])
@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 44_100)])
def test_sounds_that_soundfile_reads(form, coding, channels, rate):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.stack([sounds()[1]] * channels, axis=1), rate, format=form, subtype=coding)
    found = read_audio(file.getvalue(), 16_000, "it")
    assert audio_samples(file.getvalue(), 16_000, "it") == len(found) and 0.3 < np.abs(found).max() < 0.6
