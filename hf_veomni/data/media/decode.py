"""Images and audio clips from files, bytes and arrays, and their sizes from the header alone.

Pillow reads images. Wav files (integers of 8 to 32 bits, floats) are read here; other audio clips, and other codings
of wav, need `soundfile`.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from hf_veomni.errors import UnsupportedError

_ORIENTATION, _ROTATED = 0x0112, (5, 6, 7, 8)  # the exif tag, and its values that swap height and width
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_SIZE = 0xFFFFF000  # what writers of streams put in the place of a size begins about here
_ZEROS = 24  # zero crossings of the resampling filter to each side


class BrokenItemError(ValueError):
    """An image or audio clip that cannot be read; the message names it."""


@dataclass(frozen=True)
class _Wav:
    kind: int
    channels: int
    rate: int
    bits: int
    start: int
    size: int

    @property
    def frames(self) -> int:
        return self.size // (self.channels * self.bits // 8)


def name_of(value: object, otherwise: str) -> str:
    """The path of a file, if a value tells one."""
    path = value.get("path") if isinstance(value, Mapping) else value
    if path is None or not isinstance(path, str | os.PathLike):
        path = getattr(value, "filename", None)
    return f"{os.fspath(path)!r}" if path else otherwise


def open_image(value: object, name: str) -> Any:
    """An image in RGB as PIL.Image, turned upright.

    Args:
        value: a path, bytes, {"bytes": ..., "path": ...} as `datasets.Image(decode=False)` gives it, a PIL image, or
            an array, tensor or nested list of bytes (0..255): [height, width], with 1, 3 or 4 channels last, or 1 or 3
            first. Of images with 16 bits a channel the upper 8 are taken.
        name: what to call it in messages.

    Raises:
        BrokenItemError: it cannot be read.
    """
    from PIL import Image, ImageOps  # beside a processor only

    try:
        if isinstance(value, np.ndarray | torch.Tensor | list):
            return Image.fromarray(_picture_bytes(value)).convert("RGB")
        image = value if isinstance(value, Image.Image) else Image.open(_source(value))
        _check_mode(image)
        upright = ImageOps.exif_transpose(image) if _orientation(image) else image
        if upright.mode.startswith("I;16"):  # Pillow would cut off what is above 255: all white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")
    except Exception as error:  # decoders raise every kind
        raise BrokenItemError(f"{name} is no image that can be read: {type(error).__name__}: {error}") from error


def image_size(value: object, name: str) -> tuple[int, int]:
    """Height and width of an image as `open_image` returns it, from its header.

    Raises:
        BrokenItemError: the header cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(value, np.ndarray | torch.Tensor | list):
            height, width = _picture_bytes(value).shape[:2]
            return height, width
        if isinstance(value, Image.Image):
            return _upright(value)
        with Image.open(_source(value)) as image:
            return _upright(image)
    except Exception as error:
        raise BrokenItemError(f"{name} is no image that can be read: {type(error).__name__}: {error}") from error


def _picture_bytes(value: object) -> np.ndarray:
    """An array of an image as uint8, [height, width] or [height, width, 3 or 4]."""
    array = _array(value)
    if isinstance(value, list) and array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255:
        array = array.astype(np.uint8)  # what `datasets` makes of an array
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"arrays of images must hold bytes (uint8) [height, width, 3], not {array.dtype} {list(array.shape)}."
        )
    return array


def _array(value: object) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _check_mode(image: Any) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} has no known white, and Pillow would cut it off at 255: convert it to 8 or 16 bits."
        )


def _upright(image: Any) -> tuple[int, int]:
    _check_mode(image)
    turned = _orientation(image) in _ROTATED
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Any) -> int:
    """What the header says of turning; a PNG that says so behind its pixels only, Pillow would decode for it."""
    if getattr(image, "format", None) == "PNG" and "exif" not in image.info:
        return 0
    return image.getexif().get(_ORIENTATION, 0)


def read_audio(value: object, rate: int, name: str) -> np.ndarray:
    """An audio clip of one channel at a sampling rate, float32 [samples] in [-1, 1].

    Args:
        value: a path, bytes, {"bytes": ..., "path": ...} as `datasets.Audio(decode=False)` gives it,
            {"array": ..., "sampling_rate": ...}, a decoder of torchcodec as `datasets.Audio()` gives it, or an array
            or list [samples] that has the rate already: floats, or signed integers of up to 32 bits. Of [samples,
            channels] and [channels, samples] the mean is taken; the shorter axis counts the channels.
        rate: samples a second.
        name: what to call it in messages.

    Raises:
        BrokenItemError: it cannot be read.
    """
    try:
        samples, own_rate = _decode_audio(value)
    except Exception as error:
        raise BrokenItemError(f"{name} is no audio that can be read: {type(error).__name__}: {error}") from error
    samples = samples.mean(axis=1) if samples.ndim == 2 else samples
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise BrokenItemError(
            f"{name} has shape {list(samples.shape)}: an audio clip needs finite samples, one a time step."
        )
    return resample(samples.astype(np.float32, copy=False), own_rate or rate, rate)


