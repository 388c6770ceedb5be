"""Engines: what differs between one process, DDP, FSDP2 and DeepSpeed, behind one face.

An engine prepares a stage's model and optimizer, makes the backward pass and the step, and knows where the whole
values of a trained parameter and of its optimizer state are. Checkpoints and adapters hold whole tensors by name, so
a file does not tell which engine wrote it. What no caller has to know: under FSDP2 and ZeRO-3 the model stays
sharded after a stage, and `whole` gathers its tensors one at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer

OptimizerState = dict[str, Tensor]


class Engine:
    """One process or DDP: every rank holds everything.

    Args:
        accelerator: From `make_accelerator`.

    Attributes:
        rests_by_flag: Whether a stage's resting components may have `requires_grad` taken away. FSDP2 reads the flags
            once, at the first forward of the whole run; there, what rests is only left out of the optimizer.
        leaves_model_whole: Whether the model can be used and saved as any other after a stage.
    """

    rests_by_flag = True
    leaves_model_whole = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def check(self, model: nn.Module) -> None:
        """Refuses a model that one of the stages could not train here; `requires_grad` says what may train in any."""

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        """The wrapped model and optimizer that the stage runs on.

        Raises:
            ValueError: This rank holds weights on the meta device, and nothing here would fill them.
        """
        _refuse_meta_weights(model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        return wrapped, prepared

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` over the number of micro-batches; ranks are averaged."""
        self.accelerator.backward(loss)

    def update(self, optimizer: Optimizer, parameters: list[nn.Parameter], max_norm: float | None) -> float:
        """Clips the step's gradients and takes the optimizer's step.

        Returns:
            The gradients' norm before clipping. Where it is not finite the step is not taken (DeepSpeed: it is, and
            the loss has been looked at before).
        """
        limit = math.inf if max_norm is None else max_norm  # at infinity the norm is taken and nothing scaled
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
        # fp16's scaler finds and skips such steps by itself
        if self.accelerator.scaler is not None or math.isfinite(norm):
            optimizer.step()
        return norm

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> OptimizerState:
        """All of the optimizer's state of one parameter; empty before its first step. Collective where sharded."""
        return {key: whole(value) for key, value in optimizer.state.get(parameter, {}).items()}

    def set_state(self, optimizer: Optimizer, parameter: nn.Parameter, state: OptimizerState) -> None:
        """Gives one parameter its optimizer state back. Every rank gives the same whole values."""
        optimizer.state[parameter] = {
            key: shard_like(parameter, value).clone() if value.shape == parameter.shape else value.clone()
            for key, value in state.items()
        }


class FSDP2Engine(Engine):
    """`fully_shard` through accelerate: parameters, gradients and optimizer state are DTensors, in place."""

    rests_by_flag = False
    leaves_model_whole = False

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        if isinstance(model, FSDPModule):  # sharded in the stage before: the optimizer was made of DTensors
            return model, self.accelerator.prepare_optimizer(optimizer)
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layer_classes(model)
        if not plugin.cpu_ram_efficient_loading:
            _refuse_meta_weights(model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        return wrapped, prepared


def make_engine(accelerator: Accelerator) -> Engine:
    """The engine of a launch set-up.

    Raises:
        ValueError: FSDP1, Megatron or XLA, which the trainer does not know.
    """
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 2:
        return FSDP2Engine(accelerator)
    if kind is DistributedType.DEEPSPEED:
        from condft.training.engines.deepspeed import deepspeed_engine  # the package is optional

        return deepspeed_engine(accelerator)
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(
            f"training runs on one process, DDP, FSDP2 and DeepSpeed ZeRO-2 and 3, not on {kind.value}"
            + (" version 1: set fsdp_version: 2" if kind is DistributedType.FSDP else "")
            + "; configs/accelerate/ has a file for each engine."
        )
    return Engine(accelerator)


def _refuse_meta_weights(model: nn.Module) -> None:
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} weights are on the meta device of this rank, the first is {meta[0]}: load them, or train "
            "with FSDP2 and fsdp_cpu_ram_efficient_loading: true, which brings every rank its shards of the first "
            "rank's weights"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may hold in shards (FSDP2) or partitions (ZeRO-3), detached.

    Collective: call it on every rank.
    """
    if hasattr(tensor, "ds_id"):  # by which DeepSpeed itself tells a parameter that it partitions
        from condft.training.engines.deepspeed import whole_partition

        return whole_partition(tensor)
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]  # detach is typed Tensor
    return tensor.detach()


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole value as `parameter` is kept: this rank's shard of it under FSDP2, cut without any communication."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the module classes that are sharded as one: those that transformers never splits over devices.

    A frozen base may be of another dtype than the trained copies: FSDP2 wants one dtype among what *trains* in a
    group only, and CondFT's copies are all fp32.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    return sorted({type(module).__name__ for module in model.modules()} & named)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards, the model's modes, forward and gradients are as they were before accelerate prepared it.

    accelerate marks a model as prepared and replaces its `forward` by one under autocast. Its own unwrapping leaves
    the mark, so the next stage would run without autocast, and strips transformers' decorators from `forward` too;
    so what it sets on the instance is taken back here.
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
