"""eSpeak NG, really spoken: the library comes with the development dependencies."""

import numpy as np
import pytest

from scripts.data.espeak import EspeakError, espeak_version, synthesize
from scripts.data.make_speech import BASE_SPEAKERS, VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_speaker_speaks_and_repeats_itself(variant: str) -> None:
    for speaker in (f"en-us+{variant}", f"de+{variant}"):
        first, rate = synthesize("four", speaker, seed=5)
        synthesize("acht zwei", "de+f1", seed=6)  # what is said in between must leave no trace
        again, _ = synthesize("four", speaker, seed=5)
        assert rate == 22_050
        assert np.array_equal(first, again)


@pytest.mark.parametrize("base", BASE_SPEAKERS["en"])
def test_every_accent_exists(base: str) -> None:
    samples, rate = synthesize("seven", f"{base}+m1")
    assert samples.size > rate / 5


def test_silence_and_unknown_speakers_are_errors() -> None:
    with pytest.raises(EspeakError, match=r"'en-us' gave silence for ' ': .* Drop it"):
        synthesize(" ", "en-us")
    with pytest.raises(EspeakError, match=r"eSpeak NG 1\.\S+ knows no speaker 'xx-none'"):
        synthesize("one", "xx-none")


def test_the_version_is_the_librarys() -> None:
    assert espeak_version().startswith("1.")
