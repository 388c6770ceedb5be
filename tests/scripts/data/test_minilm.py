"""The sentence encoder's archive becomes a checkpoint, and one that tells no sentences apart is refused."""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from scripts.data.minilm import build_minilm, verify_minilm
from tests.helpers.models.tiny_speech import build_tokenizer


def test_archive_to_checkpoint_which_has_to_tell_sentences_apart(tmp_path: Path) -> None:
    tokenizer, source = build_tokenizer(), tmp_path / "source"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    for part in (model, tokenizer):
        part.save_pretrained(source)
    raw, target = tmp_path / "raw", tmp_path / "target"
    raw.mkdir()
    target.mkdir()
    with zipfile.ZipFile(raw / "model.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, path.name)
    build_minilm(raw, target)
    found = AutoModel.from_pretrained(target).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="alike"):
        verify_minilm(target, raw)
