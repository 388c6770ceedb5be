"""DeepSpeed ZeRO-2 as an engine. Needs the package `deepspeed`, and is imported only where it is launched.

DeepSpeed's own mixed precision is not used: it casts every parameter, so the frozen base would change and the copies
would lose their bits. The copies that train are fp32 as they are; under bf16, DeepSpeed's autocast computes in it.
Nor are DeepSpeed's checkpoints: they are pickles, read back without `weights_only`.
"""

from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from condft.training.engine import Engine, OptimizerState

__all__ = ["DeepSpeedEngine"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """DeepSpeed through accelerate; every stage has an engine of its own, closed at its end.

    Raises:
        ValueError: A ZeRO stage other than 2.
    """

    leaves_model_whole = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        if stage != 2:
            raise ValueError(
                f"DeepSpeed with ZeRO stage {stage}: the trainer's checkpoints gather what stage 2 keeps, not what "
                "another does. Set zero_stage: 2, or shard parameters with configs/accelerate/fsdp2.yaml; the tuner "
                "itself runs under stage 3, in a loop of your own."
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
        for partition in zero.single_partition_of_fp32_groups:
            optimizer.state[partition] = {
                "step": torch.tensor(0.0),
                **{k: torch.zeros_like(partition) for k in _MOMENTS},
            }
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
            safe_set_full_optimizer_state(parameter, state[key], key)
