"""Benchmarks: always ratios to a peer in the same run, never seconds alone."""
