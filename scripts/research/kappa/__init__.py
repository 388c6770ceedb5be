"""What the condition number says on real weights."""
