"""DeepSpeed ZeRO-2 and ZeRO-3 as engines. Needs the package `deepspeed`, and is imported only where it is launched.

DeepSpeed's own mixed precision is not used: it casts every parameter, so the frozen base would change and the copies
would lose their bits. The copies that train are fp32 as they are; under bf16, DeepSpeed's autocast computes in it.
Nor are DeepSpeed's checkpoints: they are pickles, read back without `weights_only`.

Under ZeRO-3 the model stays in partitions after a stage, as it stays in shards under FSDP2.
"""

from typing import Any

import deepspeed
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

from condft.training.engines.engine import Engine, OptimizerState

__all__ = ["DeepSpeedEngine", "Zero2Engine", "Zero3Engine", "deepspeed_engine", "whole_partition"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_engine(accelerator: Accelerator) -> "DeepSpeedEngine":
    """The engine of the ZeRO stage that was launched.

    Raises:
        ValueError: A ZeRO stage other than 2 and 3.
    """
    stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage not in (2, 3):
        raise ValueError(
            f"DeepSpeed with ZeRO stage {stage}: the trainer's checkpoints gather what stages 2 and 3 keep, not what "
            "another does. Set zero_stage: 2 or 3; configs/accelerate/ has a file for each."
        )
    return Zero2Engine(accelerator) if stage == 2 else Zero3Engine(accelerator)


def whole_partition(parameter: Tensor) -> Tensor:
    """All of a parameter that ZeRO-3 may have partitioned, detached, in memory of its own. Collective."""
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


class DeepSpeedEngine(Engine):
    """DeepSpeed through accelerate; every stage of training has an engine of its own, closed at its end."""

    leaves_model_whole = False

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, per_device_batch_size: int, max_grad_norm: float | None
    ) -> tuple[Any, Any]:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = per_device_batch_size
        config["train_batch_size"] = "auto"  # of the numbers above; the stage before left its own here
        config["gradient_clipping"] = max_grad_norm or 0.0  # DeepSpeed's word for none
        prepared = super().prepare(model, optimizer, per_device_batch_size=0, max_grad_norm=None)
        unset_hf_deepspeed_config()  # accelerate has set it anew; see make_accelerator
        self._start()
        return prepared

    def _start(self) -> None:
        """Gives the optimizer its own start, which a resumed run writes over."""
        for partition in self._partitions():
            # DeepSpeed's CPU Adam counts its steps by a plain number
            step = torch.tensor(0.0) if isinstance(self._acting, torch.optim.AdamW) else 0
            self._acting.state[partition] = {"step": step, **{key: torch.zeros_like(partition) for key in _MOMENTS}}

    def _partitions(self) -> list[Tensor]:
        """What the optimizer steps: this rank's part of each of its groups."""
        raise NotImplementedError

    @property
    def _deepspeed(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    @property
    def _acting(self) -> Optimizer:
        """The optimizer that steps: ours or, if its state is offloaded, DeepSpeed's Adam with our groups."""
        acting: Optimizer = self._deepspeed.optimizer.optimizer
        return acting

    def backward(self, loss: Tensor) -> None:
        # not accelerator.backward, which takes the step too: a loss that is not finite must stop before it
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._deepspeed.backward(loss)

    def update(self, optimizer: Optimizer, parameters: list[nn.Parameter], max_norm: float | None) -> float:
        self._deepspeed.step()  # clips, to the norm given to prepare
        return float(self._deepspeed.get_global_grad_norm())

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> OptimizerState:
        if not parameter.requires_grad:  # rests in this stage
            return {}
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        # a count for each flat partition, and all of them step together
        return state | {"step": torch.tensor(float(next(iter(self._acting.state.values()))["step"]))}

    def set_state(self, optimizer: Optimizer, parameter: nn.Parameter, state: OptimizerState) -> None:
        for partition in self._acting.state.values():
            count = partition["step"]
            partition["step"] = state["step"].clone() if isinstance(count, Tensor) else int(state["step"])
        for key in _MOMENTS:
            self._set_moment(parameter, state[key], key)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        raise NotImplementedError


class Zero2Engine(DeepSpeedEngine):
    """Gradients and optimizer state in partitions, the parameters on every rank."""

    def _start(self) -> None:
        # Left to its first step, ZeRO-2 would look for the state of all groups after stepping the first (DeepSpeed
        # 0.19), and never find that of the others again.
        super()._start()
        self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        return list(self._deepspeed.optimizer.single_partition_of_fp32_groups)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        safe_set_full_optimizer_state(parameter, value, key)


class Zero3Engine(DeepSpeedEngine):
    """The parameters in partitions too, frozen ones included; each is gathered for the module that needs it."""

    def check(self, model: nn.Module) -> None:
        """Refuses what DeepSpeed would tell by a bare AssertionError.

        Raises:
            ValueError: What may train is of several dtypes.
        """
        first: dict[torch.dtype, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                first.setdefault(parameter.dtype, name)
        if len(first) > 1:
            raise ValueError(
                "DeepSpeed ZeRO-3 keeps all that trains in one buffer, of one dtype, but of what trains here "
                + " and ".join(f"{name} is {dtype}" for dtype, name in first.items())
                + ". CondFT's copies are fp32 over any base, modules_to_save have the base's dtype: load the base in "
                "fp32 (model.dtype: float32), cast these modules' copies to fp32, or take ZeRO-2 or FSDP2."
            )

    def _partitions(self) -> list[Tensor]:
        return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        # by the rank's own part: DeepSpeed's setter of whole values (0.19) cuts past the end of one that does not
        # divide by the number of ranks
        partition: Any = parameter
        length, rank = partition.ds_tensor.numel(), self.accelerator.process_index
        flat = value.flatten()
        flat = pad(flat, (0, length * self.accelerator.num_processes - flat.numel()))
        safe_set_local_optimizer_state(parameter, flat[length * rank : length * (rank + 1)], key)
