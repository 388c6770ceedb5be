"""What all tests share: no network, few threads, and tiny real models built from configs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test reads or writes the user's cache, nor is one served what another has measured: those of the cache name a
# folder. Set here and not in a fixture, so that processes that tests launch inherit it.
os.environ["CONDFT_CACHE"] = "off"

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.models.tiny_llama import VOCABULARY, build_tiny_llama

pytest_plugins = ["tests.helpers.models.adapters", "tests.helpers.models.trainees"]

torch.set_num_threads(2)
# A busy machine is no failure: how long an example takes is not what the properties are about.
hypothesis.settings.register_profile("condft", deadline=None)
hypothesis.settings.load_profile("condft")


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    return build_tiny_llama


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


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
