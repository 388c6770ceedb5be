"""From a report to the units that train: scores, budgets, comparisons. Pure Python, no torch."""
