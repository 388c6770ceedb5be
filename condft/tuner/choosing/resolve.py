"""What a config that carries no selection yet trains in a model: analyzed, selected, and returned as one value."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import match_target_against_key
from torch import nn

from condft.analysis.analyze import analyze_units
from condft.analysis.cache import open_cache
from condft.analysis.distributed import WorkPlan, share_units
from condft.analysis.measure import MeasureSpec
from condft.analysis.request import Request
from condft.report import SkipReason, SpectralReport
from condft.runtime.process_group import ProcessGroup
from condft.selection.scores import WHOLE_SPECTRUM_SCORES
from condft.selection.select import Selection, select_units, shape_warning
from condft.tuner.choosing.candidates import candidate_names, no_candidates
from condft.tuner.choosing.fisher import add_fisher_information
from condft.tuner.config import CondFTConfig
from condft.tuner.layers.base import CondFTLayer
from condft.tuner.loading.base_digests import digests_of_base, labeled
from condft.tuner.targets import Targets
from condft.weights.walk import iter_units

__all__ = ["Resolution", "given_resolution", "resolve"]


@dataclass(frozen=True)
class Resolution:
    """What trains in a model, and what that was decided from. Its fields are those of `CondFTConfig` of that name.

    Attributes:
        target_units: The selected units.
        base_digests: Unit -> dtype and digest of its base values, of the units that are not quantized.
        report_fingerprint: Fingerprint of the report that they were selected from; None for units given by hand.
        selected_by: The budget and the rule; None for units given by hand.
        target_modules: The scope, or None if PEFT would save whole embeddings because of it.
    """

    target_units: tuple[str, ...]
    base_digests: Mapping[str, str]
    report_fingerprint: str | None
    selected_by: Mapping[str, Any] | None
    target_modules: list[str] | str | None


def resolve(config: CondFTConfig, model: nn.Module, targets: Targets) -> Resolution:
    """Analyzes the units that may be chosen, and selects among them. Changes neither the config nor the model.

    Under torch.distributed, all processes do this together: some may hold meta tensors where others hold the weights.
    The first process decides for all, also if the others were given another seed or report.

    Args:
        config: Without `target_units`.
        model: The model, with or without other adapters.
        targets: The same model's modules.

    Raises:
        ValueError: Weights on the meta device, a merged adapter, nothing to choose among, a report of other weights,
            or a budget that selects nothing.
        NonFiniteWeightError: A candidate holds NaN or infinity.
    """
    group = ProcessGroup()
    granularity: Any = config.granularity  # CondFTConfig has checked it
    plan = share_units(iter_units(model, granularity=granularity), group)
    _refuse_meta_weights(plan)
    if any(isinstance(module, CondFTLayer) and module.merged for module in model.modules()):
        raise ValueError("an adapter is merged, so the base weights cannot be analyzed: call unmerge_adapter() first")
    # Collective, as each call of `group` below: every process must reach them all, in this order. An error on one
    # process is raised on all of them, so that none waits for another.
    candidates = _on_any_process(group, lambda: candidate_names(config, model, plan.units, targets))
    if not candidates:  # the union, so all processes agree on it
        raise ValueError(no_candidates(config, plan.infos, plan.skipped))
    report = _report(config, model, plan, candidates)
    selection = group.from_first(lambda: _select(config, report, candidates))
    _warn(config, selection)
    # A quantized weight is analyzed as the values that it decodes to. Another quantization of the same base decodes
    # to other values, so a digest would refuse a base that fits.
    quantized = _on_any_process(group, lambda: {unit.name for unit in plan.units.values() if unit.quantization})
    rows = {row.name: row for row in report.rows}
    plain = [name for name in selection.names if name not in quantized]
    return Resolution(
        target_units=selection.names,
        # The analysis has hashed them already.
        base_digests={name: labeled(rows[name].dtype, rows[name].digest) for name in plain},
        report_fingerprint=report.fingerprint,
        selected_by=config.rule,
        target_modules=None if _saves_whole_embeddings(config, model) else config.target_modules,
    )


def given_resolution(config: CondFTConfig, targets: Targets) -> Resolution:
    """The resolution of a config that names its units: what it says, and the digests of their base values."""
    units = tuple(config.target_units or ())
    digests = digests_of_base(targets, units)
    return Resolution(units, digests, config.report_fingerprint, config.selected_by, config.target_modules)


def _report(config: CondFTConfig, model: nn.Module, plan: WorkPlan, candidates: set[str]) -> SpectralReport:
    """The report to select from: the one that was handed over, or a new one of the candidates."""
    group = plan.group
    report = group.from_first(config.load_report)
    if report is None:  # on every process or on none, since the first one's report is used
        # Most scores need no more than the extreme singular values and the Frobenius norm.
        spec = MeasureSpec("all" if config.score in WHOLE_SPECTRUM_SCORES else "basic")
        request = Request(type(model).__name__, spec, frozenset(candidates))
        # The first process's cache for all: the environment may turn caching off on one of them only.
        report = analyze_units(plan, request, group.from_first(lambda: open_cache(True)))
    else:
        _check_report(report, plan, candidates, config.granularity)
    if config.ranks_by_fisher_information:
        # Backward passes through the whole model, on the first process only: the others may hold meta tensors.
        report = group.from_first(partial(_with_fisher_information, report, model, candidates))
    return report


def _with_fisher_information(report: SpectralReport, model: nn.Module, candidates: set[str]) -> SpectralReport:
    # A report that was handed over may have it already.
    missing = [row.name for row in report.rows if row.name in candidates and row.fisher_information is None]
    return add_fisher_information(report, model, names=missing) if missing else report


def _on_any_process(group: ProcessGroup, names: Callable[[], set[str]]) -> set[str]:
    """The union of the names that the processes find, each in what it holds."""
    return set().union(*group.run(names))


def _select(config: CondFTConfig, report: SpectralReport, candidates: set[str]) -> Selection:
    return select_units(
        report,
        num_tensors=config.num_tensors,
        trainable_fraction=config.trainable_fraction,
        max_condition_number=config.max_condition_number,
        score=config.score,  # type: ignore[arg-type]  # select_units checks these three and names the choices
        order=config.order,  # type: ignore[arg-type]
        stratify=config.stratify,  # type: ignore[arg-type]
        seed=config.seed,
        candidates=candidates,
    )


def _warn(config: CondFTConfig, selection: Selection) -> None:
    """Warns of a budget that selects everything, and of a score that ranks by shape."""
    if len(selection.names) == selection.num_candidates and config.target_modules is None:
        warnings.warn(
            f"the budget takes all {selection.num_candidates} candidate weights, so nothing is selected by "
            "condition number: this is full fine-tuning of the layers. Lower the budget to select.",
            stacklevel=2,
        )
    warning = shape_warning(selection)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)


def _saves_whole_embeddings(config: CondFTConfig, model: nn.Module) -> bool:
    """Whether PEFT would write base embeddings into the adapter because `target_modules` matches their names.

    PEFT's `get_peft_model_state_dict(save_embedding_layers="auto")` does so (0.21), since LoRA would train what it
    matches. Here `target_modules` is only the scope of a selection, and `target_units` replaces it.
    """
    scope = config.target_modules
    if isinstance(scope, str):
        paths = (path for path, _ in model.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return scope != INCLUDE_LINEAR_LAYERS_SHORTHAND and any(match_target_against_key(scope, p) for p in paths)
    return bool(set(scope or ()).intersection(EMBEDDING_LAYER_NAMES))


def _refuse_meta_weights(plan: WorkPlan) -> None:
    meta = [skip.name for skip in plan.skipped if skip.reason is SkipReason.META_DEVICE]
    if meta:
        raise ValueError(
            f"{len(meta)} weights are on the meta device{' of every process' if plan.group.size > 1 else ''} and "
            f"cannot be analyzed, the first is {meta[0]!r}: load the weights before get_peft_model, or hand over "
            "target_units from an analysis made elsewhere"
        )


def _check_report(report: SpectralReport, plan: WorkPlan, candidates: set[str], granularity: str) -> None:
    """A report of other weights must not choose for this model."""
    rows = {row.name: row for row in report.rows}
    missing = sorted(candidates - rows.keys())
    # Collective, and sorted: every process must pass the same names in the same order.
    digests = plan.digests(sorted(candidates & rows.keys()))
    changed = sorted(name for name, digest in digests.items() if digest != rows[name].digest)
    if missing or changed:
        raise ValueError(
            f"the report ({report.model}) is not of this model: {len(missing)} of {len(candidates)} candidate "
            f"weights have no row in it and {len(changed)} have other values, the first is "
            f"{(missing + changed)[0]!r}. Analyze this model instead, with granularity={granularity!r}."
        )
