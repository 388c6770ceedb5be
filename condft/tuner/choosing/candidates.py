"""What may be selected: the units that a config's scope and roles allow, in PEFT's matching of module names."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from condft.report import Role, SkippedWeight, SkipReason
from condft.selection.select import CANDIDATE_ROLES
from condft.tuner.choosing.tied import Tie, refuse_tied_units, ties_of
from condft.tuner.config import CondFTConfig
from condft.tuner.layers.functional import SLICEABLE_LAYERS, SUPPORTED_LAYERS
from condft.tuner.targets import Target, Targets, parameter_of
from condft.weights.roles import special_modules
from condft.weights.walk import Unit

__all__ = ["candidate_names", "matches", "no_candidates"]


def candidate_names(config: CondFTConfig, model: nn.Module, units: Mapping[str, Unit], targets: Targets) -> set[str]:
    """Names of the units that the config allows to be selected.

    Args:
        config: Its scope (`target_modules` and related options) and `include_roles` decide.
        model: The model.
        units: Name -> unit, of the units whose values this process holds.
        targets: The same model's modules.

    Raises:
        ValueError: A unit in scope is tied to another weight, under either of its names.
    """
    names = {u.name for u in units.values() if _is_in_scope(config, targets.find(u.name), u.role, targets)}
    ties = ties_of(model)
    refuse_tied_units({parameter_of(name) for name in names} | _second_names(config, model, ties, targets), ties)
    return names


def matches(config: CondFTConfig, module_name: str) -> Any:
    """PEFT's own matching of a module's name, where None and "all-linear" match every name.

    Returns:
        What PEFT's `check_target_module_exists` returns: a true value for a match; else False, or an object that says
        that `exclude_modules` matched.
    """
    # Not dataclasses.replace, which runs all checks of the config: this is called for each module.
    scope = copy.copy(config)
    if config.target_modules is None or config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        scope.target_modules = ".*"
        if config.layers_to_transform is not None:
            # PEFT applies layers_to_transform to lists only, and not to a name that is in the list as a whole (0.21).
            # The last part of the name alone matches by suffix, so the layer's index is looked at.
            parent, _, name = module_name.rpartition(".")
            scope.target_modules = [name] if parent else []
    return check_target_module_exists(scope, module_name)


def _second_names(config: CondFTConfig, model: nn.Module, ties: list[Tie], targets: Targets) -> set[str]:
    """Tied weights that are in scope under their second name. A unit has the first name of its weight only."""
    special = special_modules(model)
    found: set[str] = set()
    for tie in (tie for tie in ties if not tie.same_place):
        first, second = tie.modules
        target = targets.find(tie.second)
        if not targets.has(second):  # the whole module is shared, and `targets` knows it by its first name
            target, second = targets.find(tie.first), first
            target = replace(target, called=(tie.modules[1], tie.second)) if isinstance(target, Target) else target
        module = targets.module(second)
        role = special.get(id(module), Role.EMBEDDING if isinstance(module, nn.Embedding) else Role.LAYER)
        if _is_in_scope(config, target, role, targets):
            found.add(tie.second)
    return found


def _is_in_scope(config: CondFTConfig, target: Target | str | None, role: Role, targets: Targets) -> bool:
    if not isinstance(target, Target):
        return False
    linear_only = config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND  # as in PEFT: Linear and Conv1D
    if linear_only and not isinstance(targets.module(target.path), SLICEABLE_LAYERS):
        return False
    # A list that names an embedding or a head means it. A pattern, or None, may match one by accident: then
    # include_roles has to name its role.
    roles = CANDIDATE_ROLES.union(map(Role, config.include_roles or ()))
    if role not in roles and not isinstance(config.target_modules, list | set | tuple):
        return False
    # One name that matches selects; one name that is excluded excludes.
    matched = [matches(config, name) for name in target.called]
    return any(matched) and not any(isinstance(match, _ExcludedModule) for match in matched)


def no_candidates(config: CondFTConfig, names: Iterable[str], skipped: Iterable[SkippedWeight]) -> str:
    """The message of an error: why there is nothing to select among, with the nearest names.

    Args:
        config: With a scope that no unit is in.
        names: Names of all units.
        skipped: Weights that are no unit.
    """
    modules = sorted({name.rpartition(".")[0] for name in names})
    quantized = [skip for skip in skipped if skip.reason is SkipReason.QUANTIZED]
    packed = (
        f" {len(quantized)} weights are quantized and cannot be trained, the first is {quantized[0].name} "
        f"({quantized[0].detail})."
        if quantized
        else ""
    )
    if config.target_modules is None:
        kinds = ", ".join(kind.__name__ for kind in SUPPORTED_LAYERS)
        return f"the model has no weight that CondFT can train: it supports {kinds}, and found {modules[:5]}.{packed}"
    scope = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    near = {word: get_close_matches(word, suffixes + modules, n=3, cutoff=0.5) for word in scope}
    hints = "; ".join(f"{word!r} is near {', '.join(found)}" for word, found in near.items() if found)
    return (
        f"target_modules={config.target_modules!r} (with its exclusions) matches none of the {len(modules)} modules "
        f"with a weight. {hints or 'Module names end in ' + ', '.join(suffixes[:12])}.{packed}"
    )
