"""Packages unpacked without being installed, and texts with or without gzip."""

import gzip
import subprocess
from pathlib import Path

import pytest

from scripts.data import debian
from scripts.data.debian import fetch_package, read_text, unpack


def test_a_text_is_read_with_and_without_gzip_and_bad_bytes_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe".encode() + b"\xff")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("Größe".encode()))
    assert read_text(tmp_path / "a.txt") == "Größe\ufffd"
    assert read_text(tmp_path / "b.txt.gz") == "Größe"


def test_a_real_package_is_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr").mkdir()
    (root / "usr" / "file").write_text("content")
    control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: test\n"
    (root / "DEBIAN" / "control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "p.deb")], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "p.deb", tmp_path / "out")
    assert (tmp_path / "out" / "usr" / "file").read_text() == "content"
    with pytest.raises(FileNotFoundError, match="apt-get download"):
        unpack(tmp_path / "none.deb", tmp_path / "out")


def test_a_package_is_fetched_by_apt_and_its_error_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(command: list[str], folder: str) -> None:
        assert command == ["apt-get", "download", "some-doc"]
        (Path(folder) / "some-doc_1_all.deb").write_text("")

    monkeypatch.setattr(debian, "_call", call)
    assert fetch_package("some-doc", tmp_path).name == "some-doc_1_all.deb"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"ls --no-such-option ended with \d+: .+"):
        debian._call(["ls", "--no-such-option"], str(tmp_path))
