"""The tuner against LoRA and against plain unfreezing."""
