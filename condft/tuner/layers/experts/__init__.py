"""Fused stacks of experts of which some train."""
