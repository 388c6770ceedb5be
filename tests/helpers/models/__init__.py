"""Tiny real models, checkpoints and adapters, built from configs."""
