"""The error of a missing extra names the modules and the command."""

import sys

import pytest

from condft.runtime.extras import MissingExtraError, needs_extra


def test_without_the_modules_the_error_names_them_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(
        MissingExtraError, match=r"needs matplotlib, jiwer: pip install 'condft\[plots,speech\]'$"
    ) as raised:
        needs_extra("plots", "speech")
    assert raised.value.name == "matplotlib"
    assert isinstance(raised.value, ModuleNotFoundError)


def test_with_the_modules_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "soxr", raising=False)
    with needs_extra("speech"):
        assert "soxr" not in sys.modules
    with pytest.raises(KeyError):
        needs_extra("everything")
