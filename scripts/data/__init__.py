"""Real models and data without a hub."""
