"""Scripts that tests launch as processes of their own."""
