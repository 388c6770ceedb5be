"""Every name of the documented API has an example in its docstring, and every example of the package runs.

Examples start from what `namespace` holds (docs/reference/api.md says so): a tiny Llama called `base`, a tokenizer,
`token_ids`, and a `report` of the base. They run in an empty folder; those of speech and training in a folder with two
tiny checkpoints (`whisper`, `llama`), clips (`clips/manifest.jsonl`) and the configuration of a run (`run.yaml`).
"""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import condft
from condft import analyze
from tests.helpers.isolation import alone  # noqa: F401  (autouse)
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_speech import fill_example_folder

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FOUND = sorted(pkgutil.walk_packages(condft.__path__, "condft."), key=lambda info: info.name)
MODULES = [info.name for info in FOUND if "__main__" not in info.name]
# Modules that need a package which is not always installed.
NEEDS = {"condft.training.engines.deepspeed": "deepspeed"}
# Modules whose examples start from checkpoints, clips and a configuration.
WITH_FILES = ("condft.recipe", "condft.tasks", "condft.training")


def exports() -> list[tuple[str, str]]:
    """(package, name) of everything that condft and its packages export."""
    packages = [condft, *(importlib.import_module(info.name) for info in FOUND if info.ispkg)]
    return [(package.__name__, name) for package in packages for name in getattr(package, "__all__", ())]


@pytest.fixture
def namespace(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    base = build_tiny_llama()
    token_ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"base": base, "tokenizer": tokenizer, "token_ids": token_ids, "report": analyze(base, progress=False)}


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    fill_example_folder(folder)
    return folder


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module's examples find in their folder. Speech features are cached there too."""
    if request.getfixturevalue("name").startswith(WITH_FILES):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for path in request.getfixturevalue("example_folder").iterdir():
            (tmp_path / path.name).symlink_to(path)


@pytest.mark.parametrize(("package", "name"), exports())
def test_an_exported_name_has_an_example(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    assert inspect.isclass(value) or callable(value), f"{package}.{name} is no class and no function"
    assert ">>> " in (value.__doc__ or ""), f"{package}.{name} has no example in its docstring"


@pytest.mark.parametrize("name", ["condft", *MODULES])
@pytest.mark.usefixtures("files")
def test_examples_run(name: str, namespace: dict[str, Any]) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module: ModuleType = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    output: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=dict(namespace)):
        example.globs["base"] = build_tiny_llama()  # the example before may have put an adapter on it
        runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)
