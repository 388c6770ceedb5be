"""Tables keep their width and their text in a log file."""

import pytest

from condft.runtime.console import console


def test_a_log_file_has_room_for_module_names_and_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    line = "model.layers.0[h3]: [red]" + 80 * "x" + ":smile:"
    console().print(line)
    assert capsys.readouterr().out == f"{line}\n"
    assert console().width >= 120
