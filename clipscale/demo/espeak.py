"""espeak-ng, called in this process: text to a waveform.

The library (GPL) comes with the package espeakng-loader and is used by the demo's data maker alone. It holds one voice
and one state for the whole process, and what it says depends slightly on what it said before (its flutter runs on): only
the same texts in the same order give the same samples. So a process owns a fixed list of texts.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from clipscale.errors import MissingPackage, RunError

SAMPLE_RATE = 22_050
"""Hertz, of every espeak-ng voice."""

_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _PITCH = 1, 3
_NOISE_SEED = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, started; make one a process."""

    def __init__(self) -> None:
        """
        Raises:
            MissingPackage: espeakng-loader is not installed.
            RunError: the library does not start.
        """
        self._library, data = _load()
        self._pieces: list[np.ndarray] = []
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if rate != SAMPLE_RATE:
            raise RunError(f"espeak-ng should start with {SAMPLE_RATE} Hz, it answered {rate} (data folder {data})")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))  # otherwise the clock, in seconds: f2, f3, f5 breathe noise
        self._callback = _CALLBACK(self._take)  # kept: the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, *, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """The text spoken: int16 samples at `SAMPLE_RATE`.

        Args:
            voice: An accent and a speaker, such as `en-us+f3`.
            pitch: 0 to 100; 50 is the speaker's own.

        Raises:
            RunError: there is no such voice, or nothing was said.
        """
        self._check(self._library.espeak_SetVoiceByName(voice.encode()), f"choose the voice '{voice}'")
        self._check(self._library.espeak_SetParameter(_RATE, words_per_minute, 0), f"speak {words_per_minute} words per minute")
        self._check(self._library.espeak_SetParameter(_PITCH, pitch, 0), f"set the pitch {pitch}")
        self._pieces.clear()
        encoded = text.encode()
        self._check(self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None), f"say '{text}'")
        if not self._pieces:
            raise RunError(f"espeak-ng was asked to say '{text}' as {voice} and gave no sound")
        return np.concatenate(self._pieces)

    def _take(self, samples: Any, count: int, _events: Any) -> int:
        if count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    @staticmethod
    def _check(code: int, wish: str) -> None:
        if code:
            raise RunError(f"espeak-ng was asked to {wish} and answered with error {code}")


def _load() -> tuple[Any, str]:
    """The library, and the folder of its voices."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingPackage(
            "the demo's speech is made by espeak-ng, from the package espeakng-loader: pip install espeakng-loader"
        ) from error
    return ctypes.CDLL(espeakng_loader.get_library_path()), espeakng_loader.get_data_path()
