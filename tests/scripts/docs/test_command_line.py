"""The page of the command line says what `--help` says."""

import re

import pytest
from typer.testing import CliRunner

from condft.cli.app import app
from scripts.docs.command_line import command_line_page, commands, parameters


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_the_help_is_on_the_page(name: str) -> None:
    shown = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, [name, "--help"]).output
    options = set(re.findall(r"^[^\w-]*(--[a-z][a-z-]+)", shown, re.MULTILINE)) - {"--help"}
    listed = {option for row in parameters(commands()[name]) for option in re.findall(r"--[a-z][a-z-]+", row[0])}
    assert listed == options
    assert f"## condft {name}" in command_line_page()


def test_choices_are_listed() -> None:
    rows = {row[0]: row for row in parameters(commands()["select"])}
    assert rows["`--order`"][1] == "`lowest`"
    assert "`lowest`, `highest`, `random`" in rows["`--order`"][2]
    assert "`router`" in rows["`--include-roles`"][2]
    assert rows["`REPORT`"][1] == "required"
