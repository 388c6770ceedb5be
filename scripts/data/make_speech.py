"""Speaks a dataset: English and German digits by many synthetic speakers, none of them in both train and test.

    python -m scripts.data.make_speech                     # 960 + 128 clips into data/digits/, about ten seconds
    python -m scripts.data.make_speech --into /tmp/d --seed 3 --train 100 --test 20

Leaves `manifest.jsonl` (a line a clip: audio, text, language, speaker, split), 16 kHz FLAC files in `audio/`, and
`dataset.json` with the settings and a digest. The same settings give the same bytes, and a clip depends only on the
seed, its split and its number, so a larger dataset begins with the smaller one.
Needs `pip install condft[quickstart]`.
"""

import argparse
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from condft.files.atomic import atomic_directory, write_json, write_text
from scripts.data.espeak import EspeakError, espeak_version, synthesize

FORMAT_VERSION = 1
SAMPLING_RATE = 16_000
MAX_SECONDS = 4.0
MAX_DRAWS = 20
SPLITS = ("train", "test")
NUM_DIGITS = (2, 4)
WORDS_PER_MINUTE = (110, 170)
PITCH = (30, 70)

WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
BASE_SPEAKERS = {
    "en": ("en", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us", "en-us-nyc"),
    "de": ("de",),
}
# The variants of eSpeak NG 1.52 of which whisper-tiny.en transcribes most of ten digits correctly. Left out: the rest,
# robots and effects, "fast" (its own file calls it unstable), Reed and caleb (their noise cannot be seeded), and all
# but one of every group that is really one speaker: the same formants, or waveforms that correlate beyond 0.7.
VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Jacky", "Marco", "Mike", "Nguyen",
    "Storm", "adam", "anika", "antonio", "aunty", "belinda", "boris", "croak", "david", "ed", "edward", "f1",
    "f2", "f3", "f4", "iven2", "klatt3", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "mike2", "pablo",
    "pedro", "quincy", "rob", "robert", "sandro", "steph", "whisper", "zac",
)  # fmt: skip
NUM_TEST_VARIANTS = 12


class SpeechError(RuntimeError):
    """The dataset cannot be made as asked, or would overwrite another one."""


@dataclass(frozen=True)
class Clip:
    """One utterance to be spoken; `pitch` in eSpeak's 0 to 100, `seed` of the noise."""

    text: str
    language: str
    speaker: str
    words_per_minute: int
    pitch: int
    seed: int


def recipe() -> str:
    """Hash of all choices in this file that decide what is spoken: an edited script then notices old data."""
    choices = (WORDS, BASE_SPEAKERS, VARIANTS, NUM_TEST_VARIANTS, NUM_DIGITS, WORDS_PER_MINUTE, PITCH, MAX_SECONDS)
    return hashlib.sha256(repr(choices).encode("utf-8")).hexdigest()[:16]


def split_variants(seed: int) -> dict[str, tuple[str, ...]]:
    """Divides the speaker variants between the splits: none is on both sides, in any language."""
    order = list(VARIANTS)
    random.Random(f"variants/{seed}").shuffle(order)
    return {"train": tuple(sorted(order[NUM_TEST_VARIANTS:])), "test": tuple(sorted(order[:NUM_TEST_VARIANTS]))}


def draw_clip(seed: int, split: str, index: int, draw: int = 0) -> Clip:
    """Draws a clip by its arguments alone, so that it does not depend on how many clips there are.

    Args:
        seed: Of the dataset.
        split: `"train"` or `"test"`.
        index: Number of the clip in its split; even ones are English, odd ones German.
        draw: Counts up when an earlier draw came out too long.
    """
    generator = random.Random(f"clip/{seed}/{split}/{index}/{draw}")
    language = ("en", "de")[index % 2]
    variant = generator.choice(split_variants(seed)[split])
    return Clip(
        text=" ".join(generator.choice(WORDS[language]) for _ in range(generator.randint(*NUM_DIGITS))),
        language=language,
        speaker=f"{generator.choice(BASE_SPEAKERS[language])}+{variant}",
        words_per_minute=generator.randint(*WORDS_PER_MINUTE),
        pitch=generator.randint(*PITCH),
        seed=generator.randint(1, 2**31 - 1),
    )


def speak(clip: Clip) -> np.ndarray:
    """The clip's samples: `(num_samples,)` int16 at `SAMPLING_RATE` Hz.

    Raises:
        EspeakError: The speaker is unknown or silent.
    """
    samples, rate = synthesize(
        clip.text, clip.speaker, words_per_minute=clip.words_per_minute, pitch=clip.pitch, seed=clip.seed
    )
    resampled = soxr.resample(samples.astype(np.float64), rate, SAMPLING_RATE, quality="HQ")
    return np.clip(np.rint(resampled), -32768, 32767).astype(np.int16)  # the filter overshoots full scale


