"""Adapter files, and the base model that an adapter belongs to."""
