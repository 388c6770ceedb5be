"""Where weights come from: a live model, or a checkpoint that is never instantiated.

>>> sum(isinstance(item, Unit) for item in iter_units(base))
29
"""

from condft.weights.unit import Unit
from condft.weights.walk import iter_checkpoint_units, iter_units

__all__ = ["Unit", "iter_checkpoint_units", "iter_units"]
