"""Tables show names as they are, and mark uncertain figures."""

import dataclasses

from condft import SpectralReport, select_units
from condft.cli.tables import print_comparison, print_report, print_selection
from condft.selection.compare import compare_reports
from tests.helpers.records.reports import make_row


def test_bounds_and_unresolved_figures_are_marked(capsys):
    rows = (
        dataclasses.replace(make_row("a.weight", 3e12), relative_error=0.5),
        dataclasses.replace(make_row("b.weight", 5e4), resolved=False),
    )
    print_report(SpectralReport(rows), lowest=2)
    output = capsys.readouterr().out
    assert "≥ 3e+12" in output
    assert "5e+04 *" in output
    assert "κ of 1 units is past what the precision resolves" in output


def test_names_that_look_like_markup_are_printed_unchanged(capsys):
    rows = tuple(make_row(f"m[{part}].weight", module_type=f"m[{part}]") for part in ("b", "/b"))
    found = SpectralReport(rows)
    print_report(found, lowest=2)
    print_selection(select_units(found), found)
    print_comparison(compare_reports(found, found))
    output = capsys.readouterr().out
    for part in ("b", "/b"):
        assert output.count(f" m[{part}] ") == 3
        assert output.count(f" m[{part}].weight ") == 1
