"""`Offloader`: keeps on the CPU what a copy acts in the place of, and brings it back where it has to act itself.

What is parked stays a registered parameter of its module, with its values: whatever reads them (`state_dict`, a
digest, a merge) sees the truth, and only code that supposes all parameters on one device can be surprised.
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
class _Parked:
    """One parameter that has been parked.

    Attributes:
        home: The device that it belongs on; of use while it is parked.
        kept: Its values on the CPU while it is at home; None while it is parked, for then it holds them itself.
        seen: What the parameter was when it came home; if it is that still, `kept` are its values.
    """

    home: torch.device
    kept: Tensor | None = None
    seen: tuple[int, int] | None = None


class Offloader:
    """The parked parameters of one module.

    A parameter goes to the CPU once. From then on its values stay there, so that to bring it back costs one transfer
    and to park it again none, unless somebody has changed it meanwhile (in a way that autograd notices: a write
    through `.data` while it is at home is lost). On a model that is on the CPU there is nothing to gain: it stays
    where it is, and is parked if the model moves on to an accelerator.
    """

    def __init__(self) -> None:
        self._parked: dict[str, _Parked] = {}

    def settle(self, module: nn.Module, idle: Set[str]) -> None:
        """Parks the parameters of these names, and brings all others home.

        Parameters that are sharded, on the meta device, or of a tensor kind with a layout of its own stay where they
        are.
        """
        for name in idle | self._parked.keys():
            parameter = _parameter(module, name)
            if type(parameter.data) is not Tensor:  # whoever shards it places it
                continue
            parked = self._parked.get(name)
            if name in idle and (parked is None or parked.kept is not None):
                values = _values(parameter, parked)
                if values.is_meta:
                    continue
                self._parked[name] = _Parked(parameter.device)
                _put(module, name, values.to(_CPU))
            elif name not in idle and parked is not None and parked.kept is None:
                self._bring(module, name, parameter.data, parked.home)

    def replace(self, module: nn.Module, name: str, values: Tensor) -> Tensor:
        """Puts other values into a parameter, on its home and of its dtype.

        Returns:
            What they replace, for `give_back`; on the CPU if it has ever been parked.
        """
        parameter, parked, home = _parameter(module, name), self._parked.get(name), self.home(module, name)
        original = _values(parameter, parked)
        _put(module, name, values.to(home, parameter.dtype, copy=True))
        if parked is not None:
            parked.kept = original
        return original

    def give_back(self, module: nn.Module, name: str, original: Tensor) -> None:
        """Puts what `replace` has returned back into the parameter, where that is by now and in its dtype of now."""
        parameter = _parameter(module, name)
        original = original.to(parameter.dtype)
        if name in self._parked:
            self._bring(module, name, original, parameter.device)
        else:
            _put(module, name, original.to(parameter.device))

    def _bring(self, module: nn.Module, name: str, values: Tensor, home: torch.device) -> None:
        _put(module, name, values.to(home))
        self._parked[name] = _Parked(home, values, _seen(_parameter(module, name)))

    def home(self, module: nn.Module, name: str) -> torch.device:
        """The device that a parameter belongs on."""
        parked = self._parked.get(name)
        return parked.home if parked is not None and parked.kept is None else _parameter(module, name).device

    def away(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that are on another device than their own."""
        found = {name: _parameter(module, name) for name in self._parked}
        return [parameter for name, parameter in found.items() if parameter.device != self.home(module, name)]

    @contextmanager
    def set_aside(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For `nn.Module._apply`: inside, the module is without what is parked, so that `fn` does not move it.

        After that the parked parameters have the dtype that `fn` gives, and its device for a home.
        """
        aside = {name: _parameter(module, name) for name, parked in self._parked.items() if parked.kept is None}
        for name in aside:
            _register(module, name, None)
        try:
            yield
        finally:
            for name, parameter in aside.items():
                _register(module, name, parameter)
        for name, parameter in aside.items():
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=self._parked[name].home))
            self._parked[name].home = probe.device
            _put(module, name, parameter.data.to(probe.dtype))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_parameter(name)


def _register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Past `__setattr__`, which would move it to the end of the module's parameters."""
    owner, _, key = name.rpartition(".")
    module.get_submodule(owner)._parameters[key] = parameter


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    """The parameter gets these values: the same object, where torch can change a tensor's device in place."""
    parameter: Any = _parameter(module, name)
    if torch._has_compatible_shallow_copy_type(parameter, values):
        parameter.data = values
    else:
        _register(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _values(parameter: nn.Parameter, parked: _Parked | None) -> Tensor:
    """Its values: those kept on the CPU, if nobody has changed it since it came home."""
    if parked is None or parked.kept is None or parked.seen != _seen(parameter):
        return parameter.data
    return parked.kept


def _seen(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), parameter._version
