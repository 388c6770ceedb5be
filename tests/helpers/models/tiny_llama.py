"""A tiny real Llama, built from a config."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


def build_tiny_llama(seed: int = 0, *, tied: bool = True, layers: int = 4) -> LlamaForCausalLM:
    """A Llama of 4 layers and hidden size 32: q and o square, k and v wide, the MLP 64 x 32."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
