"""Markdown tables and the ways to write a figure."""

import math

import numpy as np
import pytest

from scripts.research.tables import rows_of_cells, spread, table, with_interval


def test_a_table_has_a_head_a_rule_and_rows() -> None:
    assert table(["a", "b"], [["1", ""], ["2", "3"]]) == ["| a | b |", "| --- | --- |", "| 1 |  |", "| 2 | 3 |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        table(["a", "b"], [["1"]])


def test_rows_without_content_are_left_out() -> None:
    assert rows_of_cells({"a": ["", "1"], "b": ["", ""]}) == [["a", "", "1"]]


def test_an_interval_is_written_where_there_is_one() -> None:
    assert with_interval(0.126, 0.1, 0.2) == "0.13 [0.10, 0.20]"
    assert with_interval(0.126, math.nan, math.nan, digits=1) == "0.1"


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert spread(np.array([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"
    assert spread(np.array([30.0, 1.0]), "{:.3g}") == "15.5 (1 to 30)"
