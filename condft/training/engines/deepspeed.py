"""DeepSpeed ZeRO-2 and ZeRO-3 as engines. Needs the package `deepspeed`; imported only where it is launched.

Two features of DeepSpeed are not used. Its mixed precision casts every parameter: the frozen base would change, and
the trained copies would lose their fp32 bits. The copies are fp32 already; under bf16, DeepSpeed's autocast computes
in bf16. Its checkpoints are pickles, which it reads without `weights_only`, so that a file could run code.

Under ZeRO-3 the model stays partitioned after a stage, as it stays sharded under FSDP2.
"""

from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim.optimizer import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from condft.training.engines.base import Engine, OptimizerState

__all__ = ["DeepSpeedEngine", "Zero2Engine", "Zero3Engine", "deepspeed_engine"]

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, next to the step count


def deepspeed_engine(accelerator: Accelerator) -> "DeepSpeedEngine":
    """The engine of the ZeRO stage that was launched.

    Raises:
        ValueError: A ZeRO stage other than 2 and 3.
    """
    stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage not in (2, 3):
        raise ValueError(
            f"DeepSpeed with ZeRO stage {stage}: checkpoints can gather the state of ZeRO stages 2 and 3 only. "
            "Set zero_stage: 2 or 3; configs/accelerate/ has a file for each."
        )
    return Zero2Engine(accelerator) if stage == 2 else Zero3Engine(accelerator)


class DeepSpeedEngine(Engine):
    """DeepSpeed through accelerate. Every stage of training makes a new DeepSpeed engine, closed at its end."""

    leaves_model_whole = False

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = per_device_batch_size
        config["train_batch_size"] = "auto"  # to be computed again: the stage before has left its own number here
        config["gradient_clipping"] = max_grad_norm or 0.0  # 0 means no clipping
        # The base class does not use these two: DeepSpeed takes both from its configuration, set above.
        prepared = super().prepare(model, optimizer, per_device_batch_size=0, max_grad_norm=None)
        unset_hf_deepspeed_config()  # accelerate has just set it again; see make_accelerator
        self._init_state()
        return prepared

    def _init_state(self) -> None:
        """Makes the optimizer's state before its first step, so that a resumed run can write its own into it."""
        for partition in self._partitions():
            # torch's AdamW counts steps in a tensor, DeepSpeed's CPU Adam in an int
            step = torch.tensor(0.0) if isinstance(self._inner, torch.optim.AdamW) else 0
            self._inner.state[partition] = {"step": step, **{key: torch.zeros_like(partition) for key in _MOMENTS}}

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer steps: this process's partition of each parameter group."""
        raise NotImplementedError

    @property
    def _deepspeed(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    @property
    def _inner(self) -> Optimizer:
        """The optimizer that steps: ours or, if its state is offloaded, DeepSpeed's CPU Adam with our groups."""
        inner: Optimizer = self._deepspeed.optimizer.optimizer
        return inner

    def backward(self, loss: Tensor) -> None:
        # accelerator.backward would take the optimizer step too; a loss that is not finite must stop the run before it
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._deepspeed.backward(loss)

    def update(self, optimizer: Optimizer, parameters: list[nn.Parameter], max_norm: float | None) -> float:
        self._deepspeed.step()  # clips to the max_grad_norm given to prepare
        return float(self._deepspeed.get_global_grad_norm())

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> OptimizerState:
        if not parameter.requires_grad:  # does not train in this stage
            return {}
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        # there is one step count for each flat partition, and all partitions step together: any of them will do
        return state | {"step": torch.tensor(float(next(iter(self._inner.state.values()))["step"]))}

    def set_state(self, optimizer: Optimizer, parameter: nn.Parameter, state: OptimizerState) -> None:
        for partition in self._inner.state.values():
            count = partition["step"]
            partition["step"] = state["step"].clone() if isinstance(count, Tensor) else int(state["step"])
        for key in _MOMENTS:
            self._set_moment(parameter, state[key], key)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        raise NotImplementedError


class Zero2Engine(DeepSpeedEngine):
    """ZeRO-2: gradients and optimizer state are partitioned, every process holds all parameters."""

    def _init_state(self) -> None:
        super()._init_state()
        # DeepSpeed 0.19 makes this link from parameters to their optimizer state only once, after it has stepped the
        # first group. With several groups, the others have no state at that moment and are never linked.
        self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        return list(self._deepspeed.optimizer.single_partition_of_fp32_groups)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        safe_set_full_optimizer_state(parameter, value, key)


class Zero3Engine(DeepSpeedEngine):
    """ZeRO-3: parameters are partitioned too, frozen ones included. Each is gathered for the module that uses it."""

    def check(self, model: nn.Module) -> None:
        """Refuses trained parameters of several dtypes, for which DeepSpeed 0.19 raises a bare AssertionError.

        Raises:
            ValueError: The parameters with `requires_grad` have more than one dtype.
        """
        first: dict[torch.dtype, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                first.setdefault(parameter.dtype, name)
        if len(first) > 1:
            raise ValueError(
                "DeepSpeed ZeRO-3 keeps all trained parameters in one buffer of one dtype, but "
                + " and ".join(f"{name} is {dtype}" for dtype, name in first.items())
                + ". CondFT's copies are fp32 over any base, modules_to_save have the base's dtype: load the base in "
                "fp32 (model.dtype: float32), cast the copies of these modules to fp32, or use ZeRO-2 or FSDP2."
            )

    def _partitions(self) -> list[Tensor]:
        return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        # Each process sets its own partition. DeepSpeed's setter of whole values (0.19) reads past the end of a
        # parameter whose size is not a multiple of the number of processes: its last partition is padded.
        partition: Any = parameter
        length, process = partition.ds_tensor.numel(), self.accelerator.process_index
        flat = value.flatten()
        flat = pad(flat, (0, length * self.accelerator.num_processes - flat.numel()))
        safe_set_local_optimizer_state(parameter, flat[length * process : length * (process + 1)], key)
