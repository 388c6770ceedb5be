"""DeepSpeed ZeRO-2 and ZeRO-3 as an engine. Needs the package `deepspeed`, and is imported only where it is launched.

DeepSpeed's own mixed precision is not used: it casts every parameter, so the frozen base would change and the copies
would lose their bits. The copies that train are fp32 as they are; under bf16, DeepSpeed's autocast computes in it.
Nor are DeepSpeed's checkpoints: they are pickles, read back without `weights_only`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from condft.training.engine import Engine, OptimizerState

__all__ = ["DeepSpeedEngine"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """DeepSpeed through accelerate; every stage has an engine of its own, closed at its end.

    Raises:
        ValueError: A ZeRO stage other than 2 or 3, or fp16.
    """

    leaves_model_whole = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.stage: int = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        if self.stage != 2:
            raise ValueError(
                f"DeepSpeed with ZeRO stage {self.stage}: only stage 2 has been seen to train as one process does. "
                "Set zero_stage: 2, or shard parameters with configs/accelerate/fsdp2.yaml"
            )

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float
    ) -> tuple[Any, Any]:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = per_device_batch_size
        config["train_batch_size"] = "auto"  # of the numbers above; the stage before left its own here
        config["gradient_clipping"] = max_grad_norm
        prepared = super().prepare(model, optimizer, per_device_batch_size=0, max_grad_norm=0)
        # AdamW's own start. Left to its first step, ZeRO-2 would look for the state of all groups after stepping the
        # first (DeepSpeed 0.19), and never find that of the others again.
        zero = self._deepspeed.optimizer
        for partition in (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        ):
            optimizer.state[partition] = {
                "step": torch.tensor(0.0),
                **{k: torch.zeros_like(partition) for k in _MOMENTS},
            }
        if self.stage == 3:
            # ZeRO-3 gathers what a module holds when the module is called, and a PEFT layer reads parameters of
            # submodules that it does not call: they are declared as its own.
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    for parameter in module.parameters():
                        register_external_parameter(module, parameter)
        else:
            zero._lazy_init_hp_params_optimizer_state()
        return prepared

    @property
    def _deepspeed(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def backward(self, loss: Tensor) -> None:
        # not accelerator.backward, which takes the step too: a loss that is not finite must stop before it
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._deepspeed.backward(loss)

    def update(self, optimizer: Optimizer, parameters: list[nn.Parameter], max_norm: float) -> float:
        self._deepspeed.step()  # clips, to the norm given to prepare
        return float(self._deepspeed.get_global_grad_norm())

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> OptimizerState:
        if not parameter.requires_grad:  # rests in this stage
            return {}
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        # a count for each flat partition, and all of them step together
        return state | {"step": next(iter(optimizer.state.values()))["step"]}

    def set_state(self, optimizer: Optimizer, parameter: nn.Parameter, state: OptimizerState) -> None:
        for partition in optimizer.state.values():
            partition["step"].copy_(state["step"])
        for key in _MOMENTS:
            if self.stage == 2:
                safe_set_full_optimizer_state(parameter, state[key], key)
            else:
                safe_set_local_optimizer_state(parameter, self._partition(parameter, state[key]), key)

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's share of a whole value under ZeRO-3: equal cuts of it, the last one filled up."""
        size = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        return flat.narrow(0, size * self.accelerator.process_index, size)
