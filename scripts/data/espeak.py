"""Speaks text with the eSpeak NG library that the package `espeakng-loader` carries, reproducibly.

eSpeak NG 1.52 keeps its oscillators, echo buffer and noise in static variables that no call resets, so an utterance
changes the next one. Therefore every utterance is made by a freshly loaded copy of the library, with its own noise
seed: the same request gives the same samples in any order of requests. Loading costs about 4 ms.
"""

import _ctypes
import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import espeakng_loader
import numpy as np

AUDIO_OUTPUT_SYNCHRONOUS = 2
RATE, PITCH = 1, 3  # espeak_PARAMETER
POS_CHARACTER = 1
CHARS_UTF8 = 1
EE_OK = 0
SILENCE_PEAK = 300  # of 32767, -41 dB: the quietest speaker in use peaks at 10,000

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class EspeakError(RuntimeError):
    """The synthesizer does not load, does not know a speaker, or gave silence."""


def synthesize(
    text: str, speaker: str, *, words_per_minute: int = 160, pitch: int = 50, seed: int = 1
) -> tuple[np.ndarray, int]:
    """Speaks one utterance.

    Args:
        text: What to say.
        speaker: eSpeak's name of a language and, after a plus, of a variant: `"en-us+f3"`.
        words_per_minute: Speed, 80 to 450.
        pitch: 0 to 100, 50 is the speaker's own.
        seed: Of the noise in breath and consonants; positive.

    Returns:
        `(num_samples,)` int16 and the sampling rate in Hz.

    Raises:
        EspeakError: The speaker is unknown, or the result is silence.
    """
    chunks: list[np.ndarray] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int | None) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    callback = _Callback(collect)  # a reference, because ctypes keeps none while C calls it
    encoded = text.encode("utf-8") + b"\0"
    with _fresh_library() as (library, sampling_rate):
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(speaker.encode("utf-8")) != EE_OK:
            raise EspeakError(f"eSpeak NG {espeak_version()} knows no speaker {speaker!r}")
        library.espeak_SetParameter(RATE, words_per_minute, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        status = library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), 0, POS_CHARACTER, 0, CHARS_UTF8, None, None
        )
        if status != EE_OK:
            raise EspeakError(f"eSpeak NG failed with status {status} on {text!r} spoken by {speaker!r}")
        library.espeak_Synchronize()
    samples = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int16)
    peak = int(np.abs(samples.astype(np.int32)).max(initial=0))
    if peak < SILENCE_PEAK:
        raise EspeakError(
            f"{speaker!r} gave silence for {text!r}: {samples.size:,} samples, peak {peak} of 32767. Drop it."
        )
    return samples, sampling_rate


def espeak_version() -> str:
    """The library's own version, such as `"1.52.0"`."""
    with _loaded() as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return str(library.espeak_Info(None).decode("ascii"))


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    with _loaded() as library:
        data = espeakng_loader.get_data_path().encode()
        sampling_rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if sampling_rate <= 0:
            raise EspeakError(f"eSpeak NG did not start with the data at {data.decode()}: status {sampling_rate}")
        try:
            yield library, sampling_rate
        finally:
            library.espeak_Terminate()


@contextmanager
def _loaded() -> Iterator[ctypes.CDLL]:
    path = espeakng_loader.get_library_path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise EspeakError(f"{path} does not load: {error}. Reinstall espeakng-loader.") from error
    try:
        yield library
    finally:
        # ctypes has no public way to unload, and only unloading clears the static variables.
        if sys.platform == "win32":
            _ctypes.FreeLibrary(library._handle)
        else:
            _ctypes.dlclose(library._handle)
