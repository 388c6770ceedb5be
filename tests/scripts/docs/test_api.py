"""The API pages name everything that is exported, once."""

import condft
from scripts.docs.api import api_pages, exports


def test_every_exported_name_is_on_the_overview() -> None:
    overview = api_pages()["api.md"]
    missing = [
        f"{package}.{name}" for package in exports() for name in exports()[package] if f"`{name}`" not in overview
    ]
    assert missing == []
    assert set(condft.__all__) == set(exports()["condft"])


def test_every_object_is_described_once() -> None:
    blocks = [line for page in api_pages().values() for line in page.splitlines() if line.startswith("::: ")]
    assert len(blocks) == len(set(blocks))
    described = {block.rsplit(".", 1)[1] for block in blocks}
    assert described == {name for names in exports().values() for name in names}


def test_the_overview_says_what_the_examples_start_from() -> None:
    overview = api_pages()["api.md"]
    assert all(f"- `{name}`: " in overview for name in ("base", "tokenizer", "token_ids", "report"))
