"""Configurations that come with condft are found by name, in a checkout and in an installed wheel."""

from pathlib import Path

import pytest

import condft
from condft.recipe.shipped import find_config, shipped_configs
from condft.training import load_config
from tests.helpers.processes import ROOT


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_is_valid(name: str) -> None:
    assert find_config(name) == find_config(name.removesuffix(".yaml")) == ROOT / "configs" / name
    assert load_config(find_config(name)).output_dir == f"runs/{name.removesuffix('.yaml')}"


def test_a_file_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart.yaml") == ROOT / "configs" / "quickstart.yaml"
    Path("quickstart.yaml").write_text("mine")
    assert find_config("quickstart.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", ["nowhere.yaml", "", "../pyproject", "study", "accelerate/ddp.yaml"])
def test_other_names_are_refused_with_the_shipped_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no shipped configuration; shipped are quickstart\.yaml, "):
        find_config(name)


@pytest.mark.parametrize("with_init", [False, True])
def test_an_installed_wheel_has_them_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_init: bool
) -> None:
    folder = tmp_path / "condft" / "configs"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("seed: 1")
    if with_init:
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(condft, "__path__", [*condft.__path__, str(tmp_path / "condft")])
    assert shipped_configs() == ["mine.yaml"]
    assert find_config("mine") == folder / "mine.yaml"
