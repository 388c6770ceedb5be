"""Pieces of the generated pages."""

from scripts.docs.markdown import first_sentence, prose_of, table


def test_the_first_sentence_ends_at_its_full_stop() -> None:
    assert first_sentence("One weight\nof a model. More later.\n\nArgs:\n    x: y.") == "One weight of a model."


def test_a_number_does_not_end_a_sentence() -> None:
    assert first_sentence("Accurate to 1.5 units, e.g. of a row") == "Accurate to 1.5 units, e.g. of a row."


def test_no_docstring_is_no_error() -> None:
    assert first_sentence(None) == "."


def test_a_cell_cannot_break_its_table() -> None:
    assert table(["a"], [["x | y\nz"]]).splitlines() == ["| a |", "| --- |", "| x \\| y z |"]


def test_a_double_bar_of_a_formula_survives_a_table() -> None:
    assert table(["a"], [[r"$\|x\|$"]]).splitlines()[-1] == r"| $\Vert x\Vert $ |"


def test_prose_ends_at_the_first_section_or_example() -> None:
    assert prose_of("Adds.\n\nTwo\nlines.\n\nArgs:\n    x: y.") == "Adds.\n\nTwo lines."
    assert prose_of("Adds.\n\n>>> add(1)\n2") == "Adds."
