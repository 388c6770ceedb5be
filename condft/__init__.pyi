"""The public names and where each is defined. The running program reads this file too (`lazy_loader`)."""

from .analysis.analyze import NonFiniteWeightError as NonFiniteWeightError
from .analysis.analyze import analyze as analyze
from .report import SpectralReport as SpectralReport
from .report import SpectralRow as SpectralRow
from .selection.compare import ReportComparison as ReportComparison
from .selection.compare import compare_reports as compare_reports
from .selection.select import Selection as Selection
from .selection.select import select_units as select_units
from .spectra import condition_number as condition_number
from .spectra import spectral_facts as spectral_facts
from .tuner import CondFTConfig as CondFTConfig
from .tuner import CondFTModel as CondFTModel
from .tuner import Delta as Delta
from .tuner import LoraExport as LoraExport
from .tuner import add_fisher_information as add_fisher_information
from .tuner import apply_delta as apply_delta
from .tuner import combine_deltas as combine_deltas
from .tuner import decay_towards_base as decay_towards_base
from .tuner import export_delta as export_delta
from .tuner import export_lora as export_lora
from .tuner import load as load
from .tuner import parameter_groups as parameter_groups

__version__: str
