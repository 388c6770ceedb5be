"""What a reader of the documentation has before them: a folder with models and data of the names that pages use."""

import contextlib
import doctest
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from condft.cli import main
from tests.helpers.docs.pages import Block
from tests.helpers.isolation import forget_accelerate
from tests.helpers.models.tiny_checkpoints import edit_config
from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_manifest
from tests.helpers.processes import ROOT

LANGUAGE_MODEL = "models/smollm2-135m-instruct"
COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_GERMAN = "Ein Paket wird mit dem Programm installiert, das die Abhängigkeiten auflöst und die Dateien prüft. "


def furnish(folder: Path) -> None:
    """Puts tiny real models and data under the names that the pages use; scripts and configs are the repository's."""
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    save_language_model(folder / LANGUAGE_MODEL)
    edit_config(folder / LANGUAGE_MODEL, max_position_embeddings=1024)  # the recipe measures windows of 512 tokens
    save_whisper(folder / "models" / "whisper-tiny.en")
    (folder / "data" / "digits").mkdir(parents=True)
    write_manifest(folder / "data" / "digits", [0.4, 0.5, 0.6, 0.7, 0.5, 0.6, 0.4, 0.5, 0.6, 0.5], num_test=2)
    german = folder / "data" / "german" / "debian-reference.txt"
    german.parent.mkdir(parents=True)
    german.write_text(_GERMAN * 200, encoding="utf-8")


def put_model_of_real_size(folder: Path) -> None:
    """Replaces the tiny language model by one of SmolLM2-135M's shapes, with random weights.

    Counts of units and parameters depend on shapes alone, so outputs that show them can be compared.
    """
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / LANGUAGE_MODEL)


def run_block(block: Block, namespace: dict[str, Any], folder: Path, *, in_process: bool = True) -> None:
    """Runs a block as the reader would, in `folder`; what it prints must be what the page shows.

    Args:
        block: Python or bash.
        namespace: Of the page's Python blocks.
        folder: The reader's, and the working directory.
        in_process: Run `condft` commands by their entry point in this process: a start of Python takes seconds.

    Raises:
        AssertionError: It fails, or prints something else.
    """
    if block.language == "python":
        printed = _run_python(block, namespace)
    elif in_process and all(command.startswith("condft ") for command in _commands(block)):
        printed = "".join(_run_condft(command, block) for command in _commands(block))
    else:
        printed = _run_shell(block, folder)
    if block.output is not None:
        same = doctest.OutputChecker().check_output(block.output, printed, COMPARE)
        assert same, f"{block.place} prints\n{printed}\nand the page shows\n{block.output}"


def _run_python(block: Block, namespace: dict[str, Any]) -> str:
    source = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec"), namespace)
    return printed.getvalue()


def _commands(block: Block) -> list[str]:
    return [line for line in block.code.replace("\\\n", " ").splitlines() if line.strip()]


def _run_condft(command: str, block: Block) -> str:
    forget_accelerate()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(shlex.split(command, comments=True)[1:])
    assert code == 0, f"{block.place}: {command!r} ends with {code}:\n{printed.getvalue()[-3000:]}"
    return printed.getvalue()


def _run_shell(block: Block, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    output = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, f"{block.place} ends with {done.returncode}:\n{output}"
    return done.stdout
