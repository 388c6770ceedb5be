"""Engines: what differs between one process, DDP, FSDP2 and DeepSpeed, behind one interface (see `base`)."""
