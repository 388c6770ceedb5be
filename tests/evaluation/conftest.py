"""A tiny real model and a tokenizer of its own for the measures."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 96  # of the tiny Llama in tests/conftest.py


@pytest.fixture
def tokenizer() -> Any:
    """One token a printable ASCII character, in order from `<s>`, `</s>` and newline on."""
    characters = ["\n", *(chr(code) for code in range(32, 125))]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *characters][:VOCABULARY])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )
