"""The process that condft runs in: its memory, its terminal, its imports, and the mode that a model is in."""
