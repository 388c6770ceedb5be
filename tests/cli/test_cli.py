"""The command line prints what the functions return, and turns mendable errors into one line."""

import csv
import dataclasses
import errno
import json
import math
import re

import pytest
import typer
import yaml
from peft import get_peft_model
from typer.testing import CliRunner

from condft import CondFTConfig, SpectralReport, analyze, select_units
from condft.cli.app import app
from condft.cli.errors import UserErrors
from condft.cli.tables import print_comparison, print_report, print_selection
from condft.selection.compare import compare_reports
from tests.helpers.reports import make_row
from tests.helpers.tiny_checkpoints import build


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


@pytest.fixture
def report_file(tiny_llama, tmp_path):
    analyze(tiny_llama(), spectrum=True, progress=False).save(tmp_path / "report.json")
    return tmp_path / "report.json"


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    return " ".join(result.output.split())


def test_analyze_takes_the_functions_options(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    told = invoke("analyze", tmp_path, "--keep-lowest", 2, "--json", tmp_path / "r.json")
    report = SpectralReport.load(tmp_path / "r.json")
    assert f"ruled out without exact figures: {len(report.screened)} units" in told
    assert "give --keep-lowest too" in refused("analyze", tmp_path, "--stratify", "module_type")
    invoke(
        "analyze", tmp_path, "--granularity", "head", "--measures", "all", "--spectrum", "--csv", tmp_path / "r.csv"
    )
    with (tmp_path / "r.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert "model.layers.0.self_attn.q_proj.weight[h3]" in {row["name"] for row in rows}
    assert "spectrum" not in rows[0]
    assert float(rows[0]["entropy_deficit"]) >= 0.0


def test_select_takes_no_more_than_keep_lowest_kept(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    invoke("analyze", tmp_path, "--keep-lowest", 5, "--json", tmp_path / "r.json")
    invoke("select", tmp_path / "r.json", "--stratify", "none", "--num-tensors", 2)
    beyond = ("select", tmp_path / "r.json", "--stratify", "none", "--num-tensors", 6)
    assert "only 4 candidates: analyze with keep_lowest of at least 7" in refused(*beyond)
    assert "only 5 candidates: analyze with keep_lowest of at least 6" in refused(
        *beyond, "--include-roles", "embedding"
    )


def test_rows_beside_a_non_finite_weight_are_printed_and_written(tiny_llama, tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    paths = [tmp_path / name for name in ("r.json", "r.csv", "k.png")]
    result = CliRunner().invoke(
        app,
        [
            "analyze",
            str(tmp_path),
            "--fisher",
            "--json",
            str(paths[0]),
            "--csv",
            str(paths[1]),
            "--plot",
            str(paths[2]),
        ],
    )
    assert result.exit_code == 1
    assert "NaN or infinity in 1 of 29 weights: model.layers.1.mlp.up_proj.weight" in result.stderr
    assert "`.report`" not in result.stderr
    assert "the 10 of lowest κ" in result.stdout
    assert len(SpectralReport.load(paths[0]).rows) == 28
    assert all(path.stat().st_size for path in paths)


def test_fisher_information_is_measured_and_chosen_by(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    invoke("analyze", tmp_path, "--fisher", "--json", tmp_path / "r.json")
    assert all(row.fisher_information > 0 for row in SpectralReport.load(tmp_path / "r.json").rows)
    score = ("--score", "fisher_information", "--trainable-fraction", 0.25)
    invoke("select", tmp_path / "r.json", *score, "--out", tmp_path / "s.json")
    config = CondFTConfig(score="fisher_information", trainable_fraction=0.25)
    get_peft_model(tiny_llama(), config)
    assert json.loads((tmp_path / "s.json").read_text())["target_units"] == config.target_units
    invoke("analyze", tmp_path, "--json", tmp_path / "r.json")
    assert "condft.add_fisher_information" in refused("select", tmp_path / "r.json", *score)


def test_bounds_and_unresolved_figures_are_marked(capsys):
    rows = (
        dataclasses.replace(make_row("a.weight", 3e12), relative_error=0.5),
        dataclasses.replace(make_row("b.weight", 5e4), resolved=False),
    )
    print_report(SpectralReport(rows), lowest=2)
    told = capsys.readouterr().out
    assert "≥ 3e+12" in told
    assert "5e+04 *" in told
    assert "κ of 1 units is past what the precision resolves" in told


def test_a_selection_becomes_a_config(report_file, tmp_path, tiny_llama):
    told = invoke(
        "select", report_file, "--num-tensors", 7, "--out", tmp_path / "names.json", "--plot", tmp_path / "p.png"
    )
    assert "7 of 28 units" in told
    chosen = json.loads((tmp_path / "names.json").read_text())
    model = get_peft_model(tiny_llama(), CondFTConfig(target_units=chosen["target_units"]))
    assert sum(p.requires_grad for p in model.parameters()) == 7
    assert chosen["report_fingerprint"] == SpectralReport.load(report_file).fingerprint
    assert (tmp_path / "p.png").stat().st_size > 0


def test_experts_are_candidates_as_everywhere(tmp_path):
    report = analyze(build("MixtralForCausalLM"), progress=False)
    report.save(tmp_path / "r.json")
    invoke("select", tmp_path / "r.json", "--num-tensors", 6, "--out", tmp_path / "s.json")
    chosen = json.loads((tmp_path / "s.json").read_text())["target_units"]
    assert chosen == list(select_units(report, num_tensors=6).names)
    assert any("experts" in name for name in chosen)


def test_folders_in_place_of_files_are_one_line(report_file, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder" in refused("select", folder)
    assert f"{folder} is a folder" in refused("select", report_file, "--out", folder)
    assert f"{folder} is a folder" in refused("analyze", tmp_path / "model", "--json", folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["x[/b]", "v[base]"])
def test_paths_that_look_like_markup_are_printed_as_they_stand(name, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(name)
    assert f"{name}: κ by module type" in invoke("analyze", name, "--json", "r.json")
    assert f"{name}: chosen by" in invoke("select", "r.json", "--num-tensors", 2)
    assert f"{name} -> {name}: median" in invoke("compare", "r.json", "r.json")


def test_names_that_look_like_markup_are_printed_as_they_stand(capsys):
    rows = tuple(make_row(f"m[{part}].weight", module_type=f"m[{part}]") for part in ("b", "/b"))
    found = SpectralReport(rows)
    print_report(found, lowest=2)
    print_selection(select_units(found), found)
    print_comparison(compare_reports(found, found))
    told = capsys.readouterr().out
    for part in ("b", "/b"):
        assert told.count(f" m[{part}] ") == 3
        assert told.count(f" m[{part}].weight ") == 1


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


def test_unfrozen_parameters_name_the_chosen_parameters_only(report_file, tmp_path, tiny_llama):
    invoke("select", report_file, "--num-tensors", 7, "--yaml", tmp_path / "u.yaml", "--out", tmp_path / "n.json")
    patterns = yaml.safe_load((tmp_path / "u.yaml").read_text())["unfrozen_parameters"]
    chosen = json.loads((tmp_path / "n.json").read_text())["target_units"]
    names = [name for name, _ in tiny_llama().named_parameters()]
    for read in (lambda p: p, lambda p: p.replace(".", "\\.")):  # Spectrum's readers, and axolotl's LayerNamePattern
        matched = [name for name in names if any(re.match(read(pattern), name) for pattern in patterns)]
        assert sorted(matched) == chosen


def test_parts_of_parameters_cannot_be_unfrozen_parameters(tiny_llama, tmp_path):
    analyze(tiny_llama(), granularity="head", progress=False).save(tmp_path / "h.json")
    told = refused(
        "select", tmp_path / "h.json", "--stratify", "none", "--num-tensors", 30, "--yaml", tmp_path / "u.yaml"
    )
    assert "parts of a parameter" in told
    assert "CondFTConfig(target_units=...)" in told
    assert not (tmp_path / "u.yaml").exists()


def test_compare(report_file, tiny_llama, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    told = invoke(
        "compare", report_file, tmp_path / "other", "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png"
    )
    assert "median change" in told
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["overall"]["num_changed"] == found["overall"]["num_units"] == 29
    assert -1 < found["overall"]["spearman"] < 1
    assert (tmp_path / "c.png").stat().st_size > 0


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


def test_plot(report_file, tmp_path):
    invoke("plot", report_file, tmp_path / "k.svg")
    invoke("plot", report_file, tmp_path / "s.svg", "--spectra", "*.0.self_attn.*")
    assert "matches none of the report's 29 units" in refused(
        "plot", report_file, tmp_path / "n.svg", "--spectra", "zz"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no such unit")])
def test_what_a_user_can_mend_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, UserErrors():
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"condft: {error}\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), KeyError("a bug")])  # typer's to end on, and ours to see
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), UserErrors():
        raise error
