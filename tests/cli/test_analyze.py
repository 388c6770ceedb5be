"""What `condft analyze` prints and writes."""

import csv
import json
import math

from peft import get_peft_model
from typer.testing import CliRunner

from condft import CondFTConfig, SpectralReport
from condft.cli.app import app
from tests.helpers.cli import invoke, refused


def test_analyze_prints_the_lowest_and_warns_that_they_are_shapes(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--lowest", "5", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "the 5 of lowest κ" in result.output
    output = " ".join(result.output.split())
    assert "warning: shape, not learning, explains" in output
    assert "between the 5 chosen of 29 weights" in output
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


def test_analyze_takes_the_functions_options(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    output = invoke("analyze", tmp_path, "--keep-lowest", 2, "--json", tmp_path / "r.json")
    report = SpectralReport.load(tmp_path / "r.json")
    assert f"ruled out without exact figures: {len(report.screened)} units" in output
    assert "give --keep-lowest too" in refused("analyze", tmp_path, "--stratify", "module_type")
    invoke(
        "analyze", tmp_path, "--granularity", "head", "--measures", "all", "--spectrum", "--csv", tmp_path / "r.csv"
    )
    with (tmp_path / "r.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert "model.layers.0.self_attn.q_proj.weight[h3]" in {row["name"] for row in rows}
    assert "spectrum" not in rows[0]
    assert float(rows[0]["entropy_deficit"]) >= 0.0


def test_rows_next_to_a_non_finite_weight_are_printed_and_written(tiny_llama, tmp_path):
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
