"""The commands there are, and what holds for every one."""

import pytest
from typer.testing import CliRunner

from condft.cli import main
from condft.cli.app import app
from tests.helpers.cli import invoke, refused
from tests.helpers.models.tiny_checkpoints import build


def test_folders_in_place_of_files_are_one_line(report_file, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder" in refused("select", folder)
    assert f"{folder} is a folder" in refused("select", report_file, "--out", folder)
    assert f"{folder} is a folder" in refused("analyze", tmp_path / "model", "--json", folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["x[/b]", "v[base]"])
def test_paths_that_look_like_markup_are_printed_unchanged(name, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(name)
    assert f"{name}: κ by module type" in invoke("analyze", name, "--json", "r.json")
    assert f"{name}: chosen by" in invoke("select", "r.json", "--num-tensors", 2)
    assert f"{name} -> {name}: median" in invoke("compare", "r.json", "r.json")


def test_files_are_written_before_tables_are_printed(report_file, tmp_path, monkeypatch):
    """A pipe that closes early, such as `| head`, must not cost the report."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("condft.cli.tables.console", closed)
    for arguments in (
        ["analyze", tmp_path / "model", "--json"],
        ["select", report_file, "--out"],
        ["compare", report_file, report_file, "--json"],
    ):
        written = tmp_path / f"{arguments[0]}.json"
        if arguments[0] == "analyze":
            build("LlamaForCausalLM").save_pretrained(arguments[1])
        assert CliRunner().invoke(app, [str(argument) for argument in (*arguments, written)]).exit_code == 1
        assert written.is_file()


def test_every_command_is_registered_and_says_what_it_does():
    output = invoke("--help")
    for command in ("analyze", "select", "compare", "plot", "train", "evaluate"):
        assert command in output
        assert "Usage" in invoke(command, "--help")


def test_the_exit_code_is_returned(report_file, tmp_path, capsys):
    assert main(["plot", str(report_file), str(tmp_path / "k.svg")]) == 0
    assert main(["plot", str(tmp_path / "nowhere.json"), str(tmp_path / "k.svg")]) == 1
    assert main(["no-such-command"]) == 2
    assert "Traceback" not in capsys.readouterr().err
