"""The committed reference pages are what the code says now."""

from pathlib import Path

import pytest

from scripts.docs.reference import FOLDER, pages, write_pages


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_committed_page_is_up_to_date(name: str) -> None:
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == pages()[name], "run: python -m scripts.docs.reference"


def test_no_page_of_a_package_that_is_gone_is_left() -> None:
    assert {f"api/{path.name}" for path in (FOLDER / "api").glob("*.md")} == {
        n for n in pages() if n.startswith("api/")
    }


def test_a_stale_page_is_removed_and_a_foreign_one_stays(tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "condft.gone.md").write_text("old", encoding="utf-8")
    (tmp_path / "files.md").write_text("by hand", encoding="utf-8")
    written = write_pages(tmp_path)
    assert not (tmp_path / "api" / "condft.gone.md").exists()
    assert (tmp_path / "files.md").read_text(encoding="utf-8") == "by hand"
    assert all(path.is_file() for path in written)
