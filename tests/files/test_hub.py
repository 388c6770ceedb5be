"""What the hub raises becomes one error that names what was given and the way out."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from condft.files.hub import hub_errors

# What the error reads of an HTTP response.
_NOT_FOUND: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network and not in the cache"),
        RepositoryNotFoundError("404", response=_NOT_FOUND),
        ConnectionError("refused"),
    ],
)
def test_what_cannot_be_had_is_a_missing_file_with_the_way_out(error: Exception) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"^x is no file, and y cannot be had: .* Use z\.$") as raised,
        hub_errors("x is no file", wanted="y", way_out="Use z."),
    ):
        raise error
    assert raised.value.__cause__ is error


def test_a_name_that_is_no_hub_id_is_reported_as_such() -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"^x is no file, and no hub id either: bad name$"),
        hub_errors("x is no file"),
    ):
        raise HFValidationError("bad name")


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), hub_errors("x"):
        raise PermissionError("the cache cannot be written")
