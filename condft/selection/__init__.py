"""From a report to the units that train: scores, budgets, comparisons. Pure Python, no torch.

>>> selection = select_units(report, num_tensors=7)
>>> [score_of(report[name], "condition_number") for name in selection.names][0] > 1
True
"""

from condft.selection.compare import ReportComparison, compare_reports
from condft.selection.random_matrix import expected_condition_number
from condft.selection.scores import score_of
from condft.selection.select import Selection, select_units, shape_warning

__all__ = [
    "ReportComparison",
    "Selection",
    "compare_reports",
    "expected_condition_number",
    "score_of",
    "select_units",
    "shape_warning",
]