def audio_samples(value: object, rate: int, name: str) -> int:
    """Samples that `read_audio` returns, from the header.

    Raises:
        BrokenItemError: the header cannot be read.
    """
    try:
        array, own_rate = _given_samples(value)
        if array is not None:
            count, own_rate = len(array), own_rate or rate
        else:
            with _opened(value) as file:
                wav = _read_header(file)
            if wav is not None:
                count, own_rate = wav.frames, wav.rate
            else:
                info = _soundfile().info(_source(value))
                count, own_rate = info.frames, info.samplerate
        if not count:
            raise ValueError("it has no samples.")
    except Exception as error:
        raise BrokenItemError(f"{name} is no audio that can be read: {type(error).__name__}: {error}") from error
    return count if own_rate == rate else math.ceil(count * rate / own_rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """An audio clip at another sampling rate, float32 [ceil(samples * new_rate / rate)].

    Band-limited interpolation: a sinc at the lower of both Nyquist rates under a Hann window (Smith and Gossett 1984).
    """
    if rate == new_rate:
        return samples
    kernels, pad, step = _filters(rate, new_rate)
    length = math.ceil(len(samples) * new_rate / rate)
    padded = F.pad(torch.from_numpy(samples)[None, None], (pad, pad + step))
    mixed = F.conv1d(padded, kernels, stride=step)  # [1, phases, steps]
    return mixed[0].T.reshape(-1)[:length].numpy()


@lru_cache(maxsize=16)
def _filters(rate: int, new_rate: int) -> tuple[torch.Tensor, int, int]:
    """One filter a phase of the output, [phases, 1, taps]; what to pad by; input samples of a round of phases."""
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor
    cutoff = min(step, phases) * 0.97 / step  # in input Nyquist rates, a little below it for the window's slope
    pad = math.ceil(_ZEROS / cutoff)
    offsets = torch.arange(-pad, pad + step, dtype=torch.float64)
    times = (offsets[None] - torch.arange(phases, dtype=torch.float64)[:, None] * step / phases) * cutoff
    window = torch.cos(times.clamp(-_ZEROS, _ZEROS) * (math.pi / 2 / _ZEROS)) ** 2
    return (torch.sinc(times) * window * cutoff).float()[:, None], pad, step


def _source(value: object) -> Any:
    """What a decoder takes: a path, or an open file on bytes."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return io.BytesIO(value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise TypeError(f"it is of type {type(value).__name__}, and must be a path, bytes or an array.")


def _opened(value: object) -> BinaryIO:
    source = _source(value)
    return open(source, "rb") if isinstance(source, str) else source


def _given_samples(value: object) -> tuple[np.ndarray | None, int | None]:
    """Samples and rate of an audio clip that is decoded already."""
    if isinstance(value, Mapping) and value.get("array") is not None:
        array, rate = _array(value["array"]), int(value["sampling_rate"])
    elif hasattr(value, "get_all_samples"):
        decoder: Any = value
        samples = decoder.get_all_samples()
        array, rate = _array(samples.data), int(samples.sample_rate)
    elif isinstance(value, np.ndarray | torch.Tensor | list):
        array, rate = _array(value), None
    else:
        return None, None
    if array.size and (array.dtype.kind not in "fi" or (array.dtype.kind == "i" and array.itemsize > 4)):
        raise ValueError(
            f"its array holds {array.dtype}, whose loudest value is not known: give floats in [-1, 1], or int16."
        )
    return array.T if array.ndim == 2 and array.shape[0] < array.shape[1] else array, rate


def _decode_audio(value: object) -> tuple[np.ndarray, int | None]:
    array, rate = _given_samples(value)
    if array is not None:
        scale = 1 if array.dtype.kind == "f" else 2 ** (8 * array.itemsize - 1)
        return array / scale, rate
    with _opened(value) as file:
        wav = _read_header(file)
        if wav is not None:
            file.seek(wav.start)
            return _wav_samples(wav, file.read(wav.size)), wav.rate
    return _soundfile().read(_source(value), dtype="float32")


def _read_header(file: BinaryIO) -> _Wav | None:
    """Where the samples of a wav file lie; None for another format, or another coding than `_WAV_TYPES`."""
    riff = file.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    form = None
    while len(head := file.read(8)) == 8:
        name, size = head[:4], struct.unpack("<I", head[4:])[0]
        if name == b"data" and form is not None:
            begin = file.tell()
            there = file.seek(0, os.SEEK_END) - begin
            if there < size < _UNKNOWN_SIZE:
                raise ValueError(f"the wav file ends after {there} of {size} bytes of samples.")
            size = min(size, there)
            wav = _Wav(form[0], form[1], form[2], form[5], begin, size)
            if not (wav.channels and wav.rate):
                raise ValueError(f"the wav file declares {wav.channels} channels and {wav.rate} samples a second.")
            return wav if (wav.kind, wav.bits) in _WAV_TYPES else None
        if name == b"fmt ":
            data = file.read(size + size % 2)
            if len(data) < min(size, 16):
                break
            form = struct.unpack("<HHIIHH", data[:16])
            if form[0] == _EXTENSIBLE:
                form = (struct.unpack("<H", data[24:26])[0], *form[1:])
        else:
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("the wav file ends before its samples.")


_WAV_TYPES = {
    (_PCM, 8): "u1",
    (_PCM, 16): "<i2",
    (_PCM, 24): "u1",
    (_PCM, 32): "<i4",
    (_FLOAT, 32): "<f4",
    (_FLOAT, 64): "<f8",
}


def _wav_samples(wav: _Wav, data: bytes) -> np.ndarray:
    """[frames, channels], floats in [-1, 1]."""
    data = data[: wav.frames * wav.channels * wav.bits // 8]
    values = np.frombuffer(data, dtype=_WAV_TYPES[wav.kind, wav.bits])
    if wav.kind == _PCM and wav.bits == 24:
        wide = np.zeros((len(values) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = values.reshape(-1, 3)
        values = wide.reshape(-1).view("<i4")
    if wav.kind == _PCM:
        values = (values.astype(np.float64) - 128) / 128 if wav.bits == 8 else values / 2 ** (8 * values.itemsize - 1)
    return values.astype(np.float32).reshape(-1, wav.channels)


def _soundfile() -> Any:
    try:
        import soundfile  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(
            "only wav (PCM or floats) is read without soundfile: pip install soundfile, or convert it to wav."
        ) from error
    return soundfile
