"""What may be chosen: the units that a config's scope and roles let in, in PEFT's matching of module names."""

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
    """Names of the units, of those that are here with their values, that the config lets be chosen.

    Args:
        config: Its scope (`target_modules` and the like) and `include_roles`.
        model: The model.
        units: All units of it, by name.
        targets: The same model's modules.

    Raises:
        ValueError: One is tied to another weight, whichever of the two was asked for.
    """
    names = {u.name for u in units.values() if _is_asked_for(config, targets.find(u.name), u.role, targets)}
    ties = ties_of(model)
    refuse_tied_units({parameter_of(name) for name in names} | _second_names(config, model, ties, targets), ties)
    return names


def matches(config: CondFTConfig, module_name: str) -> Any:
    """PEFT's own matching of a module's name; None and "all-linear" stand for every name there."""
    scope = copy.copy(config)
    if config.target_modules is None or config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        scope.target_modules = ".*"
        if config.layers_to_transform is not None:
            # PEFT counts layers for lists only, and takes a name that stands whole in the list for asked for.
            parent, _, name = module_name.rpartition(".")
            scope.target_modules = [name] if parent else []
    return check_target_module_exists(scope, module_name)


def _second_names(config: CondFTConfig, model: nn.Module, ties: list[Tie], targets: Targets) -> set[str]:
    """Tied weights asked for under the name that is no unit's: a unit is told by its first one."""
    special = special_modules(model)
    asked: set[str] = set()
    for tie in (tie for tie in ties if not tie.same_place):
        first, second = tie.modules
        target = targets.find(tie.second)
        if not targets.has(second):  # the very module of the first name, which only that one leads to
            target, second = targets.find(tie.first), first
            target = replace(target, called=(tie.modules[1], tie.second)) if isinstance(target, Target) else target
        module = targets.module(second)
        role = special.get(id(module), Role.EMBEDDING if isinstance(module, nn.Embedding) else Role.LAYER)
        if _is_asked_for(config, target, role, targets):
            asked.add(tie.second)
    return asked


def _is_asked_for(config: CondFTConfig, target: Target | str | None, role: Role, targets: Targets) -> bool:
    if not isinstance(target, Target):
        return False
    linear_only = config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if linear_only and not isinstance(targets.module(target.path), SLICEABLE_LAYERS):
        return False
    # A list that names an embedding or a head asks for it; a pattern or None that happens to match does not.
    asked_roles = CANDIDATE_ROLES.union(map(Role, config.include_roles or ()))
    if role not in asked_roles and not isinstance(config.target_modules, list | set | tuple):
        return False
    matched = [matches(config, name) for name in target.called]
    return any(matched) and not any(isinstance(match, _ExcludedModule) for match in matched)


def no_candidates(config: CondFTConfig, names: Iterable[str], skipped: Iterable[SkippedWeight]) -> str:
    """Why there is nothing to choose among.

    Args:
        config: With the scope that nothing is in.
        names: Of all units.
        skipped: What is no unit.
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
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    near = {word: get_close_matches(word, suffixes + modules, n=3, cutoff=0.5) for word in wanted}
    hints = "; ".join(f"{word!r} is near {', '.join(found)}" for word, found in near.items() if found)
    return (
        f"target_modules={config.target_modules!r} (with its exclusions) matches none of the {len(modules)} modules "
        f"with a weight. {hints or 'Module names end in ' + ', '.join(suffixes[:12])}.{packed}"
    )
