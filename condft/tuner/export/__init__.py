"""A trained adapter in other forms: a weighted difference, or a LoRA."""
