"""Without the modules of an extra, a part of condft names the extra; the modules are blocked, as if not installed."""

import subprocess
import sys

import pytest

from condft.runtime.extras import MissingExtraError, needs_extra


def python(blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    # None in sys.modules makes an import fail as if the package were not installed.
    script = f"import sys; sys.modules[{blocked!r}] = None\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("condft.plots", "matplotlib", "plots"),
        ("condft.recipe", "datasets", "recipe"),
        ("condft.recipe", "tensorboard", "recipe"),
        ("condft.recipe", "jiwer", "speech"),
        ("condft.training", "ruamel", "recipe"),
        ("condft.tasks.speech", "soxr", "speech"),
    ],
)
def test_a_package_names_its_extra(package: str, module: str, extra: str) -> None:
    done = python(module, f"import {package}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"MissingExtraError: this part of condft needs {module}: pip install 'condft[{extra}]'"
    )


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_the_command_line_without_its_extra_is_one_line(module: str) -> None:
    done = python(module, "import runpy; runpy.run_module('condft', run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr == f"condft: this part of condft needs {module}: pip install 'condft[cli]'\n"


def test_a_command_that_needs_another_extra_is_one_line() -> None:
    code = "import runpy; sys.argv[1:] = ['plot', 'r.json', 'k.png']; runpy.run_module('condft', run_name='__main__')"
    done = python("matplotlib", code)
    assert done.returncode == 1
    assert done.stderr == "condft: this part of condft needs matplotlib: pip install 'condft[plots]'\n"


def test_all_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "jiwer", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingExtraError, match=r"needs datasets, jiwer, soxr: pip install 'condft\[recipe,speech\]'"
    ) as raised:
        needs_extra("recipe", "speech")
    assert raised.value.name == "datasets"
    with needs_extra("plots", "cli"):
        pass


def test_with_the_modules_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "soxr", raising=False)
    with needs_extra("speech"):
        assert "soxr" not in sys.modules
    with pytest.raises(KeyError):
        needs_extra("everything")
