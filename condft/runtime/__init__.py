"""The process that condft runs in: the group it belongs to, its memory, console and imports, and a model's mode."""
