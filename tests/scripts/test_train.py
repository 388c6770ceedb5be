"""`scripts/train.py` as accelerate starts it: a file of its own. That its arguments are those of `condft train` is
checked in tests/cli/test_train.py."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


def test_the_script_runs_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "condft train" in done.stdout
    assert "--overwrite" in done.stdout
