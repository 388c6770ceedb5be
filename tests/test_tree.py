"""The test tree mirrors the package and the scripts: every module has a test file, and every test file a module."""

from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

# What no single module owns: whole behaviors, PEFT's own suite, the documentation, and checks of the source itself.
SHARED = ("integration", "peft_suite", "docs", "helpers", "workers")
OF_THE_SOURCE = {"tests/test_tree.py", "tests/test_words.py", "tests/test_docstrings.py"}
MOST_FILES = 16


def modules_of(package: str) -> list[Path]:
    """Modules with code of their own; `__init__` and `__main__` only hand on what others define."""
    paths = (path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    return sorted(path for path in paths if not path.name.startswith("__"))


def mirror_of(module: Path) -> Path:
    inside = module.relative_to("condft") if module.parts[0] == "condft" else module
    return Path("tests") / inside.with_name(f"test_{module.name}")


@pytest.mark.parametrize("module", [*modules_of("condft"), *modules_of("scripts")], ids=str)
def test_every_module_has_a_mirror_of_its_name(module: Path) -> None:
    assert (ROOT / mirror_of(module)).is_file(), f"{module} has no {mirror_of(module)}"


def test_every_test_file_has_a_module() -> None:
    mirrored = {mirror_of(module) for module in [*modules_of("condft"), *modules_of("scripts")]}
    found = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    strays = {path for path in found - mirrored if path.parts[1] not in SHARED and str(path) not in OF_THE_SOURCE}
    assert not strays


@pytest.mark.parametrize("root", ["condft", "scripts", "tests"])
def test_no_folder_is_crowded(root: str) -> None:
    folders = {path.parent for path in (ROOT / root).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


def test_the_package_root_holds_no_loose_modules() -> None:
    assert {path.name for path in (ROOT / "condft").glob("*.py")} <= {"__init__.py", "__main__.py", "report.py"}


def test_no_test_module_imports_from_another() -> None:
    lines = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "tests").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(("from ", "import ")) and (".test_" in line or "conftest" in line)
    ]
    assert lines == []
