"""FSDP2 (torch's `fully_shard`) as an engine."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import Optimizer

from condft.training.engines.base import Engine, refuse_meta_weights

__all__ = ["FSDP2Engine", "layer_classes"]


class FSDP2Engine(Engine):
    """`fully_shard` through accelerate: parameters, gradients and optimizer state become DTensors, in place."""

    toggles_requires_grad = False
    leaves_model_whole = False

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        if isinstance(model, FSDPModule):  # sharded in the stage before, so the optimizer was made of DTensors
            return model, self.accelerator.prepare_optimizer(optimizer)
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layer_classes(model)
        if not plugin.cpu_ram_efficient_loading:  # which broadcasts the first process's weights into meta tensors
            refuse_meta_weights(model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        return wrapped, prepared


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the module classes that are sharded as one group: those that transformers never splits over devices.

    A frozen base may have another dtype than the trained copies: FSDP2 wants one dtype only among the parameters that
    *train* in a group, and CondFT's copies are all fp32.
    """
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    return sorted({type(module).__name__ for module in model.modules()} & unsplit)
