"""The interface of engines, and the engine of one process or DDP.

An engine prepares a stage's model and optimizer, makes the backward pass and the optimizer step, and gathers whole
values of a trained parameter and of its optimizer state. Checkpoints and adapters hold whole tensors by name, so a
file is the same whichever engine wrote it. Under FSDP2 and ZeRO-3 the model stays sharded after a stage.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from condft.training.engines.sharding import shard_like, whole

__all__ = ["Engine", "OptimizerState", "refuse_meta_weights", "restoring"]

OptimizerState = dict[str, Tensor]


class Engine:
    """One process or DDP: every process holds the whole model.

    Args:
        accelerator: From `make_accelerator`.

    Attributes:
        toggles_requires_grad: Whether `requires_grad` may change from stage to stage. FSDP2 reads the flags only once,
            at the first forward pass of the run: there, a component that does not train in a stage keeps its flag, and
            is only left out of the optimizer.
        leaves_model_whole: Whether the model can be used and saved as any other after a stage.
    """

    toggles_requires_grad = True
    leaves_model_whole = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check(self, model: nn.Module) -> None:
        """Refuses a model that one of the stages could not train on this engine.

        Call it before the first stage, when `requires_grad` marks all that trains in any stage.
        """

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        """The wrapped model and optimizer that the stage runs on.

        Raises:
            ValueError: This process holds weights on the meta device, and the engine does not fill them.
        """
        refuse_meta_weights(model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        return wrapped, prepared

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` / (number of micro-batches); they are averaged over the processes."""
        self.accelerator.backward(loss)

    def update(self, optimizer: Optimizer, parameters: list[nn.Parameter], max_norm: float | None) -> float:
        """Clips the step's gradients and takes the optimizer's step.

        Returns:
            The norm of the gradients before clipping. If it is not finite, the step is not taken. (DeepSpeed takes
            it; the loss, checked before, is finite then.)
        """
        limit = math.inf if max_norm is None else max_norm  # with infinity the norm is computed and nothing is scaled
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
        # fp16's gradient scaler finds and skips such steps itself, and lowers its scale for the next one
        if self.accelerator.scaler is not None or math.isfinite(norm):
            optimizer.step()
        return norm

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> OptimizerState:
        """The optimizer's whole state of one parameter; empty before its first step.

        Collective where the state is sharded: call it in every process.
        """
        return {key: whole(value) for key, value in optimizer.state.get(parameter, {}).items()}

    def set_state(self, optimizer: Optimizer, parameter: nn.Parameter, state: OptimizerState) -> None:
        """Restores the optimizer's state of one parameter. Every process passes the same whole values."""
        # the moments have the parameter's shape and are sharded as it is; the step count is a scalar
        optimizer.state[parameter] = {
            key: shard_like(parameter, value).clone() if value.shape == parameter.shape else value.clone()
            for key, value in state.items()
        }


def refuse_meta_weights(model: nn.Module) -> None:
    """Raises ValueError if the model has weights on the meta device, which would train from nothing."""
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} weights are on the meta device of this process, the first is {meta[0]}: load them, or train "
            "with FSDP2 and fsdp_cpu_ram_efficient_loading: true, which sends every process its shards of the first "
            "process's weights"
        )


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Afterwards, the model's modes, forward and gradients are as they were before accelerate prepared it.

    accelerate (1.15) marks a prepared model and replaces its `forward` by one under autocast. Its own
    `unwrap_model` leaves the mark, so that the next stage would run without autocast, and removes transformers'
    decorators from `forward` too. So the attributes that accelerate sets on the instance are undone here.
    """
    touched = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in touched if name in model.__dict__}
    was_training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for name in touched:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        for module, training in was_training.items():
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None
