"""Every snippet and shell command of README and docs runs as printed, and prints what the page shows.

The blocks of a page run in order, the Python ones in one namespace, in a folder with tiny real models and data of the
names that pages use. `tests/helpers/docs/pages.py` lists the comments by which a page marks a block as slow or as
needing something; `pytest -m slow tests/docs` runs the slow ones.
"""

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from condft import CondFTConfig
from condft.training import RunConfig, load_config
from tests.helpers.docs.pages import NEEDS, Block, blocks_of, pages
from tests.helpers.docs.reader import furnish, put_model_of_real_size, run_block
from tests.helpers.isolation import alone  # noqa: F401  (autouse)
from tests.helpers.processes import ROOT

RUN = ("python", "bash")
OF_REAL_SIZE = {ROOT / "README.md"}  # its output counts the parameters of the real model
BLOCKS = {page: blocks_of(page) for page in pages()}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(wanted: Callable[[Block], bool]) -> list[Path]:
    return [
        page for page, blocks in BLOCKS.items() if any(block.language in RUN and wanted(block) for block in blocks)
    ]


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    return folder


@pytest.fixture
def folder(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(furnished, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


def run_page(page: Path, folder: Path, *, slow: bool) -> None:
    if page in OF_REAL_SIZE:
        put_model_of_real_size(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.language in RUN and not block.unmet_need and (slow or block.mark != "slow"):
            run_block(block, namespace, folder, in_process=not slow)


@pytest.mark.parametrize("page", pages_with(lambda block: block.mark != "slow" and not block.unmet_need), ids=name_of)
def test_a_page_runs(page: Path, folder: Path) -> None:
    run_page(page, folder, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", pages_with(lambda block: block.mark == "slow"), ids=name_of)
def test_a_page_runs_with_its_slow_blocks(page: Path, folder: Path) -> None:
    run_page(page, folder, slow=True)


@pytest.mark.parametrize(
    "block",
    [block for blocks in BLOCKS.values() for block in blocks if block.language in RUN and "needs: " in block.mark],
    ids=lambda block: block.place,
)
def test_what_a_block_needs_is_known_and_its_files_exist(block: Block) -> None:
    assert block.mark.removeprefix("needs: ") in NEEDS
    files = re.findall(r"(?<![\w/])(?:configs|scripts)/[\w./-]+\.\w+", block.code)
    modules = re.findall(r"python -m (scripts[\w.]*)", block.code)
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    if block.unmet_need:
        pytest.skip(f"needs {block.unmet_need}: {block.code.splitlines()[0]}")


@pytest.mark.parametrize(
    "block",
    [block for blocks in BLOCKS.values() for block in blocks if block.language == "yaml"],
    ids=lambda block: block.place,
)
def test_yaml_is_of_a_run(block: Block, tmp_path: Path) -> None:
    """Sections of a run's YAML are valid where they replace those of the quickstart's."""
    shown = yaml.safe_load(block.code)
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert set(shown) <= set(RunConfig.model_fields), f"{block.place} has no sections of a run's YAML"
    path = tmp_path / "run.yaml"
    lines = [yaml.safe_dump({key: value}) for key, value in content.items() if key not in shown]
    path.write_text("".join(lines) + block.code, encoding="utf-8")
    CondFTConfig(**load_config(path).tuning)
