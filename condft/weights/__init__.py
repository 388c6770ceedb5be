"""Where weights come from: a live model, or a checkpoint that is never instantiated."""
