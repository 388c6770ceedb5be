"""The scripts are no package: they are run by path and find their siblings there, so the tests do the same."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
