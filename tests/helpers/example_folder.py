"""The folder that examples of speech and training run in: tiny checkpoints, clips, and the configuration of a run."""

from pathlib import Path

from tests.helpers.tiny_speech import save_language_model, save_whisper, write_manifest

__all__ = ["fill_example_folder"]

RUN = """\
output_dir: runs/example
model:
  language_model: llama
  audio_tower: whisper
data:
  manifest: clips/manifest.jsonl
training:
  projector_steps: 1
  steps: 2
  per_device_batch_size: 2
  mixed_precision: no
"""


def fill_example_folder(folder: Path) -> None:
    """Writes `whisper` and `llama` (random weights), `clips/manifest.jsonl` (3 + 1 clips) and `run.yaml`."""
    save_whisper(folder / "whisper")
    save_language_model(folder / "llama")
    write_manifest(folder / "clips", [0.4, 1.5, 0.9, 0.66])
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
