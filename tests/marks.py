"""Marks of tests that need what not every machine has."""

from importlib.util import find_spec

import pytest

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")
