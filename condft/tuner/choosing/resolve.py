"""The selection of a config that carries none yet: analyzed, chosen, and written into it."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import match_target_against_key
from torch import nn

from condft.analysis.analyze import analyze
from condft.analysis.distributed import WorkPlan, walk_together
from condft.report import SkippedWeight, SkipReason, SpectralReport
from condft.runtime.process_group import ProcessGroup
from condft.selection.scores import WHOLE_SPECTRUM_SCORES
from condft.selection.select import Selection, select_units, shape_warning
from condft.spectra import Measures
from condft.tuner.choosing.candidates import candidate_names, no_candidates
from condft.tuner.choosing.fisher import add_fisher_information
from condft.tuner.config import CondFTConfig
from condft.tuner.layers.base import CondFTLayer
from condft.tuner.loading.base_digests import labeled
from condft.tuner.targets import Targets
from condft.weights.walk import iter_units

__all__ = ["resolve_selection"]


def resolve_selection(config: CondFTConfig, model: nn.Module, targets: Targets) -> None:
    """Analyses what may be chosen, selects, and writes the selection into the config.

    All processes do this together, since some may hold meta tensors where others hold the weights; and the first
    one's choice is everybody's, whatever seed or report the others were given.
    """
    ranks = ProcessGroup()
    granularity: Any = config.granularity  # checked by iter_units
    shares, skipped = walk_together(ranks, lambda: iter_units(model, granularity=granularity))
    _refuse_meta_weights(skipped)
    if any(isinstance(module, CondFTLayer) and module.merged for module in model.modules()):
        raise ValueError("an adapter is merged, so the base weights cannot be analyzed: call unmerge_adapter() first")
    candidates = _of_any_rank(ranks, lambda: candidate_names(config, model, shares.units, targets))
    if not candidates:
        raise ValueError(no_candidates(config, shares.infos, skipped))
    report = ranks.from_first(config.load_report)
    if report is None:
        measures: Measures = "all" if config.score in WHOLE_SPECTRUM_SCORES else "basic"
        report = analyze(model, names=candidates, measures=measures, granularity=granularity)
    else:
        _check_report(report, shares, candidates, granularity)
    if config.ranks_by_fisher_information:
        report = ranks.from_first(partial(_with_fisher_information, report, model, candidates))
    selection = ranks.from_first(lambda: _select(config, report, candidates))
    if len(selection.names) == selection.num_candidates and config.target_modules is None:
        warnings.warn(
            f"the budget takes all {selection.num_candidates} candidate weights, so nothing is selected by "
            "condition number: this is full fine-tuning of the layers. Lower the budget to select.",
            stacklevel=2,
        )
    warning = shape_warning(selection)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    config.target_units = list(selection.names)
    config.selected_by = config.rule
    rows = {row.name: row for row in report.rows}
    # What is quantized is analyzed as what it stands for, which another base may hold in other digits.
    quantized = _of_any_rank(ranks, lambda: {unit.name for unit in shares.units.values() if unit.quantization})
    plain = [name for name in selection.names if name not in quantized]
    config.base_digests = {name: labeled(rows[name].dtype, rows[name].digest) for name in plain}
    if _saves_whole_embeddings(config, model):
        config.target_modules = None
    config.report_fingerprint = report.fingerprint
    config.report = None


def _with_fisher_information(report: SpectralReport, model: nn.Module, candidates: set[str]) -> SpectralReport:
    missing = [row.name for row in report.rows if row.name in candidates and row.fisher_information is None]
    return add_fisher_information(report, model, names=missing) if missing else report


def _of_any_rank(ranks: ProcessGroup, names: Callable[[], set[str]]) -> set[str]:
    return set().union(*ranks.run(names))


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


def _saves_whole_embeddings(config: CondFTConfig, model: nn.Module) -> bool:
    """Whether PEFT would write base embeddings into the adapter because `target_modules` matches their names.

    Ours is only the scope that the selection was made from, and `target_units` has taken its place by now.
    """
    scope = config.target_modules
    if isinstance(scope, str):
        paths = (path for path, _ in model.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return scope != INCLUDE_LINEAR_LAYERS_SHORTHAND and any(match_target_against_key(scope, p) for p in paths)
    return bool(set(scope or ()).intersection(EMBEDDING_LAYER_NAMES))


def _refuse_meta_weights(skipped: Sequence[SkippedWeight]) -> None:
    meta = [skip.name for skip in skipped if skip.reason is SkipReason.META_DEVICE]
    if meta:
        raise ValueError(
            f"{len(meta)} weights are on the meta device{' of every rank' if ProcessGroup().size > 1 else ''} and "
            f"cannot be analyzed, the first is {meta[0]!r}: load the weights before get_peft_model, or hand over "
            "target_units from an analysis made elsewhere"
        )


def _check_report(report: SpectralReport, shares: WorkPlan, candidates: set[str], granularity: str) -> None:
    """A report of other weights must not choose for this model."""
    rows = {row.name: row for row in report.rows}
    missing = sorted(candidates - rows.keys())
    digests = shares.digests(sorted(candidates & rows.keys()))
    changed = sorted(name for name, digest in digests.items() if digest != rows[name].digest)
    if missing or changed:
        raise ValueError(
            f"the report ({report.model}) is not of this model: {len(missing)} of {len(candidates)} candidate "
            f"weights have no row in it and {len(changed)} have other values, the first is "
            f"{(missing + changed)[0]!r}. Analyze this model instead, with granularity={granularity!r}."
        )
