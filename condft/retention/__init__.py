"""Retention: what a model has forgotten, and self-distillation, which makes it forget less."""
