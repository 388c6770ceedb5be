"""Files: written atomically, and tensors recognized by their hash."""
