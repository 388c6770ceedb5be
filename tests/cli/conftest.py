"""A saved report for the commands that read one."""

from pathlib import Path
from typing import Any

import pytest

from condft import analyze


@pytest.fixture
def report_file(tiny_llama: Any, tmp_path: Path) -> Path:
    analyze(tiny_llama(), spectrum=True, progress=False).save(tmp_path / "report.json")
    return tmp_path / "report.json"
