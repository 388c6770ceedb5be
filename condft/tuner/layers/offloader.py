"""`Offloader`: keeps a module's original parameters on the CPU while an adapter's copies replace them.

An offloaded parameter stays registered in its module and keeps its values, so a `state_dict`, a hash or a merge still
reads the right numbers. Only code that assumes all of a model's parameters on one device can notice the difference.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Offloader"]

_CPU = torch.device("cpu")


@dataclass
class _Entry:
    """One parameter that was offloaded at least once.

    Attributes:
        device: Where the module computes with it, and where it returns to. Only valid while it is offloaded.
        cpu_values: Its values on the CPU while the parameter itself is on its device; None while it is offloaded,
            because then the parameter holds them.
        version: `_version_of` the parameter when it returned to its device. While that is unchanged, `cpu_values` are
            its values.
    """

    device: torch.device
    cpu_values: Tensor | None = None
    version: tuple[int, int] | None = None

    @property
    def is_offloaded(self) -> bool:
        return self.cpu_values is None


class Offloader:
    """The offloaded parameters of one module.

    A parameter is copied to the CPU once, and its values stay there. After that, to restore it costs one transfer, and
    to offload it again costs none, unless its values were changed meanwhile. Autograd's version counter shows such a
    change; a write through `.data`, which does not increase that counter, is lost. On a model that is on the CPU there
    is nothing to gain: the parameter stays where it is, and is offloaded if the model moves to an accelerator.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def offload_only(self, module: nn.Module, names: Set[str]) -> None:
        """Offloads the parameters with these names, and restores all others to their device.

        Parameters that are sharded, on the meta device, or of a tensor subclass stay where they are.
        """
        for name in names | self._entries.keys():
            parameter = module.get_parameter(name)
            if type(parameter.data) is not Tensor:  # a DTensor or a quantized tensor: its owner decides on its device
                continue
            entry = self._entries.get(name)
            if name in names and (entry is None or not entry.is_offloaded):
                values = _values(parameter, entry)
                if values.is_meta:  # nothing to move, as with low_cpu_mem_usage
                    continue
                self._entries[name] = _Entry(parameter.device)  # before the move, which changes the device
                _set_values(module, name, values.to(_CPU))
            elif name not in names and entry is not None and entry.is_offloaded:
                self._move_to_device(module, name, parameter.data, entry.device)

    def replace(self, module: nn.Module, name: str, values: Tensor) -> Tensor:
        """Sets other values in a parameter, on its device and in its dtype.

        Returns:
            The original values, for `restore`; on the CPU if the parameter was ever offloaded.
        """
        parameter, entry, device = module.get_parameter(name), self._entries.get(name), self.device_of(module, name)
        original = _values(parameter, entry)
        # copy=True: `values` may train on and must not share memory with the parameter.
        _set_values(module, name, values.to(device, parameter.dtype, copy=True))
        if entry is not None:
            # It also marks the parameter as back on its device, where the new values are.
            entry.cpu_values = original
        return original

    def restore(self, module: nn.Module, name: str, original: Tensor) -> None:
        """Sets the values that `replace` returned, on the parameter's present device and in its present dtype."""
        parameter = module.get_parameter(name)
        original = original.to(parameter.dtype)
        if name in self._entries:
            self._move_to_device(module, name, original, parameter.device)
        else:
            _set_values(module, name, original.to(parameter.device))

    def _move_to_device(self, module: nn.Module, name: str, values: Tensor, device: torch.device) -> None:
        _set_values(module, name, values.to(device))
        # After the move: the version is that of the memory on the device.
        self._entries[name] = _Entry(device, values, _version_of(module.get_parameter(name)))

    def device_of(self, module: nn.Module, name: str) -> torch.device:
        """The device on which the module computes with a parameter; an offloaded parameter is elsewhere."""
        entry = self._entries.get(name)
        return entry.device if entry is not None and entry.is_offloaded else module.get_parameter(name).device

    def offloaded(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that are on another device than the one they are used on."""
        found = {name: module.get_parameter(name) for name in self._entries}
        return [parameter for name, parameter in found.items() if parameter.device != self.device_of(module, name)]

    @contextmanager
    def without_offloaded(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For `nn.Module._apply`: removes the offloaded parameters for the block, so that `fn` does not move them.

        After the block they are back, in the dtype that `fn` gives a tensor, and they will be restored to the device
        that `fn` gives it.
        """
        removed = {name: module.get_parameter(name) for name, entry in self._entries.items() if entry.is_offloaded}
        for name in removed:
            _register(module, name, None)
        try:
            yield
        finally:
            for name, parameter in removed.items():
                _register(module, name, parameter)
        for name, parameter in removed.items():
            # An empty tensor shows what `fn` does to dtype and device, without moving the values.
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=self._entries[name].device))
            # Outside of `finally`: if `fn` failed, the parameters are back and keep their dtype.
            self._entries[name].device = probe.device
            _set_values(module, name, parameter.data.to(probe.dtype))


def _register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Without `__setattr__`, which would move the parameter to the end of the module's parameters."""
    owner, _, key = name.rpartition(".")
    module.get_submodule(owner)._parameters[key] = parameter


def _set_values(module: nn.Module, name: str, values: Tensor) -> None:
    """Sets a parameter's values. It stays the same object where torch can change its device in place."""
    parameter: Any = module.get_parameter(name)
    # torch's own question in nn.Module._apply before it assigns `.data`: meta and XLA tensors cannot be exchanged so.
    if torch._has_compatible_shallow_copy_type(parameter, values):
        parameter.data = values
    else:
        _register(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _values(parameter: nn.Parameter, entry: _Entry | None) -> Tensor:
    """A parameter's values: those on the CPU, if it has not changed since it returned to its device."""
    if entry is None or entry.cpu_values is None or entry.version != _version_of(parameter):
        return parameter.data
    return entry.cpu_values


def _version_of(parameter: Tensor) -> tuple[int, int]:
    """Changes with the parameter's memory and with each write that autograd counts."""
    return parameter.data_ptr(), parameter._version
