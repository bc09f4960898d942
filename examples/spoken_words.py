"""Spoken words as wav files, from eSpeak NG, a synthesiser that the package `espeakng-loader` brings in its wheel.

eSpeak NG is GPL-3.0-or-later software. It is called here through its C interface, and nothing of it is copied: the
example needs it to make its data, the library does not. Words are synthesised from formants, no two times quite alike.
"""

from __future__ import annotations

import ctypes
import importlib.util
import wave
from pathlib import Path

import numpy as np

PACKAGE = "espeakng_loader"
# From espeak-ng/speak_lib.h.
_SYNCHRONOUS, _POSITION_CHARACTER, _UTF8 = 2, 1, 1
_RATE, _PITCH = 1, 3


class Speaker:
    """Speaks words into arrays.

    Raises:
        ValueError: the package is not installed, or it cannot begin.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ValueError("Package 'espeakng-loader' is not installed: run `pip install espeakng-loader` (10 MB).")
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate: int = self.library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0
        )
        if self.rate <= 0:
            raise ValueError(f"eSpeak NG does not begin (code {self.rate}): reinstall 'espeakng-loader'.")
        self._parts: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._take)  # kept, or it would be collected
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: ctypes._Pointer, count: int, events: int) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str = "en-us", *, words_a_minute: int = 175, pitch: int = 50) -> np.ndarray:
        """Samples of `text`, int16 at `rate`.

        Args:
            voice: a language, and perhaps a variant: "en-us+f3".
            pitch: 0 to 100.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice '{voice}'.")
        self.library.espeak_SetParameter(_RATE, words_a_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        self._parts.clear()
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        return np.concatenate(self._parts)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def read_wav(path: Path, rate: int) -> np.ndarray:
    """Samples of a file of one channel, float32 between -1 and 1, resampled linearly to `rate`."""
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
        times = np.arange(0, len(samples) / file.getframerate(), 1 / rate)
        return np.interp(times, np.arange(len(samples)) / file.getframerate(), samples).astype(np.float32)
