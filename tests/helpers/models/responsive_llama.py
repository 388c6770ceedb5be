"""A Llama with large random weights, on which gradients and damage show at once, and tokens for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build_responsive_llama() -> LlamaForCausalLM:
    """4 layers of hidden size 32; no parameter requires a gradient."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens(count: int, length: int = 12) -> torch.Tensor:
    """`(count, length)`, long; the same for the same count."""
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(count))
