"""condft: teach a pre-trained LLM something new by training only its weights of low condition number.

`import condft` enters CondFT into PEFT's tables, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' adapter methods know it. It does so when PEFT itself is imported, before or after, and imports nothing
heavy by itself: each public name brings in what it needs when it is first used (PEP 562).
"""

from typing import TYPE_CHECKING

from condft.runtime.import_hook import when_imported

if TYPE_CHECKING:
    from condft.analysis.analyze import NonFiniteWeightError, analyze
    from condft.report import SpectralReport, SpectralRow
    from condft.selection.compare import ReportComparison, compare_reports
    from condft.selection.select import Selection, select_units
    from condft.spectra import condition_number, spectral_facts
    from condft.tuner import (
        CondFTConfig,
        CondFTModel,
        Delta,
        LoraExport,
        add_fisher_information,
        apply_delta,
        combine_deltas,
        decay_towards_base,
        export_delta,
        export_lora,
        load,
        parameter_groups,
    )

__version__ = "0.1.0"

__all__ = [
    "CondFTConfig",
    "CondFTModel",
    "Delta",
    "LoraExport",
    "NonFiniteWeightError",
    "ReportComparison",
    "Selection",
    "SpectralReport",
    "SpectralRow",
    "add_fisher_information",
    "analyze",
    "apply_delta",
    "combine_deltas",
    "compare_reports",
    "condition_number",
    "decay_towards_base",
    "export_delta",
    "export_lora",
    "load",
    "parameter_groups",
    "select_units",
    "spectral_facts",
]

# Where each public name lives: the imports above once more, for the running program.
_HOMES = {
    "CondFTConfig": "condft.tuner",
    "CondFTModel": "condft.tuner",
    "Delta": "condft.tuner",
    "LoraExport": "condft.tuner",
    "NonFiniteWeightError": "condft.analysis.analyze",
    "ReportComparison": "condft.selection.compare",
    "Selection": "condft.selection.select",
    "SpectralReport": "condft.report",
    "SpectralRow": "condft.report",
    "add_fisher_information": "condft.tuner",
    "analyze": "condft.analysis.analyze",
    "apply_delta": "condft.tuner",
    "combine_deltas": "condft.tuner",
    "compare_reports": "condft.selection.compare",
    "condition_number": "condft.spectra",
    "decay_towards_base": "condft.tuner",
    "export_delta": "condft.tuner",
    "export_lora": "condft.tuner",
    "load": "condft.tuner",
    "parameter_groups": "condft.tuner",
    "select_units": "condft.selection.select",
    "spectral_facts": "condft.spectra",
}

if not TYPE_CHECKING:  # a type checker would take every misspelled name for this function's

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register() -> None:
    import condft.tuner  # noqa: F401  (registers itself)


when_imported("peft", _register)
