"""The prose that scripts/data/get_german.py keeps, and a real package made and read back."""

import gzip
import subprocess
from pathlib import Path

import pytest

from scripts.data.get_german import TEXT, read_package

PROSE = (
    "Ein Verzeichnisname wird in der Schrift einer\n    Schreibmaschine zwischen doppelten Zeichen dargestellt und "
    "ist damit\n    leicht von dem übrigen Text zu unterscheiden."
)


def test_a_package_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / TEXT).parent.mkdir(parents=True)
    (root / TEXT).write_bytes(gzip.compress(PROSE.encode()))
    (root / "DEBIAN").mkdir()
    control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: test\n"
    (root / "DEBIAN" / "control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "p.deb")], check=True, capture_output=True)
    assert read_package(tmp_path / "p.deb") == PROSE
    with pytest.raises(FileNotFoundError, match="apt-get download"):
        read_package(tmp_path / "none.deb")
    (tmp_path / "bad.deb").write_text("no archive")
    with pytest.raises(RuntimeError, match="dpkg-deb -x"):
        read_package(tmp_path / "bad.deb")
