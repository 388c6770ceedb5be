"""What the tests of the recipe's steps share."""

from tests.helpers.isolation import alone  # noqa: F401  (autouse)
from tests.helpers.recipe_parts import configure, parts  # noqa: F401