def speak_within_limit(seed: int, split: str, index: int) -> tuple[Clip, np.ndarray]:
    """Draws and speaks a clip, and draws again while it is `MAX_SECONDS` long or longer.

    Raises:
        SpeechError: `MAX_DRAWS` draws were all too long.
    """
    for draw in range(MAX_DRAWS):
        clip = draw_clip(seed, split, index, draw)
        samples = speak(clip)
        if samples.size < MAX_SECONDS * SAMPLING_RATE:
            return clip, samples
    raise SpeechError(f"{split} clip {index}: {MAX_DRAWS} draws were all {MAX_SECONDS} s or longer; speak faster")


def write_dataset(folder: Path, settings: dict[str, int | str], sizes: dict[str, int], seed: int) -> list[float]:
    """Speaks and writes the whole dataset into an empty folder.

    Args:
        folder: Existing and empty.
        settings: What `dataset.json` records, so that the next call knows what this one did.
        sizes: Clips per split.
        seed: Of the dataset.

    Returns:
        The clips' lengths in seconds.
    """
    lines: list[str] = []
    seconds: list[float] = []
    (folder / "audio").mkdir()
    with tqdm(total=sum(sizes.values()), desc="speaking", unit="clip") as progress:
        for split in SPLITS:
            for index in range(sizes[split]):
                clip, samples = speak_within_limit(seed, split, index)
                audio = f"audio/{split}-{index:05d}.flac"
                soundfile.write(folder / audio, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
                entry = {"audio": audio, "text": clip.text, "language": clip.language}
                lines.append(json.dumps({**entry, "speaker": clip.speaker, "split": split}, ensure_ascii=False))
                seconds.append(samples.size / SAMPLING_RATE)
                progress.update()
    _check_still_fresh(seed, folder / "audio" / "train-00000.flac")
    write_text(folder / "manifest.jsonl", "".join(f"{line}\n" for line in lines))
    write_json(folder / "dataset.json", {"settings": settings, "sha256": digest(folder)})
    return seconds


def _check_still_fresh(seed: int, first: Path) -> None:
    """Raises if the first clip comes out differently now: a system that does not unload eSpeak is not reproducible."""
    _, again = speak_within_limit(seed, "train", 0)
    written, _ = soundfile.read(first, dtype="int16")
    if not np.array_equal(written, again):
        raise SpeechError("eSpeak keeps its state between clips on this system, so the dataset is not reproducible")


def digest(folder: Path) -> str:
    """sha256 over the manifest and every audio file that it names, in its order."""
    total = hashlib.sha256((folder / "manifest.jsonl").read_bytes())
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        total.update((folder / json.loads(line)["audio"]).read_bytes())
    return total.hexdigest()


def is_complete(folder: Path, settings: dict[str, int | str]) -> bool:
    """Whether `folder` holds the very dataset that `settings` describe, unchanged.

    Raises:
        SpeechError: It holds something else.
    """
    if not folder.exists():
        return False
    way_out = f"Give another --into, or --force to replace {folder}."
    if not (folder / "dataset.json").is_file():
        raise SpeechError(f"{folder} exists and is no dataset of this script (no dataset.json). {way_out}")
    recorded = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if recorded["settings"] != settings:
        there = recorded["settings"]
        changed = sorted(k for k in settings.keys() | there.keys() if settings.get(k) != there.get(k))
        listing = ", ".join(f"{k} {there.get(k)!r} there, {settings.get(k)!r} asked for" for k in changed)
        raise SpeechError(f"{folder} holds another dataset: {listing}. {way_out}")
    try:
        if digest(folder) == recorded["sha256"]:
            return True
    except FileNotFoundError as error:
        raise SpeechError(f"{error.filename} is missing. {way_out}") from error
    raise SpeechError(f"{folder} was changed since it was written (sha256 differs). {way_out}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` lists it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--into", type=Path, default=Path("data/digits"), help="folder to make (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides speakers, digits, speeds, pitches (%(default)s)")
    parser.add_argument("--train", type=int, default=960, help="training clips, half of them German (%(default)s)")
    parser.add_argument("--test", type=int, default=128, help="test clips, by other speakers (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    for split in SPLITS:
        if getattr(options, split) < 2:
            parser.error(f"--{split} {getattr(options, split)}: at least 2 clips, one a language")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Makes the dataset unless it is there; returns the exit status."""
    options = parse_arguments(arguments)
    sizes = {split: getattr(options, split) for split in SPLITS}
    try:
        settings = {"format_version": FORMAT_VERSION, "seed": options.seed, **sizes}
        settings |= {"recipe": recipe(), "espeak": espeak_version()}
        if not options.force and is_complete(options.into, settings):
            print(f"{options.into}: already there, every file as written; nothing to do")
            return 0
        with atomic_directory(options.into) as folder:
            seconds = write_dataset(folder, settings, sizes, options.seed)
    except (SpeechError, EspeakError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.into}: {len(seconds):,} clips, {sum(seconds) / 60:.1f} minutes, "
          f"{min(seconds):.2f} to {max(seconds):.2f} s each")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
