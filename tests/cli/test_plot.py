"""What `condft plot` draws."""

from tests.helpers.cli import invoke, refused


def test_plot(report_file, tmp_path):
    invoke("plot", report_file, tmp_path / "k.svg")
    invoke("plot", report_file, tmp_path / "s.svg", "--spectra", "*.0.self_attn.*")
    assert "matches none of the report's 29 units" in refused(
        "plot", report_file, tmp_path / "n.svg", "--spectra", "zz"
    )
