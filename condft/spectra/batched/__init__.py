"""Spectral facts of many matrices of one shape in batched calls, for GPUs."""
