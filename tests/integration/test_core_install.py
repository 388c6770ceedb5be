"""What the PEFT method and the measures of forgetting need is a core dependency: no optional package is imported."""

import subprocess
import sys

import pytest

# What only speech, the recipe, pictures and the command line need. Not PyYAML: accelerate itself imports it.
OPTIONAL = (
    "datasets",
    "jiwer",
    "matplotlib",
    "rich",
    "ruamel",
    "soundfile",
    "soxr",
    "tensorboard",
    "typer",
)
# None in sys.modules makes an import fail as if the package were not installed.
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"


@pytest.mark.parametrize("module", ["condft", "condft.tuner", "condft.analysis", "condft.retention"])
def test_a_core_module_imports_without_optional_packages(module: str) -> None:
    script = f"{BLOCK}\nimport {module}\n[getattr({module}, name) for name in getattr({module}, '__all__', ())]"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
