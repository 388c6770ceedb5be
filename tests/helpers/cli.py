"""Runs the command line in this process."""

from typer.testing import CliRunner

from condft.cli.app import app


def invoke(*arguments: object) -> str:
    """The output of a command that succeeds, its white space made single blanks."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: object) -> str:
    """The output of a command that ends with 1, without a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.split())
