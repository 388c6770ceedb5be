"""One rule says where the cache is, for every part of condft that keeps something there."""

from pathlib import Path

import pytest

from condft.analysis.cache import open_cache
from condft.files.cache_folder import cache_folder, caching_is_off


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")


@pytest.mark.parametrize(
    ("named", "user_cache", "folder", "off"),
    [
        ("/scratch/c", "/caches", "/scratch/c", False),
        ("~/c", None, "/home/someone/c", False),
        ("", "/caches", "/caches/condft", False),
        (None, "~/caches", "/home/someone/caches/condft", False),
        (None, "", "/home/someone/.cache/condft", False),
        ("off", None, "/home/someone/.cache/condft", True),
    ],
)
def test_the_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, named: str | None, user_cache: str | None, folder: str, off: bool
) -> None:
    for name, value in (("CONDFT_CACHE", named), ("XDG_CACHE_HOME", user_cache)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert (cache_folder(), caching_is_off()) == (Path(folder), off)
    reports = open_cache(True)
    assert (None if reports is None else reports.folder) == (None if off else Path(folder))
    given = open_cache("~/given")
    assert given is not None
    assert given.folder == Path("/home/someone/given")
