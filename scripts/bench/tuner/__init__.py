"""The tuner beside LoRA and plain unfreezing."""
