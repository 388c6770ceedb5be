"""Errors that a user can fix are one line, and paths of pictures are checked first."""

import errno

import pytest
import typer

from condft.cli.errors import UserErrors
from tests.helpers.cli import refused


def test_a_picture_without_suffix_is_refused_before_the_work_begins(tiny_llama, report_file, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("condft.analysis.analyze.analyze", lambda *_, **__: pytest.fail("the analysis began"))
    (tmp_path / "old").write_text("precious")
    for command in (["analyze", tmp_path / "model"], ["compare", report_file, tmp_path / "model"]):
        assert "such as .png" in refused(*command, "--plot", tmp_path / "old")
    assert "such as .png" in refused("plot", report_file, tmp_path / "old")
    out = tmp_path / "names.json"
    assert "such as .png" in refused("select", report_file, "--out", out, "--plot", tmp_path / "old")
    assert not out.exists()
    assert (tmp_path / "old").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no such unit")])
def test_what_a_user_can_fix_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, UserErrors():
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"condft: {error}\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), KeyError("a bug")])  # typer's to end on, and ours to see
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), UserErrors():
        raise error
