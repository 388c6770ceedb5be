"""Which units of a model train: candidates, ties, saved modules, and the selection."""
