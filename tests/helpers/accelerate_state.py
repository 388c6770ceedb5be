"""accelerate's state, which is one a process."""

from accelerate.state import AcceleratorState, GradientState, PartialState

__all__ = ["forget_accelerate"]


def forget_accelerate() -> None:
    """The next Accelerator of this process starts without what the last one was told."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
