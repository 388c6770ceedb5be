"""Retention: measures of what a model has forgotten, and self-distillation, which makes it forget less.

Works with any causal LM and any training loop, and needs no pre-training data: text sampled from the base model
replaces it.

    texts = sample_from_base(base, tokenizer, num_sequences=16, num_tokens=96, seed=0)   # before training
    ...
    kl_to_base(model, texts, model.disable_adapter)                                      # after training
    text_cross_entropy(model, tokenizer, held_out_text("pydoc"), max_tokens=12_000, context_length=512)
"""

from condft.retention.measures import CrossEntropy, held_out_text, kl_to_base, text_cross_entropy
from condft.retention.sampling import sample_from_base
from condft.retention.self_distillation import SelfDistillation, SelfDistillationConfig

__all__ = [
    "CrossEntropy",
    "SelfDistillation",
    "SelfDistillationConfig",
    "held_out_text",
    "kl_to_base",
    "sample_from_base",
    "text_cross_entropy",
]
