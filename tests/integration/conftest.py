"""What the tests of whole behaviors share."""

from tests.helpers.isolation import alone  # noqa: F401  (autouse)
from tests.helpers.recipe_parts import configure, parts  # noqa: F401
