"""`condft train` and `scripts/train.py` are one command: the same arguments give the same run."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from condft.training import RunConfig, load_config
from tests.helpers.cli import invoke, refused
from tests.helpers.processes import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
Call = tuple[RunConfig, dict[str, bool]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the command asks of the recipe, which does not run."""
    made: list[Call] = []
    monkeypatch.setattr("condft.recipe.run", lambda config, **options: made.append((config, options)))
    return made


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        (str(QUICKSTART), "training.steps=7"),
        ("--config", str(QUICKSTART), "training.steps=7"),
        ("training.steps=7", "--config", str(QUICKSTART)),
        ("quickstart.yaml", "training.steps=7"),
        ("--config", "quickstart", "training.steps=7"),
    ],
)
def test_the_config_is_the_first_argument_or_an_option(
    arguments: tuple[str, ...], calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("train", *arguments)
    assert script(monkeypatch, *arguments) == 0
    expected = (load_config(QUICKSTART, ["training.steps=7"]), {"resume": False, "overwrite": False, "cpu": False})
    assert calls == [expected, expected]


@pytest.mark.parametrize("option", ["--resume", "--overwrite", "--cpu"])
def test_each_option_reaches_the_recipe(option: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("train", QUICKSTART, option)
    assert script(monkeypatch, option, str(QUICKSTART)) == 0
    for _, options in calls:
        assert [f"--{name}" for name, value in options.items() if value] == [option]
    assert len(calls) == 2


def test_skip_bad_is_a_setting_of_the_run(calls: list[Call]) -> None:
    invoke("train", QUICKSTART, "--skip-bad")
    assert [config.data.skip_bad for config, _ in calls] == [True]


def test_a_path_with_an_equals_sign_is_a_config(calls: list[Call], tmp_path: Path) -> None:
    path = tmp_path / "seed=1.yaml"
    path.write_text(QUICKSTART.read_text())
    invoke("train", path)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no configuration: give the path of a YAML, or the name of a shipped one (quickstart.yaml, "),
        (("training.steps=7",), "no configuration"),
        (("nowhere.yaml",), "nowhere.yaml is no file and no shipped configuration; shipped are quickstart.yaml, "),
        (("--config", "a.yaml", "b.yaml"), "two configurations: --config a.yaml and b.yaml"),
        ((str(QUICKSTART), "training.stepz=1"), "did you mean 'training.steps'"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused("train", *arguments)
    assert script(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err
    assert calls == []
