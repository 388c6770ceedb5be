"""Development scripts: models and data, benchmarks, research. Not installed."""
