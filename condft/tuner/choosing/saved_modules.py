"""Units inside modules that are trained and saved whole: refused, since each would hold a copy of the other.

`modules_to_save` copies a module with everything in it, wrappers too. The keys of the saved tensors then no longer
say which copy is which: such an adapter can be trained, but neither saved nor loaded.
"""

from collections.abc import Iterable, Iterator

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from condft.tuner.layers.base import CondFTLayer
from condft.weights.names import canonical_name

__all__ = ["named_around", "refuse_saved_units"]


def refuse_saved_units(model: nn.Module, paths: Iterable[str], modules_to_save: Iterable[str]) -> None:
    """Refuses a new adapter whose units are inside a saved module, or whose saved modules hold units.

    Both are compared with each other, and with the adapters that the model has already.

    Args:
        model: With these adapters.
        paths: Canonical paths of the modules whose weights the new adapter trains.
        modules_to_save: As in the new adapter's config: names or suffixes.

    Raises:
        ValueError: Names the module and the one around it.
    """
    names = tuple(modules_to_save)
    wrapped = [canonical_name(path) for path, module in model.named_modules() if isinstance(module, CondFTLayer)]
    saved = {
        canonical_name(path) for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }
    planned = set(paths)
    # Sorted, so that every process names the same module.
    for path in (*sorted(planned), *wrapped):
        outer = next(named_around(path, names), None)
        # Only new units: those of other adapters were compared with these modules when the later of the two was made.
        if outer is None and path in planned:
            outer = next((parent for parent in _with_parents(path) if parent in saved), None)
        if outer is not None:
            raise ValueError(
                f"weights of {path} are units of an adapter, and modules_to_save trains {outer} whole: each would "
                f"hold a copy of the other, and neither could be saved. Leave {outer} out of modules_to_save, or "
                f"{path} out of the selection (exclude_modules, target_units)."
            )


def named_around(path: str, names: Iterable[str]) -> Iterator[str]:
    """Paths of the modules around a module, itself first, that `modules_to_save` names.

    Args:
        path: Canonical path of the module.
        names: As in a config: names or suffixes.

    >>> list(named_around("model.projector.linear_1", ["projector"]))
    ['model.projector']
    """
    names = tuple(names)
    for outer in _with_parents(path):
        if any(outer == name or outer.endswith(f".{name}") for name in names):
            yield outer


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
