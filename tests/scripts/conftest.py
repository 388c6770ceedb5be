"""Each test of the scripts starts with fresh accelerate state, on one thread."""

from tests.helpers.isolation import alone  # noqa: F401  (autouse)
