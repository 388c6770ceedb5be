"""English prose out of documentation: markup goes, whole documents are held out, nothing of them is trained on."""

import gzip
from pathlib import Path

from scripts.data.get_english import documents, joined, split_documents

SENTENCE = "This is the number {} of the sentences that are long enough to be taken for prose in the test."


def test_documents_are_found_in_a_package(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "share"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(SENTENCE.format(1) + "\n\n$ ls\n")
    (folder / "b.info.gz").write_bytes(gzip.compress(SENTENCE.format(2).encode()))
    (folder / "c.png").write_bytes(b"\x89PNG")
    german = folder / "doc" / "debian-handbook" / "html" / "de-DE"
    german.mkdir(parents=True)
    (german / "a.html").write_text(f"<p>{SENTENCE.format(3)}</p>")
    assert list(documents("p", tmp_path)) == [
        ("p/usr/share/a.txt", SENTENCE.format(1)),
        ("p/usr/share/b.info.gz", SENTENCE.format(2)),
    ]


def test_held_out_documents_share_no_paragraph_with_the_others() -> None:
    found = [(f"p/{i}", f"{SENTENCE.format(i)}\n\n{SENTENCE.format(i // 2)}") for i in range(400)]
    split = split_documents(found)
    train, held_out = set(split.train.split("\n\n")), set(split.held_out.split("\n\n"))
    assert not train & held_out
    assert train | held_out == {SENTENCE.format(i) for i in range(400)}
    assert 0 < len(held_out) < len(train) / 10
    assert len(split.train.split("\n\n")) == len(train)
    assert split_documents(found) == split


def test_joined_documents_have_every_paragraph_once() -> None:
    assert joined([("a", "One.\n\nTwo."), ("b", "Two.\n\nThree.")]) == "One.\n\nTwo.\n\nThree."
