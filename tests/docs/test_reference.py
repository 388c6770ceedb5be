"""The reference names everything that exists, and quotes only what the code says."""

import ast
import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest

from condft.report import ScreenedUnit, SkippedWeight, SkipReason, SpectralRow
from condft.training import RunConfig
from condft.training.output_dir import RUN_CONTENT
from condft.tuner import CondFTConfig
from scripts.docs.api import exports
from scripts.docs.command_line import commands, parameters
from scripts.docs.options import rows_of
from tests.helpers.processes import ROOT

REFERENCE = ROOT / "docs" / "reference"
EVERYTHING = "".join(path.read_text(encoding="utf-8") for path in sorted(REFERENCE.rglob("*.md")))
SOURCES = [path for folder in ("condft", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
GAP = "…"
# What PEFT, transformers and torch say themselves.
FOREIGN = {"KeyError: 'CONDFT'", "UnpicklingError"}


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def text_of(node: ast.AST) -> str | None:
    """A string literal as one text, with a gap where an f-string fills something in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or GAP) + (text_of(node.right) or GAP)
    return None


def literals() -> list[str]:
    """Every string that the package holds, docstrings left out."""
    found: list[str] = []
    for path in (ROOT / "condft").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [text for node in ast.walk(tree) if id(node) not in docstrings and (text := text_of(node))]
    return found


def quotes() -> list[str]:
    """The messages of the errors page: first cell of each row, what is in backticks."""
    return re.findall(r"^\| `([^`]+)`", page("errors.md"), re.MULTILINE)


LITERALS = literals()


@pytest.mark.parametrize("quote", sorted(set(quotes()) - FOREIGN))
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    parts = [re.escape(part.strip()) for part in quote.split(GAP) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in LITERALS), f"no message of condft says {quote!r}: correct errors.md"


def test_every_argument_of_the_config_is_described() -> None:
    names = [field.name for field in dataclasses.fields(CondFTConfig)]
    assert [name for name in names if f"`{name}`" not in page("config.md")] == []


def test_every_field_of_a_run_is_described() -> None:
    names = [*RunConfig.model_fields, *(row[0].strip("`") for row in rows_of(RunConfig, ""))]
    assert [name for name in names if f"`{name}" not in page("yaml.md")] == []


def test_every_option_is_described() -> None:
    options = [row[0] for command in commands().values() for row in parameters(command)]
    assert [option for option in options if option not in page("command-line.md")] == []


def test_every_exported_name_is_described() -> None:
    names = {name for package in exports().values() for name in package}
    assert [name for name in sorted(names) if f"`{name}`" not in EVERYTHING] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert [name for name in pages if f" {name}\n" not in navigation] == []


def test_git_holds_the_pictures_that_a_page_shows_and_no_others() -> None:
    """The others are redrawn by the `report` commands of the studies."""
    shown = {
        (path.parent / target).resolve()
        for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    }
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "docs/*.png", "docs/*.svg"], capture_output=True, text=True
    )
    assert [name for name in listed.stdout.split() if (ROOT / name).resolve() not in shown] == []


def test_every_field_and_file_of_the_results_is_described() -> None:
    fields = [field.name for kind in (SpectralRow, SkippedWeight, ScreenedUnit) for field in dataclasses.fields(kind)]
    names = [*fields, *(reason.value for reason in SkipReason)]
    assert [name for name in names if f"`{name}`" not in page("files.md")] == []
    assert [name for name in RUN_CONTENT if f"`{name}" not in page("files.md")] == []


def test_every_key_of_a_summary_is_described() -> None:
    tree = ast.parse((ROOT / "condft" / "recipe" / "summary.py").read_text(encoding="utf-8"))
    found = [key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys]
    keys = [key.value for key in found if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    assert len(keys) > 20
    assert [key for key in keys if f"`{key}`" not in page("files.md")] == []


def test_every_key_of_the_metrics_is_described() -> None:
    lines = (ROOT / "docs" / "results" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert [key for key in sorted(keys) if f"`{key}`" not in page("files.md")] == []


def test_every_environment_variable_is_described() -> None:
    asked = re.compile(r"environ(?:\.get\(|\.setdefault\(|\[)\s*\"([A-Z_]+)\"")
    names = {name for path in SOURCES for name in asked.findall(path.read_text(encoding="utf-8"))}
    assert names >= {"CONDFT_CACHE", "XDG_CACHE_HOME"}
    assert [name for name in sorted(names) if f"`{name}`" not in page("environment.md")] == []


def test_every_test_that_needs_a_gpu_is_listed() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    names = [str(path.relative_to(ROOT)) for path in marked if path != Path(__file__)]
    assert [name for name in sorted(names) if f"`{name}`" not in page("gpu-tests.md")] == []


def test_every_launch_file_is_listed() -> None:
    files = [path.name for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))]
    assert [name for name in files if f"`{name}`" not in page("engines.md")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:condft|scripts|tests|configs|docs/results)/[\w./-]*\.\w+)`", text)
    not_yet = {"docs/results/gpu.json"}  # no GPU was at hand
    assert [name for name in named if name not in not_yet and not (ROOT / name).exists()] == []
