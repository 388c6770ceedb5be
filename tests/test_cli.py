"""The command line prints what the functions return, and turns mendable errors into one line."""

from typer.testing import CliRunner

from condft.cli import app


def test_analyze_prints_the_lowest_and_warns_that_they_are_shapes(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--lowest", "5", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "the 5 of lowest κ" in result.output
    told = " ".join(result.output.split())
    assert "warning: shape, not learning, explains" in told
    assert "between the 5 chosen of 29 weights" in told
    assert (tmp_path / "r.json").is_file()


def test_analyze_without_a_ranking_warns_of_nothing(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--lowest", "0"])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["analyze", str(tmp_path)])
    assert result.exit_code == 1
    assert "it has no config.json" in result.output
    assert "Traceback" not in result.output
